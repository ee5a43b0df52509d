"""HoliTom: windows of frames whose static places become one, then tokens by attention received; and an inner prune.

"HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025, arXiv 2505.21334. Official code:
cokeshao/HoliTom, Apache-2.0.

1. A place is static between two frames if the cosine of its tokens, in the language model's space, is above
   ``threshold``. A window of frames saves its length less one for each place that is static all through it; dynamic
   programming finds the windows that save most.
2. A static place of a window becomes one token, the mean over its frames, where the first frame has it. With M tokens
   left, every frame's other ("dynamic") tokens, and every window's static ones, are thinned out by keep / M.
3. Dynamic tokens: those stay that receive most attention in the vision encoder, mean over heads and all queries.
   Static ones: density peaks are centres, by as many neighbours as there are centres and at most 7. A centre becomes
   ``beta`` centre + (1 - ``beta``) mean of the *other* members of its cluster; alone it stays as it is.

Published: keep 0.10 with threshold 0.65; 0.15, 0.20 and 0.25 with 0.80. An image is one window of one frame.
Positions are consecutive.

Differences: every thinning has its whole number nearest to its share, so that the sum is ``keep``; the original rounds
each by itself. If ``keep`` is above M, absorbed tokens with most attention stay beside the mean; the original keeps M.
The frames' static places come to the host once, for the windows; nothing else waits.
Tokens stay in raster order, where it has the static ones of a window first. No noise breaks ties in the density. Its
option of contextual tokens among the dynamic ones, off by default, is not built.

:class:`HoliTomInner` is the part inside the language model: ``holitom | holitom-inner``.

Densities compare the static tokens of a window with each other: work grows with the square of these.
The windows are those of a dynamic program over the frames, on the host: time is as it was, stops are not one a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
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
"""Tokens at most that the density of a static token is measured by."""


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
        seen = tokens.detach()
        static = (F.cosine_similarity(seen[:, 1:], seen[:, :-1], dim=-1) > self.threshold).cpu()  # the only stop
        videos = zip(tokens, scores, static, strict=True)  # each has windows of its own
        answers = [self._of_video(*video, count) for video in videos]
        index, values, assignment = (torch.stack(parts) for parts in zip(*answers, strict=True))
        members = torch.zeros_like(index).scatter_add(1, assignment.clamp(min=0), (assignment >= 0).long())
        return Keep(index, None, assignment, members > 1, projected=values.to(view.encoder.projected.dtype))

    def _of_video(
        self,
        tokens: Float[Tensor, "frames places dim"],
        score: Float[Tensor, "frames places"],
        static: Bool[Tensor, "pairs places"],
        count: int,
    ) -> tuple[Int[Tensor, " kept"], Float[Tensor, "kept dim"], Int[Tensor, " tokens"]]:
        """``static`` is on the CPU, and so is all that follows from it alone: what belongs where, and how many stay."""
        frames, places = score.shape
        device = score.device
        windows = static_windows(static)
        home, unit, always = _homes(static, windows)
        sizes = torch.bincount(unit + 1, minlength=frames + len(windows) + 1)[1:]
        merged = int(sizes.sum())
        thinned = min(count, merged)
        counts = nearest_counts((sizes.double() * thinned / merged)[None], sizes[None], thinned)[0]
        of_windows = (unit.sort(stable=True).indices[(unit < frames).sum() :]).to(device).split(sizes[frames:].tolist())
        clusters = counts[frames:].tolist()
        home, unit, counts, always = home.to(device), unit.to(device), counts.to(device), always.to(device)

        values, score, number = tokens.clone(), score.flatten(), torch.arange(frames * places, device=device)
        for window, (first, last) in enumerate(windows):
            if first < last:
                values[first] = torch.where(always[window, :, None], tokens[first : last + 1].mean(0), tokens[first])
        values = values.flatten(0, 1)
        best = rank_within(unit[None], score[None])[0] < counts[unit]
        goes = torch.where((unit >= 0) & (unit < frames) & best, number, -1)
        for members, centres in zip(of_windows, clusters, strict=True):
            if centres:
                chosen, went_to, features = self._clustered(values[members], centres)
                goes[members] = members[chosen[went_to]]
                values[members[chosen]] = features
        goes = goes[home]
        if count > merged:
            beside = top_k(score.masked_fill(unit >= 0, -torch.inf)[None], count - merged)[0]
            goes[beside] = beside
        index = top_k((goes == number).float()[None], count)[0]
        ordinal = torch.full_like(goes, -1).scatter(0, index, torch.arange(count, device=device))
        return index, values[index], torch.where(goes >= 0, ordinal[goes], -1)

    def _clustered(
        self, static: Float[Tensor, "members dim"], count: int
    ) -> tuple[Int[Tensor, " {count}"], Int[Tensor, " members"], Float[Tensor, "{count} dim"]]:
        """Centres among the static tokens of a window, which of them each goes to, and what they become."""
        peaks = density_peaks(static[None], count, min(NEIGHBOURS, count))
        centres, went_to = peaks.centres[0], peaks.assignment[0]
        others = torch.zeros(count, len(static), device=static.device).scatter(0, went_to[None], 1.0)
        others = others.scatter(1, centres[:, None], 0.0)
        number = others.sum(1, keepdim=True)
        mixed = self.beta * static[centres] + (1 - self.beta) * (others @ static) / number.clamp(min=1)
        return centres, went_to, torch.where(number > 0, mixed, static[centres])


def _homes(
    static: Bool[Tensor, "pairs places"], windows: list[tuple[int, int]]
) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"], Bool[Tensor, "windows places"]]:
    """The token that stands for each; the unit that thins it out; and the places that are static all through a window.

    A unit is a frame, or after all frames a window; -1 marks tokens that another one stands for.
    """
    frames, places = len(static) + 1, static.shape[1]
    home = torch.arange(frames * places).view(frames, places)
    unit, number = home // places, home.clone()
    always = torch.zeros(len(windows), places, dtype=torch.bool)
    for window, (first, last) in enumerate(windows):
        if first < last:
            always[window] = here = static[first:last].all(0)
            home[first : last + 1, here] = number[first, here]
            unit[first : last + 1, here] = -1
            unit[first, here] = frames + window
    return home.flatten(), unit.flatten(), always


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
