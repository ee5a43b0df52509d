"""Schedules that prune the vision tokens in several decoder layers, until none is left.

What is removed at a layer is up to the method, so a method and its controls share the counts. The schedules are those
of LUVC (arXiv 2512.09010 publishes none; ``cascade`` is that of the same group's other work, ``linear`` is ours).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visiontrim.core.budget import Amount, check_amount, spread
from visiontrim.core.method import DecoderLayer, Layers, Method, Site, Step
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.checks import check_fields, require

Schedule = Literal["cascade", "linear"]
CASCADE = 0.45
"""What each stage of the cascade leaves of the tokens before it; the last one leaves nothing."""

Stages = tuple[tuple[int, float], ...]
"""Decoder layers, ascending, with the share of the tokens that entered which is left from that layer on."""


def stages(schedule: Schedule, num_layers: int, every: int, eliminate: bool) -> Stages:
    """The stages of a ``schedule`` on a language model of ``num_layers`` layers.

    ``cascade``: 0.45 from layer L/3, 0.45^2 from 2L/3. ``linear``: 1 - l/(L-1) from every ``every``-th layer l. Both
    leave nothing to the last layer, L - 1, if ``eliminate``. Layers that coincide in a shallow model are one stage.
    """
    last = num_layers - 1
    if schedule == "cascade":
        shares = {round(part * num_layers / 3): CASCADE**part for part in (1, 2)}
    else:
        shares = {layer: 1 - layer / last for layer in range(every, last, every)}
    shares = {layer: share for layer, share in shares.items() if 1 <= layer < last}
    if eliminate and last >= 1:
        shares[last] = 0.0
    return tuple(shares.items())


def counts(stages: Stages, num_layers: int, entered: int, mean: int | None) -> tuple[int, ...]:
    """Tokens that each stage leaves of the ``entered`` ones: its share, or in proportion to it so that ``mean`` is met.

    Raises :class:`TrimError` if the layers before the first stage alone need more than that mean of tokens per layer.
    """
    if mean is None or not stages:
        return tuple(math.floor(share * entered + 0.5) for _, share in stages)
    layers, shares = zip(*stages, strict=True)
    return spread(mean, entered, layers, num_layers, shares)


@dataclass(frozen=True)
class Scheduled(Method):
    """A method that prunes by a schedule. Subclasses choose the tokens."""

    keep: Amount | None = None
    """Mean number of vision tokens per decoder layer and image, or that as a fraction of the image's tokens; null: what
    the schedule gives."""
    schedule: Schedule = "cascade"
    """0.45 of the tokens at each third of the layers, or a little every few layers (see :func:`stages`)."""
    every: int = 4
    """Layers between the stages of the linear schedule."""
    eliminate: bool = True
    """Whether the last decoder layer gets no vision token."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep is not None:
            check_amount(self.keep)
        require(self.every >= 1, f"every={self.every} is no number of layers: give 1 or more")

    @property
    def signals(self) -> frozenset[Signal]:
        """What :meth:`choose` reads."""
        return frozenset()

    @abstractmethod
    def choose(self, view: View, count: int) -> Keep:
        """``count`` of the tokens of ``view``; at least one, and fewer than there are."""

    def steps(self) -> tuple[Step, ...]:
        return ()

    def steps_for(self, layers: Layers) -> tuple[Step, ...]:
        return tuple(_Stage(self, *stage) for stage in enumerate(layer for layer, _ in self.plan(layers.decoder)))

    def plan(self, num_layers: int) -> Stages:
        """The schedule on a language model of that many layers."""
        return stages(self.schedule, num_layers, self.every, self.eliminate)

    def mean(self, view: View) -> int | None:
        """Tokens of the segment per decoder layer that ``keep`` means; None: what the schedule gives."""
        return None if self.keep is None else view.count(self.keep, view.total)


@dataclass(frozen=True)
class _Stage(Step):
    """One stage of a schedule."""

    method: Scheduled
    number: int
    layer: int

    name: ClassVar[str] = "stage"
    summary: ClassVar[str] = "one stage of a schedule"
    paper: ClassVar[str] = "part of a method"

    @property
    def site(self) -> Site:
        return DecoderLayer(self.layer)

    @property
    def needs(self) -> frozenset[Signal]:
        return self.method.signals

    def select(self, view: View) -> Keep:
        batch, tokens = view.features.shape[:2]
        method = self.method
        planned = counts(method.plan(view.num_layers), view.num_layers, view.entered, method.mean(view))
        count = planned[self.number]
        if count >= tokens:
            return Keep.everything(view)
        if not count:
            return Keep(torch.empty(batch, 0, dtype=torch.long, device=view.features.device))
        return method.choose(view, count)
