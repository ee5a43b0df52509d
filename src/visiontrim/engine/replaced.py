"""A function of one instance, replaced for a while.

It knows attributes of instances; it does not know what the functions do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_NONE = object()


class Replaced:
    """``owner.name`` calls ``function`` with the original as its first argument, until :meth:`remove`.

    An attribute that the instance had of its own, of a user or of another library, is there again afterwards.
    ``otherwise`` is the original where there is no such attribute.
    """

    def __init__(self, owner: Any, name: str, function: Callable, otherwise: Any = _NONE) -> None:
        original = getattr(owner, name) if otherwise is _NONE else getattr(owner, name, otherwise)
        self._owner, self._name = owner, name
        self._own = owner.__dict__.get(name, _NONE)
        setattr(owner, name, functools.wraps(original)(functools.partial(function, original)))

    def remove(self) -> None:
        """Take the replacement off again."""
        if self._own is _NONE:
            self._owner.__dict__.pop(self._name, None)
        else:
            self._owner.__dict__[self._name] = self._own
