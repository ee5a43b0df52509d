"""State of one call of the model: created by generate() or a bare forward, thrown away at its end.

It knows ids, images and what the vision encoder showed of them; it knows nothing of the language model's layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.core.signals import Key
from visiontrim.engine.groups import Group, Placed
from visiontrim.engine.inside import Inside
from visiontrim.engine.segment import Ahead
from visiontrim.engine.upstream import Cache
from visiontrim.models.family import Arguments, Kind


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
    heard: dict[Key, list[Tensor]] = field(default_factory=dict)
    """Signals of the encoder, [patches, ...] of one chunk after the other."""
    last_hidden: Tensor | None = None
    selected: Selected | None = None
    """What was selected; None if everything stays as it is."""
    placed: list[Placed] | None = None
    """Its segments, once somebody asked."""
    inside: Inside | None = None
    """What was merged so far between the encoder's layers, once a step between them has seen the tokens."""
    between: dict[Key, list[Tensor]] = field(default_factory=dict)
    """Signals [patches, ...] for the next step between the encoder's layers."""

    @property
    def merged(self) -> Inside | None:
        """Where the tokens are inside the encoder, if some merged."""
        return self.inside if self.inside is not None and self.inside.merged else None


@dataclass(frozen=True)
class Counted:
    """What ids and mask of a prompt hold, on the host: read in one look, before anything waits on the device."""

    rows: int
    tokens: int
    """Of every row, padding included."""
    placeholders: Mapping[Kind, list[int]]
    """Of each row."""
    valid: list[int] | None
    """Tokens of each row that are no padding; None: there was no mask."""

    def covers(self, ids: Int[Tensor, "rows tokens"]) -> bool:
        """Whether ``ids`` can be those that were looked at, or these with each row repeated."""
        return ids.shape[1] == self.tokens and len(ids) % self.rows == 0


@dataclass
class Chunks:
    """What is known of a prompt that goes through the language model in chunks (:mod:`.chunks`)."""

    keep: Bool[Tensor, "rows tokens"] | None = None
    """What of it stays; None: its first chunk is still to come."""
    groups: list[Group] = field(default_factory=list)
    """Its segments, beams included."""
    begin: int = 0
    """Logical tokens in the cache before it."""
    origins: list[Int[Tensor, "rows left"]] = field(default_factory=list)
    """Of every chunk so far the places, in the prompt, of what was left."""
    positions: list[Tensor] = field(default_factory=list)
    """Position ids of every chunk so far, uncompressed."""


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
    prefilled: bool = False
    """Whether its images have passed through the language model."""
    passes: int = 0
    """Passes through the text model in the forward in progress."""
    counted: Counted | None = None
    """What :attr:`input_ids` hold; None: nobody looked."""
    ahead: Ahead = field(default_factory=Ahead)
    """What steps of decoding leave for each other."""
    checked: Cache | None = None
    """The cache that was found fit to lack tokens."""
    chunks: Chunks | None = None
    """Set if generate() cuts the prompt into chunks."""
    alone: bool = False
    """There is no prompt: every image is a row of its own."""
    tiles: Sequence[int] = ()
    """Without a prompt, how many of the pictures that are encoded make each image; (): one."""
    outer: Call | None = None
    """The call that was in progress when this one began."""

    @property
    def rows(self) -> int:
        """Rows that images are encoded for."""
        return len(self.tiles) if self.alone else len(self.input_ids)
