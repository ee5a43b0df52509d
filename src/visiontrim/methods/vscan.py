"""VScan: patches by [CLS] attention of two encoder layers, merged, then a prune between decoder layers.

"VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models", TMLR 2026, arXiv 2505.22654.
Official code: Tencent/SelfEvolvingAgent, VScan, MIT.

1. Vision stage: half of the budget are local patches by the attention of [CLS] in the encoder layer ``shallow``, at
   most an equal part of them, rounded up, from each ``window`` x ``window`` square; the rest are global ones, by that
   in the layer whose output is projected. Each other patch is merged into the kept one nearest by the cosine, as the
   mean of the cluster; both after the projector.
2. Language stage: before decoder layer ``layer``, the tokens stay that the last position attends to most with that
   layer's queries and keys.

``keep`` is the mean number per decoder layer. Three times as many tokens enter as go on from ``layer``, in the middle
of 32 layers: 192 = 288 -> 96, 128 = 192 -> 64, 64 = 96 -> 32 as published; a pair sets both. Positions are consecutive.
On Qwen2.5-VL the authors have window 4, shallow 7, layer 14 of 28, and original positions.

Differences: where half the budget is no multiple of the number of windows, the best windows give one more, as in the
authors' code for Qwen (that for LLaVA then keeps fewer tokens than asked for, and fails below two a window). Without
[CLS], the attention received from the other patches ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visiontrim.core.budget import Amount, check_amount, second_stage, split_two_stage
from visiontrim.core.method import DecoderLayer, Method, Positions, Site, Step, VisionOutput
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import cls_attention
from visiontrim.methods.checks import check_fields, require
from visiontrim.ops.groups import rank_within
from visiontrim.ops.merge import merge_into_nearest
from visiontrim.ops.select import top_k
from visiontrim.ops.windows import windows

FUNNEL = 3.0
"""Tokens that enter the language model for each one that the language stage leaves."""


@register
@dataclass(frozen=True)
class VScan(Method):
    keep: Amount | tuple[int, int] = 64
    """Mean number of vision tokens per decoder layer and image, or that as a fraction of the image's tokens; with the
    vision stage alone, the number that enters the language model. A pair gives the counts after either stage."""
    stages: Literal["vision", "both"] = "both"
    """Where tokens are removed."""
    window: int = 6
    """Side of the windows that share the local half, in patches."""
    shallow: int = 5
    """Encoder layer of the local scores, counted from 0, or from the last one if negative."""
    layer: int = 16
    """Decoder layers before the language stage."""

    name: ClassVar[str] = "vscan"
    summary: ClassVar[str] = "patches by [CLS] in windows and globally, merged, then a prune between decoder layers"
    paper: ClassVar[str] = "arXiv 2505.22654, TMLR 2026"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        DecoderLayer(self.layer)
        require(self.window >= 1, f"window={self.window} holds no patch: give at least 1")
        if not isinstance(self.keep, tuple):
            check_amount(self.keep)
            return
        way_out = "give two ints, the first at least as large as the second, together with stages='both'"
        require(self.stages == "both", f"keep={self.keep} counts two stages, but there is one: {way_out}")
        whole = len(self.keep) == 2 and all(type(count) is int for count in self.keep)
        require(whole and 1 <= self.keep[1] <= self.keep[0], f"keep={self.keep} is no pair of counts: {way_out}")

    @property
    def positions(self) -> Positions:
        return "compact"

    def steps(self) -> tuple[Step, ...]:
        vision = _VisionStage(self)
        return (vision,) if self.stages == "vision" else (vision, _LanguageStage(self))

    def entering(self, view: View) -> int:
        """Tokens that the vision stage leaves of the image."""
        if isinstance(self.keep, tuple):
            return view.count(self.keep[0], view.total, "keep[0]")
        mean = view.count(self.keep, view.total)
        if self.stages == "vision":
            return mean
        return split_two_stage(mean, view.total, self.layer, view.num_layers, FUNNEL)[0]

    def remaining(self, view: View) -> int:
        """Tokens that the language stage leaves of the image."""
        if isinstance(self.keep, tuple):
            return view.count(self.keep[1], name="keep[1]")
        return second_stage(view.count(self.keep, view.total), view.entered, self.layer, view.num_layers)


@dataclass(frozen=True)
class _VisionStage(Step):
    method: VScan

    name: ClassVar[str] = "vscan"
    summary: ClassVar[str] = "the vision stage of VScan"
    paper: ClassVar[str] = VScan.paper

    @property
    def site(self) -> Site:
        return VisionOutput()

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.cls_attention", ("encoder.cls_attention", self.method.shallow), "encoder.projected"})

    def select(self, view: View) -> Keep:
        count = self.method.entering(view)
        if count >= view.features.shape[1]:
            return Keep.everything(view)
        window, number = windows(view.coordinates, view.grid, self.method.window)
        shallow, half = cls_attention(view, self.method.shallow), count // 2
        best = rank_within(window, shallow) < -(-half // number)
        local = torch.zeros_like(best).scatter(1, top_k(shallow.masked_fill(~best, -1.0), half), True) & best
        # probabilities are at most 1, so local patches come before every global one
        index = top_k(cls_attention(view) + 2 * local, count)
        merged = merge_into_nearest(view.projected_content, view.encoder.projected, index, "mean")
        return Keep(index, None, merged.assignment, merged.members > 0, projected=merged.features)


@dataclass(frozen=True)
class _LanguageStage(Step):
    method: VScan

    name: ClassVar[str] = "vscan"
    summary: ClassVar[str] = "the language stage of VScan"
    paper: ClassVar[str] = VScan.paper

    @property
    def site(self) -> Site:
        return DecoderLayer(self.method.layer)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"decoder.next_attention"})

    def select(self, view: View) -> Keep:
        count = self.method.remaining(view)
        if count >= view.features.shape[1]:
            return Keep.everything(view)
        return Keep(top_k(view.decoder.next_attention, count))
