"""What a method sees of the vision tokens, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.core.budget import Amount, resolve
from visiontrim.core.errors import TrimError

SignalName = Literal[
    # at the vision encoder's output
    "cls_attention",
    "cls_attention_wide",
    "received_attention",
    "column_attention",
    "encoder_keys",
    "projected",
    "joint",
    "joint_last",
    "joint_normalised",
    "words",
    # between encoder layers
    "encoder_queries",
    "cls_query",
    "pixels",
    "colours",
    # at both
    "text",
    # between decoder layers
    "query",
    "last_attention",
    "next_attention",
    "text_attention",
    "previous",
    "embeddings",
    "normed",
    "next_normed",
    "queries",
    "keys",
    "rotary",
]
Signal = SignalName | tuple[SignalName, int]
"""Names of the optional fields of :class:`View`; a step lists in ``needs`` the ones that it reads.

A pair asks for the signal as another layer of the vision encoder gives it, counted from 0 or, if negative, from the
last one: ``("cls_attention", 5)``. Of ``joint`` there are three, of which a step asks for one at most: the selected
features in the space of the text, the same after the encoder's final norm (``joint_normalised``), and the encoder's
normalised last hidden state (``joint_last``)."""


@dataclass(frozen=True, slots=True)
class Text:
    """Token features of the question, in the space of :attr:`View.joint`."""

    tokens: Float[Tensor, "batch text joint"]
    mask: Bool[Tensor, "batch text"]
    """False marks padding: questions of a batch differ in length."""
    scale: float
    """Factor of a cosine in this space: exp(logit_scale) of a CLIP tower."""
    ends: Bool[Tensor, "batch text"] | None = None
    """Tokens that sum up the question: the end token of each window of a CLIP tower; None: this space has none."""


@dataclass(frozen=True, slots=True)
class Sides:
    """One quantity on both sides: of the vision tokens and of the text tokens after the image, as in ``View.text``."""

    tokens: Float[Tensor, "batch *tokens dim"]
    text: Float[Tensor, "batch *text dim"]
    """Places where ``View.text.mask`` is False hold nothing of meaning."""


@dataclass(frozen=True, slots=True)
class View:
    """The vision tokens of a batch of equally large segments, without any padding.

    A segment is an image or a video, or a part of one that has a grid of its own: the overview and the mosaic of tiles
    of an anyres image, a tile, a frame.

    Tensors are on the model's device. Optional signals are None unless the step asked for them in ``needs`` and they
    exist: no [CLS] token means no ``cls_attention``, no question means no ``text``.
    """

    features: Float[Tensor, "batch tokens dim"]
    coordinates: Int[Tensor, "batch tokens 3"]
    """(frame, row, column) of each token on ``grid``."""
    grid: tuple[int, int, int]
    """(frames, rows, columns) of the uncompressed segment."""
    entered: int
    """Tokens of the segment that entered the language model (at the vision output: that could enter)."""
    num_layers: int
    """Decoder layers of the language model."""
    whole: int | None = None
    """Uncompressed vision tokens of the whole image or video that the segment is a part of; None: it is all of it."""
    before: int = 0
    """How many of those stand in segments before this one."""
    cls_attention: Float[Tensor, "batch tokens"] | None = None
    """Attention of [CLS] to each patch, mean over heads, after the softmax over [CLS] and all patches. An encoder
    without [CLS] gives ``received_attention`` to a step that asks for this."""
    cls_attention_wide: Float[Tensor, "batch tokens"] | None = None
    """``cls_attention`` as if all heads were a single one of the full width, with the scale of that width."""
    received_attention: Float[Tensor, "batch tokens"] | None = None
    """Mean attention that each patch receives from the *other* patches, mean over heads."""
    column_attention: Float[Tensor, "batch tokens"] | None = None
    """Mean attention that each patch receives from all tokens, itself and [CLS] included, mean over heads."""
    encoder_keys: Float[Tensor, "batch heads tokens head_dim"] | None = None
    """Keys of the patches as the attention function gets them, in the layer whose output is projected; between encoder
    layers in the layer just passed."""
    encoder_queries: Float[Tensor, "batch heads tokens head_dim"] | None = None
    """Queries of the patches in the encoder layer just passed, scaled: their dot product with ``encoder_keys`` is the
    logit of the attention (encoder layers only)."""
    cls_query: Float[Tensor, "batch heads 1 head_dim"] | None = None
    """The query of [CLS] in that layer, scaled likewise (encoder layers only)."""
    pixels: Float[Tensor, "batch tokens channels values"] | None = None
    """What the model got as the pixels of each token: normalised by its processor, and equal where they were. Of a
    token that others merged into, its own (encoder layers only)."""
    colours: Float[Tensor, "batch tokens channels values"] | None = None
    """``pixels`` with the whole range of a channel as 1, up to a constant for each channel, so that differences are
    those of values in [0, 1]. Needs the processor of the run (encoder layers only)."""
    projected: Float[Tensor, "batch tokens width"] | None = None
    """The tokens in the language model's space, after the projector."""
    joint: Float[Tensor, "batch tokens joint"] | None = None
    """The tokens in the space of ``text``."""
    text: Text | None = None
    words: Text | None = None
    """The language model's own input embeddings of the question, in the space of ``projected``."""
    query: Float[Tensor, "batch dim"] | None = None
    """Hidden state at the position whose logits give the first generated token (decoder layers only)."""
    mass: Float[Tensor, "batch tokens"] | None = None
    """Tokens of the uncompressed segment that each token is the mean of (encoder layers only)."""
    lattice: tuple[int, int, int] | None = None
    """(frames, rows, columns) that the tokens form in raster order, merged ones included; None: they form no such box
    (encoder layers only)."""
    unit: int = 1
    """Patches whose features stand side by side in a token (encoder layers only)."""
    next_normed: Float[Tensor, "batch tokens dim"] | None = None
    """The tokens after the input norm of the decoder layer that comes next."""
    last_attention: Float[Tensor, "batch tokens"] | None = None
    """Attention of that position to each token in the decoder layer just passed, mean over heads, float32, after the
    softmax over everything that the position may see: earlier turns, text and other images too."""
    next_attention: Float[Tensor, "batch tokens"] | None = None
    """The same with the queries and keys of the decoder layer to come."""
    text_attention: Float[Tensor, "batch heads text tokens"] | None = None
    """Attention of the tokens of ``text`` to each token in the decoder layer just passed, as for ``last_attention``
    but for each query head."""
    previous: Float[Tensor, "batch tokens dim"] | None = None
    """What entered the decoder layer just passed, where ``features`` is what left it."""
    embeddings: Sides | None = None
    """Input embeddings [batch, entered, dim] and [batch, text, dim] of all tokens that entered the language model."""
    normed: Sides | None = None
    """``features`` and the text after the language model's final norm, [batch, tokens, dim]."""
    queries: Sides | None = None
    """Queries [batch, heads, tokens, head_dim] of the decoder layer just passed, with positions encoded, and scaled:
    their dot product with ``keys`` is the logit of the attention."""
    keys: Sides | None = None
    """Keys [batch, kv_heads, tokens, head_dim] of that layer, each head shared by heads / kv_heads query heads."""
    rotary: Sides | None = None
    """Cosines, then sines, of the rotary position encoding, [batch, tokens, 2 head_dim]."""
    marked: Bool[Tensor, "batch tokens"] | None = None
    """Tokens that an earlier step marked (:attr:`Keep.marked`); None: no step marked any."""
    at: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    """Signals of other encoder layers, under the pairs that the step asked for."""

    def count(self, keep: Amount, of: int | None = None, name: str = "keep") -> int:
        """Tokens of this segment that ``keep`` means, at least 1.

        A fraction is one ``of`` that many tokens (None: of those that arrive here). A number is meant for the whole
        image, whose segments share it in proportion to their size. Raises :class:`TrimError` for more tokens than there
        are, and for fewer than one a segment.
        """
        of = self.features.shape[1] if of is None else of
        if isinstance(keep, float) or self.whole is None:
            return resolve(keep, of, name)
        keep = resolve(keep, self.whole, name)
        share = _rounded(keep * (self.before + self.total), self.whole) - _rounded(keep * self.before, self.whole)
        if share < 1:
            raise TrimError(
                f"{name}={keep} leaves nothing for a part of {self.total} of the image's {self.whole} vision tokens: "
                "give more, or a fraction"
            )
        return resolve(share, of, name)

    @property
    def total(self) -> int:
        """Tokens of the uncompressed segment."""
        frames, rows, columns = self.grid
        return frames * rows * columns


