"""How many tokens stay: the reading of ``keep``, and the arithmetic of budgets over several stages."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

from visiontrim.core.errors import TrimError

Amount = int | float
"""A number of tokens per image (int), at most, or a fraction of its tokens (float in (0, 1])."""


Depth = int | float
"""A decoder layer by its index (int >= 1), or as a fraction of the decoder's layers (float in (0, 1))."""


def check_amount(keep: object, name: str = "keep") -> None:
    """Raise :class:`TrimError` unless ``keep`` is an int >= 1 or a float in (0, 1]."""
    way_out = "give a number of tokens per image (an int >= 1) or a fraction of them (a float in (0, 1])"
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TrimError(f"{name}={keep!r} is not a number: {way_out}")
    if isinstance(keep, int) and keep < 1:
        raise TrimError(f"{name}={keep} keeps nothing: {way_out}")
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:  # NaN fails both comparisons
        raise TrimError(f"{name}={keep} is not a fraction in (0, 1]: {way_out}")


def resolve(keep: Amount, total: int, name: str = "keep") -> int:
    """Number of tokens that ``keep`` means for an image of ``total`` vision tokens, at least 1.

    A fraction is rounded to the nearest count. A number is one at most: an image that has fewer passes whole.
    """
    check_amount(keep, name)
    if isinstance(keep, float):
        return max(1, round(keep * total))
    return min(keep, total)


def split_two_stage(mean: int, total: int, layer: int, num_layers: int, funnel: float) -> tuple[int, int]:
    """Counts ``(first, second)`` whose mean per layer is as near to ``mean`` as whole tokens allow (VisionTrim 3.3).

    The mean is (layer x first + (num_layers - layer) x second) / num_layers.

    ``first`` tokens enter the language model, ``second`` = about ``first / funnel`` go on from ``layer``; ``first``
    is capped by the ``total`` tokens of the image, and ``second`` then takes up what is left of the budget.
    """
    second = mean * num_layers / (layer * funnel + num_layers - layer)
    first = min(total, round(funnel * second))
    return first, second_stage(mean, first, layer, num_layers)


def second_stage(mean: int, first: int, layer: int, num_layers: int) -> int:
    """Count after ``layer`` that makes the mean per layer ``mean`` when ``first`` tokens entered the language model.

    Raises :class:`TrimError` if the layers before ``layer`` alone cost more than the budget.
    """
    second = math.floor((mean * num_layers - layer * first) / (num_layers - layer) + 0.5)
    if second < 1:
        least = math.ceil((layer * first + num_layers - layer) / num_layers)
        raise TrimError(
            f"a mean of {mean} vision tokens per layer cannot be reached: {first} tokens in the first {layer} of "
            f"{num_layers} layers already need a mean of {least}; raise keep, lower layer, or add the vision stage"
        )
    return min(second, first)


def check_depths(layers: Sequence[object]) -> None:
    """Raise :class:`TrimError` unless ``layers`` are ascending ints >= 1 or ascending floats in (0, 1)."""
    way_out = "give indices from 1 on (ints), or fractions of the decoder's depth (floats in (0, 1)), ascending"
    kinds = {type(layer) for layer in layers}
    if kinds not in ({int}, {float}):
        raise TrimError(f"layers={layers} are no layers: {way_out}")
    numbers = [float(layer) for layer in layers if isinstance(layer, int | float)]
    ascending = all(before < after for before, after in itertools.pairwise(numbers))
    inside = all(layer >= 1 for layer in numbers) if kinds == {int} else all(0 < layer < 1 for layer in numbers)
    if not ascending or not inside:
        raise TrimError(f"layers={layers} cannot be passed one after the other: {way_out}")


def at_depths(layers: Sequence[Depth], num_layers: int) -> tuple[int, ...]:
    """Indices of ``layers`` in a decoder of ``num_layers``: a fraction is the nearest layer, each a later one."""
    indices: list[int] = []
    for layer in layers:
        index = layer if isinstance(layer, int) else math.floor(layer * num_layers + 0.5)
        indices.append(max(index, indices[-1] + 1 if indices else 1))
    return tuple(indices)


def mean_per_layer(entered: int, layers: Sequence[int], counts: Sequence[int], num_layers: int) -> float:
    """Mean number of vision tokens that a decoder layer processes, when ``counts[i]`` go on from ``layers[i]``."""
    spans = _spans((0, *layers), num_layers)
    return sum(span * count for span, count in zip(spans, (entered, *counts), strict=True)) / num_layers


@functools.lru_cache(maxsize=256)
def spread(
    mean: int, entered: int, layers: tuple[int, ...], num_layers: int, proportions: tuple[float, ...]
) -> tuple[int, ...]:
    """Counts from each of ``layers`` on, in these ``proportions``, with a mean per layer as near to ``mean`` as can be.

    The ``entered`` tokens of the layers before are counted in. ``proportions`` do not ascend; only their ratios
    matter, and a 0 leaves tokens to its stage only when the stages before it cannot use up the budget. No count is
    above the one before. Raises :class:`TrimError` if the layers before the first stage alone cost more than the
    budget.
    """
    spans = _spans(layers, num_layers)
    budget = mean * num_layers - layers[0] * entered
    least = sum(span for span, share in zip(spans, proportions, strict=True) if share)
    if budget < least:
        needed = math.ceil((layers[0] * entered + least) / num_layers)
        raise TrimError(
            f"a mean of {mean} vision tokens per layer cannot be reached: {entered} tokens in the first {layers[0]} of "
            f"{num_layers} layers already need a mean of {needed}; raise keep, start at an earlier layer, or add a "
            "vision stage"
        )
    counts: list[int] = []
    cap = entered
    for stage, span in enumerate(spans):
        last = stage == len(spans) - 1
        exact = budget / span if last else _scaled(budget, cap, spans[stage:], proportions[stage:])
        if not proportions[stage] and cap < entered:  # a stage before could have more: this is what rounding left
            exact = 0.0
        cap = min(cap, max(1 if proportions[stage] else 0, math.floor(exact + 0.5)))
        counts.append(cap)
        budget -= span * cap
    return tuple(counts)


def _spans(layers: Sequence[int], num_layers: int) -> list[int]:
    """Layers from each of ``layers`` to the next, and to the end."""
    return [end - start for start, end in zip(layers, (*layers[1:], num_layers), strict=True)]


def _scaled(budget: float, cap: int, spans: Sequence[int], proportions: Sequence[float]) -> float:
    """The first count, before rounding, when the counts are multiples of ``proportions`` that cost ``budget``."""
    shares = [(share, 1.0) if share else (1e-9, 0.0) for share in proportions]  # and the fewest tokens
    low, high = 0.0, cap * 1e9
    for _ in range(100):  # the cost grows with the factor: halve where it crosses the budget
        middle = (low + high) / 2
        counts = [min(cap, max(least, middle * share)) for share, least in shares]
        if sum(span * count for span, count in zip(spans, counts, strict=True)) < budget:
            low = middle
        else:
            high = middle
    share, least = shares[0]
    return min(cap, max(least, high * share))
