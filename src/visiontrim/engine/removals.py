"""What a pass that dropped tokens leaves behind in its cache: every layer is told which of its tokens are missing.

It knows caches and which tokens were left from which layer on; it knows nothing of models and images.
"""

from __future__ import annotations

from visiontrim.engine.cache import chunk_mask, make_trimmed
from visiontrim.engine.forward import Prefill
from visiontrim.engine.upstream import holds_tokens


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
    ends = [removal.start for removal in prefill.removals[1:]] + [layers]
    for removal, end in zip(prefill.removals, ends, strict=True):
        attended = removal.alive if prefill.repeated is None else prefill.repeated.alive
        valid = attended.valid
        padded = not bool(valid.all())
        for index in range(removal.start, end):
            if index < len(cache.layers) and not holds_tokens(cache.layers[index]):
                continue  # a state knows no tokens
            shift, mask, left = None, None, valid
            layer = make_trimmed(cache, index)
            if index >= narrow_from:
                left = prefill.alive.valid
                layer.narrow(prefill.alive.within(removal.alive, prefill.length), valid.shape[1])
            if padded or prefill.past:
                mask = chunk_mask(cache, index, prefill.past_mask, prefill.past, left)
            if compact:
                shift = prefill.chunk_valid.sum(1) - valid.sum(1)
                shift = shift if layer.shift is None else shift + layer.shift
            layer.note_removal(prefill.length - left.shape[1], prefill.prompt_end, mask, shift)
