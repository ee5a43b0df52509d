"""State of one call of the model: created by generate() or a bare forward, thrown away at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from visiontrim.core.errors import TrimError
from visiontrim.core.method import DecoderLayer, Site
from visiontrim.core.trace import ImageTrace, StageTrace
from visiontrim.core.view import Keep, Signal
from visiontrim.engine.pack import gather, pack_left
from visiontrim.engine.survivors import Survivors, coordinates
from visiontrim.models.family import Arguments, Kind
from visiontrim.models.layout import Visual

if TYPE_CHECKING:
    from visiontrim.engine.inside import Inside
    from visiontrim.engine.placing import Placed
    from visiontrim.engine.unmerging import Repeated


@dataclass(frozen=True)
class Part:
    """What the segments of a group have in common, besides their number of survivors."""

    kind: Kind
    grid: tuple[int, int, int]
    whole: int | None
    before: int
    """Budget of which it is a part, see :class:`~visiontrim.core.view.View`."""
    marks_stay: bool


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
        """Marks of each segment that are there when ``kept`` of its tokens are."""
        return self.marks.shape[1] if kept == self.total or (kept and self.part.marks_stay) else 0

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


@dataclass(frozen=True)
class Selected:
    """The tokens of an encoding that go on."""

    slots: Int[Tensor, " kept"]
    """Where they belong among the tokens that were selected from, all images one after the other."""
    features: Float[Tensor, "kept dim"]
    blank: Int[Tensor, " marks"]
    """Placeholders, counted over the whole encoding, of marks that go with their segments."""
    shape: torch.Size
    """Of the tokens that were selected from, without their width."""
    projected: list[tuple[int, Float[Tensor, "merged width"]]]
    """What takes the place of the projector's outputs, each from a given one of ``slots`` on."""


@dataclass
class Encoding:
    """One call of ``get_image_features`` or ``get_video_features``."""

    kind: Kind
    arguments: Arguments
    heard: dict[Signal, list[Tensor]] = field(default_factory=dict)
    """Signals of the encoder, [patches, ...] of one chunk after the other."""
    last_hidden: Tensor | None = None
    selected: Selected | None = None
    """What was selected; None if everything stays as it is."""
    placed: list[Placed] | None = None
    """Its segments, once somebody asked."""
    inside: Inside | None = None
    """What was merged so far between the encoder's layers, once a step between them has seen the tokens."""
    between: dict[Signal, list[Tensor]] = field(default_factory=dict)
    """Signals [patches, ...] for the next step between the encoder's layers."""

    @property
    def merged(self) -> Inside | None:
        """Where the tokens are inside the encoder, if some merged."""
        return self.inside if self.inside is not None and self.inside.merged else None


@dataclass
class Call:
    """What one generate() or one bare forward has shown so far."""

    owner: object
    """Who began the call and so ends it."""
    input_ids: Int[Tensor, "batch tokens"]
    """The ids that the images are encoded for, which generate() may expand afterwards."""
    samples: int
    """Rows of the caller's batch."""
    forward_ids: Int[Tensor, "rows tokens"]
    """Ids of the forward in progress, expanded rows included."""
    prompt_end: int | None = None
    """Logical length of the conversation's prompt; None: the whole of the forward's input is prompt."""
    labels: Int[Tensor, "batch tokens"] | None = None
    """A copy of the caller's labels, which the loss reads: removed positions are ignored in it."""
    carries_vision: bool = False
    """Whether the forward in progress consumes image features."""
    mask: Tensor | None = None
    """The 2-D mask of the forward in progress, of a model that prepares its masks before its language model."""
    encoding: Encoding | None = None
    """Set while images or videos are encoded."""
    groups: list[Group] = field(default_factory=list)
    """The images that were encoded, in order; those of the next forward that carries vision."""
    checked: Cache | None = None
    """The cache that was found fit to lack tokens."""

    @staticmethod
    def owners(placeholders: Bool[Tensor, "batch tokens"], visuals: Sequence[Visual]) -> list[tuple[int, int]]:
        """Row of the batch of every image, and which placeholder of that row is its first.

        Raises :class:`TrimError` if images and placeholders do not fit.
        """
        counts = placeholders.sum(-1).tolist()
        owners: list[tuple[int, int]] = []
        for row, count in enumerate(counts):
            taken = 0
            while taken < count and len(owners) < len(visuals):
                owners.append((row, taken))
                taken += visuals[len(owners) - 1].length
            if taken != count:
                break
        total = sum(visual.length for visual in visuals)
        if len(owners) != len(visuals) or sum(counts) != total:
            raise TrimError(
                f"the prompt has {sum(counts)} image placeholders ({', '.join(map(str, counts))} by row) but the "
                f"{len(visuals)} images give {total} vision tokens: build prompt and images with one call of the "
                "model's processor"
            )
        return owners


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

    def narrowed(
        self, keep: Bool[Tensor, "batch tokens"], columns: list[Tensor], marks: list[Tensor], rows: list[Tensor]
    ) -> tuple[Int[Tensor, "batch kept"], Alive]:
        """Drop what ``keep`` does not say; ``columns`` and ``marks`` are the old places of what survives of images."""
        keep = keep & self.valid
        index, valid = pack_left(keep)
        if not index.shape[1]:
            raise TrimError("the prompt consists of images alone, and none of their tokens would be left: add text")
        place = keep.cumsum(1) - 1 + (index.shape[1] - keep.sum(1, keepdim=True))
        columns, marks = (
            [place[row[:, None], old] for row, old in zip(rows, group, strict=True)] for group in (columns, marks)
        )
        return index, Alive(gather(self.origin, index), valid, columns, marks)

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
    """The layer just passed."""
    coming: Attended | None = None
    """The layer to come."""
    ahead: bool = False
    """The layer to come is being asked, and must stop once it was heard."""
    previous: Tensor | None = None
    """Hidden states [batch, width, dim] that entered the layer just passed."""
    normed: Tensor | None = None
    """Hidden states [batch, width, dim] after the final norm."""
    rotary: Tensor | None = None
    """Cosines and sines [batch, width, 2 dim]."""
    embeddings: Tensor | None = None
    """Input embeddings [batch, length, dim] of the uncompressed chunk."""


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
    overrides: dict[str, Any] = field(default_factory=dict)
    """What decoder layers get from here on instead of the model's own keyword arguments."""
    answers: bool = False
    """Whether it is a step of decoding that sees a part of the cache."""
    passed: Attended | None = None
    """What the layer before that step's choice got."""

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
    groups: list[Group] = field(default_factory=list)
    """The segments of all rows, beams included."""
    rows: list[Int[Tensor, " images"]] = field(default_factory=list)
    """For every group the batch rows of its images."""
    entered: list[Int[Tensor, "images entered"]] = field(default_factory=list)
    """For every group the places, in the uncompressed chunk, of the tokens that entered the language model."""
    whole: list[Int[Tensor, "images total"]] = field(default_factory=list)
    """For every group the places, in the uncompressed chunk, of all of its tokens."""
    removals: list[Removal] = field(default_factory=list)
    repeated: Repeated | None = None
    """How attention sees merged tokens; None: as they are."""
    heard: Heard = field(default_factory=Heard)

    @property
    def attended(self) -> Alive:
        """What attention sees and caches of the chunk."""
        return self.alive if self.repeated is None else self.repeated.alive

    @property
    def prompt_end(self) -> int:
        """Logical end of the prompt; what follows in the chunk are guesses of assisted decoding."""
        end = self.past + self.length
        return end if self.call.prompt_end is None else min(end, self.call.prompt_end)
