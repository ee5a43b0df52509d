"""Answers that some program gave, read from its file, and joined with the questions that they answer.

LLaVA's lines (``question_id``, ``prompt``, ``text``), Video-ChatGPT's (``id``, ``pred``), upload files of all
benchmarks, result files of MM-Vet and ScienceQA, MME's folder of a text file for each category. An answer belongs to a
question by its id, and where several questions share one by what was asked; an answer to something else than the
question with its id is an error, never a score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import Benchmark
from visiontrim.evaluate.benchmarks.sheets import read_sheet
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.records import Record, read_json, read_lines, read_text_lines

SHEETS = (".xlsx", ".csv", ".tsv")
IDS = ("question_id", "id", "index", "questionId", "image")
"""The last where a picture has one question, as in uploads of VizWiz."""
TEXTS = ("text", "pred", "prediction", "response", "answer")
"""The last may be the right answer where one of the others is there."""


@dataclass(frozen=True, slots=True)
class Given:
    """One answer."""

    id: str
    text: str
    prompt: str | None
    """What was asked, if the file says so."""


@dataclass(frozen=True, slots=True)
class Joined:
    """Questions and their answers, in order."""

    path: Path
    """Where the answers come from."""
    items: tuple[Item, ...]
    texts: tuple[str, ...]
    notes: tuple[str, ...]


def read_given(path: Path) -> list[Given]:
    """The answers of a file, or of the folder that MME's tool reads."""
    if path.is_dir():
        return _given_folder(path)
    if path.suffix in SHEETS:
        return [_given(row) for row in read_sheet(path)]
    if path.suffix == ".json" and isinstance(found := read_json(path), dict):
        record = Record(found, str(path))
        if "outputs" in record and "results" in record:  # of ScienceQA's tool: the answers beside what they say
            record = record.one("outputs")
        return [Given(str(name), record.text(name), None) for name in record.fields]
    return [_given(row) for row in read_lines(path)]


def join(
    benchmark: Benchmark, items: Sequence[Item], given: Sequence[Given], path: Path, partial: bool = False
) -> Joined:
    """The items with their answers; ``partial`` leaves out those that have none.

    Raises :class:`TrimError` where answers are missing, unless the official tool counts them as wrong, or answer other
    questions.
    """
    waiting: dict[str, list[Given]] = defaultdict(list)
    for answer in given:
        waiting[answer.id].append(answer)
    found = {item: _take(item, waiting, _asks) for item in items}
    strange: list[tuple[Item, Given]] = []
    for item in (item for item, answer in found.items() if answer is None):
        if (answer := _take(item, waiting, lambda *_: True)) is not None:
            strange.append((item, answer))
    pairs = [(item, None if answer is None else answer.text) for item, answer in found.items()]
    if strange:
        item, answer = strange[0]
        raise TrimError(
            f"{len(strange):,} of {len(given):,} answers in {path} are to other questions than {benchmark.title} "
            f"asks: to {item.id} it was asked {_short(answer.prompt or '')!r}, the question is "
            f"{_short(item.bare or item.question)!r}"
        )
    lacking = sum(text is None for _, text in pairs)
    if lacking == len(pairs):
        raise TrimError(f"none of the {len(given):,} answers in {path} is to a question of {benchmark.title}")
    if lacking and not (partial or benchmark.missing_is_wrong):
        first = next(item.id for item, text in pairs if text is None)
        raise TrimError(
            f"{path} answers {len(pairs) - lacking:,} of {len(pairs):,} questions; {first} is the first that it lacks: "
            "--partial scores those that are there"
        )
    notes = []
    if lacking:
        done = "are left out" if partial else "count as wrong, as in the official tool"
        notes.append(f"{lacking:,} of {len(pairs):,} questions have no answer: they {done}")
    if (rest := sum(map(len, waiting.values()))) > 0:
        notes.append(f"{rest:,} answers are to none of these questions: they are passed over")
    if partial:
        pairs = [(item, text) for item, text in pairs if text is not None]
    return Joined(path, tuple(item for item, _ in pairs), tuple(text or "" for _, text in pairs), tuple(notes))


def _given(row: Record) -> Given:
    prompt = row.text("prompt", "question", default="")
    return Given(row.text(*IDS), row.text(*TEXTS, default=""), prompt or None)


def _given_folder(path: Path) -> list[Given]:
    """Lines of picture (or its text file), question, right answer and answer, in a file for each category."""
    found = []
    files = sorted(path.glob("*.txt"))
    if not files:
        raise TrimError(f"{path} holds no answers: a folder of answers has a CATEGORY.txt for each category of MME")
    for file in files:
        for number, line in read_text_lines(file):
            if not line.strip():
                continue
            parts = line.rstrip("\r\n").split("\t", 3)
            if len(parts) != 4:
                raise TrimError(
                    f"{file}, line {number}: it has {len(parts)} fields, where picture, question, right answer and "
                    "answer are expected, with tabs between them"
                )
            found.append(Given(f"{file.stem}/{parts[0].split('.')[0]}", parts[3], parts[1]))
    return found


def _take(item: Item, waiting: dict[str, list[Given]], suits: Callable[[Given, Item], bool]) -> Given | None:
    """The first answer with the item's id that suits it, taken out; one to exactly its question before the others."""
    names = {str(item.id), str(item.facts.get("name", item.id)), str(item.facts.get("id", item.id))}
    for rule in (_is, suits):
        for name in names:
            for number, answer in enumerate(waiting.get(name, ())):
                if rule(answer, item):
                    return waiting[name].pop(number)
    return None


def _is(answer: Given, item: Item) -> bool:
    """Whether the answer says that it is to exactly this question, with what the benchmark adds to it or without."""
    questions = item.question, item.bare or "", item.facts.get("asked", "")
    return answer.prompt is not None and _plain(answer.prompt) in map(_plain, questions)


def _asks(answer: Given, item: Item) -> bool:
    """Whether the answer is to this question, as far as its file says."""
    return answer.prompt is None or _plain(item.bare or item.question) in _plain(answer.prompt)


def _plain(text: str) -> str:
    return " ".join(text.split()).lower()


def _short(text: str) -> str:
    return f"{text[:60]} ..." if len(text) > 60 else text
