"""The course that VisionTrim's stages share: dominant tokens by a score, complement tokens among the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.signals import Text
from visiontrim.core.view import Keep, View
from visiontrim.ops.complement import Merge, Scores, complement
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
    features = gather(view.content, rest)
    merged = complement(
        features,
        features if guide.joint is view.content else gather(guide.joint, rest),
        guide.text.tokens,
        guide.text.mask,
        added,
        scale=guide.scale,
        cosine=guide.cosine,
        scores=scores,
        merge=merge,
        iterations=iterations,
    )
    index = torch.cat([index, gather(rest, merged.centres)], 1)
    features = torch.cat([gather(view.content, index[:, :dominant]), merged.features], 1)
    ordinals = torch.arange(dominant + added, device=index.device)
    order = index.argsort(1) if raster else ordinals.expand_as(index)
    place = order.argsort(1) if raster else order
    # where a leftover went: the place of its centre among the outputs, -1 if no round took it up
    went_to = place.gather(1, (merged.assignment + dominant).clamp(min=0))
    went_to = went_to.masked_fill(merged.assignment < 0, -1)
    assignment = torch.empty_like(score, dtype=torch.long).scatter(1, rest, went_to).scatter(1, index, place)
    return Keep(gather(index, order), gather(features, order), assignment, order >= dominant)
