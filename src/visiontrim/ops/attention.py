"""Attention as a score: the rows or the column means that a method reads, never the whole map."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def attention_rows(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    rows: Int[Tensor, "batch rows"] | slice = slice(None),
    *,
    scaling: float | None = None,
    causal: bool = False,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    softcap: float | None = None,
    bias: Float[Tensor, "batch keys"] | None = None,
) -> Float[Tensor, "batch heads rows keys"]:
    """Attention probabilities of the queries ``rows`` over all keys, float32, in O(heads x rows x keys) memory.

    Queries and keys as the attention function gets them: position-encoded, the heads of ``key`` each shared by
    ``heads / kv_heads`` query heads. The queries are the last ones of the keys (a key-value cache may come before
    them), which is what ``causal`` counts from. ``key_mask`` is False for padding. ``scaling`` is 1/sqrt(dim) unless
    given. ``bias`` is added to the logits of each key. A row that may attend to nothing is all zeros.
    """
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(rows, slice):
        rows = torch.arange(queries, device=query.device)[rows].expand(len(query), -1)
    picked = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    logits = _logits(picked, key, scaling)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if bias is not None:
        logits = logits + bias[:, None, None]
    if causal:
        allowed = torch.arange(keys, device=key.device) <= (rows + keys - queries)[:, None, :, None]
    else:
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=key.device)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    probabilities = logits.masked_fill(~allowed, torch.finfo(torch.float32).min).softmax(-1)
    return probabilities.masked_fill(~allowed, 0.0)


def attention_received(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    scaling: float | None = None,
    chunk: int | None = None,
    skip: int = 1,
    bias: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch patches"]:
    """Mean attention that each patch of a vision encoder receives from the *other* patches, mean over heads, float32.

    The first ``skip`` tokens are special ones ([CLS], registers): they take part in the softmax, but give and receive
    nothing here. What a patch gives to itself is left out, and the divisor is the number of other patches. ``bias`` is
    added to the logits of each key.
    Holds the rows of ``chunk`` queries at a time; None: as many as make 2^24 probabilities, 64 MB.
    """
    tokens = query.shape[2]
    chunk = chunk or _rows_at_a_time(query)
    received = query.new_zeros(len(query), tokens - skip, dtype=torch.float32)
    for start in range(skip, tokens, chunk):
        logits = _logits(query[:, :, start : start + chunk], key, scaling)
        probabilities = (logits if bias is None else logits + bias[:, None, None]).softmax(-1)
        probabilities.diagonal(offset=start, dim1=-2, dim2=-1).zero_()
        received += probabilities[..., skip:].mean(1).sum(1)
    return received / max(tokens - skip - 1, 1)


def attention_columns(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    scaling: float | None = None,
    chunk: int | None = None,
    skip: int = 1,
    bias: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch patches"]:
    """Mean attention that each patch receives from all tokens, itself and special ones included, mean over heads.

    The column means of the attention map, without the columns of the first ``skip`` tokens; float32. ``bias`` is added
    to the logits of each key. Holds the rows of ``chunk`` queries at a time; None: as many as make 2^24 probabilities,
    64 MB.
    """
    tokens = query.shape[2]
    chunk = chunk or _rows_at_a_time(query)
    received = query.new_zeros(len(query), tokens - skip, dtype=torch.float32)
    for start in range(0, tokens, chunk):
        logits = _logits(query[:, :, start : start + chunk], key, scaling)
        probabilities = (logits if bias is None else logits + bias[:, None, None]).softmax(-1)
        received += probabilities[..., skip:].mean(1).sum(1)
    return received / tokens


def _rows_at_a_time(query: Float[Tensor, "batch heads tokens dim"]) -> int:
    """Queries whose attention to all tokens is 2^24 probabilities, 64 MB."""
    batch, heads, tokens, _ = query.shape
    return max(1, 2**24 // (batch * heads * tokens))


def _logits(
    query: Float[Tensor, "batch heads rows dim"], key: Float[Tensor, "batch kv_heads keys dim"], scaling: float | None
) -> Float[Tensor, "batch heads rows keys"]:
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    logits = grouped @ key.float().mT
    return logits.view(batch, heads, rows, -1) * (dim**-0.5 if scaling is None else scaling)
