"""What differs between releases of transformers: the one room to open when a new release comes out.

Names of arguments and of output fields, functions that make masks, classes of caches and the way into an attention
module are found by looking at signatures and classes, once for each model, never by comparing version numbers. The rest
of the engine takes them from here. It knows transformers and where the parts of a model are; it knows nothing of
images, of tokens that are missing, and of methods. What is relied on is written down and checked in :mod:`.contract`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__, cache_utils, masking_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)
from transformers.generation import utils as generation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from visiontrim.core.errors import TrimError

__all__ = [
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "StaticLayer",
    "Upstream",
]

RELEASE = __version__
RELEASES = ("5.16.1", "5.19.0", "5.23.0", "5.24.0")
"""What the tests run on (``make matrix``)."""
CACHE_NAMES = ("cache", "past_key_values")
"""What the key-value cache has been called as an argument and as a field of outputs, the newest name first."""
FEATURE_NAMES = ("mm_encoder_outputs",)
"""What the argument has been called in which generate() hands encoded images on; before 5.19 there was none."""
SOUND_NAME = "input_features"
"""The argument with the spectrograms of sounds."""
FEATURE_FIELDS = ("image_", "video_")
"""How fields begin in which the output of a model hands features of images and videos out."""
MASKS = {"full_attention": "create_causal_mask", "sliding_attention": "create_sliding_window_causal_mask"}
"""By the type of a decoder layer, the function of transformers that makes its attention mask."""

STATIC_MASKS = ("create_masks_for_generate", masking_utils.create_masks_for_generate)
"""The method of a model by which generate() makes the mask of a static cache, and what stands for it in most models."""

CACHE_TENSORS = ("keys", "values", "_quantized_keys", "_quantized_values")
"""Attributes in which layers of caches store keys and values: tensors, or tuples with tensors."""
QUANTIZED: type = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
"""Layers of caches that store keys and values with fewer bits, of all kinds."""


SHARED: tuple[type, ...] = (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()
"""Layers of caches that hold nothing, because the decoder layer uses keys and values of an earlier one."""


@functools.lru_cache(maxsize=256)  # signatures are slow to read, and every run asks for the same few
def parameters(function: Callable) -> tuple[str, ...]:
    """Names that ``function`` declares, whatever decorators are around it."""
    return tuple(inspect.signature(function).parameters)


def cache_name(function: Callable) -> str | None:
    """What ``function`` calls the cache; None: by no name that is known."""
    declared = parameters(function)
    return next((name for name in CACHE_NAMES if name in declared), None)


def given_cache(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among keyword arguments or in an output, under the name of any release."""
    for name in CACHE_NAMES:  # asked several times in every step of decoding
        if (cache := arguments.get(name)) is not None:
            return cache
    return None


def given_features(arguments: Mapping[str, Any]) -> bool:
    """Whether keyword arguments bring images that were encoded before."""
    given = (arguments.get(name) or {} for name in FEATURE_NAMES)
    return any(output is not None for outputs in given for output in outputs.values())


def slices_features() -> bool:
    """Whether generate() hands every chunk of a prompt the part of encoded images that it holds."""
    return hasattr(generation, "_slice_mm_encoder_output")


def given_pixels(arguments: Mapping[str, Any]) -> bool:
    """Whether keyword arguments bring images or videos that are still to be encoded."""
    return any(value is not None for name, value in arguments.items() if name.startswith("pixel_values"))


def given_sound(arguments: Mapping[str, Any]) -> bool:
    """Whether keyword arguments bring sounds, which a forward encodes itself."""
    return arguments.get(SOUND_NAME) is not None


def recomputes_hooks(module: nn.Module) -> bool:
    """Whether gradient checkpointing calls ``module`` anew with its hooks, as before 5.23, not its forward alone."""
    return type(module).__call__ is not nn.Module.__call__ and hasattr(module, "gradient_checkpointing")


def recomputes(model: nn.Module) -> bool:
    """Whether the backward pass will compute the layers of ``model`` anew, which then cache nothing."""
    return getattr(model, "gradient_checkpointing", False) and model.training and torch.is_grad_enabled()


PER_TOKEN = ("per_layer_inputs", "moe_mm_token_type_ids")
"""Arguments of text models [batch, tokens, ...] with an entry for every token, which goes where its token goes."""


