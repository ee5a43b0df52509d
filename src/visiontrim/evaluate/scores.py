"""What answers are worth: the suite's score, retention, agreement, and differences with their intervals."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from visiontrim.core.budget import Amount
from visiontrim.evaluate.asking import PLAIN, Cell
from visiontrim.evaluate.bootstrap import Interval, Sample, numbered, resample
from visiontrim.evaluate.items import Item, Metric, Suite, ratio
from visiontrim.evaluate.log import Row


@dataclass(frozen=True, slots=True)
class Score:
    """A cell on the questions that were asked."""

    method: str
    keep: Amount | None
    error: str
    """Why there is nothing else, else ""."""
    score: float | None = None
    """In the unit of the suite's metric, % for most; without labels, % of answers that are the plain model's."""
    interval: Interval | None = None
    """95 %, by a bootstrap over groups, as all intervals; None where there are too few of them."""
    retention: float | None = None
    """Of the plain model's score: 1 is as much."""
    retention_interval: Interval | None = None
    agreement: float | None = None
    """Share of answers that are the plain model's, word for word."""
    gain: float | None = None
    """The score minus that of the reference, of the same questions."""
    gain_interval: Interval | None = None
    mean: float | None = None
    """Mean vision tokens per decoder layer."""
    per_layer: tuple[float, ...] = ()
    method_time: float | None = None
    """Time of the method's own work over that of the plain model's prefill."""
    time: float | None = None
    """Time of vision, method, prefill and answer over that of the plain model, the median over batches."""
    length: float | None = None
    """Mean tokens of an answer."""
    by_type: Mapping[str, float] = field(default_factory=dict)
    """The score on the questions of each type."""

    @property
    def beats_reference(self) -> bool | None:
        """Whether the interval of the gain lies above 0; None where there is no interval."""
        return None if self.gain_interval is None else self.gain_interval[0] > 0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self) | {"beats_reference": self.beats_reference}


class Agreement:
    """The share of answers that are the plain model's, in %: for questions whose right answers nobody knows."""

    metric = "agreement with the plain model"
    top = 100.0

    def __init__(self, plain: Mapping[Item, str]) -> None:
        self._plain = plain
        """The plain model's answers."""

    def right(self, item: Item, text: str) -> float:
        return float(text == self._plain[item])

    def counts(self, items: Sequence[Item], texts: Sequence[str]) -> Float[np.ndarray, "items 2"]:
        same = [self.right(item, text) for item, text in zip(items, texts, strict=True)]
        return np.stack([np.array(same, float), np.ones(len(same))], axis=1)

    def value(self, sums: Float[np.ndarray, "*draws 2"]) -> Float[np.ndarray, "*draws"]:
        return self.top * ratio(sums[..., 0], sums[..., 1])


