"""FastVID: segments of like frames; in each the salient tokens of every frame, and dense ones that absorb the rest.

"FastVID: Dynamic Density Pruning for Fast Video Large Language Models", NeurIPS 2025. Official code: LunarShen/FastVID,
MIT.

1. A frame is described by the mean of its tokens in the language model's space. The video is cut at the lowest
   ``segments`` - 1 cosines of successive frames, and at every one below ``threshold``.
2. All frames get the same number of tokens, of which the share ``context`` is put together for the segment. The rest
   are the frame's salient tokens, kept untouched: by attention of [CLS], or without [CLS] by attention received.
3. Every fourth frame of a segment, counted back from its last, gets an equal part of its context tokens: the density
   peaks (4 neighbours) of its tokens that are not salient.
4. For each such frame by itself, all tokens of the segment that are not salient go to the context token of the frame
   most like them, by the cosine: it becomes w token + (1 - w) their mean, w = max(1 / (n + 1), ``beta``) for n of them,
   so ``beta`` for any n.

Published: keep 0.10 of 32 x 196 tokens, 12 salient and 7 context tokens a frame. Survivors keep their position ids. An
image is one segment of one frame.

``members="all"``: context tokens are among those that go (the authors' parallel version, for LLaVA-OneVision);
``"others"``: they are not (their versions for LLaVA-Video and Qwen2.5-VL).

Differences: on LLaVA the original ranks by the pooling head of SigLIP, which these models ship without, and describes
frames by its output; the above is what it has for Qwen2.5-VL. Counts are exact: the frames' differ by one at most, what
does not divide goes to the first frames of a segment, and where a frame has no tokens left for its part, the most
salient others take it. No noise breaks ties in the density. Segments that ignore static frames, an extra of the version
for Qwen2.5-VL, are not built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.core.budget import Amount
from visiontrim.core.method import Positions
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, by_frame, cls_attention
from visiontrim.methods.checks import require
from visiontrim.ops.frames import cut_at_changes
from visiontrim.ops.groups import nearest_counts
from visiontrim.ops.recycle import density_peaks
from visiontrim.ops.select import even_shares, top_k

NEIGHBOURS = 4
"""Tokens that a density is measured by."""
PERIOD = 4
"""Frames of a segment for each that has context tokens."""


@register
@dataclass(frozen=True)
class FastVID(EncoderStep):
    keep: Amount = 0.1
    """Tokens of each video that enter the language model, as a number or as a fraction."""
    context: float = 0.4
    """Share of context tokens."""
    segments: int = 8
    """Segments at least, where there are as many frames."""
    threshold: float = 0.9
    """Cosine of successive frames below which the video is cut; 0.84 on Qwen2.5-VL."""
    beta: float = 0.6
    """Weight of a context token among what it absorbs; 1 only selects."""
    members: Literal["all", "others"] = "all"
    """Whether context tokens are among those that are absorbed."""

    name: ClassVar[str] = "fastvid"
    summary: ClassVar[str] = "salient tokens of every frame, and dense ones that absorb their segment"
    paper: ClassVar[str] = "NeurIPS 2025, OpenReview 2xS4VtpApy"
    for_videos: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.context <= 1, f"context={self.context} is no share: give a number in [0, 1], such as 0.4")
        require(0 <= self.beta <= 1, f"beta={self.beta} is no share: give a number in [0, 1], such as 0.6")
        require(self.segments >= 1, f"segments={self.segments}: give at least 1")

    @property
    def positions(self) -> Positions:
        return "keep"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected", "encoder.cls_attention"})

    def choose(self, view: View, count: int) -> Keep:
        tokens = by_frame(view, view.projected_content)
        videos = zip(tokens, cls_attention(view).view(tokens.shape[:3]), strict=True)  # each has segments of its own
        answers = [self._of_video(video, score, count) for video, score in videos]
        index, values, absorbed = (torch.stack(parts) for parts in zip(*answers, strict=True))
        return Keep(index, complement=absorbed, projected=values.to(view.encoder.projected.dtype))

    def _of_video(
        self, tokens: Float[Tensor, "frames places dim"], score: Float[Tensor, "frames places"], count: int
    ) -> tuple[Int[Tensor, " kept"], Float[Tensor, "kept dim"], Bool[Tensor, " kept"]]:
        frames, places = score.shape
        quota = even_shares(count, frames)
        context = [int(self.context * share) for share in quota]
        rank = score.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        alone = torch.tensor([share - part for share, part in zip(quota, context, strict=True)], device=score.device)
        salient = rank < alone[:, None]
        values, anchors = tokens.clone(), torch.zeros_like(salient)
        whole = F.normalize(tokens.detach().mean(1), dim=-1)
        for first, last in cut_at_changes((whole[1:] * whole[:-1]).sum(-1), self.segments, self.threshold):
            used = list(range(first + (last - first) % PERIOD, last + 1, PERIOD))
            room = (places - alone[used])[None]
            wanted = min(sum(context[first : last + 1]), int(room.sum()))
            parts = nearest_counts(torch.full(room.shape, wanted / len(used), device=room.device), room, wanted)[0]
            for frame, part in zip(used, parts.tolist(), strict=True):
                rest = (~salient[frame]).nonzero()[:, 0]
                if part:
                    peaks = density_peaks(tokens[frame, rest][None], part, min(NEIGHBOURS, len(rest)))
                    anchors[frame, rest[peaks.centres[0]]] = True
            segment = slice(first, last + 1)
            going = ~salient[segment] if self.members == "all" else ~salient[segment] & ~anchors[segment]
            for frame in used:
                values[frame, anchors[frame]] = self._absorb(tokens[frame, anchors[frame]], tokens[segment][going])
        # a frame that had no room left its part to the most salient of the others
        index = top_k(score.flatten()[None] + 2 * (salient | anchors).flatten(), count)[0]
        return index, values.flatten(0, 1)[index], anchors.flatten()[index]

    def _absorb(
        self, anchors: Float[Tensor, "anchors dim"], going: Float[Tensor, "going dim"]
    ) -> Float[Tensor, "anchors dim"]:
        if not len(anchors) or not len(going):
            return anchors
        nearest = (F.normalize(going.detach(), dim=-1) @ F.normalize(anchors.detach(), dim=-1).mT).argmax(-1)
        inside = F.one_hot(nearest, len(anchors)).float().mT
        number = inside.sum(1, keepdim=True)
        weight = (1 / (1 + number)).clamp(min=self.beta)
        return weight * anchors + (1 - weight) * (inside @ going) / number.clamp(min=1)
