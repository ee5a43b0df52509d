"""What a method sees of the vision tokens, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.core.budget import Amount, resolve
from visiontrim.core.errors import TrimError
from visiontrim.core.signals import DecoderSignals, EncoderSignals, TextSignals


@dataclass(frozen=True, slots=True)
class View:
    """The vision tokens of a batch of equally large segments, without any padding.

    A segment is an image or a video, or a part of one that has a grid of its own: the overview and the mosaic of tiles
    of an anyres image, a tile, a frame.

    Tensors are on the model's device. The groups of signals hold what the step asked for in ``needs``, as far as it
    exists: no [CLS] token means no ``encoder.cls_attention``, no question means no ``text.question``.

    ``features`` and signals are what choices, scores and weights are made by: they come without gradients, whatever was
    given. Sums that a step puts into :class:`Keep` are made of ``content`` and ``projected_content``, so that training
    reaches what was merged.
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
    marked: Bool[Tensor, "batch tokens"] | None = None
    """Tokens that an earlier step marked (:attr:`Keep.marked`); None: no step marked any."""
    noted: Float[Tensor, "batch tokens"] | None = None
    """A number of each token that an earlier step noted last (:attr:`Keep.noted`); None: no step noted any."""
    encoder: EncoderSignals = field(default_factory=EncoderSignals)
    decoder: DecoderSignals = field(default_factory=DecoderSignals)
    text: TextSignals = field(default_factory=TextSignals)
    content: Tensor = None  # pyright: ignore[reportAssignmentType]  # the features, unless a view is replaced
    """The features as they were given, [batch, tokens, dim], with their gradients."""

    def __post_init__(self) -> None:
        if self.content is None or not self.content.is_set_to(self.features):  # of other features, in a replaced view
            object.__setattr__(self, "content", self.features)
        object.__setattr__(self, "features", self.features.detach() if self.features.requires_grad else self.features)

    @property
    def projected_content(self) -> Float[Tensor, "batch tokens width"]:
        """``encoder.projected`` with its gradients."""
        return self.encoder.given("projected")

    def count(self, keep: Amount, of: int | None = None, name: str = "keep") -> int:
        """Tokens of this segment that ``keep`` means, at least 1.

        A fraction is one ``of`` that many tokens (None: of those that arrive here). A number is meant for the whole
        image, at most, whose segments share it in proportion to their size. Raises :class:`TrimError` for fewer than
        one a segment.
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
    """The outputs when something was merged into them, sums of ``View.content``; None keeps those of ``index``."""
    assignment: Int[Tensor, "batch tokens"] | None = None
    """For every token of the view the output that it went to, -1 where it was dropped; None: only ``index`` lives."""
    complement: Bool[Tensor, "batch kept"] | None = None
    """Outputs that stand for a cluster of leftovers (complement tokens); None: there are none."""
    projected: Float[Tensor, "batch kept width"] | None = None
    """The outputs when something was merged into them after the projector, sums of ``View.projected_content``; they
    take the place of what the projector makes of ``features``."""

    marked: Bool[Tensor, "batch kept"] | None = None
    """Outputs that later steps see as marked, besides those that are already; None: no more."""
    noted: Float[Tensor, "batch kept"] | None = None
    """A number of each output that later steps see, in place of what was noted before; None: that stays."""
    lattice: tuple[int, int, int] | None = None
    """(frames, rows, columns) that the outputs form in raster order (encoder layers only); None: no such box."""

    @classmethod
    def everything(cls, view: View) -> Keep:
        """Keep all tokens as they are."""
        batch, tokens = view.features.shape[:2]
        return cls(torch.arange(tokens, device=view.features.device).expand(batch, tokens))


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
