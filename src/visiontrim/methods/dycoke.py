"""DyCoke: of four frames one whole, and of the others what it does not already show. The token merging, not decoding.

"DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025, arXiv 2411.15024. Official
code: KD-TAO/DyCoke, Apache-2.0.

Temporal token merging, which drops: in every group of four frames the first stays whole. The second and the fourth keep
the places that are least similar (cosine in the language model's space) to the frame before them, the third those least
similar to the first. Each keeps the same number; what does not divide goes evenly over the frames. Published: k = 0.7,
so 30 % of a frame, 370 of 4 x 196 tokens. Positions are consecutive.

``variant="release"``: the authors' loop stops before the last group, whose third frame stays whole: 3098 instead of
2960 tokens of 32 frames.

Differences: tokens stay in raster order, where the released code has them by similarity. It loses the last of an odd
number of frames and fails on four or fewer; here an incomplete group is treated as the beginning of one. A budget below
the frames that stay whole (a quarter; all of an image) thins these out to an even lattice, on which the method has no
say. The dynamic pruning of the cache in decoding, which frees no memory in the original, is not built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from visiontrim.core.budget import Amount
from visiontrim.core.registry import register
from visiontrim.core.view import Keep, Signal, View
from visiontrim.methods.base import EncoderStep, by_frame
from visiontrim.ops.frames import whole_frames_lattice
from visiontrim.ops.select import even_shares, top_k


@register
@dataclass(frozen=True)
class DyCoke(EncoderStep):
    keep: Amount = 0.475
    """Tokens of each video that enter the language model, as a number or as a fraction: (1 + 3 (1 - k)) / 4."""
    variant: Literal["paper", "release"] = "paper"
    """Every group alike, or the last one as the released code has it."""

    name: ClassVar[str] = "dycoke"
    summary: ClassVar[str] = "one frame of four whole, and of the others what differs from it"
    paper: ClassVar[str] = "arXiv 2411.15024, CVPR 2025"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"projected"})

    def choose(self, view: View, count: int) -> Keep:
        tokens = by_frame(view)
        batch, frames, places = tokens.shape[:3]
        earlier = {frame: frame - (1 if frame % 2 else 2) for frame in range(frames) if frame % 4}
        if self.variant == "release":
            earlier = {frame: other for frame, other in earlier.items() if frame % 2 or other < frames - 4}
        whole = [frame for frame in range(frames) if frame not in earlier]
        spare = count - len(whole) * places
        if spare < 0:
            return Keep(whole_frames_lattice(view.grid, whole, count).to(tokens.device).expand(batch, -1))
        pruned, others = list(earlier), list(earlier.values())
        similarity = F.cosine_similarity(tokens[:, pruned], tokens[:, others], dim=-1)
        rank = similarity.argsort(dim=-1, stable=True).argsort(-1)
        shares = torch.tensor(even_shares(spare, len(pruned)), device=tokens.device)
        kept = torch.ones(batch, frames, places, device=tokens.device)
        kept[:, pruned] = (rank < shares[:, None]).float()
        return Keep(top_k(kept.flatten(1), count))
