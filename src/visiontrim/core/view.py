"""What a method sees of the vision tokens, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Signal = Literal["cls_attention", "received_attention", "joint", "joint_last", "text", "query"]
"""Names of the optional fields of :class:`View`; a step lists in ``needs`` the ones that it reads."""


@dataclass(frozen=True, slots=True)
class Text:
    """Token features of the question, in the space of :attr:`View.joint`."""

    tokens: Float[Tensor, "batch text joint"]
    mask: Bool[Tensor, "batch text"]
    """False marks padding: questions of a batch differ in length."""
    scale: float
    """Factor of a cosine in this space: exp(logit_scale) of a CLIP tower."""


@dataclass(frozen=True, slots=True)
class View:
    """The vision tokens of a batch of equally large segments (images, tiles, videos), without any padding.

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
    cls_attention: Float[Tensor, "batch tokens"] | None = None
    """Attention of [CLS] to each patch, mean over heads, after the softmax over [CLS] and all patches. An encoder
    without [CLS] gives ``received_attention`` to a step that asks for this."""
    received_attention: Float[Tensor, "batch tokens"] | None = None
    """Mean attention that each patch receives from the *other* patches, mean over heads."""
    joint: Float[Tensor, "batch tokens joint"] | None = None
    """The tokens in the space of ``text``."""
    text: Text | None = None
    query: Float[Tensor, "batch dim"] | None = None
    """Hidden state at the position whose logits give the first generated token (decoder layers only)."""

    @property
    def total(self) -> int:
        """Tokens of the uncompressed segment."""
        frames, rows, columns = self.grid
        return frames * rows * columns


@dataclass(frozen=True, slots=True)
class Keep:
    """Which tokens go on, and what they carry.

    ``index[b, j]`` is the token of the view that output ``j`` stands for: ascending, except where a paper fixes
    another order. Outputs take the slots, hence the position ids, of the kept tokens in ascending order.
    """

    index: Int[Tensor, "batch kept"]
    features: Float[Tensor, "batch kept dim"] | None = None
    """The outputs when something was merged into them; None keeps the features of ``index`` untouched."""
    assignment: Int[Tensor, "batch tokens"] | None = None
    """For every token of the view the output that it went to, -1 where it was dropped; None: only ``index`` lives."""
    complement: Bool[Tensor, "batch kept"] | None = None
    """Outputs that stand for a cluster of leftovers (complement tokens); None: there are none."""

    @classmethod
    def everything(cls, view: View) -> Keep:
        """Keep all tokens as they are."""
        batch, tokens = view.features.shape[:2]
        return cls(torch.arange(tokens, device=view.features.device).expand(batch, tokens))
