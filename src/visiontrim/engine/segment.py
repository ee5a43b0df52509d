"""What decoder layers from one stage on have in common; and steps of one generate(), which extend what the last made.

generate() appends to a conversation one valid token at a time, so the masks of a step are those of the last one and a
column, and its positions follow. It knows masks and lengths; it does not know what removed tokens, nor when a forward
of the caller's own, which may bring any mask, comes by: those make everything anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from visiontrim.engine.cache import Trimmed

STEPS = 32
"""For how many steps cosines and sines are made at a time."""


@dataclass
class Segment:
    """What the decoder layers from one place on have in common."""

    key_mask: Bool[Tensor, "batch keys"] | None
    """Keys that may be seen, in logical columns; None: all."""
    places: Int[Tensor, "batch tokens"] | None = None
    """Which of the tokens that the text model got each token is; None: all of them, in order."""
    masks: dict[str, Any] = field(default_factory=dict)
    """Attention masks made so far, by type of layer."""
    rotary: tuple[Any, tuple[Tensor, ...]] | None = None
    """The cosines and sines made last, after what they were made of."""
    steps: int = 1
    """For how many steps of decoding cosines and sines are made at a time (:class:`Ahead`)."""
    step: int = 0
    """Which of these this one is."""
    turns: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Cosines and sines [batch, steps, dim] by type of layer."""


@dataclass
class Left:
    """What a step left for the one after it, of the decoder layers from one stage on."""

    cached: Trimmed
    """Layer of the cache that the first of them has."""
    state: tuple[Tensor | None, Tensor | None]
    """Its padding and shift: other tensors once beams or rows were reordered."""
    end: int
    """Logical length that the step reached."""
    segment: Segment


@dataclass
class Ahead:
    """What steps of one generate() leave for each other, by the first decoder layer of every segment."""

    left: dict[int, Left] = field(default_factory=dict)

    def follow(self, layer: int, cached: Trimmed, past: int, tokens: int) -> Segment | None:
        """The segment of the step before, moved on by one token; None if this is not the step after it.

        ``cached`` is what decoder layer ``layer`` caches; ``tokens`` come after a logical ``past``.
        """
        left = self.left.get(layer)
        if left is None or tokens != 1 or cached is not left.cached:
            return None
        same = cached.key_mask is left.state[0] and cached.shift is left.state[1]
        masks = left.segment.masks.values()
        if not same or past != left.end or not all(mask is None or isinstance(mask, Tensor) for mask in masks):
            return None
        left.end += 1
        segment = left.segment
        segment.key_mask = _longer(segment.key_mask)
        segment.masks = {kind: _longer(mask) for kind, mask in segment.masks.items()}
        segment.step += 1
        if segment.step == STEPS:
            segment.step = 0
            segment.turns.clear()
        return segment

    def leave(self, layer: int, cached: Trimmed, past: int, tokens: int, segment: Segment) -> None:
        """Keep the ``segment`` that begins before decoder layer ``layer`` for the next step."""
        if tokens == 1:
            segment.steps = STEPS
            self.left[layer] = Left(cached, (cached.key_mask, cached.shift), past + 1, segment)


def _longer(mask: Tensor | None) -> Tensor | None:
    """A mask with a key more, that is seen: True, or 0 where the mask is added."""
    return None if mask is None else F.pad(mask, (0, 1), value=0 if mask.is_floating_point() else 1)
