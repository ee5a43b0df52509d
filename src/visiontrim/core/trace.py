"""The immutable record of a compressed prefill: which tokens of which image went where."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Int, Num
from torch import Tensor

from visiontrim.core.method import Site


@dataclass(frozen=True, slots=True)
class StageTrace:
    """What one step left of one image, in terms of the uncompressed image. Tensors stay on the model's device."""

    site: Site
    index: Int[Tensor, " kept"]
    """Raster index, on the image's grid, of the token that each survivor stands for."""
    assignment: Int[Tensor, " total"]
    """For every token of the image the survivor (position in ``index``) that carries it, -1 where it is gone."""
    complement: Bool[Tensor, " kept"]
    """Survivors that stand for a cluster of merged tokens."""


@dataclass(frozen=True, slots=True)
class ImageTrace:
    """One image or video of the prompt, or a part of it with a grid of its own, and what every stage left of it."""

    sample: int
    """Row of the batch, before any expansion by beams."""
    number: int
    """Which image or video it is or belongs to, counted from 0 over the whole batch."""
    before: int
    """Tokens of that image in parts before this one."""
    grid: tuple[int, int, int]
    """(frames, rows, columns) of the uncompressed tokens."""
    marks: int
    """Vision tokens without a place on the grid, such as newlines; they go with the first token that goes."""
    stages: tuple[StageTrace, ...]
    per_layer: tuple[int, ...]
    """Vision tokens of this image, marks included, that each decoder layer processes."""

    @property
    def total(self) -> int:
        """Vision tokens on the grid before compression."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def entered(self) -> int:
        """Vision tokens that entered the language model."""
        return self.per_layer[0]


@dataclass(frozen=True, slots=True)
class Trace:
    """One prefill."""

    images: tuple[ImageTrace, ...]
    """Images and videos."""
    batch: int
    """Rows of the prefill, beams included."""
    copies: int
    """Rows per sample: beams or returned sequences."""
    length: int
    """Tokens of the uncompressed chunk in every row, padding included."""
    past: int
    """Tokens of the conversation, uncompressed, that the cache held before."""
    widths: tuple[int, ...]
    """Tokens of every row that each decoder layer processed, padding included."""
    attended: tuple[int, ...]
    """Tokens of every row that attend to each other in each decoder layer, padding included: ``widths``, or more where
    attention sees merged tokens at all of their places (``positions="unmerged"``)."""
    positions: Num[Tensor, "*axes rows tokens"]
    """Position ids of the uncompressed chunk, on the model's device; with mRoPE one for each axis, the last three.
    Whole numbers, which omni models hold as float32."""
    cache_lengths: tuple[int, ...]
    """Tokens that each decoder layer's key-value cache holds after the prefill, read from it; () without a cache."""
    cache_bytes: int
    """Bytes of all keys and values after the prefill, read from the cache."""
    sounds: tuple[ImageTrace, ...] = ()
    """Sounds whose tokens were to be reduced, counted by themselves, on grids of a frame a token."""