class Answers:
    """The rows of all cells for the batches that were asked, and what they are worth."""

    def __init__(self, suite: Suite, batches: Sequence[Sequence[Item]], rows: Mapping[Cell, Sequence[Row]]) -> None:
        self.items = [item for batch in batches[: len(rows[Cell(PLAIN, None)])] for item in batch]
        self.rows = rows
        self._places: list[int] | None = None
        """Of the questions among those of the rows; None for all."""
        self.plain = self.texts(Cell(PLAIN, None))
        self.labelled = sum(bool(item.answers) for item in self.items)
        """Questions whose right answer is known."""
        agreement = Agreement(dict(zip(self.items, self.plain, strict=True)))
        self.metric: Metric = suite.metric if self.labelled else agreement
        self._groups = numbered(self.items)
        self._prefill = sum(row.seconds["prefill"] for row in rows[Cell(PLAIN, None)])
        self._samples: dict[Cell, Sample] = {}

    @property
    def groups(self) -> int:
        """Groups of questions about the same pictures."""
        return int(self._groups.max()) + 1

    @property
    def whole(self) -> Score:
        """The plain model."""
        return self.score(Cell(PLAIN, None))

    def error(self, cell: Cell) -> str:
        """Why the cell cannot work, else ""."""
        return next((row.error for row in self.rows[cell] if row.error), "")

    def texts(self, cell: Cell) -> list[str]:
        texts = [text for row in self.rows[cell] for text in row.predictions]
        return texts if self._places is None else [texts[place] for place in self._places]

    def lengths(self, cell: Cell) -> list[int]:
        """Tokens of each answer."""
        lengths = [length for row in self.rows[cell] for length in row.lengths]
        return lengths if self._places is None else [lengths[place] for place in self._places]

    def right(self, cell: Cell) -> Float[np.ndarray, " items"]:
        """What each answer is worth by itself, 0 to 1; without labels, whether it is the plain model's."""
        pairs = zip(self.items, self.texts(cell), strict=True)
        known = not self.labelled
        return np.array([self.metric.right(item, text) if known or item.answers else 0.0 for item, text in pairs])

    def sample(self, cell: Cell) -> Sample:
        """The suite's score of a cell, and its draws."""
        if cell not in self._samples:
            counts = self.metric.counts(self.items, self.texts(cell))
            self._samples[cell] = resample(self.metric, counts, self._groups)
        return self._samples[cell]

    def score(self, cell: Cell, reference: Cell | None = None) -> Score:
        """``reference`` is what the gain is measured against; None leaves it out."""
        if error := self.error(cell):
            return Score(cell.method, cell.keep, error)
        sample, texts = self.sample(cell), self.texts(cell)
        retention, spread = sample.of(self.sample(Cell(PLAIN, None)))
        gain = gain_interval = None
        if reference is not None and reference != cell and not self.error(reference):
            gain, gain_interval = sample.over(self.sample(reference))
        layers = self._layers(cell)
        rows = self.rows[cell]
        return Score(
            method=cell.method,
            keep=cell.keep,
            error="",
            score=sample.value,
            interval=sample.interval,
            retention=retention,
            retention_interval=spread,
            agreement=float(np.mean([text == plain for text, plain in zip(texts, self.plain, strict=True)])),
            gain=gain,
            gain_interval=gain_interval,
            mean=float(np.mean(layers)) if layers else None,
            per_layer=layers,
            method_time=sum(row.seconds["method"] for row in rows) / self._prefill,
            time=self._time(rows),
            length=float(np.mean(self.lengths(cell))),
            by_type=self._by_type(texts),
        )

    def _time(self, rows: Sequence[Row]) -> float | None:
        """Of the batches with pictures, each beside the plain model's time for the same batch."""
        pairs = zip(rows, self.rows[Cell(PLAIN, None)], strict=True)
        shares = [row.seconds["total"] / plain.seconds["total"] for row, plain in pairs if row.per_layer]
        return float(np.median(shares)) if shares else None

    def _layers(self, cell: Cell) -> tuple[float, ...]:
        """Mean vision tokens of an image in each layer, of the questions with pictures."""
        rows = [row for row in self.rows[cell] if row.per_layer]
        if not rows:
            return ()
        weights = [len(row.predictions) for row in rows]
        return tuple(np.average([row.per_layer for row in rows], axis=0, weights=weights).tolist())

    def where(self, chosen: Sequence[bool]) -> Answers:
        """The answers to the ``chosen`` questions alone: scores, intervals and groups are of these, times of all."""
        found = copy.copy(self)
        places = [number for number, wanted in enumerate(chosen) if wanted]
        found.items = [self.items[number] for number in places]
        found._places = places if self._places is None else [self._places[number] for number in places]
        found.plain = found.texts(Cell(PLAIN, None))
        found.labelled = sum(bool(item.answers) for item in found.items)
        found._groups = numbered(found.items)
        found._samples = {}
        return found

    def _by_type(self, texts: Sequence[str]) -> dict[str, float]:
        found: dict[str, float] = {}
        for kind in dict.fromkeys(item.type for item in self.items):
            pairs = [(item, text) for item, text in zip(self.items, texts, strict=True) if item.type == kind]
            some, said = [item for item, _ in pairs], [text for _, text in pairs]
            if not self.labelled or any(item.answers for item in some):
                found[kind] = float(self.metric.value(self.metric.counts(some, said).sum(0)))
        return found
