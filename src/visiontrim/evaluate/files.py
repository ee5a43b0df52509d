"""Questions in files of several programs, read as they are needed: each becomes an :class:`Item`.

- JSON lines (or a JSON list) of ``image``, ``question`` and ``answer``, ours;
- LLaVA's question files (``question_id``, ``image``, ``text``) and its conversations, of which the first turn is taken;
- VQA pairs in COCO's form: ``*_questions.json`` and, beside it, the annotations;
- logs of samples that lmms-eval wrote;
- VLMEvalKit's tables (.tsv), with pictures in base64;
- a folder of such files.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import LETTER, bare_of, with_options
from visiontrim.evaluate.benchmarks.mmbench import parse_choice
from visiontrim.evaluate.benchmarks.vqa_text import accuracy, vqa_text
from visiontrim.evaluate.items import Embedded, Item, RightAnswers, Source
from visiontrim.evaluate.records import Record, columns, is_lines, read_lines, read_object, read_table

SUFFIXES = (".jsonl", ".json", ".tsv")
NAMES = ("image", "image_path", "image_source", "image_file", "file_name", "imageId", "image_id")
"""Fields of a sample of lmms-eval that may name its picture."""
PICTURES = ("", ".jpg", ".png", ".jpeg", ".webp")
OPTIONS = "ABCDEFGH"


class FileAnswers(RightAnswers):
    """The share of right answers, each by the rule of the file that it came from."""

    metric = "right answers"

    def right(self, item: Item, text: str) -> float:
        rule: Callable[[Item, str], float] | None = RULES.get(item.facts.get("rule", ""))
        return super().right(item, text) if rule is None else rule(item, text)


def _by_annotators(item: Item, text: str) -> float:
    return accuracy(vqa_text(text), [vqa_text(answer) for answer in item.answers])


def _by_letter(item: Item, text: str) -> float:
    return float(parse_choice(text, item.facts["options"]) in item.answers)


RULES = {"vqa": _by_annotators, "choice": _by_letter}


def read_items(path: Path, images: Path | None = None) -> Iterator[Item]:
    """The questions of a file, or of all files of a folder; pictures are relative to ``images`` or the file.

    Questions without a picture are passed over. Raises :class:`TrimError` with the number of a line that cannot be
    read.
    """
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and not _annotations(file))
        if not found:
            raise TrimError(f"the folder {path} holds no files of questions ({', '.join(SUFFIXES)})")
        for file in found:
            for item in read_items(file, images):
                kind = file.stem if item.type == "question" else f"{file.stem}/{item.type}"
                yield dataclasses.replace(item, id=f"{file.name}/{item.id}", type=kind)
        return
    home = images or path.parent
    if path.suffix == ".tsv":
        yield from _table(path, home)
    elif path.suffix == ".json" and not is_lines(path, "questions"):
        yield from _pairs(path, home)
    else:
        for number, row in enumerate(read_lines(path), 1):
            if item := _item(row, number, home):
                yield item


def _item(row: Record, number: int, home: Path) -> Item | None:
    """The item of a line of ours, of LLaVA, or of a log; None where it has no picture."""
    if "doc_id" in row and "target" in row:
        return _logged(row, home)
    turns = row.many("conversations")[:2] if "conversations" in row else []
    if not (turns or "question" in row or "text" in row):
        raise row.error("it asks nothing: write 'image', 'question' and, if known, 'answer'")
    question = row.text("question", "text", default=turns[0].text("value") if turns else None)
    question = question.replace("<image>", "").strip()
    if not question:
        raise row.error("its question is empty")
    answers = row.texts("answer", default=[turns[1].text("value")] if len(turns) > 1 else [])
    names = row.texts("image", default=[])
    if not names:
        return None
    return Item(
        id=row.id("question_id", "id") if "question_id" in row or "id" in row else number,
        group="|".join(names),
        sources=tuple(name if "://" in name else str(home / name) for name in names),
        question=question,
        answers=answers,
        type=row.text("type", "category", default="question"),
        bare=bare_of(question),
    )


def _logged(row: Record, home: Path) -> Item:
    doc = row.one("doc") if "doc" in row else row
    question = row.text("input", default="") or doc.text("question")
    named = [doc.text(name) for name in NAMES if isinstance(doc.fields.get(name), str)]
    paths = [home / f"{name}{suffix}" for name in named for suffix in PICTURES]
    picture = next((path for path in paths if path.is_file()), None)
    if picture is None:
        raise row.error(
            f"its picture is not in {home}: lmms-eval logs none, so it is looked for by {', '.join(NAMES)} of the "
            "sample; give its folder as --images"
        )
    question, place = question.replace("<image>", "").strip(), str(picture)
    return Item(row.id("doc_id"), place, (place,), question, row.texts("target"), "question", bare=bare_of(question))


def _pairs(path: Path, home: Path) -> Iterator[Item]:
    record = Record(read_object(path), str(path))
    if "questions" not in record:
        raise record.error("an object is expected to hold 'questions', as VQA's files do")
    beside = next((file for file in sorted(path.parent.glob("*.json")) if _belongs(file, path)), None)
    labels: dict[str, Record] = {}
    if beside is not None:
        annotations = Record(read_object(beside), str(beside)).many("annotations")
        labels = {label.text("question_id"): label for label in annotations}
    kind = record.text("data_subtype", default="")
    for row in record.many("questions"):
        id, image = row.id("question_id"), row.text("image_id")
        number = f"{int(image):012d}" if image.isdecimal() else image
        names = [f"COCO_{kind}_{number}", number, image] if kind else [number, image]
        paths = [home / f"{name}{suffix}" for name in names for suffix in PICTURES]
        picture = str(next((path for path in paths if path.is_file()), home / f"{names[0]}.jpg"))
        label = labels.get(str(id))
        if labels and label is None:
            raise row.error(f"question {id} has no annotation in {beside}")
        answers = () if label is None else tuple(answer.text("answer") for answer in label.many("answers"))
        facts = {"rule": "vqa"}
        kind_of = "question" if label is None else label.text("answer_type", default="question")
        yield Item(id, picture, (picture,), row.text("question"), answers, kind_of, facts=facts)


def _belongs(file: Path, questions: Path) -> bool:
    """Whether a file is named like the annotations of a file of questions."""
    return _annotations(file) and file.name.replace("annotations", "") == (
        questions.name.replace("questions", "").replace("OpenEnded_", "").replace("MultipleChoice_", "")
    )


def _annotations(file: Path) -> bool:
    return file.name.endswith("annotations.json")


def _table(path: Path, home: Path) -> Iterator[Item]:
    names = columns(path)
    seen: dict[str, Embedded] = {}
    for row in read_table(path):
        record = row.record
        id, source = record.text("index"), _picture(row.start, row.end, record, names, path, home, seen)
        options = {letter: record.text(letter) for letter in OPTIONS if record.text(letter, default="").strip()}
        question, answer = record.text("question"), record.text("answer", default="")
        hint = record.text("hint", default="")
        hint = "" if hint.lower() in ("nan", "none") else hint
        text = with_options(f"{hint}\n{question}" if hint else question, list(options.values()))
        answers = (answer,) if options else _references(answer)
        facts: dict[str, Any] = {"rule": "choice", "options": options} if options else {}
        if len(answers) > 1:
            facts = {"rule": "vqa"}
        yield Item(
            id=int(id) if id.isdecimal() else id,
            group=_group(source),
            sources=(source,),
            question=f"{text}\n{LETTER}" if options else question,
            answers=answers if answer else (),
            type=record.text("category", default="") or "question",
            bare=question,
            facts=facts,
        )


def _picture(
    start: int, end: int, row: Record, names: list[str], path: Path, home: Path, seen: dict[str, Embedded]
) -> str | Source:
    """The picture of a row: a path, base64 in the row, or the index of the row whose picture it shares."""
    if row.text("image_path", default=""):
        return str(home / row.text("image_path"))
    text = row.text("image")
    if len(text) <= 64:
        if text not in seen:
            raise row.error(f"it shares the picture of row {text}, which is not above it")
        return seen[text]
    return seen.setdefault(row.text("index"), Embedded(path, start, end, names.index("image")))


def _group(source: str | Source) -> str:
    return source if isinstance(source, str) else str(getattr(source, "start", source))


def _references(answer: str) -> tuple[str, ...]:
    """One answer, or the list of several that some tables hold as text."""
    if answer.startswith("["):
        try:
            value = ast.literal_eval(answer)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return (answer,)
        if isinstance(value, list) and value:
            return tuple(map(str, value))
    return (answer,)
