"""TransPrune: keep the tokens that the layers change in length and direction, and that the text attends to.

"TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", CVPR 2026, arXiv 2507.20630. Official
code: liaolea/TransPrune, MIT.

1. Before a stage's decoder layer, w_i = |y_i| / |u_i| exp(1 - cos(u_i, y_i)) / sum_j exp(1 - cos(u_j, y_j)) of what
   entered (u) and left (y) the layer before. It is added to what the stages before had of the token.
2. The score of a token is its share of that plus its share of the attention that the text after the image pays in the
   same layer, mean over heads and words. The highest go on, halves of what arrives as in PyramidDrop.

``attention=false`` leaves the transitions alone, for which no attention is read. As exp(1 - cos) lies between 1 and
7.4, w is mostly the ratio of lengths.

Differences: the original measures the two blocks of a layer, attention and feed-forward, each by itself, and sums over
all layers of a list; here a layer is one block, and the layers before the stages are the list. It sums over the whole
sequence, here over the image. Its attention is that of the coming layer. Position ids are consecutive after every
stage, as in its base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.budget import Depth
from visiontrim.core.method import Positions
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.ops.select import top_k


@register
@dataclass(frozen=True)
class TransPrune(Cascade):
    keep: Counts = (0.5, 0.5, 0.5)
    """Mean number of vision tokens per decoder layer (int) or its fraction (float); a tuple gives the share or number
    that every stage leaves."""
    layers: tuple[Depth, ...] = (8 / 32, 16 / 32, 24 / 32)
    """Decoder layers before which tokens are removed: indices, or fractions of the depth."""
    attention: bool = True
    """Whether the attention of the text counts, too."""

    name: ClassVar[str] = "transprune"
    summary: ClassVar[str] = "keeps what the layers change in length and direction, and what the text attends to"
    paper: ClassVar[str] = "arXiv 2507.20630, CVPR 2026"
    text_aware: ClassVar[bool] = True

    @property
    def depths(self) -> tuple[Depth, ...]:
        return self.layers

    @property
    def positions(self) -> Positions:
        return "compact"

    @property
    def needs(self) -> frozenset[Signal]:
        of_text = {"decoder.text_attention", "text.question"} if self.attention else set()
        return frozenset({"decoder.previous"} | of_text)

    def choose(self, view: View, count: int) -> Keep:
        changes = transitions(view.decoder.previous, view.features)
        if view.noted is not None:
            changes = changes + view.noted
        score = changes / changes.sum(-1, keepdim=True)
        if self.attention:
            paid = (view.decoder.text_attention.mean(1) * view.text.question.mask[..., None]).sum(1)
            score = score + paid / paid.sum(-1, keepdim=True).clamp(min=torch.finfo(paid.dtype).tiny)
        index = top_k(score, count)
        return replace(Keep(index), noted=changes.gather(1, index))


def transitions(
    before: Float[Tensor, "batch tokens dim"], after: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, "batch tokens"]:
    """w of each token, float32."""
    before, after = before.float(), after.float()
    turn = (1 - F.cosine_similarity(before, after, dim=-1)).exp()
    grown = torch.linalg.vector_norm(after, dim=-1) / torch.linalg.vector_norm(before, dim=-1).clamp(min=1e-12)
    return grown * turn / turn.sum(-1, keepdim=True)
