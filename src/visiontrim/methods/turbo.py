"""Turbo: merge the most similar tokens after every layer of the vision encoder, but spare those that [CLS] looks at.

"Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Large Models", ECCV 2024, arXiv 2407.11717. The
official code has no licence, so from its description. The score of an edge is the cosine of the keys less 30 alpha
times the attention that [CLS] pays to the source in that layer; the factor 30 stands in the code only. Everything else
is ToMe, which ``alpha=0`` gives.

Differences: those of :mod:`.tome`. Without [CLS], attention received stands for its attention. The decay over layers,
off by default in the original, and the token dropping in the text encoder of BLIP are not here.

As in ToMe, work grows with the square of the tokens, and a product of a fourth of all pairs is nearly all there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import View
from visiontrim.methods.base import cls_attention
from visiontrim.methods.checks import require
from visiontrim.methods.matching import Matching
from visiontrim.ops.matching import Merged, match, merge_into


@register
@dataclass(frozen=True)
class Turbo(Matching):
    """Hyper-parameters of Turbo. Raises :class:`~visiontrim.core.errors.TrimError` for values that cannot work."""

    alpha: float = 1.0
    """Weight of the attention of [CLS], in units of 30 cosines."""

    name: ClassVar[str] = "turbo"
    summary: ClassVar[str] = "merges similar tokens after every encoder layer, and spares those that [CLS] attends to"
    paper: ClassVar[str] = "arXiv 2407.11717, ECCV 2024"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, f"alpha={self.alpha} would merge what [CLS] attends to: give 0 or more")

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({"encoder.keys", "encoder.cls_attention"})

    def merged(self, view: View, count: int) -> Merged:
        keys = view.encoder.keys.float().mean(1)
        penalty = 30 * self.alpha * cls_attention(view)
        return merge_into(view.content, view.encoder.mass, *match(keys, count, penalty))
