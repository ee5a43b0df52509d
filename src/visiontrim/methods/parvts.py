"""ParVTS (a reading): let all tokens pass a few layers, then drop those that are not the prompt's subject.

"Parallel Vision Token Scheduling" (ParVTS), arXiv 2511.18875; no official code and no equations were at hand. The
abstract fixes this much: vision tokens are split into subject and non-subject ones, both groups are processed in the
first layers so that their content moves into the question's tokens, then the non-subject path is discarded; up to
88.9 % of the tokens go (576 to 64), with 70 % fewer FLOPs.

What is read into it here, and may differ from the authors' method: the subject are the tokens whose input embedding has
the largest mean cosine with the text after the image; the groups are not hidden from each other, so nothing is saved
before the layer where one is dropped; and that is layer 4 of 32, where 64 tokens are a mean of 128 per layer, near the
published saving. Survivors keep their position ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from visiontrim.core.budget import Depth
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.methods.checks import require
from visiontrim.ops.select import top_k


@register
@dataclass(frozen=True)
class ParVTS(Cascade):
    keep: Counts = (64,)
    """Mean number of vision tokens per decoder layer (int) or its fraction (float); a 1-tuple gives the number of
    subject tokens, or their share."""
    layer: Depth = 4 / 32
    """Decoder layer before which the others are dropped: its index, or a fraction of the depth."""

    name: ClassVar[str] = "parvts"
    summary: ClassVar[str] = "drops what is not the prompt's subject after a few layers (a reading)"
    paper: ClassVar[str] = "arXiv 2511.18875; a reading, no equations are public"
    text_aware: ClassVar[bool] = True

    @property
    def depths(self) -> tuple[Depth, ...]:
        return (self.layer,)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"text.question", "decoder.embeddings"})

    def choose(self, view: View, count: int) -> Keep:
        embeddings = view.decoder.embeddings
        tokens = F.normalize(embeddings.tokens.float(), dim=-1)
        require(
            tokens.shape[1] == view.features.shape[1],
            f"{self} splits all {tokens.shape[1]} tokens that entered, but {view.features.shape[1]} are left: put no "
            "stage between decoder layers before it",
        )
        words = F.normalize(embeddings.text.float(), dim=-1) * view.text.question.mask[..., None]
        # the mean of cosines, but for the number of words
        return Keep(top_k((tokens @ words.sum(1)[..., None])[..., 0], count))
