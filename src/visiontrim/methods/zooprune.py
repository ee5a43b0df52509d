"""ZOO-Prune: patches to which the projector is sensitive, times their distance from those already kept.

"ZOO-Prune", CVPR 2026, arXiv 2509.24837. Its repository, AIM-SKKU/ZOO-Prune, holds no code: this is its equations.

The sensitivity S of a patch is the norm of the projector's derivative along a unit vector, mean over 64 of them, by
central differences of step 0.01 (``encoder.sensitivity``). The most sensitive patch is kept first, then again and again
the one with the highest S, scaled to [0, 1], times one minus its largest cosine with a kept patch, after the projector.
Raster order, consecutive positions. No attention is read.

``score="norm"`` takes the norm of the features: the ablation that S must beat. Where there is no projector that maps
each token by itself (Qwen's merger joins 2 x 2 patches first), it takes the place of S; there S is reported to rank
like the norm. Where S differs by less than a thousandth, as in a linear projector, it counts as equal for all.

``centred`` takes cosines of the patches minus their mean (Cen-Prune, arXiv 2608.30263, whose further factor, a raw
distinctiveness, is not here). ``divprune:centred=true`` does so there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep
from visiontrim.ops.greedy import centred, minmax, picks_by_worth

ROUNDING = 1e-3
"""Relative differences of sensitivities that the difference quotient's rounding can make."""


@register
@dataclass(frozen=True)
class ZOOPrune(EncoderStep):
    score: Literal["sensitivity", "norm"] = "sensitivity"
    centred: bool = False
    """Whether cosines are of the patches minus their mean."""

    name: ClassVar[str] = "zoo-prune"
    summary: ClassVar[str] = "patches that the projector is sensitive to, far from those kept"
    paper: ClassVar[str] = "arXiv 2509.24837, CVPR 2026"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected"} | ({"encoder.sensitivity"} if self.score == "sensitivity" else set()))

    def choose(self, view: View, count: int) -> Keep:
        score = self.sensitivity(view)
        low, high = score.aminmax(dim=-1, keepdim=True)
        equal = high - low <= ROUNDING * high
        score = torch.where(equal, 1.0, minmax(score))
        projected = view.encoder.projected
        space = centred(projected) if self.centred else projected
        return Keep(picks_by_worth(space, score, lambda nearest: score * (1 - nearest), count).sort(1).values)

    def sensitivity(self, view: View) -> Float[Tensor, "batch tokens"]:
        """S, or the norm."""
        known = view.encoder.get("sensitivity") if self.score == "sensitivity" else None
        return torch.linalg.vector_norm(view.features.float(), dim=-1) if known is None else known.float()
