"""Tokens that resemble a set of pivots least (DART)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def farthest_from_pivots(
    tokens: Float[Tensor, "batch tokens dim"],
    pivots: Float[Tensor, "batch pivots dim"],
    exists: Bool[Tensor, "batch pivots"],
    taken: Int[Tensor, "batch taken"],
    count: int,
) -> Int[Tensor, "batch {count}"]:
    """The tokens of ``taken``, and for each pivot in turn those left whose cosine with it is lowest; ascending.

    ``tokens`` and ``pivots`` are unit vectors, ``exists`` is False for a pivot that does not take part. The pivots that
    do, of which there is at least one, take equal shares of what is missing to ``count``; the first ones take one more
    where it does not divide. Of equal cosines the lower index is taken. float32; a loop over pivots, not tokens.
    Raises :class:`ValueError` for a ``count`` that is not between the number of ``taken`` and that of tokens.
    """
    batch, total = tokens.shape[:2]
    missing = count - taken.shape[1]
    if not 0 <= missing <= total - taken.shape[1]:
        raise ValueError(f"{count} of {total} tokens cannot be selected when {taken.shape[1]} are taken")
    order = exists.cumsum(1) - 1
    present = exists.sum(1, keepdim=True).clamp(min=1)
    shares = ((missing // present) + (order < missing % present)) * exists
    similarity = pivots.float() @ tokens.float().mT
    kept = torch.zeros(batch, total, dtype=torch.bool, device=tokens.device).scatter(1, taken, value=True)
    for pivot in range(pivots.shape[1]):
        cosine = similarity[:, pivot].masked_fill(kept, float("inf"))
        rank = cosine.argsort(dim=1, stable=True).argsort(1)
        kept = kept | (rank < shares[:, pivot, None])
    return kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
