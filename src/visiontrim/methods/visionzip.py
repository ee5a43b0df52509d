"""VisionZip: dominant patches by [CLS] attention, contextual ones that carry the rest.

"VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv 2412.04467. Official code:
dvlab-research/VisionZip, Apache-2.0.

Dominant patches have the highest attention of [CLS] in the encoder layer whose output is projected. Of the others,
every n-th in raster order is a target; the rest goes to the target whose key, mean over heads, is nearest by the
cosine. Targets follow the dominant ones. Published: 192 = 162 + 30, 128 = 108 + 20, 64 = 54 + 10, the ``split`` of
27 : 5. Positions are consecutive.

Differences:

- The published dominant count includes [CLS], which transformers' LLaVA never projects: the next patch has its place,
  so 64 are 54 + 10 patches here. It is one of those that would be targets or go to them there, so that the targets
  behind its place are each one patch further on, also with ``variant="release"``.
- A contextual token is the mean of its cluster, as in the paper; in the released code (``variant="release"``) it is the
  target *plus* the mean of the others, and its norm may double.
- Without [CLS], the attention received from the other patches ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, cls_attention, with_clusters
from visiontrim.methods.checks import require
from visiontrim.ops.select import gather, leftovers, top_k


@register
@dataclass(frozen=True)
class VisionZip(EncoderStep):
    split: float = 27 / 32
    """Share of dominant tokens among those kept."""
    variant: Literal["paper", "release"] = "paper"
    """Contextual tokens as means of their clusters, or as the released code has them."""

    name: ClassVar[str] = "visionzip"
    summary: ClassVar[str] = "dominant patches by [CLS], every n-th of the others takes up the rest"
    paper: ClassVar[str] = "arXiv 2412.04467, CVPR 2025"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.split <= 1, f"split={self.split} is no share: give a number in (0, 1], such as 0.84375")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.cls_attention", "encoder.keys"})

    def choose(self, view: View, count: int) -> Keep:
        dominant = max(1, round(self.split * count))
        alone = top_k(cls_attention(view), dominant)
        if dominant == count:
            return Keep(alone)
        rest = leftovers(alone, view.features.shape[1])
        step = rest.shape[1] // (count - dominant)
        targets = torch.arange(count - dominant, device=rest.device) * step
        centres = gather(rest, targets.expand(len(rest), -1))
        rule = "mean" if self.variant == "paper" else "add"
        return with_clusters(view, alone, centres, view.encoder.keys.float().mean(1), rule)
