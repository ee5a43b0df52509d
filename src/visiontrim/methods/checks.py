"""Checks of hyper-parameters that methods share."""

from __future__ import annotations

import functools
import math
from typing import Literal, get_args, get_origin, get_type_hints

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method

_hints = functools.cache(get_type_hints)  # a millisecond for each method that is made


def require(condition: bool, message: str) -> None:
    """Raise :class:`TrimError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise TrimError(message)


def check_fields(method: Method) -> None:
    """Raise :class:`TrimError` if a field of ``method`` declared as a Literal, bool, int or float has no such value."""
    for name, hint in _hints(type(method)).items():
        value = getattr(method, name)
        if get_origin(hint) is Literal:
            choices = ", ".join(map(repr, get_args(hint)))
            require(value in get_args(hint), f"{name}={value!r} is no choice: choose from {choices}")
        elif hint is bool:
            require(isinstance(value, bool), f"{name}={value!r}: give true or false")
        elif hint is int:
            require(type(value) is int, f"{name}={value!r}: give a whole number")
        elif hint is float:
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            require(number, f"{name}={value!r}: give a number")
