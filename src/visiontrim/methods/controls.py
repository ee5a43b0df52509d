"""Controls: what a method has to beat at the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visiontrim.core.budget import Amount, check_amount
from visiontrim.core.errors import TrimError
from visiontrim.core.method import DecoderLayer, Method, Site, Step, VisionOutput
from visiontrim.core.registry import register
from visiontrim.core.view import Keep, View
from visiontrim.ops.select import even_stride, uniform_stride


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
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TrimError(f"seed={self.seed!r} is no seed: give an int")

    def select(self, view: View) -> Keep:
        batch, tokens = view.features.shape[:2]
        count = view.count(self.keep)
        # one draw on the CPU for all rows: a batch then equals its samples one by one, on every device
        drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(self.seed))[:count]
        return Keep(drawn.sort().values.to(view.features.device).expand(batch, count))


@register
@dataclass(frozen=True)
class Uniform(_Control):
    """Keeps an even lattice of the grid, or every n-th token of what an earlier stage left."""

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "keeps an even lattice of tokens"
    paper: ClassVar[str] = "control"

    def select(self, view: View) -> Keep:
        batch, tokens = view.features.shape[:2]
        count = view.count(self.keep)
        index = uniform_stride(view.grid, count) if tokens == view.total else even_stride(tokens, count)
        return Keep(index.to(view.features.device).expand(batch, count))
