"""HoliTom: windows of frames whose static places become one, then tokens by attention received; and an inner prune.

"HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025, arXiv 2505.21334. Official code:
cokeshao/HoliTom, Apache-2.0.

1. A place is static between two frames if the cosine of its tokens, in the language model's space, is above
   ``threshold``. A window of frames saves its length less one for each place that is static all through it; dynamic
   programming finds the windows that save most.
2. A static place of a window becomes one token, the mean over its frames, where the first frame has it. With M tokens
   left, every frame's other ("dynamic") tokens, and every window's static ones, are thinned out by keep / M.
3. Dynamic tokens: those stay that receive most attention in the vision encoder, mean over heads and all queries.
   Static ones: density peaks (7 neighbours) are centres and become ``beta`` centre + (1 - ``beta``) mean of the
   cluster, centre included.

Published: keep 0.10 with threshold 0.65; 0.15, 0.20 and 0.25 with 0.80. An image is one window of one frame.
Positions are consecutive.

Differences: every thinning has its whole number nearest to its share, so that the sum is ``keep``; the original rounds
each by itself. If ``keep`` is above M, absorbed tokens with most attention stay beside the mean; the original keeps M.
Tokens stay in raster order, where it has the static ones of a window first. No noise breaks ties in the density. Its
option of contextual tokens among the dynamic ones, off by default, is not built.

:class:`HoliTomInner` is the part inside the language model: ``holitom | holitom-inner``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.budget import Amount, Depth
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, by_frame
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.methods.checks import require
from visiontrim.ops.frames import static_windows
from visiontrim.ops.groups import nearest_counts, rank_within
from visiontrim.ops.merge import merge_into_nearest
from visiontrim.ops.recycle import density_peaks
from visiontrim.ops.select import top_k

NEIGHBOURS = 7
"""Tokens that the density of a static token is measured by."""


@register
@dataclass(frozen=True)
class HoliTom(EncoderStep):
    keep: Amount = 0.25
    """Tokens of each video that enter the language model, as a number or as a fraction."""
    threshold: float = 0.8
    """Cosine above which a place does not change."""
    beta: float = 0.6
    """Weight of the centre in its cluster."""

    name: ClassVar[str] = "holitom"
    summary: ClassVar[str] = "static places of the best windows of frames become one, then attention received"
    paper: ClassVar[str] = "arXiv 2505.21334, NeurIPS 2025"
    for_videos: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta <= 1, f"beta={self.beta} is no share: give a number in [0, 1], such as 0.6")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected", "encoder.column_attention"})

    def choose(self, view: View, count: int) -> Keep:
        tokens, scores = by_frame(view, view.projected_content), by_frame(view, view.encoder.column_attention)
        videos = zip(tokens, scores, strict=True)  # each has windows of its own
        answers = [self._of_video(tokens, score, count) for tokens, score in videos]
        index, values, assignment = (torch.stack(parts) for parts in zip(*answers, strict=True))
        members = torch.zeros_like(index).scatter_add(1, assignment.clamp(min=0), (assignment >= 0).long())
        return Keep(index, None, assignment, members > 1, projected=values.to(view.encoder.projected.dtype))

    def _of_video(
        self, tokens: Float[Tensor, "frames places dim"], score: Float[Tensor, "frames places"], count: int
    ) -> tuple[Int[Tensor, " kept"], Float[Tensor, "kept dim"], Int[Tensor, " tokens"]]:
        frames, places = score.shape
        static = F.cosine_similarity(tokens[1:].detach(), tokens[:-1].detach(), dim=-1) > self.threshold
        number = torch.arange(frames * places, device=score.device).view(frames, places)
        # home: the token that stands for each; unit: its frame, or after all frames its window; -1: absorbed
        values, home, unit = tokens.clone(), number.clone(), number // places
        windows = static_windows(static)
        for window, (first, last) in enumerate(windows):
            if first < last:
                always = static[first:last].all(0)
                values[first, always] = tokens[first : last + 1, always].mean(0)
                home[first : last + 1, always] = number[first, always]
                unit[first : last + 1, always] = -1
                unit[first, always] = frames + window
        values, home, unit, score = values.flatten(0, 1), home.flatten(), unit.flatten(), score.flatten()

        sizes = torch.bincount(unit + 1, minlength=frames + len(windows) + 1)[1:]
        merged = int(sizes.sum())
        thinned = min(count, merged)
        counts = nearest_counts((sizes.double() * thinned / merged)[None], sizes[None], thinned)[0]
        best = rank_within(unit[None], score[None])[0] < counts[unit]
        goes = torch.where((unit >= 0) & (unit < frames) & best, number.flatten(), -1)
        for window, centres in enumerate(counts[frames:].tolist()):
            members = (unit == frames + window).nonzero()[:, 0]
            if centres:
                clusters = density_peaks(values[members][None], centres, min(NEIGHBOURS, len(members)))
                chosen = members[clusters.centres[0]]
                goes[members] = chosen[clusters.assignment[0]]
                values[chosen] = self.beta * values[chosen] + (1 - self.beta) * clusters.features[0]
        goes = goes[home]
        if count > merged:
            beside = top_k(score.masked_fill(unit >= 0, -torch.inf)[None], count - merged)[0]
            goes[beside] = beside
        index = (goes == number.flatten()).nonzero()[:, 0]
        ordinal = torch.full_like(goes, -1).scatter(0, index, torch.arange(count, device=index.device))
        return index, values[index], torch.where(goes >= 0, ordinal[goes], -1)


@register
@dataclass(frozen=True)
class HoliTomInner(Cascade):
    """HoliTom inside the language model: FastV, whose dropped tokens are merged into the kept one most like them.

    A kept token becomes its mean with each of its dropped ones in turn, in the order of the video: the later, the more
    it weighs. Published: half of the tokens before layer 18 of 28. Survivors keep their position ids.
    """

    keep: Counts = (0.5,)
    """Mean number of vision tokens per decoder layer (int) or its fraction (float); a 1-tuple gives what is left from
    ``layer`` on."""
    layer: Depth = 18 / 28
    """Decoder layer before which tokens are merged: its index, or a fraction of the depth."""

    name: ClassVar[str] = "holitom-inner"
    summary: ClassVar[str] = "keeps what the last position attends to, and merges the rest into it"
    paper: ClassVar[str] = "arXiv 2505.21334, NeurIPS 2025"
    for_videos: ClassVar[bool] = True
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    @property
    def depths(self) -> tuple[Depth, ...]:
        return (self.layer,)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"decoder.last_attention"})

    def choose(self, view: View, count: int) -> Keep:
        index = top_k(view.decoder.last_attention, count)
        merged = merge_into_nearest(view.content, view.features, index, "halve")
        return Keep(index, merged.features, merged.assignment, merged.members > 0)
