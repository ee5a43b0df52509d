"""DivPrune: the patches that are farthest from each other.

"DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv 2503.02175. The official
code, vbdi/divprune, is CC BY-NC and was not looked at: this is written from the paper's max-min problem.

Distance is one minus the cosine of projected patches. The first pick is the patch whose nearest neighbour is farthest
away, each next one the patch farthest from its nearest pick. They go on in raster order with consecutive positions.
Published: 9.8 % of the patches, which matches the FLOPs of other methods; 192, 128, 64 by others.

Differences: the authors' tables were made with the picks in the order of their choice, their released code sorts them,
as here. Distances are float32 (half precision there, which may pick a patch twice). On LLaVA-NeXT it chooses once among
the patches of overview and tiles together, newlines included; here each segment has its share, and of 320 of 2,880
tokens 224 to 231 are the same.

The first pick compares all pairs of patches, once each: work grows with the square of the patches, memory does not.
These cosines are what a nearest neighbour is known by, so no exact form does much better: at 2,304 patches of width
4,096 25.7 GFLOP, of 44.7 with all of them. Each further pick reads all patches once and hangs on the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep
from visiontrim.ops.diverse import max_min_picks
from visiontrim.ops.greedy import centred


@register
@dataclass(frozen=True)
class DivPrune(EncoderStep):
    centred: bool = False
    """Whether cosines are of the patches minus their mean (Cen-Prune, arXiv 2608.30263)."""

    name: ClassVar[str] = "divprune"
    summary: ClassVar[str] = "keeps the patches that are farthest from each other"
    paper: ClassVar[str] = "arXiv 2503.02175, CVPR 2025"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected"})

    def choose(self, view: View, count: int) -> Keep:
        projected = view.encoder.projected
        return Keep(max_min_picks(centred(projected) if self.centred else projected, count).sort(1).values)
