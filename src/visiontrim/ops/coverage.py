"""Greedy maximum coverage (MMTok eq. 6-8): tokens that together answer to every row of a similarity."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def coverage_picks(
    coverage: Float[Tensor, "batch _ tokens"], count: int, *further: Float[Tensor, "batch _ tokens"]
) -> Int[Tensor, "batch {count}"]:
    """Greedy maximum of the sum over rows of max_{j in S} coverage[row, j], in the order of choice.

    ``coverage`` is at least 0: how well a token stands for a row; ``further`` have other rows of it.
    Monotone and submodular, so the greedy set reaches 1 - 1/e of the best one. Ties go to the lower index. Sums are
    float64. A row counts anew only where a pick covers it better, which after t picks is about one row in t: on the
    CPU the others are left alone, O(rows x tokens x log count) work instead of :func:`_all_rows`'s O(rows x tokens x
    count). Elsewhere finding out which rows these are would stop the host at every pick.
    """
    blocks = [block.float() for block in (coverage, *further)]
    if blocks[0].device.type != "cpu":
        return _all_rows(blocks, count)
    return torch.stack([_changed_rows([block[image] for block in blocks], count) for image in range(len(blocks[0]))])


def _all_rows(coverage: list[Float[Tensor, "batch _ tokens"]], count: int) -> Int[Tensor, "batch {count}"]:
    """Every row again at every pick."""
    batch, _, tokens = coverage[0].shape
    covered = [block.new_zeros(*block.shape[:2], 1) for block in coverage]
    taken = torch.zeros(batch, tokens, dtype=torch.bool, device=coverage[0].device)
    picks = []
    for _ in range(count):
        added = [
            (block - best).clamp_(min=0).sum(1, dtype=torch.float64)
            for block, best in zip(coverage, covered, strict=True)
        ]
        gain = torch.stack(added).sum(0).masked_fill_(taken, -torch.inf)
        pick = gain.argmax(1, keepdim=True)
        taken = taken.scatter(1, pick, True)
        for number, block in enumerate(coverage):
            column = block.gather(2, pick[:, None].expand(-1, block.shape[1], -1))
            covered[number] = torch.maximum(covered[number], column)
        picks.append(pick)
    return torch.cat(picks, 1)


def _changed_rows(coverage: list[Float[Tensor, "_ tokens"]], count: int) -> Int[Tensor, " {count}"]:
    """The same for one image, with what a pick changes alone."""
    covered = [block.new_zeros(len(block)) for block in coverage]
    gain = torch.stack([block.sum(0, dtype=torch.float64) for block in coverage]).sum(0)
    nothing = 1e-12 * gain.max()  # what adding and taking away has left of a gain of 0
    picks = []
    for _ in range(count):
        gain.masked_fill_(gain.abs() < nothing, 0.0)
        pick = gain.argmax()
        gain[pick] = -torch.inf
        picks.append(pick)
        for block, best in zip(coverage, covered, strict=True):
            column = block[:, pick]
            better = (column > best).nonzero()[:, 0]
            for rows in better.split(256):  # few at a time stay in the processor's cache
                old, new = best[rows, None], column[rows, None]
                gain -= (block[rows].clamp(old, new) - old).sum(0, dtype=torch.float64)
            best[better] = column[better]
    return torch.stack(picks)
