"""The course that VisionTrim's stages share: dominant tokens by a score, complement tokens among the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.view import Keep, Text, View
from visiontrim.ops.complement import Complement, Merge, Scores, complement
from visiontrim.ops.select import gather, leftovers, top_k


class Guide(NamedTuple):
    """What chooses complement tokens: the vision tokens and the question in one space, and a similarity of the two."""

    joint: Float[Tensor, "batch tokens joint"]
    text: Text
    scale: float
    cosine: bool


def keep_with_complement(
    view: View,
    score: Float[Tensor, "batch tokens"],
    dominant: int,
    added: int,
    guide: Guide,
    *,
    merge: Merge,
    iterations: int,
    scores: Scores = "softmax",
    raster: bool = True,
) -> Keep:
    """Keep the ``dominant`` tokens with the highest score and ``added`` complement tokens, in raster order (eq. 11).

    Without ``raster`` the complement tokens follow all dominant ones.
    """
    index = top_k(score, dominant)
    rest = leftovers(index, score.shape[1])
    merged = complement(
        gather(view.features, rest),
        gather(guide.joint, rest),
        guide.text.tokens,
        guide.text.mask,
        added,
        scale=guide.scale,
        cosine=guide.cosine,
        scores=scores,
        merge=merge,
        iterations=iterations,
    )
    index, features, assignment = _joined(view.features, index, rest, merged)
    added_last = (torch.arange(dominant + added, device=index.device) >= dominant).expand_as(index)
    if not raster:
        return Keep(index, features, assignment, added_last)
    order = index.argsort(1)
    place = order.argsort(1)
    moved = torch.where(assignment >= 0, place.gather(1, assignment.clamp(min=0)), -1)
    return Keep(gather(index, order), gather(features, order), moved, gather(added_last, order))


def _joined(
    features: Float[Tensor, "batch tokens dim"],
    dominant: Int[Tensor, "batch dominant"],
    rest: Int[Tensor, "batch leftovers"],
    merged: Complement,
) -> tuple[Int[Tensor, "batch kept"], Float[Tensor, "batch kept dim"], Int[Tensor, "batch tokens"]]:
    """Index, features and assignment of the dominant tokens followed by the complement tokens."""
    count = dominant.shape[1]
    index = torch.cat([dominant, gather(rest, merged.centres)], 1)
    ordinals = torch.arange(index.shape[1], device=index.device).expand_as(index)
    went_to = torch.where(merged.assignment >= 0, merged.assignment + count, -1)
    assignment = rest.new_empty(features.shape[:2]).scatter(1, rest, went_to).scatter(1, index, ordinals)
    return index, torch.cat([gather(features, dominant), merged.features], 1), assignment
