"""State of one pass through the language model, thrown away at its end.

It knows which tokens of the chunk are left and what layers showed of them; it changes nothing in a model or a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.engine.call import Call
from visiontrim.engine.groups import Group
from visiontrim.engine.pack import gather, pack_left
from visiontrim.engine.segment import Ahead, Segment
from visiontrim.engine.upstream import Cache


@dataclass
class Alive:
    """The tokens of a forward that are still there, as a left-padded batch."""

    origin: Int[Tensor, "batch tokens"]
    """Place of each token in the uncompressed chunk."""
    valid: Bool[Tensor, "batch tokens"]
    """False marks padding."""
    columns: list[Int[Tensor, "images kept"]]
    """For every group the places, in this batch, of its images' tokens."""
    marks: list[Int[Tensor, "images marks"]]
    """The same for tokens without a place on the grid."""
    lengths: tuple[int, ...] | None = None
    """Tokens of every row that are no padding, on the host; None: only the device knows."""

    @property
    def padded(self) -> bool:
        """Whether a row has padding."""
        if self.lengths is None:
            return not bool(self.valid.all())
        return min(self.lengths) < self.width

    @property
    def width(self) -> int:
        """Tokens of every row, padding included."""
        return self.origin.shape[1]

    def narrowed(
        self,
        keep: Bool[Tensor, "batch tokens"],
        columns: list[Tensor],
        marks: list[Tensor],
        rows: list[Tensor],
        numbers: Sequence[Sequence[int]],
        left: tuple[int, ...] | None = None,
    ) -> tuple[Int[Tensor, "batch kept"], Alive]:
        """Drop what ``keep`` does not say; ``columns`` and ``marks`` are the old places of what survives of images.

        ``rows``, and ``numbers`` on the host, are the batch rows of each group's images. ``left`` are the tokens of
        every row that stay of a chunk of a prompt, if need be none; None: groups tell.
        """
        keep = keep & self.valid
        lengths = self._lengths(columns, marks, numbers) if left is None else left
        width = None if lengths is None else max(lengths) if left is None else max(1, *lengths)
        index, valid = pack_left(keep, width)
        if not index.shape[1]:
            raise TrimError("the prompt consists of images alone, and none of their tokens would be left: add text")
        place = keep.cumsum(1) - 1 + (index.shape[1] - keep.sum(1, keepdim=True))
        columns, marks = (
            [place[row[:, None], old] for row, old in zip(rows, group, strict=True)] for group in (columns, marks)
        )
        return index, Alive(gather(self.origin, index), valid, columns, marks, lengths)

    def _lengths(
        self, columns: list[Tensor], marks: list[Tensor], numbers: Sequence[Sequence[int]]
    ) -> tuple[int, ...] | None:
        """Tokens of every row once only ``columns`` and ``marks`` are left of images, which are of rows ``numbers``."""
        if self.lengths is None:
            return None
        lengths = list(self.lengths)
        for before, after in ((self.columns, columns), (self.marks, marks)):
            for old, new, rows in zip(before, after, numbers, strict=True):
                for row in rows:
                    lengths[row] -= old.shape[1] - new.shape[1]
        return tuple(lengths)

    def within(self, earlier: Alive, length: int) -> Int[Tensor, "batch tokens"]:
        """Places in ``earlier``, a batch of the same chunk of ``length`` tokens, of those that are still there."""
        place = torch.zeros(len(earlier.valid), length + 1, dtype=torch.long, device=earlier.origin.device)
        at = torch.where(earlier.valid, earlier.origin, length)  # padding has no place of its own
        place.scatter_(1, at, torch.arange(at.shape[1], device=at.device).expand_as(at))
        return place.gather(1, self.origin)


@dataclass
class Removal:
    """From decoder layer ``start`` on, only ``alive`` is left of the chunk."""

    start: int
    alive: Alive


class Attended(NamedTuple):
    """What the attention function of a decoder layer got."""

    query: Float[Tensor, "batch heads width dim"]
    key: Float[Tensor, "batch kv_heads keys dim"]
    """The cached keys of earlier turns come first."""
    scaling: float | None


@dataclass
class Heard:
    """What the language model showed on the way, for the next step to see (:mod:`.hearing`)."""

    passed: Attended | None = None
    """The layer just passed; where that has no attention, the layer to come."""
    of: int = 0
    """Which decoder layer ``passed`` is of."""
    coming: Attended | None = None
    """The layer to come."""
    ahead: bool = False
    """The layer to come is being asked, and must stop once it was heard."""
    previous: Tensor | None = None
    """Hidden states [batch, width, dim] that entered the layer just passed."""
    normed: Tensor | None = None
    """Hidden states [batch, width, dim] after the final norm."""
    values: Tensor | None = None
    """What the attention of the layer just passed averages, [batch, key-value heads, keys, dim]."""
    rotary: Tensor | None = None
    """Cosines and sines [batch, width, 2 dim]."""
    mean_rotary: Tensor | None = None
    """Their means over dimensions [batch, width, 2]."""
    embeddings: Tensor | None = None
    """Input embeddings [batch, length, dim] of the uncompressed chunk."""


