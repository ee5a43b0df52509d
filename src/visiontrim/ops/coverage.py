"""Greedy maximum coverage (MMTok eq. 6-8): tokens that together answer to every row of a similarity."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.ops import host

PART = 64
"""Rows that are taken at a time, so that they stay in a processor's cache and sums of float32 stay short."""
DOUBT = 1.01 * (PART + 2) * 2**-24
"""What a sum of as many numbers of float32 may be off by, as a share of it."""
TIE = 1e-12
"""Gains that differ by less than this share of all there was to gain tie: sums of float64 are no better."""


def coverage_picks(coverage: Float[Tensor, "batch rows tokens"], count: int) -> Int[Tensor, "batch {count}"]:
    """Greedy maximum of the sum over rows of max_{j in S} coverage[row, j], in the order of choice.

    ``coverage`` is at least 0: how well a token stands for a row. Monotone and submodular, so the greedy set reaches
    1 - 1/e of the best one. Choices are those of sums in float64; ties go to the lower index.

    A row counts anew only where a pick covers it better, which after t picks is about one row in t: on the CPU the
    others are left alone, O(rows x tokens x log count) work instead of :func:`_all_rows`'s O(rows x tokens x count).
    Elsewhere finding out which rows these are would stop the host at every pick.
    """
    coverage = coverage.float()
    if not host.asks_freely(coverage):
        return _all_rows(coverage, count)
    return torch.stack([_changed_rows(of_image, count) for of_image in coverage])


def _all_rows(coverage: Float[Tensor, "batch rows tokens"], count: int) -> Int[Tensor, "batch {count}"]:
    """Every row again at every pick: a pass that writes, one that reads, and seven small operations."""
    covered = coverage.new_zeros(*coverage.shape[:2], 1)
    taken = torch.zeros(coverage.shape[0], coverage.shape[2], dtype=torch.bool, device=coverage.device)
    best, picks, tie = torch.empty_like(coverage), [], None
    for _ in range(count):
        # what is covered already is in all of these sums alike
        value = torch.maximum(coverage, covered, out=best).sum(1, dtype=torch.float64).masked_fill_(taken, -torch.inf)
        most = value.amax(1, keepdim=True)
        tie = TIE * most if tie is None else tie
        pick = (value >= most - tie).byte().argmax(1, keepdim=True)
        taken.scatter_(1, pick, True)
        covered = torch.maximum(covered, coverage.gather(2, pick[:, None].expand(-1, coverage.shape[1], -1)))
        picks.append(pick)
    return torch.cat(picks, 1)


def _changed_rows(coverage: Float[Tensor, "rows tokens"], count: int) -> Int[Tensor, " {count}"]:
    """The same for one image, with what a pick changes alone.

    Gains are kept up by sums of float32, whose error is known; where it leaves more than one token in question, these
    are summed anew in float64, and all if they are many.
    """
    covered, gain = coverage.new_zeros(len(coverage)), coverage.new_zeros(coverage.shape[1], dtype=torch.float64)
    for part in coverage.split(PART):
        gain += part.sum(0)
    tie, slack = TIE * float(gain.max()), 4 * DOUBT * gain  # what is summed up is taken away again
    picks: list[int] = []
    while len(picks) < count:
        open_to = (gain >= (gain - slack).max()).nonzero()[:, 0]
        pick = int(open_to[0])
        if len(open_to) > max(8, len(gain) // 32):
            gain = _gains(coverage, covered)
            slack = (2 * DOUBT * gain).clamp_(min=tie)
            gain[picks] = -torch.inf
            if float(gain.max()) <= tie:  # nothing adds any more: the lowest indices follow
                picks += gain.isfinite().nonzero()[: count - len(picks), 0].tolist()
                break
            pick = _first(gain, tie)
        elif len(open_to) > 1:
            pick = int(open_to[_first(_gains(coverage.index_select(1, open_to), covered), tie)])
        picks.append(pick)
        column = coverage[:, pick]
        rows = (column > covered).nonzero()[:, 0]
        covered, before = torch.maximum(covered, column), covered
        low, high = (side.index_select(0, rows)[:, None] for side in (before, covered))
        for start in range(0, len(rows), PART):
            some = slice(start, start + PART)
            part = coverage.index_select(0, rows[some])
            torch.minimum(torch.maximum(part, low[some], out=part), high[some], out=part)
            # the differences, not the values, are summed: their rounding is a share of what they add
            gain -= part.sub_(low[some]).sum(0)
        gain[pick] = -torch.inf
    return torch.tensor(picks)


def _first(gain: Float[Tensor, " tokens"], tie: float) -> int:
    """The first token of those with the largest gain."""
    return int((gain >= float(gain.max()) - tie).byte().argmax())


def _gains(coverage: Float[Tensor, "rows tokens"], covered: Float[Tensor, " rows"]) -> Float[Tensor, " tokens"]:
    """What each token adds to what is covered, float64."""
    total = -covered.sum(dtype=torch.float64).expand(coverage.shape[1])
    some = PART * (1 + 4096 // (1 + coverage.shape[1]))
    for part, old in zip(coverage.split(some), covered.split(some), strict=True):
        total = total + torch.maximum(part, old[:, None]).sum(0, dtype=torch.float64)
    return total
