"""VidCom2: more tokens for frames that stand out, and in each frame those that stand out.

"Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models", EMNLP 2025, arXiv
2505.14454. Official code: xuyang-liu16/VidCom2, Apache-2.0.

1. In the language model's space, the half of the channels with the lowest variance over the video; unit vectors.
2. v is the likeness of a token to the mean of the video, f that to the mean of its frame; the likeness of x and m is
   the sum of exp(-|x - m|^2 / 2a) over a = 1/8, 1/4, 1/2, 1, 2.
3. With u the mean of -v over a frame, and pi = softmax(u / 0.01) over the T frames, a frame's share of its tokens is
   R (1 + pi - 1/T), at most all. As R is ``keep``, no frame gets more than R (2 - 1/T).
4. In each frame the tokens with the lowest v + f stay, in raster order.

Published: R = 0.25 and 0.15. Positions are consecutive, as on LLaVA; the authors' ports to Qwen-VL keep them:
``vt.trim(..., positions="keep")``. An image is one frame: its least typical tokens stay.

Differences: counts per frame are the whole numbers nearest to the shares that sum up to ``keep`` (each was rounded by
itself, 393 instead of 392 of 8 x 196), at least 1 where the budget allows. float32, where the original scores in the
model's dtype. Newline tokens are the family's: the authors keep all 13 of a frame of LLaVA-Video.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.budget import Amount
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, by_frame
from visiontrim.methods.checks import require
from visiontrim.ops.groups import nearest_counts
from visiontrim.ops.select import top_k

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
"""Widths of the kernels."""


@register
@dataclass(frozen=True)
class VidCom2(EncoderStep):
    keep: Amount = 0.25
    """Tokens of each video that enter the language model, as a number or as a fraction: R."""
    temperature: float = 0.01
    """Of the softmax over frames; a large one gives all frames the same."""

    name: ClassVar[str] = "vidcom2"
    summary: ClassVar[str] = "the least typical tokens of each frame, more of frames that stand out"
    paper: ClassVar[str] = "arXiv 2505.14454, EMNLP 2025"
    for_videos: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"temperature={self.temperature}: give a number above 0, such as 0.01")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected"})

    def choose(self, view: View, count: int) -> Keep:
        tokens = by_frame(view, view.encoder.projected)
        batch, frames, places, dim = tokens.shape
        variance = tokens.flatten(1, 2).var(1, correction=0)
        steady = variance.sort(dim=-1, stable=True).indices[:, : max(1, dim // 2)]
        unit = F.normalize(tokens.gather(3, steady[:, None, None].expand(-1, frames, places, -1)), dim=-1)
        of_video = _likeness(unit, unit.mean((1, 2), keepdim=True))
        of_frame = _likeness(unit, unit.mean(2, keepdim=True))
        bonus = (-of_video.mean(2) / self.temperature).softmax(1) - 1 / frames
        sizes = torch.full((batch, frames), places, device=tokens.device)
        share = (count / frames * (1 + bonus)).clamp(max=places)
        counts = nearest_counts(share, sizes, count, least=1 if count >= frames else 0)
        rank = (of_video + of_frame).argsort(dim=-1, stable=True).argsort(-1)
        return Keep(top_k((rank < counts[..., None]).flatten(1).float(), count))


def _likeness(
    unit: Float[Tensor, "batch frames places dim"], centre: Float[Tensor, "batch #frames 1 dim"]
) -> Float[Tensor, "batch frames places"]:
    squared = (unit - centre).square().sum(-1)
    return torch.stack([(-squared / (2 * width)).exp() for width in WIDTHS]).sum(0)
