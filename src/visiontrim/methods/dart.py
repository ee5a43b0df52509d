"""DART: keep the tokens that resemble a few pivots least.

"Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025, arXiv
2502.11494. Official code: ZichenWen1/DART, Apache-2.0 by its README; a copy of it stands in Chenfei-Liao/VTC-Bench.

Before decoder layer K, the 4 vision tokens and the 4 text tokens after the image with the largest L1 norm of their key
in layer K - 1 (all heads, position-encoded) are pivots. For each pivot in turn, the tokens whose hidden state, after
the language model's final norm, has the lowest cosine with the pivot's are taken out of the pool and kept. Vision
pivots are kept too. No attention is computed; survivors keep their position ids.

The paper's budgets T name what is asked for: 4 + 8 floor(T / 8) tokens are left from layer K = 2 on, so 192 / 128 / 64
are 196 / 132 / 68, a mean per layer of 219.75 / 159.75 / 99.75. Here a count is kept exactly: what does not divide goes
to the first pivots.

Differences: the code takes pivots in the order of a Python set, which is arbitrary but changes the result; here they
come by descending norm, vision before text. Where a prompt has fewer than 4 text tokens after the image, the pivots
that exist share the budget. The paper speaks of a threshold on similarity, the code has none; nor has this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.budget import Depth
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.methods.checks import require
from visiontrim.ops.pivots import farthest_from_pivots
from visiontrim.ops.select import gather


@register
@dataclass(frozen=True)
class DART(Cascade):
    keep: Counts = (132,)
    """Mean number of vision tokens per decoder layer (int) or its fraction (float); a 1-tuple gives what is left from
    ``layer`` on."""
    layer: Depth = 2
    """Decoder layer K before which tokens are removed: its index, or a fraction of the depth."""
    vision_pivots: int = 4
    """Pivots among the vision tokens."""
    text_pivots: int = 4
    """Pivots among the text tokens after the image."""

    name: ClassVar[str] = "dart"
    summary: ClassVar[str] = "keeps the tokens that resemble a few pivots least"
    paper: ClassVar[str] = "arXiv 2502.11494, EMNLP 2025"
    text_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.vision_pivots >= 1, f"vision_pivots={self.vision_pivots}: give at least 1")
        require(self.text_pivots >= 0, f"text_pivots={self.text_pivots}: give 0 or more")

    @property
    def depths(self) -> tuple[Depth, ...]:
        return (self.layer,)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"text.question", "decoder.keys", "decoder.normed"})

    def choose(self, view: View, count: int) -> Keep:
        keys, normed, mask = view.decoder.keys, view.decoder.normed, view.text.question.mask
        norms = keys.tokens.float().abs().sum((1, 3))
        of_text = keys.text.float().abs().sum((1, 3)).masked_fill(~mask, -1.0)
        vision = _largest(norms, min(self.vision_pivots, count))
        text = _largest(of_text, min(self.text_pivots, of_text.shape[1]))
        exists = torch.cat([torch.ones_like(vision, dtype=torch.bool), mask.gather(1, text)], 1)
        hidden = F.normalize(normed.tokens.float(), dim=-1)
        pivots = torch.cat([gather(hidden, vision), gather(F.normalize(normed.text.float(), dim=-1), text)], 1)
        return Keep(farthest_from_pivots(hidden, pivots, exists, vision, count))


def _largest(norms: Float[Tensor, "batch tokens"], count: int) -> Int[Tensor, "batch {count}"]:
    """By descending norm, of equal ones the lower index first."""
    return norms.sort(dim=1, descending=True, stable=True).indices[:, :count]
