"""V2Drop: drop the tokens that the last decoder layer hardly changed.

"Variation-aware Vision Token Dropping for Faster Large Vision-Language Models", CVPR 2026, arXiv 2509.01552;
github.com/xuyang-liu16/V2Drop, Apache-2.0.

Before a stage's decoder layer, the score of a token is the Euclidean norm of what the layer before added to its hidden
state. No attention is read. Survivors keep their position ids.

The paper gives shares to prune of the tokens that are left: 50 / 70 / 100 % (192 tokens on average), 72 / 75 / 100 %
(128), 95 / 95 / 100 % (64), the last of which drops every vision token. The released LLaVA code has 50 / 50 % and one
token at the end, ``keep=(0.5, 0.5, 1)``, a mean of 202.8; its Qwen2-VL code ``keep=(0.25, 0.05, 1)`` before layers 3,
16 and 22.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visiontrim.core.budget import Depth
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.ops.select import top_k


@register
@dataclass(frozen=True)
class V2Drop(Cascade):
    keep: Counts = (0.5, 0.3, 0)
    """Mean number of vision tokens per decoder layer (int) or its fraction (float); a tuple gives the share or number
    that every stage leaves."""
    layers: tuple[Depth, ...] = (3 / 32, 17 / 32, 22 / 32)
    """Decoder layers before which tokens are removed: indices, or fractions of the depth."""

    name: ClassVar[str] = "v2drop"
    summary: ClassVar[str] = "drops the tokens that the layer before changed least"
    paper: ClassVar[str] = "arXiv 2509.01552, CVPR 2026"

    @property
    def depths(self) -> tuple[Depth, ...]:
        return self.layers

    @property
    def proportions(self) -> tuple[float, ...]:
        # 0.3 of what arrives at the second stage, and none after the last
        return (0.5, 0.15, 0.0) if len(self.layers) == 3 else super().proportions

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"decoder.previous"})

    def choose(self, view: View, count: int) -> Keep:
        update = view.features.float() - view.decoder.previous.float()
        return Keep(top_k(torch.linalg.vector_norm(update, dim=-1), count))
