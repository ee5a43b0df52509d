"""Intervals of scores that need not be means: whole groups of questions are drawn anew, the score computed of each
draw.

Two scores of the same questions are compared in the same draws, so that differences are paired. Knows no question: a
score is a function of sums over questions (:class:`visiontrim.evaluate.items.Metric`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from visiontrim.evaluate.items import Item, Metric

DRAWS = 2_000
"""Draws of the bootstrap, with seed 0."""
FEWEST_GROUPS = 8
"""With fewer a bootstrap says nothing, and there is no interval."""
CHUNK = 100
"""Draws at a time."""

Interval = tuple[float, float]
"""Ends of a 95 % interval."""


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """A score, and what it is in each draw."""

    value: float
    draws: Float[np.ndarray, " draws"] | None
    """None where there are too few groups."""

    @property
    def interval(self) -> Interval | None:
        return None if self.draws is None else _ends(self.draws)

    def over(self, other: Sample) -> tuple[float, Interval | None]:
        """This score minus the ``other``, of the same questions, and the interval of the difference."""
        if self.draws is None or other.draws is None:
            return self.value - other.value, None
        return self.value - other.value, _ends(self.draws - other.draws)

    def of(self, other: Sample) -> tuple[float | None, Interval | None]:
        """This score as a share of the ``other``; None where that is 0, in a draw for the interval."""
        share = self.value / other.value if other.value else None
        if self.draws is None or other.draws is None or not other.draws.all():
            return share, None
        return share, _ends(self.draws / other.draws)


def resample(metric: Metric, counts: Float[np.ndarray, "items columns"], groups: Int[np.ndarray, " items"]) -> Sample:
    """The score of ``counts``, and in :data:`DRAWS` draws of the ``groups``, which are numbered from 0 on.

    Groups of which nothing was counted are not drawn. Equal groups give equal draws, whatever the counts.
    """
    sums = np.zeros((int(groups.max(initial=-1)) + 1, counts.shape[1]))
    np.add.at(sums, groups, counts)
    sums = sums[sums.any(1)]
    value = float(metric.value(sums.sum(0)))
    if len(sums) < FEWEST_GROUPS:
        return Sample(value, None)
    random, found = np.random.default_rng(0), []
    for start in range(0, DRAWS, CHUNK):
        rows = min(CHUNK, DRAWS - start)
        drawn = random.integers(0, len(sums), (rows, len(sums))) + len(sums) * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * len(sums)).reshape(rows, len(sums))
        found.append(metric.value(weights.astype(float) @ sums))
    return Sample(value, np.concatenate(found))


def numbered(items: Sequence[Item]) -> Int[np.ndarray, " items"]:
    """The groups of the items, as numbers from 0 on."""
    names: dict[str, int] = {}
    return np.array([names.setdefault(item.group, len(names)) for item in items], dtype=np.int64)


def to_json(interval: Interval | None) -> Any:
    return None if interval is None else list(interval)


def _ends(draws: Float[np.ndarray, " draws"]) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
