"""HiPrune: objects by a middle layer of the encoder, with their neighbours, and the rest of the budget by a deep one.

"HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models", arXiv 2508.00553.
Official code: Danielement321/HiPrune, MIT.

The score of a layer is the mean attention that a patch receives from all tokens. Anchors are the ``keep * share / 5``
best patches of the layer ``middle``, buffers their four neighbours on the grid; the budget is filled with the best
patches (registers) of the layer whose output is projected. All go on in raster order with consecutive positions.
Published: 192, 128 and 64 tokens with share 0.1, so 4, 3 and 1 anchors; layer 8, counted from 0, of CLIP-L.

``variant="paper"`` takes neighbours on the grid. In ``variant="release"`` they are the raster indices before, after,
above and below, so a border patch has neighbours at the other end of the next row, and indices outside the image become
its first or last patch.

Differences: a budget too small for anchors and buffers takes anchors first. The tokens that HiPrune++ adds by the
question are not in the released code and left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep
from visiontrim.methods.checks import require
from visiontrim.ops.select import top_k
from visiontrim.ops.windows import crosses


@register
@dataclass(frozen=True)
class HiPrune(EncoderStep):
    middle: int = 8
    """Encoder layer that ranks objects, counted from 0, or from the last one if negative."""
    share: float = 0.1
    """Share of anchors and buffers among the kept tokens."""
    variant: Literal["paper", "release"] = "paper"
    """Neighbours on the grid, or of the raster index."""

    name: ClassVar[str] = "hiprune"
    summary: ClassVar[str] = "objects by a middle encoder layer with their neighbours, the rest by a deep one"
    paper: ClassVar[str] = "arXiv 2508.00553"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.share <= 1, f"share={self.share} is no share: give a number in [0, 1]")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.column_attention", ("encoder.column_attention", self.middle)})

    def choose(self, view: View, count: int) -> Keep:
        deep = view.encoder.column_attention.float()
        middle = view.encoder["column_attention", self.middle].float()
        best = top_k(middle, round(self.share * count / 5))
        anchors = torch.zeros_like(deep, dtype=torch.bool).scatter(1, best, True)
        if self.variant == "paper":
            buffers = crosses(anchors, view.coordinates, view.grid)
        else:
            columns, last = view.grid[2], deep.shape[1] - 1
            around = torch.cat([best + step for step in (-1, 1, -columns, columns)], 1).clamp(0, last)
            buffers = torch.zeros_like(anchors).scatter(1, around, True)
        # a mean of probabilities is at most 1, so anchors and buffers come before every register
        return Keep(top_k(deep + 2 * (anchors | buffers) + 2 * anchors, count))
