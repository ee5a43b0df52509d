"""What the published methods at the output of the vision encoder have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.budget import Amount, check_amount
from visiontrim.core.method import Positions, Site, Step, VisionOutput
from visiontrim.core.view import Keep, View
from visiontrim.methods.checks import check_fields
from visiontrim.ops.merge import Rule, merge_into_nearest
from visiontrim.ops.select import gather, leftovers


@dataclass(frozen=True)
class EncoderStep(Step):
    """Chooses among the patches before the language model starts, so survivors get consecutive positions."""

    keep: Amount = 64
    """Tokens of each image that enter the language model, as a number or as a fraction."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_amount(self.keep)

    @property
    def site(self) -> Site:
        return VisionOutput()

    @property
    def positions(self) -> Positions:
        return "compact"

    def select(self, view: View) -> Keep:
        count = view.count(self.keep)
        return Keep.everything(view) if count >= view.features.shape[1] else self.choose(view, count)

    @abstractmethod
    def choose(self, view: View, count: int) -> Keep:
        """Keep ``count`` tokens, at least one and not all."""


def cls_attention(view: View, layer: int | None = None) -> Float[Tensor, "batch tokens"]:
    """Attention of [CLS] in the scored encoder layer or in ``layer``; attention received where there is no [CLS]."""
    bare = ("cls_attention", layer) not in view.encoder and ("received_attention", layer) in view.encoder
    return view.encoder["received_attention" if bare else "cls_attention", layer].float()


def by_frame(view: View, values: Float[Tensor, "batch tokens *rest"]) -> Float[Tensor, "batch frames places *rest"]:
    """Values of a video's tokens, float32, frame by frame."""
    return values.float().view(len(values), view.grid[0], -1, *values.shape[2:])


def with_clusters(
    view: View,
    alone: Int[Tensor, "batch alone"],
    centres: Int[Tensor, "batch centres"],
    space: Float[Tensor, "batch tokens space"],
    rule: Rule,
) -> Keep:
    """Keep ``alone`` as they are, then ``centres`` (ascending), which take up all others by the cosine in ``space``."""
    tokens, first = view.features.shape[1], alone.shape[1]
    rest = leftovers(alone, tokens)
    place = torch.empty_like(rest[:, :1]).expand(-1, tokens).clone()
    place.scatter_(1, rest, torch.arange(rest.shape[1], device=rest.device).expand_as(rest))
    merged = merge_into_nearest(gather(view.content, rest), gather(space, rest), place.gather(1, centres), rule)
    index = torch.cat([alone, centres], 1)
    ordinals = torch.arange(index.shape[1], device=index.device).expand_as(index)
    assignment = place.scatter(1, rest, merged.assignment + first).scatter(1, index, ordinals)
    features = torch.cat([gather(view.content, alone), merged.features], 1)
    return Keep(index, features, assignment=assignment, complement=ordinals >= first)


def in_raster_order(keep: Keep) -> Keep:
    """The same outputs by ascending index."""
    order = keep.index.argsort(1)

    def sorted_(values: Tensor | None) -> Tensor | None:
        return None if values is None else gather(values, order)

    assignment = keep.assignment
    if assignment is not None:
        place = order.argsort(1).gather(1, assignment.clamp(min=0))
        assignment = torch.where(assignment < 0, -1, place)
    index = keep.index.gather(1, order)
    return Keep(index, sorted_(keep.features), assignment, sorted_(keep.complement), sorted_(keep.projected))
