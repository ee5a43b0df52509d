"""SEED-Bench 1 (arXiv 2307.16125; CC BY-NC 4.0): multiple choice in twelve types, nine of pictures, three of videos.

LLaVA compares the answer with the letter as it stands and asks about a video on its middle frame. Its 58.6 is the
accuracy over pictures *and* videos, 66.1 that over pictures: they are two benchmarks here, ``seed`` and ``seed-image``.
The benchmark's own metric, which ranks the options by likelihood, is another number and not here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from visiontrim.evaluate.benchmarks.base import (
    LETTER,
    Benchmark,
    Breakdown,
    Files,
    save_lines,
    share,
    shares,
    with_options,
)
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.records import Record, read_lines, read_object

QUESTIONS = "llava-seed-bench.jsonl"
LABELS = "SEED-Bench.json"
FRAMES = "SEED-Bench-video-image"
QUESTIONS_IN_ALL = 19_242
OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")


class SEED(Benchmark):
    folders = ("seed_bench", "seed")
    where = (
        f"{QUESTIONS} comes with LLaVA's eval.zip, {LABELS} and SEED-Bench-image with the SEED-Bench download page, "
        f"{FRAMES} with LLaVA's extract_video_frames.py"
    )
    checked = "image accuracy 68.2 of LLaVA-1.5-13B's published answers, restated independently"
    licence = "CC BY-NC 4.0"
    upload = ".jsonl"
    missing_is_wrong = True

    def __init__(self, images_only: bool = False) -> None:
        self.images_only = images_only
        self.name = "seed-image" if images_only else "seed"
        self.title = "SEED-Bench, images" if images_only else "SEED-Bench, images and videos"
        self.metric = "image accuracy" if images_only else "image + video accuracy"
        self.papers = (
            "some print it as SEED-I (66.1 for LLaVA-1.5-7B)"
            if images_only
            else "accuracy in % over images and videos (58.6 for LLaVA-1.5-7B)"
        )

    def read(self, files: Files) -> list[Item]:
        path = files.need(LABELS)
        record = Record(read_object(path), str(path))
        names = {str(number): name for name, number in record.one("question_type").fields.items()}
        labels = record.many("questions")
        asked = files.find(QUESTIONS)
        if asked is None:
            items = [_item(None, label, place, _picture(label, files), names) for place, label in enumerate(labels)]
        else:
            waiting: dict[str, list[tuple[int, Record]]] = defaultdict(list)
            for place, label in enumerate(labels):
                waiting[label.text("question_id")].append((place, label))
            items = []
            for row in read_lines(asked):
                place, label = _matching(row, waiting, path)
                items.append(_item(row, label, place, files.picture(row.text("image")), names))
        return [item for item in items if item.facts["kind"] == "image"] if self.images_only else items

    def parse(self, item: Item, text: str) -> str:
        return text

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        right = [self.right(item, text) for item, text in zip(items, texts, strict=True)]
        kinds = [item.facts["kind"] for item in items]
        order = sorted({item.facts["number"]: item.type for item in items}.items())
        types = shares([item.type for item in items], right)
        return Breakdown(
            {
                "all": shares(kinds, right) | {"image + video": share(right)},
                "type": {name: types[name] for _, name in order},
            }
        )

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        pairs = sorted(zip(items, texts, strict=True), key=lambda pair: pair[0].facts["place"])
        save_lines(({"question_id": item.facts["id"], "prediction": text} for item, text in pairs), path)
        whole = [item.facts["place"] for item, _ in pairs] == list(range(QUESTIONS_IN_ALL))
        return [] if whole else [f"it holds {len(items):,} of {QUESTIONS_IN_ALL:,} questions; the server wants all"]


def _matching(row: Record, waiting: dict[str, list[tuple[int, Record]]], path: Path) -> tuple[int, Record]:
    """Place and label of a question; of several with its id the first that reads the same."""
    found = waiting[row.text("question_id")]
    if not found:
        raise row.error(
            f"question {row.text('question_id')} is not in {path}, or asked twice: take both from one release"
        )
    text = row.text("text")
    return found.pop(next((n for n, (_, label) in enumerate(found) if text.startswith(label.text("question"))), 0))


def _item(row: Record | None, label: Record, place: int, picture: Path, names: dict[str, str]) -> Item:
    options = [label.text(option) for option in OPTIONS]
    number = label.whole("question_type_id")
    id = label.text("question_id")
    built = f"{with_options(label.text('question'), options)}\n{LETTER}"
    return Item(
        id=(int(id) if id.isdecimal() else id) if row is None else row.id("question_id"),
        group=str(picture),
        sources=(str(picture),),
        question=built if row is None else row.text("text"),
        bare=label.text("question"),
        answers=(label.text("answer"),),
        type=names.get(str(number), str(number)),
        facts={"kind": label.text("data_type"), "number": number, "id": label.id("question_id"), "place": place},
    )


def _picture(label: Record, files: Files) -> Path:
    """Pictures are named by their id and have no suffix; a video's frame is named by its question."""
    if label.text("data_type") == "image":
        return files.pictures("SEED-Bench-image") / label.text("data_id")
    names = [label.text("question_id") + suffix for suffix in (".png", ".jpg", "")]
    return files.find(*(f"{FRAMES}/{name}" for name in names)) or files.pictures(FRAMES) / names[0]
