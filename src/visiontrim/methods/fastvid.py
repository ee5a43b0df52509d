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

``members="all"``: context tokens are among those that go (the authors' parallel version, for LLaVA-OneVision).
``"others"``: a frame's own are not (their versions for LLaVA-Video and Qwen2.5-VL), those of the segment's other frames
are; and a segment of T tokens has int(``context`` T) context tokens, of which those that do not divide go to its last
such frames, as salient ones do to its first frames.

Differences: on LLaVA the original ranks by the pooling head of SigLIP, which these models ship without, and describes
frames by its output; the above is what it has for Qwen2.5-VL. Counts are exact: with ``members="all"`` what does not
divide goes to the first frames of a segment, and where a frame has no tokens left for its part, the most salient others
take it. No noise breaks ties in the density. Segments that ignore static frames, an extra of the version
for Qwen2.5-VL, are not built.

All tokens of a segment are compared with all its context tokens: with ``keep`` as a fraction the work grows with the
square of a segment's tokens, with a number linearly.
Every frame with context tokens has density peaks of its own, some 100 operations each; distances by products make that
3.7 times less CPU time than exact differences, and one stop is left of five a frame.
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
    """Whether a frame's own context tokens are among those that they absorb, and how segments share out counts."""

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
        whole = F.normalize(tokens.detach().mean(2), dim=-1)
        alike = (whole[:, 1:] * whole[:, :-1]).sum(-1).cpu()  # the only stop
        videos = zip(tokens, cls_attention(view).view(tokens.shape[:3]), alike, strict=True)  # each has its segments
        answers = [self._of_video(*video, count) for video in videos]
        index, values, absorbed = (torch.stack(parts) for parts in zip(*answers, strict=True))
        return Keep(index, complement=absorbed, projected=values.to(view.encoder.projected.dtype))

    def _of_video(
        self,
        tokens: Float[Tensor, "frames places dim"],
        score: Float[Tensor, "frames places"],
        alike: Float[Tensor, " pairs"],
        count: int,
    ) -> tuple[Int[Tensor, " kept"], Float[Tensor, "kept dim"], Bool[Tensor, " kept"]]:
        """``alike`` is on the CPU: how many tokens every frame has is known without looking at the device."""
        frames, places = score.shape
        quota = even_shares(count, frames)
        order = score.sort(dim=1, descending=True, stable=True).indices
        salient, anchors = (torch.zeros(frames * places, dtype=torch.bool, device=score.device) for _ in range(2))
        flat = tokens.flatten(0, 1)
        values, unit = flat.clone(), F.normalize(flat.detach(), dim=-1)
        for first, last in cut_at_changes(alike, self.segments, self.threshold):
            used = list(range(first + (last - first) % PERIOD, last + 1, PERIOD))
            alone, parts = self._counts(quota[first : last + 1], [frame - first for frame in used], places)
            rests = []  # of every frame the tokens that are not salient, ascending
            for frame, share in zip(range(first, last + 1), alone, strict=True):
                salient[frame * places + order[frame, :share]] = True
                rests.append(frame * places + order[frame, share:].sort().values)
            going = torch.cat(rests)
            for frame, part in zip(used, parts, strict=True):
                if not part:
                    continue
                rest = rests[frame - first]
                peaks = density_peaks(flat[rest][None].detach(), part, min(NEIGHBOURS, len(rest)))
                own = rest[peaks.centres[0]]
                anchors[own] = True
                values[own] = self._absorb(flat, unit, own, going)
        # a frame that had no room left its part to the most salient of the others
        index = top_k(score.flatten()[None] + 2 * (salient | anchors), count)[0]
        return index, values[index], anchors[index]

    def _counts(self, quota: list[int], used: list[int], places: int) -> tuple[list[int], list[int]]:
        """Salient tokens of every frame of a segment, and context tokens of those of its frames that have any.

        ``quota`` are the tokens of its frames, ``used`` the frames with context tokens.
        """
        if self.members == "all":
            context = [int(self.context * share) for share in quota]
            alone, total = [share - part for share, part in zip(quota, context, strict=True)], sum(context)
        else:
            total = int(self.context * sum(quota))
            alone = _shared(sum(quota) - total, [places] * len(quota), last=False)
        return alone, _shared(total, [places - alone[frame] for frame in used], last=self.members == "others")

    def _absorb(
        self,
        tokens: Float[Tensor, "tokens dim"],
        unit: Float[Tensor, "tokens dim"],
        own: Int[Tensor, " anchors"],
        going: Int[Tensor, " going"],
    ) -> Float[Tensor, "anchors dim"]:
        """What the context tokens ``own`` of a frame become when the tokens ``going`` of the segment go to them."""
        nearest = (unit[going] @ unit[own].mT).argmax(-1)
        inside = torch.zeros(len(own), len(going), device=tokens.device).scatter(0, nearest[None], 1.0)
        if self.members == "others":
            inside = inside.masked_fill(torch.isin(going, own), 0.0)
        number = inside.sum(1, keepdim=True)
        weight = (1 / (1 + number)).clamp(min=self.beta)
        return weight * tokens[own] + (1 - weight) * (inside @ tokens[going]) / number.clamp(min=1)


def _shared(total: int, room: list[int], *, last: bool) -> list[int]:
    """``total`` in parts as even as ``room`` allows; what does not divide goes to the ``last`` ones, or to the first.

    Less than ``total`` where there is no room.
    """
    parts = [0] * len(room)
    while total and (open_to := [place for place, most in enumerate(room) if parts[place] < most]):
        share, rest = divmod(total, len(open_to))
        if not share:
            for place in open_to[-rest:] if last else open_to[:rest]:
                parts[place] += 1
            break
        for place in open_to:
            more = min(share, room[place] - parts[place])
            parts[place] += more
            total -= more
    return parts
