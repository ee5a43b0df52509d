"""Masks that were prepared before the language model, cut down to what is left: by a model whose images attend in both
directions, or by generate() for a static cache.

It knows rows and columns of a mask; it does not know why a token is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from visiontrim.core.errors import TrimError

Prepared = Tensor | Mapping[str, Tensor | None] | None
"""[batch or 1, heads or 1, queries, keys], bool (True: visible) or to be added to scores; several by layer type;
None where plain causal attention needs no mask."""


def narrowed_mask(mask: Prepared, origin: Int[Tensor, "batch left"], valid: Bool[Tensor, "batch left"]) -> Prepared:
    """``mask`` of a chunk of which only the tokens at ``origin`` are left; its keys are those of the past, then itself.

    Padding, which is where ``valid`` is False, is seen by itself only.
    Raises :class:`TrimError` for masks of another kind.
    """
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        return {kind: None if part is None else _narrowed(part, origin, valid) for kind, part in mask.items()}
    return _narrowed(mask, origin, valid)


def _narrowed(mask: Tensor, origin: Int[Tensor, "batch left"], valid: Bool[Tensor, "batch left"]) -> Tensor:
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        shape = f"has {mask.ndim} axes" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise TrimError(
            f"the model's own attention mask {shape}, but removed tokens need one of 4 axes: load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    origin, valid = origin.to(mask.device), valid.to(mask.device)
    batch, left = origin.shape
    queries, keys = mask.shape[2:]
    past = torch.arange(keys - queries, device=mask.device).expand(batch, -1)
    columns = torch.cat([past, keys - queries + origin], 1)
    rows = mask.expand(batch, -1, -1, -1).gather(2, origin[:, None, :, None].expand(-1, mask.shape[1], -1, keys))
    narrowed = rows.gather(3, columns[:, None, None].expand(-1, mask.shape[1], left, -1))
    visible, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    here = narrowed[..., -left:]
    here.masked_fill_(~valid[:, None, None, :], hidden)
    own = torch.eye(left, dtype=torch.bool, device=mask.device) & ~valid[:, None, :, None]
    here.masked_fill_(own, visible)
    return narrowed


def static_padding(mask: Any, past: int, removed: int, length: int) -> Tensor | None:
    """The padding mask [batch, past + length] in the 4-D mask that generate() makes for a static cache; None: none.

    The first ``removed`` columns stand for tokens that the cache lacks, and mean nothing.
    """
    if isinstance(mask, Mapping):
        mask = next((kind for kind in mask.values() if isinstance(kind, Tensor)), None)
    if not isinstance(mask, Tensor) or mask.ndim == 2:
        return mask
    last = mask[:, 0, -1, : past - removed + length]  # the last token sees all that is no padding
    valid = last if last.dtype == torch.bool else last == 0
    return None if bool(valid.all()) else F.pad(valid, (removed, 0), value=True)
