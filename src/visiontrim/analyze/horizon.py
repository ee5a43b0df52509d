"""How deep the picture is needed: random tokens instead of the method's from a decoder layer on.

Up to layer l all vision tokens are there; before it all but a few go, chosen by a method or at random. From the layer
on at which random ones lose nothing, no choice can be worth anything; from the one at which the method beats random no
more, its own is not. Question type by question type. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.asking import PLAIN, Cell
from visiontrim.evaluate.bootstrap import Interval, to_json
from visiontrim.evaluate.scores import Answers

LAYER = "{layer}"
"""Stands for the layer in the name of a method."""
METHOD = "fastv:layer={layer},keep=[{keep}]"
"""What is compared with random by default: the simplest method that chooses there."""
MARGIN = 1.0
"""Points of the score that are nothing."""


@dataclass(frozen=True, slots=True)
class Depth:
    """What is lost against the plain model at one layer, in points of the suite's score."""

    layer: int
    loss: float
    """With random tokens; negative where the score falls."""
    loss_interval: Interval | None
    method: float | None
    """The same with the method's tokens; None where it cannot choose there."""
    over: float | None
    """The method's score minus that of random tokens."""
    over_interval: Interval | None

    @property
    def loses_nothing(self) -> bool:
        """Whether random tokens cost at most :data:`MARGIN`, and the interval reaches 0."""
        return -self.loss <= MARGIN and (self.loss_interval is None or self.loss_interval[1] >= 0)

    @property
    def chooses_nothing(self) -> bool:
        """Whether the method does not beat random tokens."""
        if self.over is None or self.over_interval is None:
            return self.over is None or self.over <= MARGIN
        return self.over_interval[0] <= 0


@dataclass(frozen=True, slots=True)
class Horizon:
    """One type of question, or all."""

    type: str
    questions: int
    plain: float
    depths: tuple[Depth, ...]

    @property
    def lost(self) -> int | None:
        """The first layer from which on, at every layer that was looked at, random tokens lose nothing."""
        return _first([depth.loses_nothing for depth in self.depths], self.depths)

    @property
    def chosen(self) -> int | None:
        """The first layer from which on the method beats random tokens no more."""
        return _first([depth.chooses_nothing for depth in self.depths], self.depths)

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {
                "layer": depth.layer,
                "random": depth.loss,
                "random_interval": to_json(depth.loss_interval),
                "method": depth.method,
                "over": depth.over,
                "over_interval": to_json(depth.over_interval),
            }
            for depth in self.depths
        ]
        about = {"type": self.type, "questions": self.questions, "plain": self.plain}
        return about | {"nothing_lost_from": self.lost, "nothing_chosen_from": self.chosen, "layers": rows}


def _first(good: Sequence[bool], depths: Sequence[Depth]) -> int | None:
    """The layer at which the run of True that reaches the end begins."""
    start = next((number + 1 for number in reversed(range(len(good))) if not good[number]), 0)
    return depths[start].layer if start < len(depths) else None


def pair(method: str, layer: int, keep: int) -> tuple[Cell, Cell]:
    """Random tokens from ``layer`` on, and the method's. ``method`` has the layer's place, :data:`LAYER`.

    Raises :class:`TrimError` where it has none.
    """
    if LAYER not in method:
        raise TrimError(f"--method {method!r} has no place for the layer: write one as {METHOD!r}")
    named = method.replace(LAYER, str(layer)).replace("{keep}", str(keep))
    return Cell(f"random:layer={layer},keep={keep}", None), Cell(named, None)


def horizons(answers: Answers, method: str, layers: Sequence[int], keep: int) -> list[Horizon]:
    """All questions, then each type."""
    kinds = list(dict.fromkeys(item.type for item in answers.items))
    parts = [("all", answers)]
    if len(kinds) > 1:
        parts += [(kind, answers.where([item.type == kind for item in answers.items])) for kind in kinds]
    return [_horizon(kind, part, method, layers, keep) for kind, part in parts]


def _horizon(kind: str, answers: Answers, method: str, layers: Sequence[int], keep: int) -> Horizon:
    plain, depths = answers.sample(Cell(PLAIN, None)), []
    for layer in layers:
        control, ours = pair(method, layer, keep)
        if error := answers.error(control):
            raise TrimError(f"layer {layer}: {error}")
        loss, ends = answers.sample(control).over(plain)
        works = not answers.error(ours)
        over, spread = answers.sample(ours).over(answers.sample(control)) if works else (None, None)
        alone = answers.sample(ours).over(plain)[0] if works else None
        depths.append(Depth(layer, loss, ends, alone, over, spread))
    return Horizon(kind, len(answers.items), plain.value, tuple(depths))


def table(found: Sequence[Horizon], keep: int, metric: str) -> str:
    """Markdown: a row for each type of question, then the layers of all questions."""
    layers = [depth.layer for depth in found[0].depths]
    lines = [
        f"{metric.capitalize()} lost with {keep} random tokens from a layer on, in points; nothing is lost from the "
        f"first layer on behind which it is at most {MARGIN:g} and within its interval.",
        "",
        f"| questions | plain | nothing lost from | no choice from | {' | '.join(f'layer {n}' for n in layers)} |",
        "|---" * (4 + len(layers)) + "|",
    ]
    for one in found:
        cells = (f"{depth.loss:+.1f}" for depth in one.depths)
        name = f"{one.type} ({one.questions})"
        lines.append(f"| {name} | {one.plain:.1f} | {_at(one.lost)} | {_at(one.chosen)} | {' | '.join(cells)} |")
    lines += ["", "| layer | random | method | method over random |", "|---|---|---|---|"]
    for depth in found[0].depths:
        ours = "-" if depth.method is None else f"{depth.method:+.1f}"
        over = "-" if depth.over is None else f"{depth.over:+.1f}{_ends(depth.over_interval)}"
        lines.append(f"| {depth.layer} | {depth.loss:+.1f}{_ends(depth.loss_interval)} | {ours} | {over} |")
    return "\n".join(lines)


def _at(layer: int | None) -> str:
    return "none" if layer is None else str(layer)


def _ends(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})"
