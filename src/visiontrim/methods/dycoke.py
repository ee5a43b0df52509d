"""DyCoke: of four frames one whole, and of the others what it does not already show; and a part of that in decoding.

"DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025, arXiv 2411.15024. Official
code: KD-TAO/DyCoke, Apache-2.0.

Temporal token merging, which drops: in every group of four frames the first stays whole. The second and the fourth keep
the places that are least similar (cosine in the language model's space) to the frame before them, the third those least
similar to the first. Each keeps the same number; what does not divide goes evenly over the frames. Published: k = 0.7,
so 30 % of a frame, 370 of 4 x 196 tokens. Positions are consecutive.

``variant="release"``: the authors' loop stops before the last group, whose third frame stays whole: 3098 instead of
2960 tokens of 32 frames.

Dynamic pruning in decoding (``view_layer``, off unless asked for): every token of the answer sees all N vision tokens
in the layers before ``view_layer``, and from there on the int(N (1 - ``view_drop``)) that it attended to most in the
layer before, mean over heads. The choice is made at the first token of an answer and whenever the cosine of its
attention with that of the token before is below 0.9; else the earlier choice stays, or, in ``variant="release"``, all N
are seen. Published: 3 and 0.7. The cache stays whole, so no memory is saved, and as the engine hides by a mask
(:mod:`visiontrim.engine.decoding`), no time either: it shows what the answers lose.

Differences: tokens stay in raster order, where the released code has them by similarity. It loses the last of an odd
number of frames and fails on four or fewer; here an incomplete group is treated as the beginning of one. A budget below
the frames that stay whole (a quarter; all of an image) thins these out to an even lattice, on which the method has no
say. Newline tokens count as vision tokens in decoding. The released code carries the attention of one video over to the
next; here every answer begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from visiontrim.core.budget import Amount
from visiontrim.core.method import Decoding
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Glance, Keep, View
from visiontrim.methods.base import EncoderStep, by_frame
from visiontrim.methods.checks import require
from visiontrim.ops.frames import whole_frames_lattice
from visiontrim.ops.select import even_shares, top_k


@register
@dataclass(frozen=True)
class DyCoke(EncoderStep):
    keep: Amount = 0.475
    """Tokens of each video that enter the language model, as a number or as a fraction: (1 + 3 (1 - k)) / 4."""
    variant: Literal["paper", "release"] = "paper"
    """Every group alike, and earlier choices stay; or both as the released code has it."""
    view_layer: int | None = None
    """Decoder layer from which on the answer sees a part of the vision tokens; None: all layers see all of them."""
    view_drop: float = 0.7
    """Share of the vision tokens that it does not see there."""

    name: ClassVar[str] = "dycoke"
    summary: ClassVar[str] = "one frame of four whole, and of the others what differs from it"
    paper: ClassVar[str] = "arXiv 2411.15024, CVPR 2025"
    for_videos: ClassVar[bool] = True
    also_at: ClassVar[tuple[type, ...]] = (Decoding,)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.view_layer is None or (type(self.view_layer) is int and self.view_layer >= 1),
            f"view_layer={self.view_layer!r}: give a decoder layer from 1 on, or None",
        )
        require(0 <= self.view_drop <= 1, f"view_drop={self.view_drop}: give a share from 0 to 1")

    @property
    def decoding(self) -> Decoding | None:
        return None if self.view_layer is None else _Watched(self.view_layer, self.view_drop, self.variant)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected"})

    def choose(self, view: View, count: int) -> Keep:
        tokens = by_frame(view, view.encoder.projected)
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


ALIKE = 0.9
"""Cosine from which on two rows of attention count as the same."""


@dataclass(frozen=True)
class _Watched(Decoding):
    """The dynamic pruning in decoding."""

    drop: float
    variant: Literal["paper", "release"]

    def select(self, glance: Glance) -> Bool[Tensor, "batch tokens"]:
        # in millionths, since 10 (1 - 0.9) is less than 1 in floating point
        count = glance.valid.sum(1, keepdim=True) * round((1 - self.drop) * 1e6) // 1_000_000
        order = glance.attention.masked_fill(~glance.valid, -1.0).argsort(dim=1, descending=True, stable=True)
        anew = (order.argsort(1) < count) & glance.valid
        if glance.before is None or glance.shown is None:
            return anew
        changed = F.cosine_similarity(glance.attention, glance.before, dim=1) < ALIKE
        return torch.where(changed[:, None], anew, glance.shown if self.variant == "paper" else glance.valid)
