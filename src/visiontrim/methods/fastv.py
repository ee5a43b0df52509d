"""FastV: after a few decoder layers, keep the tokens that the end of the prompt attends to most.

"An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models",
ECCV 2024, arXiv 2403.06764; github.com/pkunlp-icler/FastV, which has no licence, so nothing is taken from it.

Before decoder layer K, the score of a token is its attention from the last position of the prompt in layer K - 1, mean
over heads; the rest is dropped for good, and survivors keep their position ids.

The paper speaks of attention received from all tokens; its authors confirm that the last row is what is used. They
re-rank at every generated token without a cache; with one, as here, the tokens are ranked once. The row is read by
itself, no map is built and no layer runs twice. With padding on the left it is the last real position's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visiontrim.core.budget import Depth
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.ops.select import top_k


@register
@dataclass(frozen=True)
class FastV(Cascade):
    keep: Counts = (0.5,)
    """Mean number of vision tokens per decoder layer (int) or its fraction (float); a 1-tuple gives what is left from
    ``layer`` on: the paper's R = 50 % is ``(0.5,)``."""
    layer: Depth = 2
    """Decoder layer K before which tokens are removed: its index, or a fraction of the depth."""

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "keeps what the last position of the prompt attends to in the layer before"
    paper: ClassVar[str] = "arXiv 2403.06764, ECCV 2024"
    text_aware: ClassVar[bool] = True

    @property
    def depths(self) -> tuple[Depth, ...]:
        return (self.layer,)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"decoder.last_attention"})

    def choose(self, view: View, count: int) -> Keep:
        return Keep(top_k(view.decoder.last_attention, count))