@dataclass
class Repeated:
    """How the attention of a prefill sees the tokens that are left."""

    alive: Alive
    """The tokens of the uncompressed chunk that went somewhere, as a left-padded batch."""
    places: Int[Tensor, "batch repeated"]
    """Which of the tokens that are left each of them went to."""
    mask: Any
    """What attention gets as its mask."""
    few: Tensor | None = None
    """What entered the attention of the current layer, [batch, left, dim], ..."""
    many: Tensor | None = None
    """... and its rows repeated."""

    def mean(self, rows: Float[Tensor, "batch repeated dim"], left: int) -> Float[Tensor, "batch left dim"]:
        """Mean of the rows of each of the tokens that are ``left``; zeros for padding."""
        owner = torch.where(self.alive.valid, self.places, left)  # the last one: padding
        total = torch.zeros(len(rows), left + 1, rows.shape[-1], device=rows.device)
        total.scatter_add_(1, owner[..., None].expand_as(rows), rows.float())
        count = torch.zeros(len(rows), left + 1, device=rows.device)
        count.scatter_add_(1, owner, torch.ones_like(owner, dtype=count.dtype))
        return (total / count.clamp_min(1)[..., None])[:, :-1].to(rows.dtype)


@dataclass
class Forward:
    """One pass through the language model on a cache that lacks tokens."""

    cache: Cache | None
    mask: Tensor | None
    """The logical key mask [batch, past + length] that the caller gave; None: no padding."""
    length: int
    """Tokens of the uncompressed chunk."""
    past: int
    """Logical tokens in the cache before."""
    positions: Tensor
    """Logical position ids of the chunk, [batch or 1, length] or [channels, batch, length]."""
    segment: Segment | None = None
    """What decoder layers get from here on; None: the model's own keyword arguments."""
    ahead: Ahead | None = None
    """What steps of one generate() leave for each other; None: this is none of them."""
    answers: bool = False
    """Whether it is a step of decoding that sees a part of the cache."""
    passed: Attended | None = None
    """What the layer before that step's choice got."""
    helped: bool = False
    """Whether a decoder layer got something else than the model would have given it."""

    @property
    def past_mask(self) -> Tensor | None:
        """The mask of what the cache held before."""
        return None if self.mask is None else self.mask[:, : self.past]


@dataclass
class Prefill(Forward):
    """A pass that carries images, so that tokens are removed in it."""

    call: Call = field(kw_only=True)
    alive: Alive = field(kw_only=True)
    """What is left of the chunk."""
    chunk_valid: Bool[Tensor, "batch length"] = field(kw_only=True)
    """Which tokens of the uncompressed chunk are no padding."""
    held: tuple[int, ...] = field(kw_only=True)
    """Tokens that every layer of the cache held before."""
    groups: list[Group] = field(default_factory=list)
    """The segments of all rows, beams included."""
    rows: list[Int[Tensor, " images"]] = field(default_factory=list)
    """For every group the batch rows of its images."""
    entered: list[Int[Tensor, "images entered"]] = field(default_factory=list)
    """For every group the places, in the uncompressed chunk, of the tokens that entered the language model."""
    whole: list[Int[Tensor, "images total"]] = field(default_factory=list)
    """For every group the places, in the uncompressed chunk, of all of its tokens."""
    removals: list[Removal] = field(default_factory=list)
    staying: Bool[Tensor, "batch length"] | None = None
    """What stays of a chunk of a prompt, which is known from the start; None: all, or it is no such chunk."""
    left: tuple[int, ...] | None = None
    """Of every row how many of these."""
    reserved: int = 0
    """Tokens for which a static cache makes no room."""
    repeated: Repeated | None = None
    """How attention sees merged tokens; None: as they are."""
    heard: Heard = field(default_factory=Heard)

    @property
    def attended(self) -> Alive:
        """What attention sees and caches of the chunk."""
        return self.alive if self.repeated is None else self.repeated.alive

    def alive_in(self, layer: int) -> Alive | None:
        """The tokens that decoder layer ``layer`` gets; None: all."""
        return next((removal.alive for removal in reversed(self.removals) if removal.start <= layer), None)

    @property
    def more(self) -> bool:
        """Whether chunks of the same prompt are still to come."""
        return self.call.chunks is not None and self.past + self.length < (self.call.prompt_end or 0)

    def widths(self, layers: int) -> tuple[int, ...]:
        """Tokens of every row that each of ``layers`` decoder layers processes, padding included."""
        widths = [self.length] * layers
        for removal in self.removals:
            widths[removal.start :] = [removal.alive.width] * (layers - removal.start)
        return tuple(widths)

    @property
    def prompt_end(self) -> int:
        """Logical end of the prompt; what follows in the chunk are guesses of assisted decoding."""
        end = self.past + self.length
        return end if self.call.prompt_end is None else min(end, self.call.prompt_end)
