"""What a benchmark is: official files read into questions, answers parsed and scored, upload files written.

A benchmark is a file of this package. It knows its files, prompts, rules and upload; it knows no model. Literal
sentences that several share are here, since scores depend on every character of them.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.items import Item, ratio

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
OCR = "Reference OCR token: "
LETTERS = "ABCDE"

SHORT_ANSWER = 128
"""Longest answer, in tokens, to what asks for a word."""
LONG_ANSWER = 1024

Table = dict[str, dict[str, float]]
"""Rows of numbers by their names."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A score's parts: a table for each way of cutting it up."""

    tables: Mapping[str, Table]
    notes: tuple[str, ...] = ()


class Files:
    """The folder of a benchmark below a root, and the files in it under the names that they are known by."""

    def __init__(self, root: Path, benchmark: Benchmark, images: Path | None = None) -> None:
        if not root.is_dir():
            raise TrimError(
                f"{root} is no folder: give the one that eval.zip was unpacked into, as {benchmark.name}:ROOT"
            )
        below = [root / name for name in benchmark.folders if (root / name).is_dir()]
        self.folders = [*below, root]
        self.root, self._benchmark, self._images = root, benchmark, images
        self.lacking: list[str] = []
        """Sentences on files without which nothing can be scored, but everything asked."""
        if images is not None and not images.is_dir():
            raise TrimError(
                f"--images {images} is no folder: give the one that holds the pictures of {benchmark.title}"
            )

    def find(self, *names: str) -> Path | None:
        """The first of ``names`` that is a file; names are relative to the folder of the benchmark."""
        return next((path for name in names for path in self._paths(name) if path.is_file()), None)

    def need(self, *names: str) -> Path:
        """The same, or an error that says what was looked for, where, and where it comes from."""
        found = self.find(*names)
        if found is None:
            shown = " or ".join(names)
            folders = " and ".join(map(str, self.folders))
            raise TrimError(f"{self._benchmark.title} lacks {shown} (looked for in {folders}): {self._benchmark.where}")
        return found

    def want(self, *names: str) -> Path | None:
        """The first of ``names`` that is a file; where there is none, :attr:`lacking` says so."""
        try:
            return self.need(*names)
        except TrimError as error:
            self.lacking.append(str(error))
            return None

    def folder(self, *names: str) -> Path | None:
        """The first of ``names`` that is a folder."""
        return next((path for name in names for path in self._paths(name) if path.is_dir()), None)

    def pictures(self, *names: str) -> Path:
        """The folder of the pictures: that of ``--images``, the first of ``names``, or what would be the first."""
        return self._images or self.folder(*names) or self.folders[0] / names[0]

    def picture(self, name: str) -> Path:
        """A picture that is named relative to the folder of the benchmark."""
        if self._images is None:
            return next((path for path in self._paths(name) if path.is_file()), self.folders[0] / name)
        near = self._images / name
        return near if near.is_file() else self._images / Path(name).name

    def _paths(self, name: str) -> list[Path]:
        return [folder / name for folder in self.folders]


class Benchmark(ABC):
    """Official files, prompts, parsing, scores and uploads of one benchmark; a :class:`Metric` of its questions."""

    name: str
    """As ``--suite NAME:ROOT`` takes it."""
    title: str
    folders: tuple[str, ...]
    """Names of its folder below the root."""
    where: str
    """Where its files come from, as the end of a sentence."""
    metric: str
    """The score that is printed first."""
    papers: str
    """Which number tables of papers print."""
    checked: str
    """What the rules were held against."""
    licence: str
    unit: str = "pictures"
    """What its groups are."""
    top: float = 100.0
    max_new_tokens: int = SHORT_ANSWER
    upload: str = ".json"
    """End of the name of the upload file."""
    missing_is_wrong: bool = False
    """Whether the official tool counts a question without an answer as wrong."""

    @abstractmethod
    def read(self, files: Files) -> list[Item]:
        """The questions of the official files. Raises :class:`TrimError` for files that are missing or do not fit."""

    @abstractmethod
    def parse(self, item: Item, text: str) -> str:
        """What an answer says, in the form that is compared."""

    @abstractmethod
    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        """Write the upload file, or the file that the official tool scores. Returns what a user has to know of it."""

    def notes(self, items: Sequence[Item]) -> list[str]:
        """What a reader of the scores has to know of the questions that were read."""
        return []

    def right(self, item: Item, text: str) -> float:
        """What an answer is worth, 0 to 1."""
        return float(self.parse(item, text) in item.answers)

    def counts(self, items: Sequence[Item], texts: Sequence[str]) -> Float[np.ndarray, "items columns"]:
        pairs = zip(items, texts, strict=True)
        found = [(self.right(item, text) if item.answers else 0.0, bool(item.answers)) for item, text in pairs]
        return np.array(found, float).reshape(-1, 2)

    def value(self, sums: Float[np.ndarray, "*draws columns"]) -> Float[np.ndarray, "*draws"]:
        return self.top * ratio(sums[..., 0], sums[..., 1])

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        """Every number that the official tool prints, in its unit."""
        return Breakdown({})

    def score(self, items: Sequence[Item], texts: Sequence[str]) -> float | None:
        """The score of answers to ``items``; None where no label is known."""
        if not any(item.answers for item in items):
            return None
        return float(self.value(self.counts(items, texts).sum(0)))


def share(values: Iterable[float]) -> dict[str, float]:
    """Mean in %, and of how many: a row of a table."""
    values = list(values)
    return {"accuracy": 100 * sum(values) / len(values) if values else 0.0, "questions": float(len(values))}


def shares(keys: Sequence[Any], values: Sequence[float]) -> Table:
    """A row for each key that is not None, in order of first sight."""
    names = [key for key in dict.fromkeys(keys) if key is not None]
    return {str(name): share(v for key, v in zip(keys, values, strict=True) if key == name) for name in names}


def with_options(question: str, options: Sequence[str]) -> str:
    """The question and a line ``A. option`` for each."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip("ABCDEFGH", options, strict=False))])


def bare_of(text: str) -> str:
    """The question alone, without the sentences that benchmarks add and without lines of options."""
    added = (SHORT, LETTER, LETTER_CN, UNANSWERABLE)
    lines = [line for line in text.split("\n") if line not in added and not line.startswith(OCR.strip())]
    kept = [line for line in lines if not (len(line) > 2 and line[0] in "ABCDEFGH" and line[1:3] == ". ")]
    return "\n".join(kept or lines).strip() or text


def save_json(value: Any, path: Path, indent: int | None = None) -> None:
    save_text(json.dumps(value, indent=indent), path)


def save_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    save_text("".join(json.dumps(row) + "\n" for row in rows), path)


def save_text(text: str, path: Path) -> None:
    """Raises :class:`TrimError` where ``path`` cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TrimError(f"{path} cannot be written ({error.strerror or error}): write somewhere else") from error
