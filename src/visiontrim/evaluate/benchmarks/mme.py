"""MME (arXiv 2306.13394; research use only): two yes-or-no questions about each picture, in 14 categories.

A category scores accuracy over questions plus the share of pictures with both right, each in %. LLaVA prints the sum
over the ten categories of perception (1510.7 for 7B), compression papers that over all 14 (1862): ``mme-perception``
and ``mme``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import SHORT, Benchmark, Breakdown, Files, Table, save_text
from visiontrim.evaluate.items import Item, ratio
from visiontrim.evaluate.records import read_lines, read_text_lines

QUESTIONS = "llava_mme.jsonl"
RELEASE = ("MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version", "MME_Benchmark")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ASKS = "Please answer yes or no."
PICTURES = (".jpg", ".png", ".jpeg")
COLUMNS = ("right", "questions", "both right", "pictures")


class MME(Benchmark):
    folders = ("MME", "mme")
    where = (
        f"{QUESTIONS} comes with LLaVA's eval.zip, {RELEASE[1]} with the MME download of "
        "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models"
    )
    checked = "by hand, against the text of the official tool"
    licence = "research use only, no redistribution"
    upload = ""

    def __init__(self, perception_only: bool = False) -> None:
        self.categories = PERCEPTION if perception_only else (*PERCEPTION, *COGNITION)
        self.name = "mme-perception" if perception_only else "mme"
        self.title = "MME perception" if perception_only else "MME"
        self.metric = "perception" if perception_only else "perception + cognition"
        self.papers = (
            "sum of ten categories, at most 2,000 (LLaVA: 1510.7 for 7B)"
            if perception_only
            else "sum of 14 categories, at most 2,800 (compression papers: 1862 for LLaVA-1.5-7B)"
        )
        self.top = 200.0 * len(self.categories)

    def read(self, files: Files) -> list[Item]:
        release = files.folder(*RELEASE)
        asked = files.find(QUESTIONS)
        if release is None:
            problem = f"MME lacks {' or '.join(RELEASE)} (looked for in {files.folders[0]}): {self.where}"
            if asked is None:
                raise TrimError(problem)
            files.lacking.append(problem)
        labels = {} if release is None else {key: label for key, label, _ in _labels(release)}
        pictures = files.pictures(*RELEASE)
        if asked is None and release is not None:
            found = [_item(image, key[2], key[0], label, image, pictures) for key, label, image in _labels(release)]
            return [item for item in found if item.type in self.categories]
        items = []
        for row in read_lines(files.need(QUESTIONS)):
            category, image = row.text("category"), row.text("image")
            if category not in (*PERCEPTION, *COGNITION):
                raise row.error(f"the category {category!r} is none of MME's 14")
            bare = row.text("text").replace(SHORT, "").strip()
            key = next((key for key in _keys(category, image, bare) if key in labels), None)
            if labels and key is None:
                raise row.error(f"{category}/{Path(image).stem}.txt does not ask {bare!r}: take both from one release")
            items.append(_item(row.text("question_id"), bare, category, key and labels.get(key), image, pictures, key))
        return [item for item in items if item.type in self.categories]

    def parse(self, item: Item, text: str) -> str:
        text = text.lower()
        if text in ("yes", "no"):
            return text
        return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"

    def counts(self, items: Sequence[Item], texts: Sequence[str]) -> Float[np.ndarray, "items columns"]:
        """A picture counts at its first question."""
        found = np.zeros((len(items), len(self.categories), len(COLUMNS)))
        first: dict[str, int] = {}
        for number, (item, text) in enumerate(zip(items, texts, strict=True)):
            if item.answers:
                place, category = first.setdefault(item.group, number), self.categories.index(item.type)
                right = self.right(item, text)
                found[number, category, :2] += right, 1
                both = right if place == number else min(found[place, category, 2], right)
                found[place, category, 2:] = both, 1
        return found.reshape(len(items), -1)

    def value(self, sums: Float[np.ndarray, "*draws columns"]) -> Float[np.ndarray, "*draws"]:
        found = sums.reshape(*sums.shape[:-1], len(self.categories), len(COLUMNS))
        return 100 * (ratio(found[..., 0], found[..., 1]) + ratio(found[..., 2], found[..., 3])).sum(-1)

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        sums = self.counts(items, texts).sum(0).reshape(len(self.categories), len(COLUMNS))
        table: Table = {}
        for category, (right, asked, both, pictures) in zip(self.categories, sums.tolist(), strict=True):
            if asked:
                parts = {"accuracy": 100 * right / asked, "accuracy+": 100 * both / pictures}
                table[category] = {"score": sum(parts.values()), **parts, "questions": asked}
        halves = {"perception": PERCEPTION, "cognition": COGNITION}
        totals = {
            name: {"score": sum(row["score"] for category, row in table.items() if category in half)}
            for name, half in halves.items()
            if set(half) & set(table)
        }
        return Breakdown({"all": totals, "category": table})

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise TrimError(f"{path} cannot be made ({error.strerror or error}): write somewhere else") from error
        # The official tool takes each two lines in a row for the two questions of a picture
        pictures = {group: place for place, group in enumerate(dict.fromkeys(item.group for item in items))}
        ordered = sorted(zip(items, texts, strict=True), key=lambda pair: pictures[pair[0].group])
        for category in dict.fromkeys(item.type for item in items):
            lines = [
                "\t".join(
                    (
                        Path(str(item.sources[0])).name,
                        item.facts["asked"],
                        (item.answers or ("",))[0].title(),
                        _one_line(text),
                    )
                )
                for item, text in ordered
                if item.type == category
            ]
            save_text("\n".join(lines) + "\n", path / f"{category}.txt")
        return ["the official calculation.py reads the folder"]


def _labels(release: Path) -> Iterator[tuple[tuple[str, str, str], str, str]]:
    """(category, file, question), label, and picture relative to the release."""
    for category in (*PERCEPTION, *COGNITION):
        home = release / category
        nested = (home / "questions_answers_YN").is_dir()
        texts, pictures = (home / "questions_answers_YN", home / "images") if nested else (home, home)
        for path in sorted(texts.glob("*.txt")):
            image = next((p for suffix in PICTURES if (p := pictures / f"{path.stem}{suffix}").is_file()), None)
            for number, line in read_text_lines(path):
                if not line.strip():
                    continue
                question, _, label = line.strip().rpartition("\t")
                if label.lower() not in ("yes", "no"):
                    raise TrimError(f"{path}, line {number}: a question, a tab, and Yes or No are expected")
                shown = image or pictures / f"{path.stem}.jpg"
                yield (category, path.name, question), label.lower(), str(shown.relative_to(release))


def _keys(category: str, image: str, bare: str) -> Iterator[tuple[str, str, str]]:
    """How the question may stand in the release: some have two spaces before the last sentence."""
    name = f"{Path(image).name.split('.')[0]}.txt"
    for text in (bare, f"{bare} {ASKS}", f"{bare}  {ASKS}"):
        yield category, name, text


def _item(
    id: str, question: str, category: str, label: str | None, image: str, pictures: Path, key: tuple | None = None
) -> Item:
    bare = question.replace(ASKS, "").strip()
    return Item(
        id=id,
        group=f"{category}/{Path(image).name}",
        sources=(str(pictures / image),),
        question=f"{bare}\n{SHORT}",
        bare=bare,
        answers=() if label is None else (label,),
        type=category,
        facts={"asked": key[2] if key else f"{bare} {ASKS}", "name": f"{category}/{Path(image).name.split('.')[0]}"},
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
