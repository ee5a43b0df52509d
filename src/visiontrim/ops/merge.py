"""Merging: tokens that take up others."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.ops.groups import rank_within
from visiontrim.ops.select import gather

Rule = Literal["mean", "add", "halve"]
"""What a centre becomes: the mean of itself and its members, itself plus the mean of its members, or what is left when
it is replaced by its mean with each member in turn, in the order of their indices."""


class Merged(NamedTuple):
    """What :func:`merge_into_nearest` returns."""

    features: Float[Tensor, "batch centres dim"]
    """The centres, in the order of ``index``; one without members is unchanged."""
    assignment: Int[Tensor, "batch tokens"]
    """Position in ``index`` that each token went to; of a centre, its own."""
    members: Int[Tensor, "batch centres"]
    """Tokens that each centre took up, itself not counted."""


def merge_into_nearest(
    features: Float[Tensor, "batch tokens dim"],
    space: Float[Tensor, "batch tokens space"],
    index: Int[Tensor, "batch centres"],
    rule: Rule,
) -> Merged:
    """Merge every token into the centre of ``index`` that is nearest to it by the cosine in ``space``.

    Of equally near centres the earlier one in ``index`` takes it. float32 inside, ``features`` come back in their
    dtype. Holds O(tokens x centres) numbers.
    """
    values = features.float()
    unit = F.normalize(space.float(), dim=-1)
    centres = gather(values, index)
    ordinals = torch.arange(index.shape[1], device=index.device).expand_as(index)
    own = torch.full(features.shape[:2], -1, device=index.device).scatter(1, index, ordinals)
    nearest = (unit @ gather(unit, index).mT).argmax(-1)
    assignment = torch.where(own < 0, nearest, own)
    weights = torch.zeros(*features.shape[:2], index.shape[1], device=features.device)
    weights.scatter_(-1, nearest[..., None], (own < 0).float()[..., None])
    members = weights.sum(1)[..., None]
    if rule == "halve":
        position = torch.arange(features.shape[1], device=features.device).expand_as(own).float()
        later = rank_within(assignment, position, own >= 0)  # members of the same centre that come after
        weights = weights * 0.5 ** (later + 1.0)[..., None]
    total = weights.mT @ values
    if rule == "halve":
        merged = centres * 0.5**members + total
    else:
        merged = (centres + total) / (1 + members) if rule == "mean" else centres + total / members.clamp(min=1)
    merged = torch.where(members > 0, merged, centres)
    return Merged(merged.to(features.dtype), assignment, members[..., 0].long())


def add_neighbours(
    features: Float[Tensor, "batch tokens dim"],
    space: Float[Tensor, "batch tokens space"],
    weight: Float[Tensor, "batch tokens"],
    index: Int[Tensor, "batch kept"],
    *,
    neighbours: int = 32,
    average: bool = True,
) -> Float[Tensor, "batch kept dim"]:
    """Add to each token of ``index`` its nearest ``neighbours`` (by the cosine in ``space``, of all other tokens).

    With ``average`` the mean of token and neighbours, weighted by ``weight``; else the token itself plus the weighted
    sum of its neighbours. float32 inside, ``features`` come back in their dtype. Holds O(kept x tokens) numbers.
    """
    values, weight = features.float(), weight.float()
    unit = F.normalize(space.float(), dim=-1)
    cosine = (gather(unit, index) @ unit.mT).scatter(-1, index[..., None], -torch.inf)
    neighbours = min(neighbours, features.shape[1] - 1)
    nearest = cosine.sort(dim=-1, descending=True, stable=True).indices[..., :neighbours]
    of_all = weight[:, None].expand_as(cosine)
    weights = torch.zeros_like(cosine).scatter(-1, nearest, of_all.gather(-1, nearest))
    own = weight.gather(1, index)[..., None] if average else 1.0
    total = own * gather(values, index) + weights @ values
    if average:
        total = total / (own + weights.sum(-1, keepdim=True)).clamp(min=torch.finfo(total.dtype).tiny)
    return total.to(features.dtype)
