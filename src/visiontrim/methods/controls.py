"""Controls: what a method has to beat at the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from visiontrim.core.budget import Amount, check_amount
from visiontrim.core.method import DecoderLayer, Method, Site, Step, VisionOutput
from visiontrim.core.registry import register
from visiontrim.core.view import Keep, View
from visiontrim.methods.checks import check_seed
from visiontrim.methods.schedule import Scheduled
from visiontrim.ops.select import even_stride, gather, uniform_stride


@register
@dataclass(frozen=True)
class NoTrim(Method):
    """Keeps every token: the uncompressed model, with a report."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "keeps everything"
    paper: ClassVar[str] = "control"

    def steps(self) -> tuple[Step, ...]:
        return ()


@dataclass(frozen=True)
class _Control(Step):
    keep: Amount = 64
    """Tokens of each image that go on, as a number or as a fraction of those that arrive."""
    layer: int | None = None
    """Decoder layer before which tokens are removed; None removes them at the output of the vision encoder."""

    also_at: ClassVar[tuple[type, ...]] = (DecoderLayer,)

    def __post_init__(self) -> None:
        check_amount(self.keep)
        if self.layer is not None:
            DecoderLayer(self.layer)

    @property
    def site(self) -> Site:
        return VisionOutput() if self.layer is None else DecoderLayer(self.layer)


@register
@dataclass(frozen=True)
class Random(_Control):
    """Keeps tokens drawn without replacement, the same ones for all images with as many tokens."""

    seed: int = 0
    """Seed of the draw."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "keeps random tokens"
    paper: ClassVar[str] = "control"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def select(self, view: View) -> Keep:
        batch, tokens = view.features.shape[:2]
        count = view.count(self.keep)
        return Keep(_drawn(tokens, count, self.seed).to(view.features.device).expand(batch, count))


@register
@dataclass(frozen=True)
class Uniform(_Control):
    """Keeps an even lattice of the grid, or every n-th token of what an earlier stage left."""

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "keeps an even lattice of tokens"
    paper: ClassVar[str] = "control"

    def select(self, view: View) -> Keep:
        count = view.count(self.keep)
        return Keep(_lattice(view, count).to(view.features.device).expand(len(view.features), count))


@register
@dataclass(frozen=True)
class Fade(Scheduled):
    """Random, uniform or averaged tokens by the schedule of LUVC."""

    operator: Literal["random", "uniform", "average"] = "random"
    """What goes on: tokens drawn without replacement; an even lattice of the grid, then every n-th token; or the same
    tokens, each as the mean of those that are nearer to it on the grid than to another."""
    seed: int = 0
    """Seed of the draws."""

    name: ClassVar[str] = "fade"
    summary: ClassVar[str] = "random, uniform or averaged tokens by LUVC's schedule"
    paper: ClassVar[str] = "control"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def choose(self, view: View, count: int) -> Keep:
        batch, tokens = view.features.shape[:2]
        index = _drawn(tokens, count, self.seed) if self.operator == "random" else _lattice(view, count)
        index = index.to(view.features.device).expand(batch, count)
        return averaged(view, index) if self.operator == "average" else Keep(index)


def averaged(view: View, index: Int[Tensor, "batch kept"]) -> Keep:
    """Each token of ``index`` as the mean of the tokens nearest to it on the grid, the first of two as near."""
    places = view.coordinates.float()
    exactly = "donot_use_mm_for_euclid_dist"  # or ties would be decided by rounding
    nearest = torch.cdist(places, gather(places, index), compute_mode=exactly).argmin(-1)
    nearest.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
    batch, _, dim = view.content.shape
    total = view.content.new_zeros(batch, index.shape[1], dim, dtype=torch.float32)
    total.scatter_add_(1, nearest[..., None].expand_as(view.content), view.content.float())
    number = torch.zeros_like(total[..., 0]).scatter_add_(1, nearest, torch.ones_like(places[..., 0]))
    return Keep(index, total / number[..., None], nearest)


def _drawn(tokens: int, count: int, seed: int) -> Int[Tensor, " {count}"]:
    # one draw on the CPU for all rows: a batch then equals its samples one by one, on every device
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def _lattice(view: View, count: int) -> Int[Tensor, " {count}"]:
    tokens = view.features.shape[1]
    return uniform_stride(view.grid, count) if tokens == view.total else even_stride(tokens, count)