class Upstream:
    """What this release calls things in one model, whose text model is ``text``."""

    def __init__(self, text: Any) -> None:
        self._text = text
        self._config = text.config
        self.cache_name = cache_name(type(text).forward) or CACHE_NAMES[0]
        """Argument of the text model's forward."""
        named = getattr(text.config, "layer_types", None)
        self.kinds: tuple[str, ...] = tuple(named) if named else self._inferred()
        """Type of every decoder layer, as the configuration has it, or as the cache infers it from that."""

    def _inferred(self) -> tuple[str, ...]:
        windows = [isinstance(layer, DynamicSlidingWindowLayer) for layer in self.cache_layers]
        windows += [False] * (len(self._text.layers) - len(windows))
        return tuple("sliding_attention" if window else "full_attention" for window in windows)

    @functools.cached_property
    def recurrent(self) -> frozenset[int]:
        """Decoder layers whose cache is a state that all tokens went into: linear attention and short convolutions."""
        layers = self.cache_layers
        return frozenset(
            index
            for index, layer in enumerate(layers)
            if isinstance(layer, LinearAttentionLayer) and not holds_tokens(layer)
        )

    def holding(self, layer: int) -> int:
        """The first decoder layer, from ``layer`` on, that caches keys and values; ``layer`` itself if none does."""
        return next((index for index in range(layer, len(self.kinds)) if index not in self.recurrent), layer)

    @functools.cached_property
    def mask_functions(self) -> dict[str, Callable | None]:
        """The functions that make the masks of this model's layers, by name; None where there is none of that name."""
        kinds = [kind for index, kind in enumerate(self.kinds) if index not in self.recurrent]
        names = {MASKS.get(kind, MASKS["full_attention"]) for kind in kinds}
        return {name: getattr(masking_utils, name, None) for name in sorted(names)}

    @functools.cached_property
    def cache_layers(self) -> tuple[Any, ...]:
        """Layers of an empty cache, to see of which class each is."""
        return tuple(self.new_cache().layers)

    def new_cache(self) -> DynamicCache:
        """An empty cache for the text model."""
        return DynamicCache(config=self._config)

    def mask(self, hidden: Tensor, key_mask: Tensor | None, cache: Cache | None, layer: int) -> Any:
        """What decoder layer ``layer`` gets as its attention mask, as the model's attention implementation wants it.

        ``hidden`` [batch, queries, dim] is looked at for its shape, dtype and device. ``key_mask`` [batch, keys] is in
        logical columns (None: no padding).
        """
        if layer in self.recurrent:  # takes the padding of the chunk alone, and none in a step of decoding
            return None if key_mask is None or hidden.shape[1] == 1 else key_mask[:, -hidden.shape[1] :]
        make = self.mask_functions[MASKS.get(self.kinds[layer], MASKS["full_attention"])]
        assert make is not None  # :mod:`.contract` has seen it
        named = {_mask_cache_name(make): cache}
        return make(config=self._config, inputs_embeds=hidden, attention_mask=key_mask, layer_idx=layer, **named)

    def rotary(self, hidden: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ``positions`` for decoder layer ``layer``, in the dtype of ``hidden``."""
        encoding = getattr(self._text, "rotary_emb", None)
        if encoding is None:
            raise TrimError(
                f"{type(self._text).__name__} has no rotary encoding of positions, which tokens could be given anew: "
                "use positions='keep'"
            )
        kind = {"layer_type": self.kinds[layer]} if "layer_type" in parameters(type(encoding).forward) else {}
        return encoding(hidden, position_ids=positions, **kind)


def holds_tokens(layer: Any) -> bool:
    """Whether a layer of a cache holds keys and values of every token, not a state that all tokens went into."""
    return isinstance(layer, CacheLayerMixin)


@functools.cache
def _mask_cache_name(make: Callable) -> str:
    return cache_name(make) or CACHE_NAMES[0]


def implementation(module: Any) -> str:
    """The attention implementation of a module, or of a model, with a configuration."""
    return module.config._attn_implementation or "eager"


def attention_of(config: Any) -> str | None:
    """The attention implementation that ``config`` names, without the detours of its attributes."""
    return object.__getattribute__(config, "_attn_implementation_internal")


def with_implementation(config: Any, name: str) -> Any:
    """A copy of the configuration ``config`` under which a module takes the attention function ``name``."""
    config = copy.copy(config)
    config._attn_implementation_internal = name
    return config


def register_attention(name: str, function: Callable) -> None:
    """Let configurations name ``function`` as an attention implementation, unless the name is taken already."""
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, function)


def attention_function(module: nn.Module, name: str) -> Callable:
    """What the attention module ``module`` calls under the implementation ``name``."""
    if name == "eager":  # each modeling file's own function, with its own soft caps and sinks
        return importlib.import_module(type(module).__module__).eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
