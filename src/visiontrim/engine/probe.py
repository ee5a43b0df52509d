"""Attention signals from one module, while it and everything else stay on the model's own attention implementation.

transformers lets a name select the attention function of a module through the module's config. The probed module, and
only it, gets a shallow copy of its config with a name registered here; the function of that name shows queries and
keys to the module's listener and then calls the original implementation.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

Listener = Callable[[Tensor, Tensor, float | None], None]
"""Called with the queries [B, heads, Q, d], the keys [B, key-value heads, K, d] and the scaling of each forward."""

_listeners: WeakKeyDictionary[nn.Module, Listener] = WeakKeyDictionary()


class AttentionProbe:
    """Lets ``listener`` hear the attention module ``module``; :meth:`remove` gives the module its own config back."""

    def __init__(self, module: nn.Module, listener: Listener) -> None:
        self._module: Any = module
        self._config: Any = module.config
        base = self._config._attn_implementation or "eager"
        # the base name stays inside: transformers looks for "flash" in the name of an implementation
        name = f"visiontrim_probe::{base}"
        if name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(name, _audible(base))
        config = copy.copy(self._config)
        config._attn_implementation_internal = name
        self._module.config = config
        _listeners[module] = listener

    def remove(self) -> None:
        self._module.config = self._config
        del _listeners[self._module]


def _audible(base: str) -> Callable:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
        with torch.no_grad():
            _listeners[module](query, key, kwargs.get("scaling"))
        if base == "eager":  # eager is each modeling file's own function, with its own soft caps and sinks
            function = importlib.import_module(type(module).__module__).eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[base]
        return function(module, query, key, value, attention_mask, **kwargs)

    return attention
