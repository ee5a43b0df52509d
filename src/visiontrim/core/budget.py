"""How many tokens stay: the reading of ``keep`` and the arithmetic of two-stage budgets."""

from __future__ import annotations

import math

from visiontrim.core.errors import TrimError

Amount = int | float
"""A number of tokens per image (int) or a fraction of its tokens (float in (0, 1])."""


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

    A fraction is rounded to the nearest count. Raises :class:`TrimError` for more tokens than there are.
    """
    check_amount(keep, name)
    if isinstance(keep, float):
        return max(1, round(keep * total))
    if keep > total:
        raise TrimError(f"{name}={keep} but the image has {total} vision tokens: give at most {total}, or a fraction")
    return keep


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
