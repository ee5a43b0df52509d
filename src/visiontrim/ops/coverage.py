"""Greedy maximum coverage (MMTok eq. 6-8): tokens that together answer to every row of a similarity."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

PART = 256
"""Rows that are taken at a time, so that they stay in a processor's cache."""


def coverage_picks(coverage: Float[Tensor, "batch rows tokens"], count: int) -> Int[Tensor, "batch {count}"]:
    """Greedy maximum of the sum over rows of max_{j in S} coverage[row, j], in the order of choice.

    ``coverage`` is at least 0: how well a token stands for a row. Monotone and submodular, so the greedy set reaches
    1 - 1/e of the best one. Ties go to the lower index. Sums are float64. A row counts anew only where a pick covers it
    better, which after t picks is about one row in t: on the CPU the others are left alone, O(rows x tokens x log
    count) work instead of :func:`_all_rows`'s O(rows x tokens x count). Elsewhere finding out which rows these are
    would stop the host at every pick.
    """
    coverage = coverage.float()
    if coverage.device.type != "cpu":
        return _all_rows(coverage, count)
    return torch.stack([_changed_rows(of_image, count) for of_image in coverage])


def _all_rows(coverage: Float[Tensor, "batch rows tokens"], count: int) -> Int[Tensor, "batch {count}"]:
    """Every row again at every pick."""
    covered = coverage.new_zeros(*coverage.shape[:2], 1)
    taken = torch.zeros(coverage.shape[0], coverage.shape[2], dtype=torch.bool, device=coverage.device)
    picks = []
    for _ in range(count):
        gain = (coverage - covered).clamp_(min=0).sum(1, dtype=torch.float64).masked_fill_(taken, -torch.inf)
        pick = gain.argmax(1, keepdim=True)
        taken = taken.scatter(1, pick, True)
        column = coverage.gather(2, pick[:, None].expand(-1, coverage.shape[1], -1))
        covered = torch.maximum(covered, column)
        picks.append(pick)
    return torch.cat(picks, 1)


def _changed_rows(coverage: Float[Tensor, "rows tokens"], count: int) -> Int[Tensor, " {count}"]:
    """The same for one image, with what a pick changes alone."""
    covered, gain = coverage.new_zeros(len(coverage)), coverage.sum(0, dtype=torch.float64)
    little = 1e-9 * float(gain.max())  # adding and taking away leaves errors of 1e-15
    picks: list[int] = []
    for _ in range(count):
        pick = int(gain.argmax())
        if gain[pick] < little:
            gain = (coverage - covered[:, None]).clamp_(min=0).sum(0, dtype=torch.float64)
            gain[picks] = -torch.inf
            pick = int(gain.argmax())
        picks.append(pick)
        column = coverage[:, pick]
        better = (column > covered).nonzero()[:, 0]
        for rows in better.split(PART):
            old, new = covered.index_select(0, rows)[:, None], column.index_select(0, rows)[:, None]
            between = torch.minimum(coverage.index_select(0, rows).maximum(old), new)
            # summed before it is subtracted: a difference of float32 would be rounded
            gain -= between.sum(0, dtype=torch.float64) - old.sum(dtype=torch.float64)
        covered = torch.maximum(covered, column)
        gain[pick] = -torch.inf
    return torch.tensor(picks)
