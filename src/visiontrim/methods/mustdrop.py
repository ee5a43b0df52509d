"""MustDrop: merge flat windows in the encoder, protect what [CLS] looks at, and let the text drop the rest in stages.

"Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", arXiv 2411.10803;
github.com/liuting20/MustDrop, Apache-2.0 by its README.

1. After the first encoder layer, windows of 3 x 3 places whose mean pairwise cosine is at least ``similar`` become
   their mean.
2. The share ``key`` of the tokens with the most attention of [CLS] in the last layer of the encoder is the key set,
   which the language model never drops.
3. After decoder layers 2, 6, 10 and 14, with A the attention of the text after the image, averaged over heads, token v
   is dropped if sum_t A_tv < T_g sum_tv A_tv and max_t A_tv < T_i.
4. In decoding, every layer from the first stage on has only what the last stage left (``narrows_cache``).

Position ids are consecutive again after every stage. Published (T_g, T_i): (0.001, 0.001) for "192", (0.0012, 0.001)
for "128", (0.011, 0.01) for "64".

Two thresholds let every image keep its own number; ``keep=None`` does that, for images that agree. With a number,
counts are exact: the share ``merged`` of the windows merges, the most similar ones, and a stage ranks tokens by
max(g_v / T_g, m_v / T_i), so that any count is what a common factor on both thresholds would leave; key tokens first.

Differences: rows and columns beyond the last whole window never merge; merged windows stand in raster order; a decoded
token goes on from the position of its own layer, where the original restarts from the narrowed cache. Without [CLS],
attention received makes the key set. ``stages="language"`` leaves the windows out, for encoders that cannot merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.budget import Depth
from visiontrim.core.errors import TrimError
from visiontrim.core.method import EncoderLayer, Layers, Positions, Site, Step, VisionOutput
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import cls_attention
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.methods.checks import require
from visiontrim.ops.groups import rank_within
from visiontrim.ops.select import leftovers, top_k

SIDE = 3
"""Places along a window."""


@register
@dataclass(frozen=True)
class MustDrop(Cascade):
    keep: Counts | None = 192
    """Mean number of vision tokens per decoder layer and image (int), or its fraction (float); a tuple gives what every
    stage leaves; None: what the thresholds leave."""
    merged: float = 0.25
    """Share of the windows that merges in the encoder, where ``keep`` is given: ours, the paper has ``similar``."""
    similar: float = 0.8
    """Mean cosine from which a window merges, where ``keep`` is None."""
    key: float = 0.08
    """Share of the tokens leaving the encoder that the language model never drops."""
    thresholds: tuple[float, float] = (0.001, 0.001)
    """Attention below which a token is dropped: its share of all, and the most that a text token pays it."""
    layers: tuple[Depth, ...] = (3 / 32, 7 / 32, 11 / 32, 15 / 32)
    """Decoder layers before which tokens are removed, each the one after the layer whose attention is read."""
    stages: Literal["both", "language"] = "both"
    """With the merging of windows in the encoder, or without."""

    name: ClassVar[str] = "mustdrop"
    summary: ClassVar[str] = "merges flat windows in the encoder, then drops in stages what text and [CLS] ignore"
    paper: ClassVar[str] = "arXiv 2411.10803"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    narrows_cache: ClassVar[bool | Literal["all"]] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("merged", "key"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}={value} is no share: give a number in [0, 1]")
        fine = len(self.thresholds) == 2 and min(self.thresholds) > 0
        require(fine, f"thresholds={self.thresholds}: give two positive numbers, a share and an attention")

    def _check_keep(self) -> None:
        if self.keep is not None:
            super()._check_keep()

    @property
    def depths(self) -> tuple[Depth, ...]:
        return self.layers

    @property
    def positions(self) -> Positions:
        return "compact"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"text.question", "decoder.text_attention"})

    def steps_for(self, layers: Layers) -> tuple[Step, ...]:
        windows = (_Windows(self),) if self.stages == "both" else ()
        return (*windows, _KeySet(self.key), *super().steps_for(layers))

    def count(self, view: View, number: int, layers: tuple[int, ...]) -> int:
        if self.keep is not None:
            return super().count(view, number, layers)
        stays = self.score(view) >= 1
        return _agreed(stays if view.marked is None else stays | view.marked)

    def choose(self, view: View, count: int) -> Keep:
        score = self.score(view)
        behind = None if view.marked is None else ~view.marked
        rank = rank_within(torch.zeros_like(score, dtype=torch.long), score, behind)
        return Keep(top_k(-rank.float(), count))

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """The larger of both kinds of attention, in units of its threshold."""
        attention = view.decoder.text_attention.mean(1).masked_fill(~view.text.question.mask[..., None], 0.0)
        of_all = attention.sum(1)
        of_all = of_all / of_all.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.maximum(of_all / self.thresholds[0], attention.amax(1) / self.thresholds[1])


def _agreed(stays: Tensor) -> int:
    counts = set(stays.sum(1).tolist())
    if len(counts) > 1:
        raise TrimError(
            f"the thresholds leave between {min(counts)} and {max(counts)} for the images of this batch, which must "
            "agree: pass one image at a time, or keep="
        )
    return counts.pop()


@dataclass(frozen=True)
class _Windows(Step):
    """Flat windows become their means."""

    method: MustDrop

    name: ClassVar[str] = "windows"
    summary: ClassVar[str] = "the encoder's part of MustDrop"
    paper: ClassVar[str] = MustDrop.paper

    @property
    def site(self) -> Site:
        return EncoderLayer(1)

    def select(self, view: View) -> Keep:
        members = _members(view.grid).to(view.features.device)
        unit = F.normalize(view.features.float(), dim=-1)[:, members]
        pairs = members.shape[1] * (members.shape[1] - 1)
        similarity = (unit.sum(2).square().sum(-1) - members.shape[1]) / pairs
        if self.method.keep is None:
            count = _agreed(similarity >= self.method.similar)
        else:
            count = round(self.method.merged * len(members))
        if not count:
            return Keep.everything(view)
        chosen = members[top_k(similarity, count)]
        index = leftovers(chosen[..., 1:].flatten(1), view.total)
        means = view.content.float()[torch.arange(len(chosen))[:, None, None], chosen].mean(2)
        features = view.content.float().scatter(1, chosen[..., :1].expand_as(means), means)
        features = features.gather(1, index[..., None].expand(-1, -1, means.shape[-1]))
        assignment = torch.zeros_like(view.coordinates[..., 0], dtype=torch.long)
        assignment.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
        first = assignment.gather(1, chosen[..., 0])[..., None].expand_as(chosen)
        return Keep(index, features, assignment.scatter(1, chosen.flatten(1), first.flatten(1)))


def _members(grid: tuple[int, int, int]) -> Int[Tensor, "windows places"]:
    """Raster indices of every whole window, on the CPU."""
    frames, rows, columns = grid
    down, across = rows // SIDE, columns // SIDE
    places = torch.arange(frames * rows * columns).view(grid)[:, : down * SIDE, : across * SIDE]
    return places.reshape(frames, down, SIDE, across, SIDE).transpose(2, 3).reshape(-1, SIDE * SIDE)


@dataclass(frozen=True)
class _KeySet(Step):
    """Marks the tokens that [CLS] attends to most."""

    share: float

    name: ClassVar[str] = "key-set"
    summary: ClassVar[str] = "the key set of MustDrop"
    paper: ClassVar[str] = MustDrop.paper

    @property
    def site(self) -> Site:
        return VisionOutput()

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({("encoder.cls_attention", -1)})

    def select(self, view: View) -> Keep:
        attention = cls_attention(view, -1)
        tokens = attention.shape[1]
        best = top_k(attention, -int(-self.share * tokens // 1))  # rounded up
        marked = torch.zeros_like(attention, dtype=torch.bool).scatter(1, best, True)
        return Keep(torch.arange(tokens, device=best.device).expand(len(best), -1), marked=marked)
