"""Greedy maximum coverage (MMTok eq. 6-8): tokens that together answer to every row of a similarity."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def coverage_picks(coverage: Float[Tensor, "batch rows tokens"], count: int) -> Int[Tensor, "batch {count}"]:
    """Greedy maximum of the sum over rows of max_{j in S} coverage[row, j], in the order of choice.

    ``coverage`` is at least 0: how well a token stands for a row. Monotone and submodular, so the greedy set reaches
    1 - 1/e of the best one. Ties go to the lower index. float32, O(rows x tokens) work a step.
    """
    coverage = coverage.float()
    covered = coverage.new_zeros(*coverage.shape[:2], 1)
    taken = torch.zeros(coverage.shape[0], coverage.shape[2], dtype=torch.bool, device=coverage.device)
    picks = []
    for _ in range(count):
        gain = (coverage - covered).clamp_(min=0).sum(1).masked_fill_(taken, -torch.inf)
        pick = gain.argmax(1, keepdim=True)
        taken = taken.scatter(1, pick, True)
        column = coverage.gather(2, pick[:, None].expand(-1, coverage.shape[1], -1))
        covered = torch.maximum(covered, column)
        picks.append(pick)
    return torch.cat(picks, 1)
