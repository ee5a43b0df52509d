"""The record of a pass that carried images, once it is over.

It knows what is left of every image and what the cache holds; it changes nothing.
"""

from __future__ import annotations

from visiontrim.core.trace import Trace
from visiontrim.engine.cache import cache_bytes, physical_length
from visiontrim.engine.forward import Prefill


def trace_of(prefill: Prefill, layers: int) -> Trace:
    """The trace of ``prefill`` through ``layers`` decoder layers."""
    cache = prefill.cache
    batch = prefill.alive.origin.shape[0]
    copies = batch // prefill.call.samples
    traced = sorted(
        (row, group.numbers[image], group.part.before, place, image)
        for place, group in enumerate(prefill.groups)
        for image, row in enumerate(group.rows)
        if row % copies == 0
    )
    images, sounds = [], []
    for row, _, _, place, image in traced:
        group = prefill.groups[place]
        (sounds if group.part.kind == "audio" else images).append(group.trace(image, row // copies, layers))
    widths = prefill.widths(layers)
    attended = widths if prefill.repeated is None else (prefill.attended.width,) * layers
    return Trace(
        images=tuple(images),
        batch=batch,
        copies=copies,
        length=prefill.length,
        past=prefill.past,
        widths=widths,
        attended=attended,
        positions=prefill.positions,
        cache_lengths=() if cache is None else tuple(physical_length(cache, index) for index in range(layers)),
        cache_bytes=cache_bytes(cache),
        sounds=tuple(sounds),
    )
