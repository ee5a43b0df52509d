"""Slots and packing: how removed tokens are marked, squeezed out, and put back.

It knows places in a sequence; it does not know what stands there.
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.ops import select

_SIGNATURE = (float("inf"), float("-inf"), float("inf"), float("-inf"))
"""First entries of an empty slot's features. Infinities survive every cast, copy and beam expansion, no projector
gives this pattern, and a genuine NaN is not taken for it."""


@functools.cache
def _signature(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the run
        return torch.tensor(_SIGNATURE, dtype=dtype, device=device)


def to_slots(
    features: Float[Tensor, "batch kept dim"], slots: Int[Tensor, "batch kept"], total: int
) -> Float[Tensor, "batch total dim"]:
    """Put ``features`` into their ``slots`` among ``total``; all other slots are marked as empty."""
    batch, _, dim = features.shape
    full = _empty(features).expand(batch, total, dim).clone()
    return full.scatter_(1, slots[..., None].expand_as(features), features)


def _empty(features: Float[Tensor, "*shape dim"]) -> Float[Tensor, " dim"]:
    empty = features.new_zeros(features.shape[-1])
    empty[: len(_SIGNATURE)] = _signature(features.dtype, features.device)
    return empty


def mark_empty(features: Float[Tensor, "tokens dim"], places: Int[Tensor, " places"]) -> Float[Tensor, "tokens dim"]:
    """``features`` with the slots at ``places`` marked as empty."""
    if not len(places):
        return features
    marked = features.clone()
    marked[places] = _empty(features)
    return marked


def is_empty_slot(features: Float[Tensor, "*shape dim"]) -> Bool[Tensor, "*shape"]:
    """Where :func:`to_slots` left an empty slot."""
    return (features[..., : len(_SIGNATURE)] == _signature(features.dtype, features.device)).all(-1)


def blank_slots(value: Any) -> Any:
    """``value`` with zeros in its empty slots: features, or mappings, lists and tuples with some."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.ndim < 2 or value.shape[-1] < len(_SIGNATURE):
            return value
        return value.masked_fill(is_empty_slot(value)[..., None], 0.0)
    if isinstance(value, MutableMapping):
        for name, part in value.items():
            value[name] = blank_slots(part)
        return value
    return type(value)(map(blank_slots, value)) if type(value) in (list, tuple) else value


def gather(values: Tensor, index: Int[Tensor, "batch kept"]) -> Tensor:
    """``values[b, index[b, j]]`` for values of shape [batch or 1, tokens, ...], on their device."""
    return select.gather(values.expand(index.shape[0], *values.shape[1:]), index.to(values.device))


def pack_left(
    keep: Bool[Tensor, "batch tokens"], width: int | None = None
) -> tuple[Int[Tensor, "batch kept"], Bool[Tensor, "batch kept"]]:
    """Indices of the kept tokens in order, rows with fewer of them padded at the left (with index 0).

    Also says which indices are not padding. ``width`` is the largest number of kept tokens in a row; without it, the
    device is asked.
    """
    tokens = keep.shape[1]
    width = int(keep.sum(-1).max()) if width is None else width
    position = torch.arange(tokens, device=keep.device).expand_as(keep)
    order = torch.where(keep, position, position - tokens).sort(dim=-1).values[:, tokens - width :]
    return order.clamp_min(0), order >= 0


def unpack(
    values: Float[Tensor, "batch last dim"],
    index: Int[Tensor, "batch kept"],
    valid: Bool[Tensor, "batch kept"],
    tokens: int,
) -> Float[Tensor, "batch all_or_last dim"]:
    """Undo :func:`pack_left`: a removed token gets the values of the last kept token before it.

    So the token after a removed one is predicted by what precedes it in the packed sequence, and losses and logits
    of the surviving tokens are those of the packed sequence. Rows with no kept token before get zeros. Of models that
    give the last of the kept tokens alone, as many of the last tokens are given.
    """
    # padding points at token 0: adding its zeros cannot hide a kept token 0
    kept = torch.zeros(index.shape[0], tokens, dtype=torch.long, device=index.device).scatter_add_(
        1, index, valid.long()
    )
    rank = kept.cumsum(1)
    padding = (~valid).sum(1, keepdim=True)
    missing = index.shape[1] - values.shape[1]
    if missing:  # no more than these are kept of the last tokens
        rank, padding = rank[:, -values.shape[1] :], padding - missing
    full = gather(values, (rank - 1 + padding).clamp_min(0))
    return full.masked_fill_((rank == 0)[..., None], 0.0)
