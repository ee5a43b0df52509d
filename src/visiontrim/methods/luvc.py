"""LUVC: merge inside the vision encoder, prune by spectrum inside the language model, until no vision token is left.

"Towards Lossless Ultimate Vision Token Compression for VLMs", arXiv 2512.09010. The public text names the parts and has
no equations, so what stands here is our design from its description, and every choice is an option; defaults are what
measured best on the bundled model (docs/luvc.md).

OIM, the orthogonal iterative merger, stands between layers of the vision encoder. Its calls alternate between width and
height. Along the axis, every line merges the same number of disjoint neighbour pairs, the most similar ones, so that
the tokens still form a box. Merged features and places are means weighted by the number of patches that they stand for.
[CLS] never merges. Position ids are those of the slot nearest to the merged place.

SPU, the spectrum pruning unit, stands before several decoder layers (see :mod:`.schedule`). Per image or video:

1. Z = the hidden states of the n tokens in raster order, after the layer's own input norm, in float32 minus their mean.
2. A real FFT along the tokens keeps |f| <= max(1, round(n' / n x floor(n / 2))), the highest frequency that the n'
   tokens to come can carry, and goes back to Y.
3. The n' tokens with the largest |Y_i|^2 go on, in order, with hidden states and position ids as they are.
4. The last layer gets no vision token, and caches none.

No attention map is read, and the text never enters.

A merge in the encoder is linear in the tokens. The table of costs shows one up to 9,216 tokens and a pruning between
decoder layers at 16,384, so what it has as growth, above linear, is that of two different steps.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.budget import mean_per_layer
from visiontrim.core.errors import TrimError
from visiontrim.core.method import EncoderLayer, Layers, Site, Step
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.checks import require
from visiontrim.methods.schedule import Scheduled, counts
from visiontrim.ops.matching import merge_axis
from visiontrim.ops.select import even_stride, top_k
from visiontrim.ops.spectrum import channel_energy, cutoff, grid_energy, resample, token_energy


@register
@dataclass(frozen=True)
class LUVC(Scheduled):
    """Hyper-parameters of LUVC. Raises :class:`TrimError` for values that cannot work."""

    stages: Literal["both", "vision", "language"] = "both"
    """OIM and SPU, or one of them. With OIM alone, ``keep`` is met as nearly as a box of tokens allows."""
    merged: float = 0.5
    """Share of the tokens that OIM leaves, where ``keep`` does not decide it."""
    calls: int = 4
    """Calls of OIM, spread evenly over the encoder, at most one between two layers. Each leaves at least half of the
    tokens."""
    pairs: Literal["best", "fixed"] = "best"
    """The disjoint pairs of a line with the largest sum of similarities, or the most similar ones of the pairs (0, 1),
    (2, 3), ..."""
    proportional: bool = False
    """Whether later encoder layers attend to merged tokens in proportion to their mass; not with flash attention."""
    spectrum: Literal["tokens", "channels", "grid", "residual", "pooling"] = "channels"
    """What ranks the tokens: their energy after a low pass along the tokens, along the channels of each token, or along
    the rows and columns of the grid; the energy that the low pass along the tokens removes ("residual"); or no ranking
    but spectral pooling, a merge: the spectrum along the tokens, cut to the count to come and transformed back."""

    name: ClassVar[str] = "luvc"
    summary: ClassVar[str] = "merges inside the encoder, prunes by spectrum in the decoder until no token is left"
    paper: ClassVar[str] = "arXiv 2512.09010; its equations are ours, docs/luvc.md"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.merged <= 1, f"merged={self.merged} is no share: give a number in (0, 1], such as 0.5")
        require(self.calls >= 1, f"calls={self.calls} is no number of calls: give 1 or more, or stages='language'")

    def steps_for(self, layers: Layers) -> tuple[Step, ...]:
        places = self.places(layers)
        merging = tuple(_Merge(self, call, len(places), layer) for call, layer in enumerate(places))
        return merging + (super().steps_for(layers) if self.stages != "vision" else ())

    def places(self, layers: Layers) -> tuple[int, ...]:
        """The encoder layers before which tokens merge, where it can be those behind a layer that sees all of them."""
        if self.stages == "language":
            return ()
        calls = min(self.calls, max(1, layers.encoder - 1))
        even = tuple(max(1, round((call + 1) * layers.encoder / (calls + 1))) for call in range(calls))
        behind = [layer + 1 for layer in layers.whole if layer + 1 < layers.encoder]
        if len(behind) < calls:
            return even
        choices = itertools.combinations(behind, calls)
        return min(choices, key=lambda places: sum(abs(a - b) for a, b in zip(places, even, strict=True)))

    def entering(self, view: View) -> int:
        """Tokens of the segment that OIM should leave."""
        mean = self.mean(view)
        if mean is None:
            return max(1, round(self.merged * view.total))
        if self.stages == "vision":
            return mean
        plan, layers = self.plan(view.num_layers), view.num_layers
        given = counts(plan, layers, view.total, None)
        scheduled = mean_per_layer(view.total, [layer for layer, _ in plan], given, layers)
        return min(view.total, round(mean * view.total / scheduled))

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset() if self.spectrum == "pooling" else frozenset({"decoder.next_normed"})

    def choose(self, view: View, count: int) -> Keep:
        if self.spectrum == "pooling":
            return pooled(view, count)
        return Keep(top_k(self.energy(view, count), count))

    def energy(self, view: View, count: int) -> Float[Tensor, "batch tokens"]:
        """What ranks the tokens when ``count`` of them are to be left."""
        values, (tokens, dim) = view.decoder.next_normed, view.features.shape[1:]
        match self.spectrum:
            case "channels":
                return channel_energy(values, cutoff(count, tokens, dim))
            case "grid":
                _, rows, columns = view.grid
                share = (count / view.total) ** 0.5  # of the rows as of the columns
                highest = cutoff(round(share * rows), rows, rows), cutoff(round(share * columns), columns, columns)
                return grid_energy(values, view.coordinates, view.grid, highest)
            case rule:
                return token_energy(values, cutoff(count, tokens, tokens), residual=rule == "residual")


def pooled(view: View, count: int) -> Keep:
    """``count`` tokens with the low end of the spectrum, at even distances; each stands for those nearest to it."""
    batch, tokens = view.features.shape[:2]
    centres = even_stride(tokens, count)
    borders = (centres[1:] + centres[:-1]) / 2
    assignment = torch.bucketize(torch.arange(tokens), borders).to(view.features.device)
    return Keep(
        centres.to(view.features.device).expand(batch, count),
        resample(view.content, count),
        assignment.expand(batch, tokens),
    )


@dataclass(frozen=True)
class _Merge(Step):
    """One call of OIM."""

    method: LUVC
    call: int
    calls: int
    layer: int

    name: ClassVar[str] = "oim"
    summary: ClassVar[str] = "one call of OIM"
    paper: ClassVar[str] = LUVC.paper

    @property
    def site(self) -> Site:
        return EncoderLayer(self.layer)

    @property
    def proportional(self) -> bool:
        return self.method.proportional

    def select(self, view: View) -> Keep:
        seen = view.encoder
        if "lattice" not in seen:
            raise TrimError(f"{self.method} merges along the axes of a grid that an earlier stage broke: put it first")
        frames, rows, columns = view.grid
        calls = self.calls
        left = box(rows, columns, self.method.entering(view) / frames, calls)
        axis, turns = (2, (calls + 1) // 2) if self.call % 2 == 0 else (1, calls // 2)
        count = seen.lattice[axis] - sizes(view.grid[axis], left[axis - 1], turns)[self.call // 2]
        if not count:
            return Keep.everything(view)
        best = self.method.pairs == "best"
        merged = merge_axis(view.content, seen.mass, seen.lattice, axis, count, unit=seen.unit, best=best)
        lattice = list(seen.lattice)
        lattice[axis] -= count
        return Keep(merged.index, merged.features, merged.assignment, lattice=(lattice[0], lattice[1], lattice[2]))


@functools.cache
def box(rows: int, columns: int, target: float, calls: int) -> tuple[int, int]:
    """(rows, columns) with a product as near as possible to ``target`` that ``calls`` calls of OIM can leave.

    Of several the one nearest to the picture's proportions.
    """
    least = _halved(rows, calls // 2), _halved(columns, (calls + 1) // 2)
    boxes = ((r, c) for r in range(least[0], rows + 1) for c in range(least[1], columns + 1))
    return min(boxes, key=lambda box: (abs(box[0] * box[1] - target), abs(math.log(box[0] * columns / box[1] / rows))))


def sizes(start: int, end: int, turns: int) -> tuple[int, ...]:
    """Length of an axis after each of its ``turns``, in equal ratios, none of which leaves less than half."""
    result = [end]
    for turn in range(turns - 1, 0, -1):
        length = round(start * (end / start) ** (turn / turns))
        result.insert(0, min(2 * result[0], max(length, _halved(start, turn))))
    return tuple(result)


def _halved(length: int, times: int) -> int:
    """The shortest length that ``times`` mergers of disjoint pairs leave."""
    return -(-length // 2**times)
