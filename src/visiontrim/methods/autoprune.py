"""AutoPrune: how soon tokens go is read off the question. A schedule, for any method between decoder layers.

"AutoPrune: Each Complexity Deserves a Pruning Policy", NeurIPS 2025, arXiv 2509.23931. Official code:
AutoLab-SAI-SJTU/AutoPrune, Apache-2.0.

1. At the first stage, I is the mutual information of text and vision tokens in the attention of the text after the
   image in the layer before, in bits, summed over heads.
2. With k = max(``steepness`` - ``slope`` I, 0), the stage before layer x (of 32) leaves tokens in proportion to
   1 / (1 + exp(k (x - 14.9 - k))), by one common factor so that the mean per layer is ``keep``. A question that points
   at few places has a large I and a flat curve: fewer tokens early, more late.
3. Which tokens stay, ``ranking`` says: any method with stages between decoder layers, such as "pyramiddrop" or
   "fastv", of which places, positions and choice are taken. Without one, those to which the text pays most attention in
   the layer before, mean over heads, before layers 1, 3, 7 and 16 of 32.

Each picture has its own counts: it is looked at by itself. ``slope=0`` is one curve for all.

Differences: the first cut after layer 0 is a stage like the others; the original leaves 2.5 times the mean there, by
the attention of [CLS] in part. What is dropped is gone, where its base, SparseVLM, recycles some.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from visiontrim.core.budget import Amount, Depth, check_amount, spread
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Layers, Positions, Step
from visiontrim.core.registry import load_method, register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import PAPERS, Cascade, Stage
from visiontrim.methods.checks import require
from visiontrim.ops.information import mutual_information
from visiontrim.ops.select import top_k

MIDDLE = 14.9


@register
@dataclass(frozen=True)
class AutoPrune(Cascade):
    keep: Amount = 128
    """Mean number of vision tokens per decoder layer and image (int), or that as a fraction of its tokens (float)."""
    ranking: str | None = None
    """A method between decoder layers, as it is written down, whose places and choice are taken; None: attention of the
    text."""
    steepness: float = 0.4
    """k of a question that points nowhere."""
    slope: float = 0.2
    """What k loses for each bit."""

    name: ClassVar[str] = "autoprune"
    summary: ClassVar[str] = "how soon tokens go follows what the question tells; any method says which"
    paper: ClassVar[str] = "arXiv 2509.23931, NeurIPS 2025"
    text_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(
            self.ranking is None or isinstance(self.ranking, str),
            f"ranking={self.ranking!r}: write the method down, such as 'pyramiddrop'",
        )
        require(
            self.ranking is None or isinstance(load_method(self.ranking), Cascade),
            f"ranking={self.ranking!r} has no stages between decoder layers alone: choose one that has, such as fastv",
        )
        super().__post_init__()
        check_amount(self.keep)
        for name in ("steepness", "slope"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: give 0 or more")

    @property
    def ranked(self) -> Cascade | None:
        """The method that chooses; None: this one."""
        method = None if self.ranking is None else load_method(self.ranking)
        return method if isinstance(method, Cascade) else None

    @property
    def depths(self) -> tuple[Depth, ...]:
        return (1 / 32, 3 / 32, 7 / 32, 16 / 32) if self.ranked is None else self.ranked.depths

    @property
    def positions(self) -> Positions:
        return "keep" if self.ranked is None else self.ranked.positions

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"decoder.text_attention", "text.question"}) if self.ranked is None else self.ranked.needs

    def choose(self, view: View, count: int) -> Keep:
        if self.ranked is not None:
            return self.ranked.choose(view, count)
        mask = view.text.question.mask[:, None]  # the mean over words, but for their number
        return Keep(top_k((view.decoder.text_attention.mean(1) * mask.mT).sum(1), count))

    def steps_for(self, layers: Layers) -> tuple[Step, ...]:
        return tuple(InformedStage(**vars(stage)) for stage in super().steps_for(layers) if isinstance(stage, Stage))

    def shares(self, bits: float, layers: tuple[int, ...], num_layers: int) -> tuple[float, ...]:
        """What the stages before ``layers`` leave, in proportion."""
        k = max(self.steepness - self.slope * bits, 0.0)
        return tuple(1 / (1 + math.exp(k * (layer * PAPERS / num_layers - MIDDLE - k))) for layer in layers)


@dataclass(frozen=True)
class InformedStage(Stage):
    """A stage whose count follows the information that the first one measured."""

    @property
    def needs(self) -> frozenset[Signal]:
        measured = {"decoder.text_attention", "text.question"} if self.number == 0 else set()
        return self.method.needs | measured

    @property
    def own_counts(self) -> bool:
        return True

    def select(self, view: View) -> Keep:
        method = self.method
        assert isinstance(method, AutoPrune)
        if self.number == 0:
            bits = mutual_information(view.decoder.text_attention, view.text.question.mask)
        elif view.noted is not None:
            bits = view.noted[:, 0]
        else:
            raise TrimError(f"{self} does not know what its first stage measured: leave all of its stages in")
        mean = view.count(method.keep, view.total)
        every = Keep.everything(view)
        kept = every if mean >= view.entered else self._some(view, bits.tolist(), mean)
        return replace(kept, noted=bits[:, None].expand_as(kept.index).to(torch.float32))

    def _some(self, view: View, bits: list[float], mean: int) -> Keep:
        method, arriving = self.method, view.features.shape[1]
        assert isinstance(method, AutoPrune)
        counts = {
            spread(mean, view.entered, self.layers, view.num_layers, method.shares(b, self.layers, view.num_layers))[
                self.number
            ]
            for b in bits
        }
        require(len(counts) == 1, f"{len(bits)} images share a batch, but {method} leaves different counts of them")
        count = min(arriving, counts.pop())
        return Keep.everything(view) if count == arriving else method.choose(view, count)
