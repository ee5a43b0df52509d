"""Where the tokens of an image or a video are among its placeholders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Grid = tuple[int, int, int]
"""(frames, rows, columns) of tokens. Sound has a frame a token."""
Kind = Literal["image", "video", "audio"]


@dataclass(frozen=True, slots=True)
class Picture:
    """Size of an image in pixels, or of a video where ``frames`` are given."""

    height: int
    width: int
    frames: int = 0

    @property
    def kind(self) -> Kind:
        return "video" if self.frames else "image"


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of an image or video with a grid of its own. Tensors are on the CPU."""

    grid: Grid
    index: Int[Tensor, " tokens"]
    """Places of its tokens among the placeholders of the image, in raster order."""
    marks: Int[Tensor, " marks"] = field(default_factory=_none)
    """Places of tokens without a place on the grid: newline rows, [CLS]."""
    marks_stay: int = 0
    """How many of these, the first ones, stay when tokens of the segment go (a [CLS], begin and end of an image).
    Newlines mark the rows of a grid that then no longer exists."""
    tile: Int[Tensor, " tokens"] | None = None
    """Number of the tile that each token comes from; None: all from one."""

    def frames(self) -> Sequence[Segment]:
        """The segment frame by frame."""
        frames, rows, columns = self.grid
        if frames == 1:
            return [self]
        marks = self.marks.view(frames, -1) if len(self.marks) % frames == 0 else None
        parts = [
            replace(self, grid=(1, rows, columns), index=index, marks=_none() if marks is None else marks[number])
            for number, index in enumerate(self.index.view(frames, rows * columns))
        ]
        if marks is None:
            parts[-1] = replace(parts[-1], marks=self.marks)
        return parts

    def tiles(self) -> Sequence[Segment]:
        """The segment tile by tile; its marks go with the last one."""
        if self.tile is None:
            return [self]
        _, rows, columns = self.grid
        tile, index = self.tile.view(rows, columns), self.index.view(rows, columns)
        heights = tile[:, 0].unique_consecutive(return_counts=True)[1].tolist()
        widths = tile[0].unique_consecutive(return_counts=True)[1].tolist()
        parts = [
            Segment((1, height, width), block.flatten())
            for height, band in zip(heights, index.split(heights), strict=True)
            for width, block in zip(widths, band.split(widths, dim=1), strict=True)
        ]
        parts[-1] = replace(parts[-1], marks=self.marks, marks_stay=self.marks_stay)
        return parts


@dataclass(frozen=True, eq=False)
class Visual:
    """An image or a video: one budget of vision tokens."""

    length: int
    """Its placeholders."""
    segments: tuple[Segment, ...]

    @classmethod
    def of_grid(cls, grid: Grid) -> Visual:
        """One whose placeholders are a grid in raster order."""
        total = math.prod(grid)
        return cls(total, (Segment(grid, torch.arange(total)),))

    @property
    def total(self) -> int:
        """Tokens on grids."""
        return sum(len(segment.index) for segment in self.segments)

    def split(self, per: str) -> list[tuple[Segment, int | None, int]]:
        """Segments, each with the tokens of the whole that it shares its budget with and those before it.

        ``per="frame"`` cuts videos into frames and ``"tile"`` images into tiles, with a budget for each.
        """
        if per == "frame" and any(segment.grid[0] > 1 for segment in self.segments):
            return [(frame, None, 0) for segment in self.segments for frame in segment.frames()]
        if per == "tile":
            return [(tile, None, 0) for segment in self.segments for tile in segment.tiles()]
        if len(self.segments) == 1:
            return [(self.segments[0], None, 0)]
        parts, before = [], 0
        for segment in self.segments:
            parts.append((segment, self.total, before))
            before += len(segment.index)
        return parts


@dataclass(frozen=True, eq=False)
class Packing:
    """How an encoder that gets all pictures in one sequence has their tokens in it. Tensors are on the CPU."""

    order: Int[Tensor, " tokens"]
    """Which token, counted over all pictures in raster order, stands at each place."""
    chunks: Sequence[int]
    """Tokens that attend to each other, chunk after chunk."""
    windows: Sequence[int] | None = None
    """The same in the layers that see windows; None: there are none."""


def with_newlines(
    is_mark: Bool[Tensor, " tokens"], overview: Grid, tile: Int[Tensor, " tokens"] | None = None
) -> Visual:
    """An anyres image: an ``overview`` of the whole, then a mosaic of tiles whose rows end in newlines.

    ``is_mark`` says which of its placeholders are newlines, ``tile`` from which tile each of them comes. Without a
    mosaic, a single newline may end the overview.
    """
    base = math.prod(overview)
    places = torch.arange(len(is_mark))
    marks = places[is_mark]
    mosaic = places[base:][~is_mark[base:]]
    if not len(mosaic):
        return Visual(len(is_mark), (Segment(overview, places[:base], marks),))
    grid = (1, len(marks), len(mosaic) // len(marks))
    origin = None if tile is None else tile[mosaic]
    return Visual(len(is_mark), (Segment(overview, places[:base]), Segment(grid, mosaic, marks, tile=origin)))


def squares(
    pixels: Float[Tensor, "pictures channels height width"], side: int
) -> Float[Tensor, "squares channels values"]:
    """The pixels of every ``side`` x ``side`` square, picture by picture in raster order, without borders."""
    cut = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
    return cut.flatten(0, 2).flatten(2)


def equal_grids(lengths: Sequence[int], grid: Grid) -> list[Visual]:
    """Images of the same grid; a tensor of features may hold several of them one after the other."""
    total = math.prod(grid)
    return [Visual.of_grid(grid) for length in lengths for _ in range(length // total)]
