"""A question about pictures, and a suite of them: what is asked, and by which measure answers count.

Knows no file format and no model.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from PIL import Image

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.records import read_field
from visiontrim.images import decode_image, load_image


class Source(Protocol):
    """Pictures that are no file of their own."""

    def load(self) -> list[Image.Image]: ...

    def digest(self) -> str:
        """What tells their content apart."""
        ...


@dataclass(frozen=True, slots=True)
class Embedded:
    """A picture in base64 in a field of a table."""

    path: Path
    start: int
    """Byte at which the row begins."""
    end: int
    column: int

    def load(self) -> list[Image.Image]:
        return [decode_image(self._bytes(), f"the picture at byte {self.start} of {self.path}")]

    def digest(self) -> str:
        return hashlib.sha256(self._bytes()).hexdigest()

    def _bytes(self) -> bytes:
        try:
            return base64.b64decode(read_field(self.path, self.start, self.end, self.column), validate=True)
        except binascii.Error as error:
            raise TrimError(f"the picture at byte {self.start} of {self.path} is no base64: {error}") from error


@dataclass(frozen=True, eq=False, slots=True)
class Item:
    """One question."""

    id: str | int
    group: str
    """Questions of one group are no independent evidence: intervals draw whole groups."""
    sources: tuple[Image.Image | str | Source, ...]
    """The pictures in order, or where they are."""
    question: str
    """With whatever a benchmark adds to it: options, a sentence on the form of the answer."""
    answers: tuple[str, ...]
    """Any of these is right, or what a benchmark's rule compares with; () if nobody knows."""
    type: str
    prompt: str | None = None
    """What the model reads; None: a template around pictures and question."""
    bare: str | None = None
    """The question alone; None: ``question`` is."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the rule of a benchmark needs, by its names."""

    def pictures(self) -> list[Image.Image]:
        """The pictures, read now. Raises :class:`TrimError` for what is no picture."""
        return [picture for source in self.sources for picture in _load(source)]

    def is_right(self, answer: str) -> bool:
        """Whether ``answer`` is one of :attr:`answers`, whatever its case, spaces and final full stop."""
        return _plain(answer) in map(_plain, self.answers)


class Metric(Protocol):
    """A score that is a function of sums over questions: then it can be resampled, also where it is no mean."""

    @property
    def metric(self) -> str:
        """Its name: "accuracy", "mean F1", ..."""
        ...

    @property
    def top(self) -> float:
        """The best that can be reached, in the unit that is printed: 100 for shares."""
        ...

    def right(self, item: Item, text: str) -> float:
        """What one answer is worth by itself, 0 to 1."""
        ...

    def counts(self, items: Sequence[Item], texts: Sequence[str]) -> Float[np.ndarray, "items columns"]:
        """What each answer adds to the sums; a question without a label adds nothing."""
        ...

    def value(self, sums: Float[np.ndarray, "*draws columns"]) -> Float[np.ndarray, "*draws"]:
        """The score, 0 where nothing was counted."""
        ...


class RightAnswers:
    """The share of right answers, in %, of the questions whose answer is known."""

    metric = "right answers"
    top = 100.0

    def right(self, item: Item, text: str) -> float:
        return float(item.is_right(text))

    def counts(self, items: Sequence[Item], texts: Sequence[str]) -> Float[np.ndarray, "items 2"]:
        pairs = zip(items, texts, strict=True)
        found = [(self.right(item, text), 1.0) if item.answers else (0.0, 0.0) for item, text in pairs]
        return np.array(found, float).reshape(-1, 2)

    def value(self, sums: Float[np.ndarray, "*draws 2"]) -> Float[np.ndarray, "*draws"]:
        return self.top * ratio(sums[..., 0], sums[..., 1])


def ratio(part: Float[np.ndarray, "*some"], whole: Float[np.ndarray, "*some"]) -> Float[np.ndarray, "*some"]:
    """``part / whole``, 0 where ``whole`` is 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) != 0)


@dataclass(frozen=True, slots=True)
class Suite:
    """Questions that are asked together."""

    name: str
    items: tuple[Item, ...]
    max_new_tokens: int
    metric: Metric = field(default_factory=RightAnswers)
    notes: tuple[str, ...] = ()
    """What a reader of its scores has to know."""
    unit: str = "pictures"
    """What its groups are."""

    @property
    def prompted(self) -> bool:
        """Whether its questions bring their whole prompt, so that no protocol applies."""
        return all(item.prompt is not None for item in self.items)

    @property
    def labelled(self) -> int:
        """Questions whose right answer is known."""
        return sum(bool(item.answers) for item in self.items)

    def taking(self, items: Sequence[Item]) -> Suite:
        """The same suite with these questions alone."""
        return dataclasses.replace(self, items=tuple(items))

    def batches(self, size: int) -> list[tuple[Item, ...]]:
        """Whole groups in order of their first question, up to ``size`` items or one group in a batch.

        A batch is either of questions with pictures or of questions without.
        """
        groups: dict[tuple[str, bool], list[Item]] = {}
        for item in self.items:
            groups.setdefault((item.group, bool(item.sources)), []).append(item)
        batches: list[tuple[Item, ...]] = []
        for (_, seen), group in groups.items():
            for start in range(0, len(group), size):
                part = tuple(group[start : start + size])
                last = batches[-1] if batches else ()
                if last and len(last) + len(part) <= size and bool(last[0].sources) == seen:
                    batches[-1] += part
                else:
                    batches.append(part)
        return batches


class Digests:
    """Digests of pictures by their content; each file is read once."""

    def __init__(self) -> None:
        self._known: dict[Any, str] = {}

    def of(self, source: Image.Image | str | Source) -> str:
        key = id(source) if isinstance(source, Image.Image) else source
        if key not in self._known:
            self._known[key] = _content(source)
        return self._known[key]


def _content(source: Image.Image | str | Source) -> str:
    if isinstance(source, Image.Image):
        return hashlib.sha256(f"{source.mode}{source.size}".encode() + source.tobytes()).hexdigest()
    if not isinstance(source, str):
        return source.digest()
    if "://" in source:
        return _content(load_image(source))
    try:
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return _content(load_image(source))  # which says what is wrong with it


def _load(source: Image.Image | str | Source) -> list[Image.Image]:
    if isinstance(source, Image.Image):
        return [source]
    return [load_image(source)] if isinstance(source, str) else source.load()


def _plain(answer: str) -> str:
    return " ".join(answer.lower().split()).removesuffix(".")
