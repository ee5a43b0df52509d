"""FlashVID: of every frame what is attended to and different, the rest in trees along the video, then one late cut.

"FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging", ICLR 2026,
arXiv 2602.08024. Official code: Fanziyang-v/FlashVID, MIT.

1. The video is cut where successive frames' means, in the language model's space, have a cosine below ``threshold``,
   and at the lowest ones until there are ``segments``.
2. Of a frame's share of the budget, ``alpha`` is chosen by largest minimal distance, one minus the cosine, times the
   candidate's attention from [CLS] (or received) and, with ``events``, its mean cosine with the frames of its segment.
3. In a segment, each other token joins the one most like it in the frame before, if their cosine is above ``joins``, as
   long as enough trees are left. A tree becomes its mean, in the first of its frames.
4. In each frame the trees are thinned out by density peaks (7 neighbours), in proportion to their number; a cluster
   becomes its mean, at the place of its centre.
5. Before decoder layer 20 of 28 the share ``retention`` stays that the last position attends to most.

``keep`` is the mean per layer, R in the paper: 1.25 R enter, (20 x 1.25 R + 8 x 0.3 x 1.25 R) / 28 = R. On Qwen3-VL
layer 28 of 36 and retention 0.1; on Qwen ``events=false`` and 4 segments. Position ids are kept; an image is one frame.

``variant="code"`` divides the sum of a tree by one more than the *direct* children of its root, as released: four equal
frames give a token of twice the length. ``"paper"`` is the mean.

Differences: counts are exact, those of frames differ by one at most. No noise breaks ties in the density. A segment of
one frame clusters what was not chosen in 2; the released code clusters the whole frame, and counts what was chosen
twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.core.budget import Amount, Depth
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import by_frame, cls_attention
from visiontrim.methods.checks import require
from visiontrim.methods.twostage import TwoStage
from visiontrim.ops.diverse import nearest_similarity
from visiontrim.ops.frames import Segments, cut_at_changes
from visiontrim.ops.greedy import picks_by_worth
from visiontrim.ops.groups import nearest_counts
from visiontrim.ops.recycle import density_peaks
from visiontrim.ops.select import even_shares, top_k
from visiontrim.ops.trees import temporal_trees

NEIGHBOURS = 7


@register
@dataclass(frozen=True)
class FlashVID(TwoStage):
    keep: Amount | tuple[int, int] = 0.1
    """Mean number of vision tokens per decoder layer and video, or that as a fraction of the video's tokens; with the
    vision stage alone, the number that enters the language model. A pair gives the counts after either stage."""
    layer: Depth = 20 / 28
    """Decoder layer before which the second stage stands: its index, or a fraction of the depth."""
    retention: float = 0.3
    """Share of the tokens that the second stage leaves."""
    alpha: float = 0.7
    """Share of a frame's tokens that is chosen; the rest are trees."""
    segments: int = 8
    """Segments at least, where there are as many frames."""
    threshold: float = 0.9
    """Cosine of successive frames below which the video is cut."""
    joins: float = 0.8
    """Cosine above which a token joins a tree."""
    events: bool = True
    """Whether tokens like the frames of their segment are preferred."""
    variant: Literal["paper", "code"] = "paper"

    name: ClassVar[str] = "flashvid"
    summary: ClassVar[str] = "attended and different tokens of every frame, the rest in trees along the video"
    paper: ClassVar[str] = "arXiv 2602.08024, ICLR 2026"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    for_videos: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.retention <= 1, f"retention={self.retention} is no share: give a number in (0, 1]")
        require(0 <= self.alpha <= 1, f"alpha={self.alpha} is no share: give a number in [0, 1]")
        require(self.segments >= 1, f"segments={self.segments}: give at least 1")

    @property
    def funnel(self) -> float:
        return 1 / self.retention

    @property
    def vision_needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected", "encoder.cls_attention"})

    def choose(self, view: View, count: int) -> Keep:
        tokens = by_frame(view, view.projected_content)
        videos = zip(tokens, cls_attention(view).view(tokens.shape[:3]), strict=True)  # each has segments of its own
        answers = [self._of_video(video, score, count) for video, score in videos]
        index, values, home, alone = (torch.stack(parts) for parts in zip(*answers, strict=True))
        return Keep(index, None, home, ~alone, projected=values.to(view.encoder.projected.dtype))

    def prune(self, view: View, count: int) -> Keep:
        return Keep(top_k(view.decoder.last_attention, count))

    def _of_video(
        self, tokens: Float[Tensor, "frames places dim"], score: Float[Tensor, "frames places"], count: int
    ) -> tuple[Int[Tensor, " kept"], Float[Tensor, "kept dim"], Int[Tensor, " tokens"], Bool[Tensor, " kept"]]:
        frames, places = score.shape
        whole = F.normalize(tokens.detach().mean(1), dim=-1)
        cuts = cut_at_changes((whole[1:] * whole[:-1]).sum(-1), self.segments, self.threshold)
        quota = even_shares(count, frames)
        chosen = self._chosen(tokens.detach(), score, whole, cuts, [math.ceil(self.alpha * share) for share in quota])
        number = torch.arange(frames * places, device=score.device)
        values, goes = tokens.flatten(0, 1).clone(), torch.where(chosen.flatten(), number, -1)
        for first, last in cuts:
            here = slice(first, last + 1)
            wanted = sum(quota[here]) - int(chosen[here].sum())
            if not wanted:
                continue
            trees = temporal_trees(tokens[here], ~chosen[here], self.joins, wanted, passed_on=self.variant == "paper")
            own = number.view(frames, places)[here] - first * places
            roots = trees.root == own
            sizes = roots.sum(1)[None]
            counts = nearest_counts(sizes.double() * wanted / sizes.sum(), sizes, wanted)[0].tolist()
            merged = torch.full_like(number, -1)  # of each root its cluster's centre
            for frame, clusters in enumerate(counts):
                members = roots[frame].nonzero()[:, 0]
                if not clusters:
                    continue
                at_most = min(clusters, NEIGHBOURS, len(members))
                found = density_peaks(trees.features[frame, members][None], clusters, at_most)
                at = members + (first + frame) * places
                centres = at[found.centres[0]]
                values[centres] = found.features[0]
                merged[at] = centres[found.assignment[0]]
            root = torch.where(trees.root >= 0, trees.root + first * places, 0)
            of_trees = torch.where(trees.root >= 0, merged[root], -1).flatten()
            there = slice(first * places, (last + 1) * places)
            goes[there] = torch.where(chosen[here].flatten(), goes[there], of_trees)
        index = (goes == number).nonzero()[:, 0]
        ordinal = torch.full_like(goes, -1).scatter(0, index, torch.arange(count, device=index.device))
        return index, values[index], torch.where(goes >= 0, ordinal[goes], -1), chosen.flatten()[index]

    def _chosen(
        self,
        tokens: Float[Tensor, "frames places dim"],
        score: Float[Tensor, "frames places"],
        whole: Float[Tensor, "frames dim"],
        cuts: Segments,
        counts: list[int],
    ) -> Bool[Tensor, "frames places"]:
        """The attended and different tokens of each frame."""
        unit, weight = F.normalize(tokens, dim=-1), score
        if self.events:
            event = torch.cat([whole[a : b + 1].mean(0).expand(b + 1 - a, -1) for a, b in cuts])
            weight = score * (unit @ event[..., None])[..., 0]
        first = weight * (1 - nearest_similarity(unit).clamp(min=-1))  # a frame may be a single token
        picks = picks_by_worth(tokens, first, lambda nearest: weight * (1 - nearest), max(counts))
        # greedy: fewer tokens are the first ones of more
        number = torch.tensor(counts, device=score.device)[:, None]
        taken = torch.arange(picks.shape[1], device=score.device) < number
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, picks, taken)
