"""Hooks that are on their modules only while a pass needs them: PyTorch's part of a call is long where there is one.

It knows how many passes of all threads need them; it does not know what the hooks do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torch import nn


class PassingHooks:
    """Pre-hooks with keyword arguments, each on a module of its own, from the first :meth:`enter` to the last
    :meth:`leave`.

    A module that another thread calls meanwhile has them too, and may come upon one that is not yet known to want
    keyword arguments: a hook without any has nothing to do.
    """

    def __init__(self, hooks: Sequence[tuple[nn.Module, Callable]]) -> None:
        self._hooks = hooks
        self._handles: list = []
        self._passes = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """A pass that needs them begins."""
        if not self._hooks:
            return
        with self._lock:
            self._passes += 1
            if not self._handles:
                self._handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in self._hooks]

    def leave(self) -> None:
        """A pass that needed them is over."""
        if not self._hooks:
            return
        with self._lock:
            self._passes -= 1
            if not self._passes:
                self._take_off()

    def remove(self) -> None:
        """Nothing needs them any more."""
        with self._lock:
            self._passes = 0
            self._take_off()

    def _take_off(self) -> None:
        while self._handles:
            self._handles.pop().remove()
