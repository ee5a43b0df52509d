"""ADSC (a reading): thin out the tokens evenly in stages, whatever they show.

"Attention-Driven Self-Compression", arXiv 2602.12618; no official code was found. The abstract says that at selected
layers a uniform subset of the vision tokens goes on, and that the model reorganises its information for these
bottlenecks, which points to training. This is the operator by itself, without training: not a reproduction, but the
null hypothesis that every method with a score has to beat at the same mean per layer.

Of n tokens in raster order, the k centres of equal intervals stay; survivors keep their position ids. Layers and
strides are not published: the defaults halve the tokens after every quarter of the decoder, which comes near the
published saving of 53.7 % of the FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visiontrim.core.budget import Depth
from visiontrim.core.registry import register
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.ops.select import even_stride


@register
@dataclass(frozen=True)
class ADSC(Cascade):
    keep: Counts = (0.5, 0.5, 0.5)
    """Mean number of vision tokens per decoder layer (int) or its fraction (float); a tuple gives the share or number
    that every stage leaves."""
    layers: tuple[Depth, ...] = (8 / 32, 16 / 32, 24 / 32)
    """Decoder layers before which tokens are removed: indices, or fractions of the depth."""

    name: ClassVar[str] = "adsc"
    summary: ClassVar[str] = "thins out the tokens evenly in stages (a reading, without its training)"
    paper: ClassVar[str] = "arXiv 2602.12618; a reading, untrained"

    @property
    def depths(self) -> tuple[Depth, ...]:
        return self.layers

    def choose(self, view: View, count: int) -> Keep:
        batch, tokens = view.features.shape[:2]
        return Keep(even_stride(tokens, count).to(view.features.device).expand(batch, count))
