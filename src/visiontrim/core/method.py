"""Methods: frozen hyper-parameters plus one pure function from a view to what is kept."""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.signals import Signal
from visiontrim.core.view import Glance, Keep, View

Positions = Literal["keep", "compact", "members", "unmerged"]
"""Position ids of survivors: their own (gaps stay), consecutive ones, for merged ones those of several members, or in
attention those of all members, at each of which they stand."""


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """Just before layer ``index`` of the vision encoder, so after ``index`` layers; 0: on embedded patches."""

    index: int

    def __post_init__(self) -> None:
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 0:
            raise TrimError(f"layer={self.index!r}: an encoder stage stands before encoder layer 0 or a later one")

    def __str__(self) -> str:
        return f"encoder layer {self.index}"


@dataclass(frozen=True, slots=True)
class VisionOutput:
    """Between the vision encoder and the projector."""

    def __str__(self) -> str:
        return "vision"


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Just before decoder layer ``index`` of the language model, so after ``index`` layers, during prefill."""

    index: int

    def __post_init__(self) -> None:
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 1:
            raise TrimError(f"layer={self.index!r}: a language stage stands before decoder layer 1 or a later one")

    def __str__(self) -> str:
        return f"layer {self.index}"


Site = EncoderLayer | VisionOutput | DecoderLayer


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers of a model, for methods whose places depend on them."""

    encoder: int
    """Layers of the vision encoder that its output passes through; stages stand before layers 0 to ``encoder - 1``."""
    decoder: int
    """Layers of the language model."""
    whole: tuple[int, ...] = ()
    """Layers of the vision encoder that see all of a picture where the others see windows; (): all do."""
    between: bool = True
    """Whether tokens can be removed between the layers of the language model."""


@dataclass(frozen=True)
class Decoding(ABC):
    """What the tokens of an answer see of the vision tokens in the cache, from one decoder layer on.

    Layers before it see all of them. The cache stays whole, so another step can see others. What :meth:`select` answers
    is a pure function of what it is shown.
    """

    layer: int
    """The first decoder layer that sees a part, at least 1."""

    @abstractmethod
    def select(self, glance: Glance) -> Bool[Tensor, "batch tokens"]:
        """Which of the vision tokens are seen; entries where ``glance.valid`` is False do not count."""


class Method(ABC):
    """A way to compress. Concrete methods are frozen dataclasses, equal and hashable by their hyper-parameters."""

    name: ClassVar[str]
    """Name in the registry, on the command line and in recipes."""
    summary: ClassVar[str]
    """One line for tables."""
    paper: ClassVar[str]
    """Where it is published, or "control"."""
    for_videos: ClassVar[bool] = False
    """Whether it was published for videos: by its rule an image is a video of one frame."""
    also_at: ClassVar[tuple[type, ...]] = ()
    """Kinds of place (:data:`Site`, or :class:`Decoding`) where options can have it act, beside those of its steps."""
    text_aware: ClassVar[bool] = False
    """Whether the question can change what is kept."""
    merges: ClassVar[bool] = False
    """Whether kept tokens carry something of the dropped ones."""
    narrows_cache: ClassVar[bool | Literal["all"]] = False
    """Whether, once the prefill is over, every decoder layer from the first stage on that removes something caches only
    what the last one left; "all": every decoder layer."""

    @property
    def positions(self) -> Positions:
        """Position rule of the method; ``trim(positions=...)`` overrides it."""
        return "keep"

    @property
    def decoding(self) -> Decoding | None:
        """What the answer sees of the cache; None: all that is in it."""
        return None

    @abstractmethod
    def steps(self) -> tuple[Step, ...]:
        """The single-site steps, in the order in which the model meets them.

        Where a method places stages by the decoder's depth, they are those of the 32 layers that papers speak of.
        """

    def steps_for(self, layers: Layers) -> tuple[Step, ...]:
        """The steps on a model of so many ``layers``."""
        return self.steps()

    def as_part(self) -> Method:
        """The method as a part of a plan, whose other parts take stages that it may have taken alone."""
        return self

    def __or__(self, other: Method) -> Plan:
        return Plan((self, other))

    def to_dict(self) -> dict[str, Any]:
        """Name and hyper-parameters; ``visiontrim.load_method`` turns it back into an equal object."""
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]  # concrete methods are dataclasses
        return {"method": self.name} | {f.name: getattr(self, f.name) for f in fields}

    def __str__(self) -> str:
        given = (
            f"{f.name}={_spelled(getattr(self, f.name))}"
            for f in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
            if f.name == "keep" or getattr(self, f.name) != f.default
        )
        options = ",".join(given)
        return f"{self.name}:{options}" if options else self.name


