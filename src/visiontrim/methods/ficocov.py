"""FiCoCo-V: from the middle of the vision encoder on, fold redundant tokens into the ones they correlate with.

"Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration", AAAI 2026, arXiv 2411.17686;
github.com/kawhiiiileo/FiCoCo, which has no licence, so nothing is taken from it. :mod:`.ficoco` is the form inside the
language model.

A step drops the tokens with the highest s_i = lambda mean_j A_ij - (1 - lambda) a_cls_i, after a local penalty: in
every window of 2 x 2 places the largest s is doubled if positive, halved if negative, so that neighbours do not go
together. A dropped token goes to those remaining ones whose C_ij = A_ij reaches the eps-quantile of its row, in
proportion to C, and a remaining one becomes (x_j + sum_i alpha_ij x_i) / (1 + sum_i alpha_ij).

What "A" is, the paper leaves open: rows of a softmax have the constant mean 1 / N. As in the released code, s is read
from scaled logits averaged over heads, a_cls being those of [CLS]; the correlation is their softmax. Without [CLS],
a_cls is the cosine of a token's key with the mean key (the paper's best choice).

The dropped tokens of a step are compared with all that stay: work and memory of a step grow with the product of both.
Beside all tokens with all that is 2.4 times less CPU time at 576 tokens and 4.1 at 2,304, in 135 operations.

Differences. The paper compresses inside a layer, between attention and MLP; here a step stands before the layer that
follows. Of 24 layers LLaVA uses 23, so steps stand before layers 12 to 22, eleven as in the released code. That code
swaps the two weights and normalises both terms, spreads a token over one or two others of which some are dropped
themselves, and loses [CLS] and the places of tokens on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.budget import Depth, at_depths, check_depths
from visiontrim.core.method import Layers
from visiontrim.core.registry import register
from visiontrim.core.signals import EncoderSignals, Signal
from visiontrim.core.view import View
from visiontrim.methods.checks import require
from visiontrim.methods.matching import Matching
from visiontrim.ops.matching import Merged
from visiontrim.ops.select import gather, leftovers, top_k
from visiontrim.ops.spreading import absorb, head_mean_logits, pick_heads
from visiontrim.ops.windows import penalise_peaks, windows


@register
@dataclass(frozen=True)
class FiCoCoV(Matching):
    """Hyper-parameters of FiCoCo-V. Raises :class:`~visiontrim.core.errors.TrimError` for values that cannot work."""

    proportional: bool = False
    """Whether later encoder layers attend to merged tokens in proportion to their mass, which the paper does not."""
    start: Depth = 0.5
    """The first encoder layer before which tokens are dropped, then before every later one: its index, or a fraction of
    the depth."""
    lamb: float = 0.35
    """Weight of the visual term of redundancy against that of [CLS]: lambda."""
    eps: float = 0.998
    """Quantile of a row of correlations from which a target takes part."""

    name: ClassVar[str] = "ficoco-v"
    summary: ClassVar[str] = "folds redundant tokens into correlated ones, a few after every layer of the encoder"
    paper: ClassVar[str] = "arXiv 2411.17686, AAAI 2026"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depths((self.start,))
        for name in ("lamb", "eps"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}={value} is no weight: give a number in [0, 1]")

    def first(self, layers: Layers) -> int:
        return at_depths((self.start,), layers.encoder)[0]

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({"encoder.queries", "encoder.keys", "encoder.cls_query"})

    def merged(self, view: View, count: int) -> Merged:
        queries, keys = view.encoder.queries, view.encoder.keys
        # logits are linear in the key: the mean of a row is the logit of the mean key, and no full map is made
        means = head_mean_logits(queries, keys.float().mean(2, keepdim=True))[..., 0]
        score = self.lamb * means - (1 - self.lamb) * _of_cls(view.encoder)
        dropped = top_k(penalise_peaks(score, *windows(view.coordinates, view.grid, 2)), count)
        kept = leftovers(dropped, score.shape[1])
        of_dropped, of_kept = pick_heads(queries, dropped), pick_heads(keys, kept)
        correlation = head_mean_logits(of_dropped, of_kept).softmax(-1)
        features = absorb(gather(view.content, kept).float(), gather(view.content, dropped), correlation, self.eps)
        went_to = torch.zeros(score.shape, dtype=torch.long, device=kept.device)
        went_to.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
        went_to.scatter_(1, dropped, correlation.argmax(-1))
        return Merged(kept, features, went_to)


def _of_cls(seen: EncoderSignals) -> Float[Tensor, "batch tokens"]:
    """How much [CLS], or without it the mean key, points to each token."""
    if "cls_query" in seen:
        return head_mean_logits(seen.cls_query, seen.keys)[:, 0]
    flat = seen.keys.float().transpose(1, 2).flatten(2)
    return F.cosine_similarity(flat, flat.mean(1, keepdim=True), dim=-1)
