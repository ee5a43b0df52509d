"""HoloV: every strip of the picture has a quota, which its attention decides, and keeps what [CLS] attends to there.

"Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", NeurIPS 2025, arXiv
2510.02912. Official code: obananas/HoloV, Apache-2.0.

1. The tokens in raster order are cut into ``strips`` of equal length, 1.5 rows each on 24 x 24.
2. The score of a token is its attention from [CLS] plus ``weight`` times the variance of its cosines with the others of
   its strip, scaled to the mean of the attention. Quotas are in proportion to the mean scores of the strips.
3. In each strip the tokens with the most attention stay. Raster order, consecutive positions.

``variant="paper"`` scales the variance by means over the whole picture. ``variant="code"`` scales it in each strip by
itself, as released, so that every strip has the same mean of it: it cannot change a quota, and a strip gets its share
of the attention, whatever ``weight`` is.

Differences: what a quota has above its strip's size goes to the strips with room, where the code appends zero vectors;
quotas are the whole numbers nearest to the shares, where it gives what floors leave to the largest weights in turn.
Strips are 16 at most, and one a token at most.

The variance is over all pairs inside a strip, and strips grow with the picture: a sixteenth of N x N cosines, so work
grows with the square of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, cls_attention
from visiontrim.methods.checks import require
from visiontrim.ops.groups import nearest_counts, rank_within
from visiontrim.ops.select import top_k

TINY = 1e-6


@register
@dataclass(frozen=True)
class HoloV(EncoderStep):
    strips: int = 16
    """Runs of tokens in raster order that share the budget."""
    weight: float = 0.09
    """Weight of the variance."""
    variant: Literal["paper", "code"] = "paper"

    name: ClassVar[str] = "holov"
    summary: ClassVar[str] = "a quota for every strip of the picture, in it what [CLS] attends to"
    paper: ClassVar[str] = "arXiv 2510.02912, NeurIPS 2025"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.strips >= 1, f"strips={self.strips}: give at least 1")
        require(self.weight >= 0, f"weight={self.weight}: give 0 or more")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.cls_attention"})

    def choose(self, view: View, count: int) -> Keep:
        attention = cls_attention(view)
        sizes = torch.tensor(strip_sizes(attention.shape[1], self.strips), device=attention.device)
        strip = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes).expand_as(attention)
        score = attention
        if self.variant == "paper" and self.weight:
            variance = torch.cat([_variance(part) for part in view.features.split(sizes.tolist(), 1)], 1)
            scale = attention.mean(1, keepdim=True) / (variance.mean(1, keepdim=True) + TINY)
            score = attention + self.weight * variance * scale
        mean = score.new_zeros(len(score), len(sizes)).scatter_add(1, strip, score) / sizes
        share = mean / mean.sum(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
        quota = nearest_counts(count * share, sizes.expand_as(mean), count)
        kept = rank_within(strip, attention) < quota.gather(1, strip)
        return Keep(top_k(kept.float(), count))


def strip_sizes(tokens: int, strips: int) -> list[int]:
    """Lengths of the strips; the first ones have a token more where it does not divide."""
    strips = min(strips, tokens)
    return [tokens // strips + (number < tokens % strips) for number in range(strips)]


def _variance(features: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens"]:
    """Of the cosines of each token with the others, of which its own is a 0 that counts, as in the original."""
    unit = F.normalize(features.float(), dim=-1)
    cosine = unit @ unit.mT
    cosine.diagonal(dim1=1, dim2=2).zero_()
    others = max(1, cosine.shape[-1] - 1)
    mean = cosine.sum(-1, keepdim=True) / others
    return (cosine - mean).square().sum(-1) / others
