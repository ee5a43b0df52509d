"""A function of one instance, replaced for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Replaced:
    """``owner.name`` calls ``function`` with the original as its first argument, until :meth:`remove`."""

    def __init__(self, owner: Any, name: str, function: Callable) -> None:
        original = getattr(owner, name)
        self._owner, self._name = owner, name
        setattr(owner, name, functools.wraps(original)(functools.partial(function, original)))

    def remove(self) -> None:
        """Take the replacement off again."""
        self._owner.__dict__.pop(self._name, None)
