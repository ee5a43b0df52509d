"""What answers are worth: accuracy, retention, agreement, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from visiontrim.evaluate.asking import PLAIN, Cell, Row
from visiontrim.evaluate.suites import Item, Suite

DRAWS = 2_000
"""Draws of the bootstrap, with seed 0."""
FEWEST_GROUPS = 8
"""With fewer, a bootstrap says nothing, and the interval is everything that is possible."""


@dataclass(frozen=True, slots=True)
class Score:
    """A cell on the questions that were asked."""

    method: str
    keep: int | float | None
    error: str
    """Why there is nothing else, else ""."""
    right: float | None = None
    """Share of right answers, 0 to 1; without labels, of the plain model's answers."""
    retention: float | None = None
    """Of the plain model's right answers: 1 is as many."""
    agreement: float | None = None
    """Share of answers that are the plain model's."""
    gain: tuple[float, float, float] | None = None
    """Share of right answers minus that of the reference, and its 95 % interval: paired, bootstrap over groups."""
    mean: float | None = None
    """Mean vision tokens per decoder layer."""
    per_layer: tuple[float, ...] = ()
    method_time: float | None = None
    """Time of the method's own work over that of the plain model's prefill."""
    by_type: Mapping[str, float] = field(default_factory=dict)
    """Share of right answers to the questions of each type."""

    @property
    def beats_reference(self) -> bool:
        """Whether the interval of the gain lies above 0."""
        return self.gain is not None and self.gain[1] > 0


class Answers:
    """The rows of all cells for the batches that were asked, and what they are worth."""

    def __init__(self, suite: Suite, batches: Sequence[Sequence[Item]], rows: Mapping[Cell, Sequence[Row]]) -> None:
        self.items = [item for batch in batches[: len(rows[Cell(PLAIN, None)])] for item in batch]
        self.rows = rows
        self.labelled = suite.labelled
        self.plain = self.texts(Cell(PLAIN, None))
        names = {group: number for number, group in enumerate(dict.fromkeys(item.group for item in self.items))}
        self._groups = np.array([names[item.group] for item in self.items])
        self._prefill = sum(row.seconds["prefill"] for row in rows[Cell(PLAIN, None)])

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
        return [text for row in self.rows[cell] for text in row.predictions]

    def right(self, cell: Cell) -> Bool[np.ndarray, " items"]:
        """Which answers are right; without labels, which are the plain model's."""
        pairs = zip(self.items, self.texts(cell), self.plain, strict=True)
        if self.labelled:
            return np.array([item.is_right(text) for item, text, _ in pairs])
        return np.array([text == plain for _, text, plain in pairs])

    def score(self, cell: Cell, reference: Cell | None = None) -> Score:
        """``reference`` is what the gain is measured against; None leaves it out."""
        if error := self.error(cell):
            return Score(cell.method, cell.keep, error)
        right, rows = self.right(cell), self.rows[cell]
        agreement = np.mean([text == plain for text, plain in zip(self.texts(cell), self.plain, strict=True)])
        gain = None
        if reference is not None and reference != cell and not self.error(reference):
            gain = difference(right, self.right(reference), self._groups)
        counts = [len(row.predictions) for row in rows]
        layers = np.average([row.per_layer for row in rows], axis=0, weights=counts)
        types = dict.fromkeys(item.type for item in self.items)
        plain = float(self.right(Cell(PLAIN, None)).mean())
        return Score(
            method=cell.method,
            keep=cell.keep,
            error="",
            right=float(right.mean()),
            retention=float(right.mean()) / plain if plain else None,
            agreement=float(agreement),
            gain=gain,
            mean=float(layers.mean()),
            per_layer=tuple(float(layer) for layer in layers),
            method_time=sum(row.seconds["method"] for row in rows) / self._prefill,
            by_type={kind: float(right[[item.type == kind for item in self.items]].mean()) for kind in types},
        )


def difference(
    ours: Bool[np.ndarray, " items"], reference: Bool[np.ndarray, " items"], groups: Int[np.ndarray, " items"]
) -> tuple[float, float, float]:
    """Mean difference of two paired series, and its 95 % interval by a bootstrap over groups (2,000 draws, seed 0).

    ``groups`` are numbered from 0 on. Fewer than 8 give the interval from -1 to 1.
    """
    gain = ours.astype(float) - reference.astype(float)
    if len(np.unique(groups)) < FEWEST_GROUPS:
        return float(gain.mean()), -1.0, 1.0
    sums, counts = np.bincount(groups, gain), np.bincount(groups)
    draws = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(gain.mean()), float(low), float(high)
