"""The images of a call, stacked by likeness: where their tokens belong and which of them are left.

It knows rows, placeholders and survivors; it knows nothing of models, hidden states and caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from visiontrim.core.method import DecoderLayer, Site
from visiontrim.core.trace import ImageTrace, StageTrace
from visiontrim.core.view import Keep
from visiontrim.engine.survivors import Survivors, coordinates
from visiontrim.models.family import Kind


@dataclass(frozen=True)
class Part:
    """What the segments of a group have in common, besides their number of survivors."""

    kind: Kind
    grid: tuple[int, int, int]
    whole: int | None
    before: int
    """Budget of which it is a part, see :class:`~visiontrim.core.view.View`."""
    marks_stay: int
    """How many of its marks, the first ones, stay when tokens go."""


@dataclass(frozen=True)
class Group:
    """Segments of the call that have the same grid and the same number of surviving tokens, stacked."""

    rows: tuple[int, ...]
    """Row of the batch that each segment belongs to."""
    numbers: tuple[int, ...]
    """Number, in the call, of the image or video that each segment belongs to."""
    part: Part
    """What they have in common."""
    places: Int[Tensor, "images total"]
    """Which of the placeholders of its row each token has."""
    marks: Int[Tensor, "images marks"]
    """The same for tokens without a place on the grid."""
    now: Survivors
    history: tuple[tuple[Site, Survivors], ...] = ()
    """What each step so far left, in order."""

    @classmethod
    def uncompressed(
        cls,
        rows: tuple[int, ...],
        numbers: tuple[int, ...],
        part: Part,
        places: Int[Tensor, "images total"],
        marks: Int[Tensor, "images marks"],
    ) -> Group:
        images, total = places.shape
        survivors = Survivors.uncompressed(images, total, places.device)
        return cls(rows, numbers, part, places, marks, survivors)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.part.grid

    @property
    def total(self) -> int:
        return self.now.assignment.shape[1]

    @property
    def kept(self) -> int:
        return self.now.index.shape[1]

    @property
    def coordinates(self) -> Int[Tensor, "images kept 3"]:
        """(frame, row, column) of each survivor."""
        return coordinates(self.now.index, self.grid)

    def after(self, keep: Keep, site: Site) -> Group:
        """The group once ``keep``, answered for its current tokens, is applied at ``site``."""
        now = self.now.after(keep)
        return replace(self, now=now, history=(*self.history, (site, now)))

    @property
    def entered(self) -> int:
        """Tokens of each image that entered the language model."""
        before = [past.index.shape[1] for site, past in self.history if not isinstance(site, DecoderLayer)]
        return before[-1] if before else self.total

    def marks_beside(self, kept: int) -> int:
        """Marks of each segment, the first ones, that are there when ``kept`` of its tokens are."""
        marks = self.marks.shape[1]
        return marks if kept == self.total else min(marks, self.part.marks_stay) if kept else 0

    def per_layer(self, num_layers: int) -> tuple[int, ...]:
        """Tokens of each segment, marks included, that every decoder layer processes."""
        counts = [self.entered] * num_layers
        for site, past in self.history:
            if isinstance(site, DecoderLayer):
                counts[site.index :] = [past.index.shape[1]] * (num_layers - site.index)
        return tuple(count + self.marks_beside(count) for count in counts)

    def select(self, images: list[int], rows: tuple[int, ...]) -> Group:
        """The given images, in that order, as if they belonged to ``rows``."""
        picked = torch.tensor(images, device=self.now.index.device)
        return replace(
            self,
            rows=rows,
            numbers=tuple(self.numbers[image] for image in images),
            places=self.places[picked],
            marks=self.marks[picked],
            now=self.now.pick(picked),
            history=tuple((site, past.pick(picked)) for site, past in self.history),
        )

    def trace(self, image: int, sample: int, num_layers: int) -> ImageTrace:
        """The record of one image."""
        stages = tuple(
            StageTrace(site, past.index[image], past.assignment[image], past.complement[image])
            for site, past in self.history
        )
        return ImageTrace(
            sample=sample,
            number=self.numbers[image],
            before=self.part.before,
            grid=self.grid,
            marks=self.marks.shape[1],
            stages=stages,
            per_layer=self.per_layer(num_layers),
        )


class Placed(NamedTuple):
    """Segments of one call of the encoder that are alike, and where they stand among all its placeholders."""

    group: Group
    tokens: Int[Tensor, "images tokens"]
    """In raster order."""
    marks: Int[Tensor, "images marks"]