@dataclass(frozen=True, slots=True)
class Glance:
    """What one step of decoding shows of the vision tokens in the cache: those of all images and videos of a row.

    They stand in the order of the prompt. Rows with fewer than others are padded, which ``valid`` marks.
    """

    attention: Float[Tensor, "batch tokens"]
    """Attention of the new token to each in the decoder layer just passed, mean over heads, float32, after the softmax
    over everything that it sees; 0 for padding."""
    valid: Bool[Tensor, "batch tokens"]
    """False marks padding."""
    before: Float[Tensor, "batch tokens"] | None = None
    """``attention`` at the step before; None at the first step of an answer."""
    shown: Bool[Tensor, "batch tokens"] | None = None
    """What was answered at the step before; None as for ``before``."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Which tokens go on, and what they carry.

    ``index[b, j]`` is the token of the view that output ``j`` stands for: ascending, except where a paper fixes
    another order. Outputs take the slots, hence the position ids, of the kept tokens in ascending order.

    At encoder layers outputs stay in the order in which they are given, and the language model meets each of them at
    the slot, among those of its members, that is nearest to their mean place.
    """

    index: Int[Tensor, "batch kept"]
    features: Float[Tensor, "batch kept dim"] | None = None
    """The outputs when something was merged into them; None keeps the features of ``index`` untouched."""
    assignment: Int[Tensor, "batch tokens"] | None = None
    """For every token of the view the output that it went to, -1 where it was dropped; None: only ``index`` lives."""
    complement: Bool[Tensor, "batch kept"] | None = None
    """Outputs that stand for a cluster of leftovers (complement tokens); None: there are none."""
    projected: Float[Tensor, "batch kept width"] | None = None
    """The outputs when something was merged into them after the projector, in the space of :attr:`View.projected`;
    they take the place of what the projector makes of ``features``."""

    marked: Bool[Tensor, "batch kept"] | None = None
    """Outputs that later steps see as marked, besides those that are already; None: no more."""
    lattice: tuple[int, int, int] | None = None
    """(frames, rows, columns) that the outputs form in raster order (encoder layers only); None: no such box."""

    @classmethod
    def everything(cls, view: View) -> Keep:
        """Keep all tokens as they are."""
        batch, tokens = view.features.shape[:2]
        return cls(torch.arange(tokens, device=view.features.device).expand(batch, tokens))


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
