"""Greedy choices that weigh the worth of a token against what those already taken say."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.ops.select import gather

Worth = Callable[[Float[Tensor, "batch tokens"]], Float[Tensor, "batch tokens"]]
"""What each token is worth when its largest cosine with one that is taken is this."""

ROUNDING = 1e-6
"""Differences of cosines below it are taken for rounding."""


def picks_by_worth(
    features: Float[Tensor, "batch tokens dim"],
    first: Float[Tensor, "batch tokens"],
    worth: Worth,
    count: int,
    *,
    at_once: int = 1,
) -> Int[Tensor, "batch {count}"]:
    """The token with the highest ``first``, then again and again those of the highest ``worth``, in order of choice.

    ``at_once`` tokens are taken in a round, which looks at the largest cosines as they were before it. Ties go to the
    lower index. float32; a row of cosines for each token that is taken, no map.
    """
    unit = F.normalize(features.float(), dim=-1)
    taken = torch.zeros(unit.shape[:2], dtype=torch.bool, device=unit.device)
    nearest = unit.new_full(unit.shape[:2], -torch.inf)
    picks, left, value = [taken[:, :0].long()], count, first
    while left:
        size = min(left, at_once if len(picks) > 1 else 1)
        value = value.masked_fill(taken, -torch.inf)
        pick = value.sort(dim=1, descending=True, stable=True).indices[:, :size]
        taken = taken.scatter(1, pick, True)
        nearest = torch.maximum(nearest, (unit @ gather(unit, pick).mT).amax(-1))
        value = worth(nearest)
        picks.append(pick)
        left -= size
    return torch.cat(picks, 1)


def covering_picks(
    features: Float[Tensor, "batch tokens dim"],
    weight: Float[Tensor, "batch tokens"],
    count: int,
    *,
    add: bool = False,
) -> Int[Tensor, "batch {count}"]:
    """Greedy cover of all tokens by cosines, each gain times ``weight`` (or plus it), in the order of choice.

    A token is covered as its most similar taken one is like it, at least 0; the gain of a token is the sum over all of
    what it would add. Once nothing adds, the weight alone decides; ties go to the lower index. float32. Holds tokens^2
    numbers and looks at all of them for every token that is taken, since each changes every gain.
    """
    unit = F.normalize(features.float(), dim=-1)
    cosine = unit @ unit.mT
    covered, more = cosine.new_zeros(*cosine.shape[:2], 1), torch.empty_like(cosine)
    taken = torch.zeros(cosine.shape[:2], dtype=torch.bool, device=cosine.device)
    picks = []
    for _ in range(count):
        more = torch.sub(cosine, covered, out=more)
        gain = F.threshold(more, ROUNDING, 0.0, inplace=True).sum(1)
        value = gain + weight if add else gain * weight
        nothing = (gain.masked_fill(taken, 0.0) == 0).all(-1, keepdim=True)
        value = torch.where(nothing, weight, value).masked_fill(taken, -torch.inf)
        pick = value.argmax(1, keepdim=True)
        taken = taken.scatter(1, pick, True)
        covered = torch.maximum(covered, gather(cosine, pick).mT)
        picks.append(pick)
    return torch.cat(picks, 1)


def minmax(values: Float[Tensor, "*batch tokens"]) -> Float[Tensor, "*batch tokens"]:
    """``values`` scaled to [0, 1] along the last axis; 0 where all are equal."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    return (values - low) / torch.where(high > low, high - low, 1.0)


def centred(features: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
    """``features`` minus their mean over the tokens, float32: what cosines are of once nothing is common to all."""
    return features.float() - features.float().mean(1, keepdim=True)
