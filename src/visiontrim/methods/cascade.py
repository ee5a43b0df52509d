"""The course that methods inside the language model share: stages before given decoder layers, and what each leaves.

Published schedules differ in what they count. Here a layer counts the tokens that it *processes*, and ``keep`` is the
mean over all decoder layers; a tuple gives what each stage leaves instead, as papers do.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from visiontrim.core.budget import Amount, Depth, at_depths, check_amount, check_depths, spread
from visiontrim.core.errors import TrimError
from visiontrim.core.method import DecoderLayer, Layers, Method, Site, Step
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.checks import check_fields, require

Counts = Amount | tuple[Amount, ...]
"""Mean number of vision tokens per decoder layer and image (int), or that as a fraction of the image's tokens (float).
A tuple gives what every stage leaves: tokens (ints), or a fraction of those that arrive there, rounded down (floats);
0 leaves none."""

PAPERS = 32
"""Decoder layers of the models that the papers' layers are counted on."""


class Cascade(Method):
    """A method with one or several stages between decoder layers. A subclass is a dataclass with a field ``keep``."""

    keep: Any

    @property
    @abstractmethod
    def depths(self) -> tuple[Depth, ...]:
        """Decoder layers before which tokens are removed."""

    @property
    def proportions(self) -> tuple[float, ...]:
        """What the stages leave, in proportion, when ``keep`` is a mean: half of what arrives."""
        return tuple(0.5**stage for stage in range(1, len(self.depths) + 1))

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals that :meth:`choose` reads."""
        return frozenset()

    @abstractmethod
    def choose(self, view: View, count: int) -> Keep:
        """Which ``count`` tokens, fewer than there are, go on."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_depths(self.depths)
        self._check_keep()

    def _check_keep(self) -> None:
        keep = self.keep
        if not isinstance(keep, tuple):
            check_amount(keep)
            return
        wanted = len(self.depths)
        require(len(keep) == wanted, f"keep={keep} counts {len(keep)} stages, but layers={self.depths}: give {wanted}")
        for amount in keep:
            if type(amount) not in (int, float) or amount != 0:
                check_amount(amount)

    def steps(self) -> tuple[Step, ...]:
        return self.steps_for(Layers(encoder=0, decoder=PAPERS))

    def steps_for(self, layers: Layers) -> tuple[Step, ...]:
        places = at_depths(self.depths, layers.decoder)
        return tuple(Stage(self, number, places) for number in range(len(places)))

    def count(self, view: View, number: int, layers: tuple[int, ...]) -> int:
        """Tokens that stage ``number`` of those before ``layers`` leaves of the image."""
        arriving = view.features.shape[1]
        if isinstance(self.keep, tuple):
            amount = self.keep[number]
            if isinstance(amount, float) and amount:
                return max(1, math.floor(amount * arriving))
            return view.count(amount, name=f"keep[{number}]") if amount else 0
        mean = view.count(self.keep, view.total)
        if mean >= view.entered:
            return arriving
        count = spread(mean, view.entered, layers, view.num_layers, self.proportions)[number]
        if count > arriving:
            raise TrimError(
                f"{self} leaves {count} tokens before layer {layers[number]}, but only {arriving} arrive there: lower "
                "keep, or remove the other stages"
            )
        return count


@dataclass(frozen=True)
class Stage(Step):
    """One stage of a cascade."""

    method: Cascade
    number: int
    layers: tuple[int, ...]
    """The layers of all stages."""

    name: ClassVar[str] = "stage"
    summary: ClassVar[str] = "one stage of a method inside the language model"
    paper: ClassVar[str] = "that of the method"

    @property
    def site(self) -> Site:
        return DecoderLayer(self.layers[self.number])

    @property
    def needs(self) -> frozenset[Signal]:
        return self.method.needs

    def select(self, view: View) -> Keep:
        count = self.method.count(view, self.number, self.layers)
        if count >= view.features.shape[1]:
            return Keep.everything(view)
        return self.method.choose(view, count)

    def __str__(self) -> str:
        return f"{self.method} before {self.site}"
