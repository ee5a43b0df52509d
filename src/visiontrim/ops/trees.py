"""Trees of tokens along a video: a token joins its like in the frame before, and what is joined becomes one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Trees(NamedTuple):
    """What :func:`temporal_trees` returns."""

    features: Float[Tensor, "frames places dim"]
    """What each root became; other tokens have no meaning."""
    root: Int[Tensor, "frames places"]
    """Raster index of the root of the tree of each token; -1 for tokens that are not ``free``."""


def temporal_trees(
    tokens: Float[Tensor, "frames places dim"],
    free: Bool[Tensor, "frames places"],
    threshold: float,
    least: int,
    *,
    passed_on: bool = True,
) -> Trees:
    """Every ``free`` token joins the free one of the frame before that is most like it, if their cosine is above
    ``threshold``, or above the higher one that leaves ``least`` trees.

    A root becomes the mean of its tree. Without ``passed_on`` a token takes the sums of the subtrees of its children,
    but counts the children alone (the released FlashVID): trees that are deeper than one step grow in length. float32;
    ties to the lower index; of frames in a row all pairs of tokens are compared. Sums have the gradients of ``tokens``.
    """
    frames, places, _ = tokens.shape
    unit = F.normalize(tokens.detach().float(), dim=-1)
    likeness = unit[1:] @ unit[:-1].mT
    likeness = likeness.masked_fill(~(free[1:, :, None] & free[:-1, None]), -torch.inf)
    best, parent = likeness.max(-1)
    joins = best > threshold
    excess = least - (int(free.sum()) - int(joins.sum()))
    if excess > 0:  # as many of the least alike stay apart
        order = best.flatten().masked_fill(~joins.flatten(), torch.inf).sort(stable=True).indices
        joins = joins.flatten().scatter(0, order[:excess], False).view_as(joins)
    number = torch.arange(frames * places, device=tokens.device).view(frames, places)
    totals, counts = list(tokens.float().unbind(0)), [torch.ones_like(free[0], dtype=torch.float32)] * frames
    for frame in range(frames - 1, 0, -1):
        here, to = joins[frame - 1], parent[frame - 1]
        grown = counts[frame] if passed_on else torch.ones_like(counts[frame])
        totals[frame - 1] = totals[frame - 1].index_add(0, to[here], totals[frame][here])
        counts[frame - 1] = counts[frame - 1].index_add(0, to[here], grown[here])
    features = torch.stack([total / count[:, None] for total, count in zip(totals, counts, strict=True)])
    root = number.clone()
    for frame in range(1, frames):
        root[frame] = torch.where(joins[frame - 1], root[frame - 1][parent[frame - 1]], root[frame])
    return Trees(features, torch.where(free, root, -1))
