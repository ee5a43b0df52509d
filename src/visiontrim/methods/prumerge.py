"""PruMerge and PruMerge+: outliers of the [CLS] attention, with their neighbours by key merged in.

"LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025, arXiv 2403.15388. Official
code: 42Shawn/LLaVA-PruMerge, Apache-2.0.

The patches with the highest attention of [CLS] in the encoder's *last* layer are kept. Each takes up the ``neighbours``
patches, kept or not, whose keys in that layer are nearest by the cosine. PruMerge+ keeps one part of the budget for
outliers and three for an even lattice of the other patches. Positions are consecutive.

How many are kept: the paper takes the outliers of each image, those above Q3 + 1.5 IQR (about 5 % of the patches; four
times as many in PruMerge+). ``keep=None`` does so, for one image at a time, since a batch has one count for all; any
other ``keep`` is met exactly. ``keep=None`` reads a number from the device.

``variant="paper"`` averages a patch with its neighbours, weighted by attention, and keeps raster order.
``variant="release"`` does what the released code does: all heads of the attention as a single one of the full width; a
patch plus the attention-weighted sum of its neighbours, not divided by anything; falling order of attention, lattice
last; and one more token, the attention-weighted sum of all dropped patches, which counts in ``keep`` and stands in
pictures at the best dropped patch.

Differences to the released code: its lattice skips places that are outliers and never samples the last patch, which
``keep=None`` repeats; with a number, the lattice is even over the patches that are no outliers, so that the count is
exact. Quartiles are those of each image (of the whole batch there). It fails without outliers or with more than a
third; here at least one patch is kept, and the lattice is full at most. Without [CLS], the paper's variant ranks by the
attention received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.budget import Amount, check_amount
from visiontrim.core.errors import TrimError
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, cls_attention
from visiontrim.methods.checks import check_fields, require
from visiontrim.ops.merge import add_neighbours
from visiontrim.ops.select import even_stride, gather, leftovers

LAST = -1
"""The encoder layer that ranks, counted from the end."""


@register
@dataclass(frozen=True)
class PruMerge(EncoderStep):
    keep: Amount | None = 64  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen, so wider is safe to read
    """Tokens of each image that enter the language model, as a number or a fraction; None: as many as are outliers."""
    neighbours: int = 32
    """Patches that each kept one takes up."""
    variant: Literal["paper", "release"] = "paper"
    """The paper's method, or the released code."""

    name: ClassVar[str] = "prumerge"
    summary: ClassVar[str] = "outliers of the [CLS] attention take up their neighbours by key"
    paper: ClassVar[str] = "arXiv 2403.15388, ICCV 2025"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep is not None:
            check_amount(self.keep)
        require(self.neighbours >= 1, f"neighbours={self.neighbours} merges nothing: give at least 1")

    @property
    def needs(self) -> frozenset[Signal]:
        attention = "encoder.cls_attention" if self.variant == "paper" else "encoder.cls_attention_wide"
        return frozenset({(attention, LAST), ("encoder.keys", LAST)})

    def select(self, view: View) -> Keep:
        if self.keep is not None:
            return super().select(view)
        if len(view.features) > 1:
            raise TrimError(
                f"keep=None counts the outliers of each image, but {len(view.features)} images share a batch and so a "
                "count: give keep, or one image at a time"
            )
        return self.merged(view, self.adaptive(self.attention(view)), self.variant == "release")

    def choose(self, view: View, count: int) -> Keep:
        extra = self.variant == "release" and count > 1  # one place is for the dropped patches
        return self.merged(view, self.fixed(self.attention(view), count - extra), extra)

    def attention(self, view: View) -> Float[Tensor, "batch tokens"]:
        if self.variant == "paper":
            return cls_attention(view, LAST)
        return view.encoder["cls_attention_wide", LAST].float()

    def fixed(self, attention: Float[Tensor, "batch tokens"], count: int) -> Int[Tensor, "batch kept"]:
        """``count`` patches, the best first."""
        return _ranked(attention)[:, :count]

    def adaptive(self, attention: Float[Tensor, "1 tokens"]) -> Int[Tensor, "1 kept"]:
        """The outliers, the highest first; the best patch if there are none."""
        return _ranked(attention)[:, : max(1, _outliers(attention))]

    def merged(self, view: View, index: Int[Tensor, "batch kept"], extra: bool) -> Keep:
        attention, keys = self.attention(view), view.encoder["keys", LAST]
        if self.variant == "paper":
            index = index.sort(1).values
        features = add_neighbours(
            view.content,
            keys.transpose(1, 2).flatten(2),
            attention,
            index,
            neighbours=self.neighbours,
            average=self.variant == "paper",
        )
        if extra:
            return _with_rest(view, attention, index, features)
        ordinals = torch.arange(index.shape[1], device=index.device).expand_as(index)
        assignment = torch.full_like(attention, -1, dtype=torch.long).scatter(1, index, ordinals)
        return Keep(index, features, assignment=assignment)


@register
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    name: ClassVar[str] = "prumerge-plus"
    summary: ClassVar[str] = "PruMerge with a lattice of three more patches for each outlier"

    def fixed(self, attention: Float[Tensor, "batch tokens"], count: int) -> Int[Tensor, "batch kept"]:
        outliers = _ranked(attention)[:, : max(1, round(count / 4))]
        others = leftovers(outliers, attention.shape[1])
        lattice = even_stride(others.shape[1], count - outliers.shape[1]).to(others.device)
        return torch.cat([outliers, others[:, lattice]], 1)

    def adaptive(self, attention: Float[Tensor, "1 tokens"]) -> Int[Tensor, "1 kept"]:
        outliers, tokens = super().adaptive(attention), attention.shape[1]
        stride = max(1, tokens // outliers.shape[1] // 3)
        lattice = torch.arange(0, tokens - 1, stride, device=attention.device)
        fresh = lattice[~torch.isin(lattice, outliers)]
        return torch.cat([outliers, fresh[None]], 1)


def _ranked(attention: Float[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    return attention.sort(dim=1, descending=True, stable=True).indices


def _outliers(attention: Float[Tensor, "1 tokens"]) -> int:
    """Patches above Q3 + 1.5 IQR, with linearly interpolated quartiles."""
    low, high = attention[0].quantile(torch.tensor([0.25, 0.75], device=attention.device)).unbind()
    return int((attention > high + 1.5 * (high - low)).sum())


def _with_rest(
    view: View,
    attention: Float[Tensor, "batch tokens"],
    index: Int[Tensor, "batch kept"],
    features: Float[Tensor, "batch kept dim"],
) -> Keep:
    """The kept patches and one more token, the weighted sum of the dropped ones, where there are any."""
    batch, tokens = attention.shape
    kept = index.shape[1]
    if kept == tokens:
        return Keep(index, features)
    rest = leftovers(index, tokens)
    weights = gather(attention, rest)[:, None]
    extra = (weights @ gather(view.content, rest).float()).to(features.dtype)
    best = gather(rest, weights[:, 0].argmax(1, keepdim=True))
    ordinals = torch.arange(kept + 1, device=index.device).expand(batch, -1)
    assignment = torch.full_like(attention, kept, dtype=torch.long).scatter(1, index, ordinals[:, :kept])
    return Keep(torch.cat([index, best], 1), torch.cat([features, extra], 1), assignment, ordinals == kept)
