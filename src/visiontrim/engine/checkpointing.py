"""Gradient checkpointing of layers that have hooks, on releases that recompute a layer with its hooks.

There, the backward pass would call a layer with the tokens that came before its hooks narrowed them, long after the
pass that knew which. While a run is open such layers recompute what is inside of their hooks instead, as later releases
do. It knows how a layer is recomputed; it does not know what hooks do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from visiontrim.engine.replaced import Replaced
from visiontrim.engine.upstream import CACHE_NAMES, recomputes_hooks


class InsideHooks:
    """The layers of ``model`` that are recomputed with their hooks, made to be recomputed within them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._replaced: list[tuple[Any, Replaced]] = []

    def refresh(self) -> None:
        """Before a forward: also of layers whose checkpointing was switched on since the last one."""
        if not torch.is_grad_enabled():  # nothing will be recomputed, and a model has many modules to look at
            return
        for layer in self._layers:
            if layer.gradient_checkpointing:
                layer.gradient_checkpointing = False
                self._replaced.append((layer, Replaced(layer, "forward", functools.partial(_recomputed, layer))))

    @functools.cached_property
    def _layers(self) -> list[Any]:
        return [module for module in self._model.modules() if recomputes_hooks(module)]

    def remove(self) -> None:
        """Recompute with hooks again."""
        while self._replaced:
            layer, replaced = self._replaced.pop()
            replaced.remove()
            layer.gradient_checkpointing = True


def _recomputed(layer: Any, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    without = {name: False if name == "use_cache" else None for name in ("use_cache", *CACHE_NAMES) if name in kwargs}
    return layer._gradient_checkpointing_func(functools.partial(forward, **kwargs | without), *args)
