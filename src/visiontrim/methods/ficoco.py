"""FiCoCo-L: in every layer of the upper decoder, fold the most redundant tokens into the ones they correlate with.

"Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration", AAAI 2026, arXiv 2411.17686;
github.com/kawhiiiileo/FiCoCo, which has no licence, so nothing is taken from it. FiCoCo-L is the form that works inside
the language model.

A step drops the tokens with the highest redundancy, beta times the mean attention logit to the other vision tokens less
(1 - beta) times the mean logit that the text pays the token (queries of the text, keys of the token). A dropped token i
correlates with a remaining token j as C_ij = gamma A_ij + (1 - gamma) / M sum_k A_ik A_kj over the M text tokens k. It
goes to those j whose C_ij reaches the eps-quantile of its row, with weights alpha_ij = C_ij / sum_j C_ij, and a
remaining token becomes (x_j + sum_i alpha_ij x_i) / (1 + sum_i alpha_ij). Position ids are consecutive again after
every step.

What "attention" is, the paper leaves open: rows of a softmax have the constant mean 1 / N. As in the released code,
redundancy is read from the scaled logits, averaged over heads and before the causal mask. The correlation needs
weights, so A in it is the softmax of these logits over the vision and text tokens: our reading.

Differences. The paper compresses inside a layer, between attention and MLP; here a step stands before the layer that
follows, so the released layers 5, 6, ... 31 are steps before layers 6, 7, ... 31. The released code takes the row *sum*
against a text *mean*, so that the visual term is about N times heavier, reads text logits that causality forbids, adds
without dividing, counts prompt tokens as vision tokens, and drops at most 21 tokens a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.budget import Amount, Depth, at_depths, check_amount
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Layers, Positions, Step
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import Cascade, Stage
from visiontrim.methods.checks import require
from visiontrim.ops.select import gather, leftovers, top_k
from visiontrim.ops.spreading import absorb, head_mean_logits, pick_heads


@register
@dataclass(frozen=True)
class FiCoCoL(Cascade):
    keep: Amount | None = None
    """Mean number of vision tokens per decoder layer and image (int), or that as a fraction of the image's tokens
    (float), from which the tokens dropped in a step follow; None drops ``r``."""
    r: int = 14
    """Tokens dropped in every step when ``keep`` is None."""
    start: Depth = 6 / 32
    """The first decoder layer before which tokens are dropped, then before every later one: its index, or a fraction of
    the depth."""
    beta: float = 0.6
    """Weight of the visual against the text term of redundancy."""
    gamma: float = 0.6
    """Weight of the direct correlation against the one by way of the text."""
    eps: float = 0.998
    """Quantile of a row of correlations from which a target takes part."""

    name: ClassVar[str] = "ficoco-l"
    summary: ClassVar[str] = "folds redundant tokens into correlated ones, a few in every layer"
    paper: ClassVar[str] = "arXiv 2411.17686, AAAI 2026"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r >= 1, f"r={self.r} drops nothing: give at least 1")
        for name in ("beta", "gamma", "eps"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}={value} is no weight: give a number in [0, 1]")

    def _check_keep(self) -> None:
        if self.keep is not None:
            check_amount(self.keep)

    @property
    def depths(self) -> tuple[Depth, ...]:
        return (self.start,)

    @property
    def positions(self) -> Positions:
        return "compact"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"text.question", "decoder.queries", "decoder.keys"})

    def steps_for(self, layers: Layers) -> tuple[Step, ...]:
        (first,) = at_depths(self.depths, layers.decoder)
        places = tuple(range(first, layers.decoder)) or (first,)
        return tuple(Stage(self, number, places) for number in range(len(places)))

    def count(self, view: View, number: int, layers: tuple[int, ...]) -> int:
        arriving = view.features.shape[1]
        if self.keep is None:
            left = arriving - self.r
            require(left >= 1, f"{self} drops {self.r} of {arriving} tokens before layer {layers[number]}: lower r")
            return left
        mean = view.count(self.keep, view.total)
        # tokens fall by the same rate in every step: entered - rate (1 + 2 + ... + steps) / num_layers = mean
        steps = len(layers)
        rate = max(0, view.entered - mean) * 2 * view.num_layers / (steps * (steps + 1))
        if view.entered - rate * steps < 1:
            least = view.entered - (view.entered - 1) * (steps + 1) / (2 * view.num_layers)
            raise TrimError(
                f"a mean of {mean} vision tokens per layer cannot be reached by dropping equally many before each of "
                f"the layers {layers[0]} to {layers[-1]}: raise keep to {math.ceil(least)}, or start earlier"
            )
        return min(arriving, int(view.entered - rate * (number + 1) + 0.5))

    def choose(self, view: View, count: int) -> Keep:
        queries, keys, mask = view.decoder.queries, view.decoder.keys, view.text.question.mask
        words = mask.sum(-1)[:, None].clamp(min=1)
        # logits are linear in the key: the mean of a row is the logit of the mean key, and no full map is made
        redundancy = head_mean_logits(queries.tokens, keys.tokens.float().mean(2, keepdim=True))[..., 0]
        from_text = head_mean_logits(queries.text, keys.tokens)
        asked_for = (from_text * mask[..., None]).sum(1) / words
        kept = top_k((1 - self.beta) * asked_for - self.beta * redundancy, count)
        dropped = leftovers(kept, redundancy.shape[1])

        of_dropped = pick_heads(queries.tokens, dropped)
        to_text = head_mean_logits(of_dropped, keys.text)
        within_text = head_mean_logits(queries.text, keys.text)
        direct, by_text = _shares(head_mean_logits(of_dropped, keys.tokens), to_text, mask)
        onward, _ = _shares(from_text, within_text, mask)
        correlation = self.gamma * direct + (1 - self.gamma) / words[..., None] * (by_text @ onward)
        targets = correlation.gather(2, kept[:, None].expand(-1, dropped.shape[1], -1))
        merged = absorb(gather(view.content, kept), gather(view.content, dropped), targets, self.eps)
        nearest = targets.argmax(-1)
        ordinals = torch.arange(count, device=kept.device).expand_as(kept)
        assignment = torch.empty(view.features.shape[:2], dtype=torch.long, device=kept.device)
        assignment = assignment.scatter_(1, kept, ordinals).scatter_(1, dropped, nearest)
        return Keep(kept, merged, assignment)


def _shares(
    to_vision: Float[Tensor, "batch rows tokens"], to_text: Float[Tensor, "batch rows text"], mask: Tensor
) -> tuple[Float[Tensor, "batch rows tokens"], Float[Tensor, "batch rows text"]]:
    """Softmax of logits over vision and text tokens, in two parts."""
    to_text = to_text.masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
    shares = torch.cat([to_vision, to_text], -1).softmax(-1)
    return shares[..., : to_vision.shape[-1]], shares[..., to_vision.shape[-1] :]
