"""What a pass that dropped tokens leaves behind in its cache: every layer is told which of its tokens are missing.

It knows caches and which tokens were left from which layer on; it knows nothing of models and images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visiontrim.engine.cache import Trimmed, chunk_mask, make_trimmed, static, trimmed_layer
from visiontrim.engine.forward import Alive, Forward, Prefill, Removal
from visiontrim.engine.upstream import Cache, holds_tokens


def expected_lengths(prefill: Prefill, layers: int, narrow_from: int) -> list[int]:
    """How many tokens each layer of the cache must hold after ``prefill``."""
    added = list(prefill.widths(layers) if prefill.repeated is None else (prefill.attended.width,) * layers)
    if prefill.removals:
        added[narrow_from:] = [prefill.alive.width] * (layers - narrow_from)
    return [held + new for held, new in zip(prefill.held, added, strict=True)]


def note_removals(prefill: Prefill, layers: int, narrow_from: int, compact: bool) -> None:
    """Tell the cache of ``prefill``, a pass through ``layers`` decoder layers, what each layer lacks.

    Layers from ``narrow_from`` on keep only what the last stage left. ``compact``: position ids that follow are
    consecutive.
    """
    cache = prefill.cache
    if cache is None or not prefill.removals:
        return
    removals = prefill.removals
    if narrow_from < removals[0].start:  # layers that had all of the chunk are narrowed, too
        origin = torch.arange(prefill.length, device=prefill.chunk_valid.device).expand_as(prefill.chunk_valid)
        removals = [Removal(narrow_from, Alive(origin, prefill.chunk_valid, [], [])), *removals]
    ends = [removal.start for removal in removals[1:]] + [layers]
    even = len(ends) == 1 and removals[0].start == 0
    for removal, end in zip(removals, ends, strict=True):
        attended = removal.alive if prefill.repeated is None else prefill.repeated.alive
        shorter = prefill.chunk_valid.sum(1) - attended.valid.sum(1) if compact else None
        masks: dict[tuple, Tensor | None] = {}  # layers with the same past have the same mask
        for index in range(removal.start, end):
            if index < len(cache.layers) and not holds_tokens(cache.layers[index]):
                continue  # a state knows no tokens
            layer, left = make_trimmed(cache, index), attended
            if index >= narrow_from:
                left = prefill.alive
                layer.narrow(left.within(removal.alive, prefill.length), attended.width)
            past = id(layer.key_mask), layer.trimmed_to, layer.removed, left is attended
            if past not in masks:
                valid = left.valid if left.padded else None
                masks[past] = chunk_mask(cache, index, prefill.past_mask, prefill.past, valid, left.width)
            shift = shorter if shorter is None or layer.shift is None else shorter + layer.shift
            layer.note_removal(prefill.length - left.width, prefill.prompt_end, masks[past], shift)
    mark_plain(cache, layers, even)


def mark_plain(cache: Cache | None, layers: int, even: bool) -> None:
    """Tell ``cache`` whether the passes to come need no help; ``even``: all layers lack the same."""
    for index in range(layers):
        if (layer := trimmed_layer(cache, index)) is not None:
            hides = layer.key_mask is not None and not static(cache)
            layer.plain = even and not hides and layer.shift is None
            layer.still = None


def mark_still(step: Forward, kinds: Sequence[str], attention: str | None) -> None:
    """Tell the cache of ``step`` where that was a step of decoding which needed no help, so that the next gets none.

    ``kinds`` are those of the decoder layers, of which windows and recurrent ones may want a mask later on;
    ``attention`` is the implementation.
    """
    cache = step.cache
    if step.helped or step.length != 1 or step.mask is not None or set(kinds) != {"full_attention"}:
        return
    for layer in () if cache is None or static(cache) else cache.layers:
        if isinstance(layer, Trimmed):
            layer.still = attention
