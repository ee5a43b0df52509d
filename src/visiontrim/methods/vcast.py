"""V-CAST: more tokens for frames where the video turns, and in each frame those that stand out.

"V-CAST", arXiv 2603.27650. Code: xinyouu/V-CAST, whose licence is unclear, so nothing is taken from it. No attention is
read.

1. r_f is the unit vector of the mean token of frame f in the language model's space, u_f = r_f - r_{f-1} its step, and
   c_f = 1 - cos(u_f, u_{f+1}) the curvature there; the first and the last frame get 1.
2. Each frame gets one token, and the rest by w = softmax(c / ``temperature``), at most all of its tokens.
3. In a frame the tokens with the highest 1 - cos(x, r_f) + |x| scaled to [0, 1] stay.

Published: 0.25 and 0.15 on Qwen3-VL. Survivors keep their position ids; an image is one frame. A frame between two
frames equal to it has c = 1, as an end: a still stretch gets more than a steady pan, whose c is 0. Below three frames
all get the same.

``variant="code"`` rounds the quotas as released: down, and all that is left over goes to the one frame with the largest
fraction until it is full, then to the next. ``"paper"`` rounds to the nearest whole numbers with the same sum; below
one token a frame both do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.budget import Amount
from visiontrim.core.method import Positions
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, by_frame
from visiontrim.methods.checks import require
from visiontrim.ops.greedy import minmax
from visiontrim.ops.groups import nearest_counts
from visiontrim.ops.select import top_k


@register
@dataclass(frozen=True)
class VCAST(EncoderStep):
    keep: Amount = 0.25
    """Tokens of each video that enter the language model, as a number or as a fraction."""
    temperature: float = 0.7
    """Of the softmax over frames; a large one gives all frames the same."""
    variant: Literal["paper", "code"] = "paper"

    name: ClassVar[str] = "v-cast"
    summary: ClassVar[str] = "more tokens of frames where the video turns, in each what stands out"
    paper: ClassVar[str] = "arXiv 2603.27650"
    for_videos: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"temperature={self.temperature}: give a number above 0, such as 0.7")

    @property
    def positions(self) -> Positions:
        return "keep"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected"})

    def choose(self, view: View, count: int) -> Keep:
        tokens = by_frame(view, view.encoder.projected)
        batch, frames, places, _ = tokens.shape
        whole = F.normalize(tokens.mean(2), dim=-1)
        weight = (curvature(whole) / self.temperature).softmax(1)
        sizes = torch.full((batch, frames), places, device=tokens.device)
        least = 1 if count >= frames else 0
        target = least + weight * (count - least * frames)
        quota = _down(target, sizes, count) if self.variant == "code" and least else None
        quota = nearest_counts(target, sizes, count, least) if quota is None else quota
        apart = 1 - (F.normalize(tokens, dim=-1) * whole[:, :, None]).sum(-1)
        norm = torch.linalg.vector_norm(tokens, dim=-1)
        score = apart + minmax(norm)
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return Keep(top_k((rank < quota[..., None]).flatten(1).float(), count))


def curvature(whole: Float[Tensor, "batch frames dim"]) -> Float[Tensor, "batch frames"]:
    """One minus the cosine of the steps to and from each frame; 1 for the ends, and where a step is nothing."""
    step = whole.diff(dim=1)
    inner = 1 - F.cosine_similarity(step[:, 1:], step[:, :-1], dim=-1)
    return F.pad(inner, (1, 1), value=1.0)[:, : whole.shape[1]]


def _down(
    target: Float[Tensor, "batch frames"], sizes: Int[Tensor, "batch frames"], count: int
) -> Int[Tensor, "batch frames"]:
    """``target`` rounded down, and what is missing given to the largest fractions, each filled before the next."""
    quota = torch.minimum(target.floor().long(), sizes)
    order = (target - target.floor()).sort(dim=1, descending=True, stable=True).indices
    room = (sizes - quota).gather(1, order)
    missing = count - quota.sum(1, keepdim=True)
    given = torch.minimum((missing - (room.cumsum(1) - room)).clamp(min=0), room)
    return quota + torch.zeros_like(quota).scatter(1, order, given)
