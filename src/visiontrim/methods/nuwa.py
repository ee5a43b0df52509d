"""Nüwa: salient patches of every small cell gather their neighbourhood, and keep their places on the picture.

"Nüwa: Mending the Spatial Integrity Torn by VLM Token Pruning", ICLR 2026, arXiv 2602.02951. Official code:
Man-PaperRejected/Nuwa, Apache-2.0. Made for grounding: position ids are those of the whole picture from the first
decoder layer on (``positions="keep"``), which the paper holds for the larger part of its gain.

1. Score: the attention of [CLS], times the norm of the patch's key. The grid is tiled in cells of 2 x 2; the best
   ceil(M / cells) of each are candidates, and of these the M best of all enter, in raster order.
2. With w_ij = max(0, cos(x_i, x_j)) max(0, 1 - d_ij / R), d the distance on the grid, an entering patch becomes the
   mean of all patches of its frame weighted by w_ij. Those whose score reaches the ``pillars`` quantile of the entering
   ones stay as they are.
3. Before decoder layer 16 of 32, those of the M stay whose hidden state has the highest mean cosine with the text's.

``keep`` is the mean per layer, and seven enter for one that goes on: 192 = 336 -> 48, 128 = 224 -> 32, 64 = 112 -> 16.
R is sqrt(280) on 24 x 24, a ``radius`` of 0.514 of the largest distance; on Qwen 0.8 of it, with ``pillars=0.9``.

``variant="code"`` is the released code: no norm of keys; the weight of a patch in its own mean is 1 after the others
were normalised, so that the vector grows up to twofold; the second stage ranks by the attention of the last position.

Differences: w compares the features that are projected, where the original has the mean of the hidden states 16 to 24
of CLIP-L. The norm of a key is over all heads. Cells at an odd border are smaller; where cells have too few candidates,
the next best of all cells follow. Holds entering x tokens numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import cls_attention
from visiontrim.methods.checks import require
from visiontrim.methods.twostage import TwoStage
from visiontrim.ops.groups import rank_within
from visiontrim.ops.select import gather, top_k


@register
@dataclass(frozen=True)
class Nuwa(TwoStage):
    radius: float = 0.514
    """Distance from which on nothing is gathered, as a share of the largest one on the grid."""
    pillars: float = 0.55
    """Quantile of the entering scores from which on a patch gathers nothing."""
    variant: Literal["paper", "code"] = "paper"

    name: ClassVar[str] = "nuwa"
    summary: ClassVar[str] = "salient patches of every cell gather their neighbourhood, at their own places"
    paper: ClassVar[str] = "arXiv 2602.02951, ICLR 2026"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.radius > 0, f"radius={self.radius}: give a share of the largest distance above 0, such as 0.514")
        require(0 <= self.pillars <= 1, f"pillars={self.pillars} is no quantile: give a number in [0, 1]")

    @property
    def funnel(self) -> float:
        return 7.0

    @property
    def vision_needs(self) -> frozenset[Signal]:
        attention = {"encoder.cls_attention"}
        return frozenset(attention if self.variant == "code" else attention | {"encoder.keys"})

    @property
    def language_needs(self) -> frozenset[Signal]:
        return frozenset({"decoder.last_attention"} if self.variant == "code" else {"text.question"})

    def choose(self, view: View, count: int) -> Keep:
        score = cls_attention(view)
        if self.variant == "paper":
            score = score * torch.linalg.vector_norm(view.encoder.keys.float(), dim=(1, 3))
        index = balanced_picks(score, view, count)
        kept = score.gather(1, index)
        gathers = kept < kept.quantile(self.pillars, dim=-1, keepdim=True)
        weight = self.weights(view, index) * gathers[..., None]
        own = torch.zeros_like(weight).scatter(-1, index[..., None], 1.0)
        share = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        if self.variant == "code":
            share = share * (1 - own) + own
        share = torch.where(gathers[..., None] & (weight.sum(-1, keepdim=True) > 0), share, own)
        features = (share @ view.content.float()).to(view.features.dtype)
        features = torch.where(gathers[..., None], features, gather(view.content, index))
        best, home = weight.max(1)
        home = torch.where(best > 0, home, -1)  # what nobody gathers is lost
        ordinals = torch.arange(count, device=index.device).expand_as(index)
        return Keep(index, features, home.scatter(1, index, ordinals), gathers)

    def weights(self, view: View, index: Int[Tensor, "batch kept"]) -> Float[Tensor, "batch kept tokens"]:
        """w of the patches of ``index`` and all patches, 0 in other frames."""
        unit = F.normalize(view.features.float(), dim=-1)
        cosine = (gather(unit, index) @ unit.mT).clamp(min=0)
        _, rows, columns = view.grid
        largest = max(1.0, ((rows - 1) ** 2 + (columns - 1) ** 2) ** 0.5)
        frame, places = view.coordinates[..., 0], view.coordinates[..., 1:].float()
        apart = torch.cdist(gather(places, index), places, compute_mode="donot_use_mm_for_euclid_dist")
        near = (1 - apart / (self.radius * largest)).clamp(min=0)
        return cosine * near * (frame.gather(1, index)[..., None] == frame[:, None])

    def prune(self, view: View, count: int) -> Keep:
        if self.variant == "code":
            return Keep(top_k(view.decoder.last_attention, count))
        text = view.text.question
        words = F.normalize(text.tokens.float(), dim=-1) * text.mask[..., None]
        # the mean of cosines, but for the number of words
        return Keep(top_k((F.normalize(view.features.float(), dim=-1) @ words.sum(1)[..., None])[..., 0], count))


def balanced_picks(score: Float[Tensor, "batch tokens"], view: View, count: int) -> Int[Tensor, "batch {count}"]:
    """The best ``count`` of the candidates, ascending: of each cell of 2 x 2 the best ceil(count / cells)."""
    frames, rows, columns = view.grid
    down, across = (rows + 1) // 2, (columns + 1) // 2
    frame, row, column = view.coordinates.long().unbind(-1)
    cell = (frame * down + row // 2) * across + column // 2
    each = -(-count // (frames * down * across))
    beyond = (rank_within(cell, score) - each + 1).clamp(min=0)
    place = score.argsort(dim=1, descending=True, stable=True).argsort(1)
    return top_k(-(beyond * score.shape[1] + place).float(), count)
