"""SCOPE: patches that cover the picture, each gain of cover times the attention that [CLS] pays to it.

"SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", NeurIPS 2025, arXiv 2510.24214.
Official code: kinredon/SCOPE, which has no licence but LLaVA's Apache-2.0; this is written from the equations.

A patch is covered as the kept patch most like it, by the cosine, and at least 0. Greedily, the patch goes in whose gain
of cover, summed over all patches, times its attention to the power ``alpha`` is largest. They go on in raster order,
with consecutive positions. ``alpha=0`` is facility location; a large one keeps what [CLS] attends to most.
``combine="add"`` is the other mode of the released code, the sum of both: the gain is hundreds of times larger there,
so that it is nearly plain cover.

Differences: float32, where the code sums 576 gains in half precision. Once every patch is covered, attention decides
(there the lowest index). A video is covered frame by frame, with equal counts: the cost grows with the square of what
is covered together, here one frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, cls_attention
from visiontrim.methods.checks import require
from visiontrim.ops.greedy import covering_picks
from visiontrim.ops.select import even_shares


@register
@dataclass(frozen=True)
class SCOPE(EncoderStep):
    alpha: float = 1.0
    """Power of the attention."""
    combine: Literal["multiply", "add"] = "multiply"

    name: ClassVar[str] = "scope"
    summary: ClassVar[str] = "patches that cover the picture and that [CLS] attends to"
    paper: ClassVar[str] = "arXiv 2510.24214, NeurIPS 2025"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, f"alpha={self.alpha} rewards what is not attended to: give 0 or more")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.cls_attention"})

    def choose(self, view: View, count: int) -> Keep:
        weight, features = cls_attention(view) ** self.alpha, view.features
        frames = view.grid[0] if view.total == features.shape[1] else 1  # of a whole video
        places, picks = features.shape[1] // frames, []
        for frame, share in enumerate(even_shares(count, frames)):
            if share:
                of_frame = slice(frame * places, (frame + 1) * places)
                add = self.combine == "add"
                picks.append(covering_picks(features[:, of_frame], weight[:, of_frame], share, add=add))
                picks[-1] = picks[-1] + frame * places
        return Keep(torch.cat(picks, 1).sort(1).values)
