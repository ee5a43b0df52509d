"""Matching inside the vision encoder: after every layer some tokens merge into others, until ``keep`` are left."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from visiontrim.core.budget import Amount, check_amount
from visiontrim.core.errors import TrimError
from visiontrim.core.method import EncoderLayer, Layers, Method, Site, Step
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.checks import check_fields
from visiontrim.ops.matching import Merged


@dataclass(frozen=True)
class Matching(Method):
    """Subclasses choose the tokens that merge. The same number merges after every layer, so that ``keep`` is exact."""

    keep: Amount = 64
    """Tokens of each image that leave the encoder, as a number or as a fraction."""
    proportional: bool = True
    """Whether later encoder layers attend to merged tokens in proportion to their mass; not with flash attention."""

    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_amount(self.keep)

    @property
    @abstractmethod
    def signals(self) -> frozenset[Signal]:
        """What :meth:`merged` reads."""

    @abstractmethod
    def merged(self, view: View, count: int) -> Merged:
        """Merge ``count`` of the tokens of ``view``, at most half of them, into others."""

    def steps(self) -> tuple[Step, ...]:
        return ()

    def first(self, layers: Layers) -> int:
        """The encoder layer before which tokens merge first, then before every later one."""
        return 1

    def steps_for(self, layers: Layers) -> tuple[Step, ...]:
        last = max(1, layers.encoder - 1)
        first = min(self.first(layers), last)
        return tuple(_Layer(self, layer, first, last) for layer in range(first, last + 1))

    def count(self, view: View, step: int, steps: int) -> int:
        """Tokens that merge in ``step`` of 1 to ``steps``."""
        tokens, keep = view.features.shape[1], view.count(self.keep, view.total)
        return tokens - min(tokens, left_after(step, steps, view.total, keep))


def left_after(step: int, steps: int, total: int, keep: int) -> int:
    """Tokens after ``step`` of 1 to ``steps``: equal numbers merge, but no step takes more than half."""
    return min(total - (total - keep) * step // steps, keep << (steps - step))


@dataclass(frozen=True)
class _Layer(Step):
    """The step before one layer."""

    method: Matching
    layer: int
    first: int
    last: int

    name: ClassVar[str] = "matching"
    summary: ClassVar[str] = "one step of a matching"
    paper: ClassVar[str] = "part of a method"

    @property
    def site(self) -> Site:
        return EncoderLayer(self.layer)

    @property
    def needs(self) -> frozenset[Signal]:
        return self.method.signals

    @property
    def proportional(self) -> bool:
        return self.method.proportional

    def select(self, view: View) -> Keep:
        tokens = view.features.shape[1]
        count = self.method.count(view, self.layer - self.first + 1, self.last - self.first + 1)
        if not count:
            return Keep.everything(view)
        if 2 * count > tokens:
            raise TrimError(
                f"{self.method} would merge {count} of {tokens} tokens at {self.site}, but at most half can merge at a "
                "time: give a larger keep"
            )
        merged = self.method.merged(view, count)
        return Keep(merged.index, merged.features, merged.assignment)