def _spelled(value: object) -> object:
    """As the registry reads it."""
    return list(value) if isinstance(value, tuple) else "null" if value is None else value


class Step(Method):
    """A method that acts at one place. What is kept is a pure function of the view."""

    @property
    @abstractmethod
    def site(self) -> Site: ...

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals that :meth:`select` reads; the engine computes no others."""
        return frozenset()

    @property
    def proportional(self) -> bool:
        """Whether later layers of the encoder attend to each token in proportion to its mass (encoder layers only)."""
        return False

    @property
    def own_counts(self) -> bool:
        """Whether what a picture shows decides how much is kept. The step then sees one segment at a time.

        Pictures that are rows of a batch of the encoder must still agree on their counts inside it.
        """
        return False

    @abstractmethod
    def select(self, view: View) -> Keep: ...

    def steps(self) -> tuple[Step, ...]:
        return (self,)


def check_order(method: Method, steps: tuple[Step, ...]) -> None:
    """Raise :class:`TrimError` unless the ``steps`` of ``method`` follow each other in the model."""
    sites = [step.site for step in steps]
    if any(_place(later) <= _place(earlier) for earlier, later in itertools.pairwise(sites)):
        raise TrimError(
            f"the stages of {method} stand at {', '.join(map(str, sites))}: order them from the vision encoder "
            "to the last decoder layer, one method per place"
        )


def _place(site: Site) -> tuple[int, int]:
    """Sorts sites in the order in which a model meets them."""
    match site:
        case EncoderLayer(index):
            return 0, index
        case VisionOutput():
            return 1, 0
        case DecoderLayer(index):
            return 2, index


@dataclass(frozen=True)
class Plan(Method):
    """Several methods one after the other: ``Random(keep=128) | Random(keep=0.5, layer=2)``."""

    methods: tuple[Method, ...]
    name: ClassVar[str] = "plan"
    summary: ClassVar[str] = "several methods one after the other"
    paper: ClassVar[str] = "composition"

    def __post_init__(self) -> None:
        flat: list[Method] = []
        for method in self.methods:
            flat += method.methods if isinstance(method, Plan) else [method.as_part()]
        object.__setattr__(self, "methods", tuple(flat))
        check_order(self, self.steps())
        if len(views := [str(method) for method in self.methods if method.decoding is not None]) > 1:
            raise TrimError(
                f"{' and '.join(views)} each choose what the answer sees of the cache: leave it to one of them"
            )

    @property
    def decoding(self) -> Decoding | None:
        return next((method.decoding for method in self.methods if method.decoding is not None), None)

    @property
    def positions(self) -> Positions:
        rules = {method.positions for method in self.methods}
        order: tuple[Positions, ...] = ("unmerged", "members", "compact", "keep")
        return next(rule for rule in order if rule in rules)

    def steps(self) -> tuple[Step, ...]:
        return tuple(step for method in self.methods for step in method.steps())

    def steps_for(self, layers: Layers) -> tuple[Step, ...]:
        return tuple(step for method in self.methods for step in method.steps_for(layers))

    def to_dict(self) -> dict[str, Any]:
        return {"plan": [method.to_dict() for method in self.methods]}

    def __str__(self) -> str:
        return " | ".join(map(str, self.methods))
