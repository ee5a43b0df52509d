"""Checks of hyper-parameters that methods share."""

from __future__ import annotations

import functools
import math
from types import NoneType, UnionType
from typing import Literal, get_args, get_origin, get_type_hints

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method

_hints = functools.cache(get_type_hints)  # a millisecond for each method that is made


def require(condition: bool, message: str) -> None:
    """Raise :class:`TrimError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise TrimError(message)


def check_fields(method: Method) -> None:
    """Raise :class:`TrimError` if a field of ``method`` has no value of its type.

    Types are Literal, bool, int, float, tuples of floats, and any of these or None; others have checks of their own.
    """
    for name, hint in _hints(type(method)).items():
        value = getattr(method, name)
        if get_origin(hint) is UnionType and len(of := [part for part in get_args(hint) if part is not NoneType]) == 1:
            if value is None:
                continue
            (hint,) = of
        if get_origin(hint) is Literal:
            choices = ", ".join(map(repr, get_args(hint)))
            require(value in get_args(hint), f"{name}={value!r} is no choice: choose from {choices}")
        elif hint is bool:
            require(isinstance(value, bool), f"{name}={value!r}: give true or false")
        elif hint is int:
            require(type(value) is int, f"{name}={value!r}: give a whole number")
        elif hint is float:
            require(_finite(value), f"{name}={value!r}: give a number")
        elif get_origin(hint) is tuple and float in get_args(hint):
            fits = isinstance(value, tuple) and all(_finite(part) or part in (math.inf, -math.inf) for part in value)
            require(fits, f"{name}={value!r}: give a list of numbers")


def check_seed(seed: object) -> None:
    """Raise :class:`TrimError` unless torch's generators take ``seed``."""
    fits = type(seed) is int and -(2**63) <= seed < 2**64
    require(fits, f"seed={seed!r} is no seed: give a whole number from 0 to 2^64 - 1")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
