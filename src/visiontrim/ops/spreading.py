"""Merging a token into several others (FiCoCo), and the head-averaged logits that say into which."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.ops.select import gather


def head_mean_logits(
    query: Float[Tensor, "batch heads rows dim"], key: Float[Tensor, "batch kv_heads keys dim"]
) -> Float[Tensor, "batch rows keys"]:
    """Mean over heads of query . key, float32; ``query`` is scaled already, a head of ``key`` serves several of it.

    One product of concatenated heads: no map of a single head is built.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    # queries that share a key are summed first
    grouped = query.float().view(batch, kv_heads, heads // kv_heads, rows, dim).sum(2)
    flat_query = grouped.transpose(1, 2).reshape(batch, rows, kv_heads * dim)
    flat_key = key.float().transpose(1, 2).reshape(batch, keys, kv_heads * dim)
    return flat_query @ flat_key.mT / heads


def pick_heads(
    heads: Float[Tensor, "batch heads tokens dim"], index: Int[Tensor, "batch picked"]
) -> Float[Tensor, "batch heads picked dim"]:
    """What the heads have of the tokens ``index``."""
    return gather(heads.transpose(1, 2), index).transpose(1, 2)


def absorb(
    targets: Float[Tensor, "batch targets dim"],
    sources: Float[Tensor, "batch sources dim"],
    correlation: Float[Tensor, "batch sources targets"],
    eps: float,
) -> Float[Tensor, "batch targets dim"]:
    """``targets``, each with its share of the ``sources`` that correlate with it (FiCoCo's compression).

    A source goes to the targets whose ``correlation``, not negative, reaches the ``eps``-quantile of its row (linear
    interpolation), in proportion to it. A target becomes (x + sum alpha source) / (1 + sum alpha). float32 inside, the
    dtype of ``targets`` outside.
    """
    threshold = _quantile(correlation, eps)
    weight = correlation * (correlation >= threshold)
    total = weight.sum(-1, keepdim=True)
    weight = weight / torch.where(total > 0, total, 1.0)
    merged = targets.float() + weight.mT @ sources.float()
    return (merged / (1 + weight.sum(1)[..., None])).to(targets.dtype)


def _quantile(values: Float[Tensor, "batch rows columns"], share: float) -> Float[Tensor, "batch rows 1"]:
    """Quantile of each row, with linear interpolation, from the largest numbers alone.

    ``torch.quantile`` sorts everything, and takes 16 million numbers at most.
    """
    last = values.shape[-1] - 1
    place = share * last
    below = min(int(place), last)
    largest = values.topk(last - below + 1, dim=-1).values
    above = largest[..., max(0, largest.shape[-1] - 2), None]
    return torch.lerp(largest[..., -1:], above, place - below)
