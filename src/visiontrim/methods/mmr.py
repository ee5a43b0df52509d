"""MMR: important patches, each minus what it repeats of those already kept. The selection rule of IDPruner.

"IDPruner", arXiv 2602.13315; its code is in Tencent/AngelSlim, Apache-2.0. IDPruner proper ranks by a *trained* scorer,
whose weights are not here: this is its rule of choice alone, maximal marginal relevance, over a score that needs no
training, so its numbers are not IDPruner's.

With s the score scaled to [0, 1] and c cosines of the features, the patch with the highest s is kept first, then again
and again the one with the highest ``balance`` s_i - (1 - ``balance``) max_{kept j} c_ij. They go on in raster order.
``balance=1`` keeps the highest scores; 0 is DivPrune's rule, but for the first patch.

One outlier flattens s, since cosines weigh as much whatever it is: ``scale="rank"`` takes ranks instead. ``at_once``
takes several patches a round, as the original may: faster, and only near the greedy choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, cls_attention
from visiontrim.methods.checks import require
from visiontrim.ops.greedy import minmax, picks_by_worth


@register
@dataclass(frozen=True)
class MMR(EncoderStep):
    balance: float = 0.5
    """Weight of the score; that of the largest cosine is the rest of 1."""
    score: Literal["attention", "norm"] = "attention"
    """Attention of [CLS], or of all patches where there is none; or the norm of the features."""
    scale: Literal["minmax", "rank"] = "minmax"
    at_once: int = 1
    """Patches taken in a round."""

    name: ClassVar[str] = "mmr"
    summary: ClassVar[str] = "important patches, each minus what it repeats of those kept"
    paper: ClassVar[str] = "rule of arXiv 2602.13315, without its trained score"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.balance <= 1, f"balance={self.balance} is no share: give a number in [0, 1]")
        require(self.at_once >= 1, f"at_once={self.at_once}: give at least 1")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.cls_attention"} if self.score == "attention" else ())

    def choose(self, view: View, count: int) -> Keep:
        if self.score == "attention":
            score = cls_attention(view)
        else:
            score = torch.linalg.vector_norm(view.features.float(), dim=-1)
        if self.scale == "rank":
            score = score.argsort(dim=1, stable=True).argsort(1).float()
        score = minmax(score)

        def worth(nearest: torch.Tensor) -> torch.Tensor:
            return self.balance * score - (1 - self.balance) * nearest

        return Keep(picks_by_worth(view.features, score, worth, count, at_once=self.at_once).sort(1).values)
