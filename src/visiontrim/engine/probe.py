"""Attention signals from one module, while it and everything else stay on the model's own attention implementation.

transformers lets a name select the attention function of a module through the module's config. The probed module, and
only it, gets a shallow copy of its config with a name registered here; the function of that name shows queries and
keys to the module's listeners, each a probe of its own, and then calls the original implementation. It knows queries,
keys, values and the scaling; it does not know what a listener makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from visiontrim.engine.upstream import attention_function, implementation, register_attention, with_implementation

Listener = Callable[[Tensor, Tensor, float | None], None]
"""Called with the queries [B, heads, Q, d], the keys [B, key-value heads, K, d] and the scaling of each forward."""
ValueListener = Callable[[Tensor], None]
"""Called before it with the values, of the shape of the keys."""

_Heard = tuple[Listener, ValueListener | None]
_probed: WeakKeyDictionary[nn.Module, tuple[Any, list[_Heard]]] = WeakKeyDictionary()
"""Of every probed module its own config, and who listens."""


class AttentionProbe:
    """Lets ``listener`` hear the attention module ``module``, which has its own config again once nobody listens."""

    def __init__(self, module: nn.Module, listener: Listener, of_values: ValueListener | None = None) -> None:
        self._module: Any = module
        self._listener = listener, of_values
        if module not in _probed:
            base = implementation(module)
            # the base name stays inside: transformers looks for "flash" in the name of an implementation
            name = f"visiontrim_probe::{base}"
            register_attention(name, _audible(base))
            _probed[module] = self._module.config, []
            self._module.config = with_implementation(self._module.config, name)
        _probed[module][1].append(self._listener)

    def remove(self) -> None:
        config, listeners = _probed[self._module]
        listeners.remove(self._listener)
        if not listeners:
            self._module.config = config
            del _probed[self._module]


def _audible(base: str) -> Callable:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
        with torch.no_grad():
            for listener, of_values in _probed[module][1]:
                if of_values is not None:
                    of_values(value)
                listener(query, key, kwargs.get("scaling"))
        return attention_function(module, base)(module, query, key, value, attention_mask, **kwargs)

    return attention
