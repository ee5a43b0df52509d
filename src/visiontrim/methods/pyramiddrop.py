"""PyramidDrop: after every quarter of the decoder, keep the half of the tokens that the instruction looks for.

"PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR 2025, arXiv
2410.17247; github.com/Cooperx521/PyramidDrop, MIT.

Before a stage's decoder layer, the score of a token is the attention that the last position of the prompt is about to
pay it there: queries and keys are those of the coming layer, with positions as they are then, softmax over everything
visible, mean over heads. Position ids are consecutive again after every stage.

The released code rounds a share of the original tokens down, here one of those that arrive, which is the same for the
published halves. It finds the first image of a prompt only; here every image drops its own tokens. The paper also
trains with the stages in place; this is the training-free use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visiontrim.core.budget import Depth
from visiontrim.core.method import Positions
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.ops.select import top_k


@register
@dataclass(frozen=True)
class PyramidDrop(Cascade):
    keep: Counts = (0.5, 0.5, 0.5)
    """Mean number of vision tokens per decoder layer (int) or its fraction (float); a tuple gives the share or number
    that every stage leaves: the paper's lambda = 0.5."""
    layers: tuple[Depth, ...] = (8 / 32, 16 / 32, 24 / 32)
    """Decoder layers before which tokens are removed: indices, or fractions of the depth."""

    name: ClassVar[str] = "pyramiddrop"
    summary: ClassVar[str] = "halves the tokens in stages, by the attention of the prompt's end in the coming layer"
    paper: ClassVar[str] = "arXiv 2410.17247, CVPR 2025"
    text_aware: ClassVar[bool] = True

    @property
    def depths(self) -> tuple[Depth, ...]:
        return self.layers

    @property
    def positions(self) -> Positions:
        return "compact"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"decoder.next_attention"})

    def choose(self, view: View, count: int) -> Keep:
        return Keep(top_k(view.decoder.next_attention, count))
