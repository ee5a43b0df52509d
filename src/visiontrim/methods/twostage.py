"""The course of methods that act at the output of the vision encoder and once more between decoder layers.

It knows how a mean per layer is shared out over the two stages; it does not know what either of them looks at.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from visiontrim.core.budget import Amount, Depth, at_depths, check_amount, check_depths, second_stage
from visiontrim.core.method import DecoderLayer, Layers, Method, Site, Step, VisionOutput
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import PAPERS
from visiontrim.methods.checks import check_fields, require


@dataclass(frozen=True)
class TwoStage(Method):
    """A method whose second stage leaves one token for every :attr:`funnel` that its first one lets in."""

    keep: Amount | tuple[int, int] = 64
    """Mean number of vision tokens per decoder layer and image, or that as a fraction of the image's tokens; with the
    vision stage alone, the number that enters the language model. A pair gives the counts after either stage."""
    stages: Literal["vision", "both"] = "both"
    """Where tokens are removed."""
    layer: Depth = 16 / 32
    """Decoder layer before which the second stage stands: its index, or a fraction of the depth."""

    @property
    def funnel(self) -> float:
        """Tokens that enter the language model for each one that the second stage leaves."""
        return 3.0

    @property
    def vision_needs(self) -> frozenset[Signal]:
        """Signals that :meth:`choose` reads."""
        return frozenset()

    @property
    def language_needs(self) -> frozenset[Signal]:
        """Signals that :meth:`prune` reads."""
        return frozenset({"decoder.last_attention"})

    @abstractmethod
    def choose(self, view: View, count: int) -> Keep:
        """Which ``count`` tokens of the encoder's output, fewer than there are, enter the language model."""

    @abstractmethod
    def prune(self, view: View, count: int) -> Keep:
        """Which ``count`` tokens, fewer than there are, go on between decoder layers."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_depths((self.layer,))
        if not isinstance(self.keep, tuple):
            check_amount(self.keep)
            return
        way_out = "give two ints, the first at least as large as the second, together with stages='both'"
        require(self.stages == "both", f"keep={self.keep} counts two stages, but there is one: {way_out}")
        whole = len(self.keep) == 2 and all(type(count) is int for count in self.keep)
        require(whole and 1 <= self.keep[1] <= self.keep[0], f"keep={self.keep} is no pair of counts: {way_out}")

    def steps(self) -> tuple[Step, ...]:
        return self.steps_for(Layers(encoder=0, decoder=PAPERS))

    def steps_for(self, layers: Layers) -> tuple[Step, ...]:
        vision, language = VisionHalf(self), LanguageHalf(self, self.place(layers.decoder))
        return (vision,) if self.stages == "vision" else (vision, language)

    def place(self, num_layers: int) -> int:
        """The decoder layer of the second stage in a model of that many."""
        return at_depths((self.layer,), num_layers)[0]

    def entering(self, view: View) -> int:
        """Tokens that the first stage leaves of the segment."""
        if isinstance(self.keep, tuple):
            return view.count(self.keep[0], view.total, "keep[0]")
        mean = view.count(self.keep, view.total)
        if self.stages == "vision":
            return mean
        place, layers = self.place(view.num_layers), view.num_layers
        second = mean * layers / (place * self.funnel + layers - place)
        most = (2 * mean * layers - (layers - place)) // (2 * place)  # so that the second stage has a token
        return min(view.total, max(1, most), round(self.funnel * second))

    def remaining(self, view: View) -> int:
        """Tokens that the second stage leaves of the segment."""
        if isinstance(self.keep, tuple):
            return view.count(self.keep[1], name="keep[1]")
        mean = view.count(self.keep, view.total)
        return second_stage(mean, view.entered, self.place(view.num_layers), view.num_layers)


@dataclass(frozen=True)
class VisionHalf(Step):
    """The first stage."""

    method: TwoStage

    name: ClassVar[str] = "vision-half"
    summary: ClassVar[str] = "the stage at the encoder's output of a method that has two"
    paper: ClassVar[str] = "that of the method"

    @property
    def site(self) -> Site:
        return VisionOutput()

    @property
    def needs(self) -> frozenset[Signal]:
        return self.method.vision_needs

    def select(self, view: View) -> Keep:
        count = self.method.entering(view)
        return Keep.everything(view) if count >= view.features.shape[1] else self.method.choose(view, count)

    def __str__(self) -> str:
        return f"{self.method} at the encoder's output"


@dataclass(frozen=True)
class LanguageHalf(Step):
    """The second stage."""

    method: TwoStage
    layer: int

    name: ClassVar[str] = "language-half"
    summary: ClassVar[str] = "the stage between decoder layers of a method that has two"
    paper: ClassVar[str] = "that of the method"

    @property
    def site(self) -> Site:
        return DecoderLayer(self.layer)

    @property
    def needs(self) -> frozenset[Signal]:
        return self.method.language_needs

    def select(self, view: View) -> Keep:
        count = self.method.remaining(view)
        return Keep.everything(view) if count >= view.features.shape[1] else self.method.prune(view, count)

    def __str__(self) -> str:
        return f"{self.method} before {self.site}"
