"""Fusion of the global and the local score of a token (VisionTrim eq. 3 and 6)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Fusion = Literal["adaptive", "max", "mean", "geometric", "harmonic"]
"""How :func:`fuse` joins two scores."""
Normalise = Literal["softmax", "z-scores"]
"""What turns a score into a distribution over the tokens: a softmax, or a softmax of z-scores."""
Weight = Literal["lower", "higher"]
"""Whether the score of the lower or of the higher variance weighs more."""


def fuse(
    global_score: Float[Tensor, "batch tokens"],
    local_score: Float[Tensor, "batch tokens"],
    rule: Fusion,
    normalise: Normalise = "softmax",
    weight: Weight = "lower",
) -> Float[Tensor, "batch tokens"]:
    """One score per token from two, in float32. Only its order within an image has a meaning.

    Each score is turned into a distribution over the tokens, ``a`` and ``b``: by a softmax (eq. 3: the second one, for
    a score that is an attention), or by the softmax of its z-scores, which puts both on one scale. The rules:

    - ``adaptive``: eq. 6, ``alpha a + (1 - alpha) b`` with ``alpha = var b / (var a + var b)`` where the ``lower``
      variance weighs more, as the equation prints, and ``alpha = var a / (var a + var b)`` where the ``higher`` does,
      as its text says. With the softmax of an attention, which is almost flat, "lower" leaves the decision to the
      global score in effect.
    - ``max``, ``mean``, ``geometric``, ``harmonic``: that mean, or the larger, of ``a`` and ``b``.

    Raises :class:`ValueError` for an unknown rule.
    """
    first, second = global_score.float(), local_score.float()
    if normalise == "z-scores":
        first, second = _standardise(first), _standardise(second)
    a, b = first.softmax(-1), second.softmax(-1)
    match rule:
        case "adaptive":
            varies, other = _shares(a, b)
            return other * a + varies * b if weight == "lower" else varies * a + other * b
        case "max":
            return torch.maximum(a, b)
        case "mean":
            return (a + b) / 2
        case "geometric":
            return (a * b).sqrt()
        case "harmonic":
            return 2 * a * b / (a + b).clamp(min=torch.finfo(a.dtype).tiny)
    raise ValueError(f"fusion={rule!r} is unknown: choose from {', '.join(get_args(Fusion))}")


def _standardise(score: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    centred = score - score.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1.0)


def _shares(
    a: Float[Tensor, "batch tokens"], b: Float[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "batch 1"], Float[Tensor, "batch 1"]]:
    """var(a) / (var(a) + var(b)) and the rest, one half each where both are constant."""
    variances = torch.stack([a, b]).var(-1, keepdim=True, correction=0)
    total = variances.sum(0)
    share, rest = torch.where(total > 0, variances / total, 0.5)
    return share, rest
