"""FasterVLM: keep the patches that [CLS] attends to.

"[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv 2412.01818 v1. Official code:
Theia-4869/FasterVLM, Apache-2.0.

The score is the attention of [CLS], mean over heads, in the encoder layer whose output is projected; the ``keep`` best
go on in raster order, with consecutive positions. Published settings: 144, 58 and 29 of 576 (75, 90 and 95 % removed).

Differences: none in what is kept. The official code projects all patches first; the projector maps each by itself, so
that is the same. Without [CLS], the attention received from the other patches ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, cls_attention
from visiontrim.ops.select import top_k


@register
@dataclass(frozen=True)
class FasterVLM(EncoderStep):
    name: ClassVar[str] = "fastervlm"
    summary: ClassVar[str] = "keeps the patches that [CLS] attends to"
    paper: ClassVar[str] = "arXiv 2412.01818 v1"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.cls_attention"})

    def choose(self, view: View, count: int) -> Keep:
        return Keep(top_k(cls_attention(view), count))
