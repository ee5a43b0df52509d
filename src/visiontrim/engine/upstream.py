"""What differs between releases of transformers: the one room to open when a new release comes out.

Names of arguments and of output fields, functions that make masks and classes of caches are found by looking at
signatures and classes, once for each model, never by comparing version numbers. It knows transformers and the places of
a model's parts; it knows nothing of images, of tokens that are missing, and of methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask

from visiontrim.core.errors import TrimError

CACHE_NAMES = ("cache", "past_key_values")
"""What the key-value cache has been called as an argument and as a field of outputs, the newest name first."""


def parameters(function: Callable) -> frozenset[str]:
    """Names that ``function`` declares, whatever decorators are around it."""
    return frozenset(inspect.signature(function).parameters)


def cache_name(function: Callable) -> str:
    """What ``function`` calls the cache. Raises :class:`TrimError` if it is none of the names known."""
    declared = parameters(function)
    for name in CACHE_NAMES:
        if name in declared:
            return name
    raise TrimError(f"{getattr(function, '__qualname__', function)} takes no {' or '.join(CACHE_NAMES)}")


def given_cache(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among keyword arguments or in an output, under the name of any release."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


_MASK_CACHE = cache_name(create_causal_mask)


def causal_mask(config: Any, hidden: Tensor, key_mask: Tensor | None, cache: Cache | None, layer: int) -> Any:
    """What decoder layer ``layer`` gets as its attention mask, in the form of the model's attention implementation.

    ``hidden`` [batch, queries, dim] is looked at for its shape, dtype and device. ``key_mask`` [batch, keys] is in
    logical columns (None: no padding).
    """
    named: dict[str, Any] = {_MASK_CACHE: cache}
    return create_causal_mask(config=config, inputs_embeds=hidden, attention_mask=key_mask, layer_idx=layer, **named)


class Upstream:
    """What this release calls things in one model, whose text model is ``text``."""

    def __init__(self, text: Any) -> None:
        self._text = text
        self.cache_name = cache_name(text.forward)
        """Argument of the text model's forward, and field of its output."""

    def new_cache(self) -> DynamicCache:
        """An empty cache for the text model."""
        return DynamicCache(config=self._text.config)

    def mask(self, hidden: Tensor, key_mask: Tensor | None, cache: Cache | None, layer: int) -> Any:
        """:func:`causal_mask` of the text model."""
        return causal_mask(self._text.config, hidden, key_mask, cache, layer)
