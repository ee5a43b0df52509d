"""Key-value caches that hold fewer tokens than the conversation has.

generate() and every model count *logical* tokens: those of the uncompressed conversation. A :class:`Trimmed` one
holds fewer, and tells the two users of a cache layer apart: ``get_seq_length`` is logical, so continuation, positions
and further turns stay right, while ``get_mask_sizes`` says that the keys start ``removed`` tokens late, the way a
sliding window does. Every attention backend of transformers already knows how to mask that.

A cache knows lengths and which of its keys are padding; it knows nothing of images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.engine.upstream import (
    CACHE_TENSORS,
    QUANTIZED,
    SHARED,
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    attention_of,
    given_cache,
    holds_tokens,
)


@dataclass
class Glanced:
    """Where a cache layer holds vision tokens, and what the last step of decoding saw of them."""

    places: Int[Tensor, "batch tokens"]
    """Physical; rows with fewer tokens are padded."""
    valid: Bool[Tensor, "batch tokens"]
    """False marks padding."""
    attention: Float[Tensor, "batch tokens"] | None = None
    """Attention of the last token of the answer to each; None: there is none yet."""
    shown: Bool[Tensor, "batch tokens"] | None = None
    """Which of them later layers saw; None as for ``attention``."""

    def rows(self, function: Callable[[Tensor], Tensor]) -> Glanced:
        """With ``function`` applied to the rows of everything."""
        last = (None if part is None else function(part) for part in (self.attention, self.shown))
        return Glanced(function(self.places), function(self.valid), *last)


_Base = DynamicLayer if TYPE_CHECKING else object  # it stands before the class of a layer of any kind


class Trimmed(_Base):
    """What a cache layer of any kind becomes whose keys and values lack tokens of the conversation.

    A sliding window counts the tokens that are left: one that took over a sliding-window layer keeps all of them, and
    the model's mask hides those outside. A quantised layer gets what is left in full precision, and quantises that.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._lacks_nothing()

    def _lacks_nothing(self) -> None:
        self.removed: int = 0
        """Logical length minus physical length."""
        self.trimmed_to: int = 0
        """Logical length when tokens were last removed; columns before it differ from those of the logical mask."""
        self.key_mask: Bool[Tensor, "batch trimmed_to"] | None = None
        """Valid keys up to ``trimmed_to``, the first ``removed`` columns being meaningless; None: all are valid."""
        self.shift: Int[Tensor, " batch"] | None = None
        """What to subtract from logical position ids (``positions="compact"``)."""
        self.plain = False
        """All layers lack the same, without a shift, and no padding is hidden that generate() does not hide itself."""
        self.still: str | None = None
        """The attention implementation with which a step of decoding needed no help, whatever the layers lack."""
        self.glanced: Glanced | None = None
        """What steps of decoding have to know of each other (:mod:`.decoding`); None: they need nothing."""

    @classmethod
    def take_over(cls, layer: Any) -> Any:
        """A trimmed layer with all that ``layer`` has: keys and values, and the device that is their home."""
        kind = trimmed_class(type(layer))
        new = kind.__new__(kind)
        new.__dict__.update(layer.__dict__)
        new._lacks_nothing()
        return new

    def note_removal(
        self,
        removed: int,
        prompt_end: int,
        mask: Bool[Tensor, "batch keys"] | None,
        shift: Int[Tensor, " batch"] | None,
    ) -> None:
        """Record that ``removed`` tokens of the chunk just cached are missing.

        None is missing after the logical position ``prompt_end``, where guesses of assisted decoding may stand.
        ``mask`` is the one the chunk was attended with, so it starts with the columns removed before.
        """
        self.removed += removed
        self.trimmed_to = prompt_end
        self.key_mask = None if mask is None else F.pad(mask, (removed, 0))[:, :prompt_end]
        self.shift = shift

    def narrow(self, index: Int[Tensor, "batch left"], chunk: int) -> None:
        """Leave, of the ``chunk`` tokens just cached, those at ``index``, and all that were there before."""
        if not isinstance(self, TrimmedLayer):
            raise TrimError(
                f"the method drops tokens from what is cached already, which a {type(self).__name__} cannot give up: "
                "use a DynamicCache (cache_implementation=None or 'dynamic')"
            )
        assert self.keys is not None and self.values is not None  # noqa: PT018
        before = torch.arange(self.keys.shape[-2] - chunk, device=index.device).expand(len(index), -1)
        index = torch.cat([before, before.shape[1] + index], 1)[:, None, :, None].to(self.keys.device)
        self.keys, self.values = (
            held.gather(2, index.expand(-1, held.shape[1], -1, held.shape[-1])) for held in (self.keys, self.values)
        )

    def logical_mask(self, mask: Tensor | None, length: int) -> Bool[Tensor, "batch length"] | None:
        """Key mask in logical columns for a forward that ends at logical ``length``; None when all keys are valid.

        ``mask`` is the one [batch, length] that generate() keeps, or None when the uncompressed batch has no padding.
        """
        old = self.key_mask
        if mask is None:
            return None if old is None else F.pad(old, (0, length - self.trimmed_to), value=True)
        if old is None:
            old = mask.new_ones(mask.shape[0], self.trimmed_to, dtype=torch.bool)
        return torch.cat([old, mask[:, self.trimmed_to :].bool()], dim=1)

    @property
    def held(self) -> int:
        """Tokens whose keys and values are there."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.removed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_seq_length() + query_length, self.removed

    def crop(self, tokens_to_remove: int) -> None:
        if -tokens_to_remove > self.get_seq_length() - self.trimmed_to:
            raise TrimError(
                f"cannot crop {-tokens_to_remove} tokens: only the {self.get_seq_length() - self.trimmed_to} tokens "
                "after the compressed prompt can be taken back; start a new cache instead"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self.keys = self.values = None  # dropped: transformers 5.16 would only zero them
        self.is_initialized = False
        super().reset()
        self._lacks_nothing()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices])

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        self.key_mask = None if self.key_mask is None else function(self.key_mask)
        self.shift = None if self.shift is None else function(self.shift)
        self.glanced = None if self.glanced is None else self.glanced.rows(function)


def plain_step(args: Sequence[Any], arguments: Mapping[str, Any], config: Any) -> bool:
    """Whether a forward with these arguments is one token on a cache that lacks the same in all layers.

    Such a step needs no help: what the cache says of its length and of the sizes of masks is enough. Padding that is
    left is nothing that it says; only a static cache may have some, and generate() a mask of it (:func:`seen`). Where
    layers lack different tokens, a step before must have shown that with the attention of ``config`` no layer gets a
    mask; what is compiled may get one all the same.
    """
    cache = given_cache(arguments)
    if cache is None or not cache.layers or arguments.get("labels") is not None:
        return False
    layer: Any = cache.layers[0]
    if not (isinstance(layer, Trimmed) and layer.plain) and not _is_still(cache.layers[-1], config):
        return False
    mask = arguments.get("attention_mask")
    if isinstance(layer, TrimmedStaticLayer):  # generate() has made its mask by what the layers say of themselves
        if layer.key_mask is not None and (mask is None or getattr(mask, "ndim", 4) == 2):
            return False
    elif mask is not None:
        return False
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    tokens = args[0] if tokens is None and args else tokens
    return tokens is not None and tokens.shape[1] == 1


def _is_still(layer: object, config: Any) -> bool:
    """Whether a step with the attention of ``config`` needed no help, of which ``layer`` was told."""
    if not isinstance(layer, Trimmed) or layer.still is None:
        return False
    return layer.still == attention_of(config) and not torch.compiler.is_compiling()


def seen(mask: Tensor | None, layer: Trimmed | None) -> Tensor | None:
    """The padding mask [batch, tokens] of which generate() makes the one for a static cache, now of what is left."""
    if mask is None or mask.ndim != 2 or layer is None or layer.key_mask is None:
        return mask
    return layer.logical_mask(mask, mask.shape[1])


class TrimmedLayer(Trimmed, DynamicLayer):
    """One layer's keys and values [batch, heads, tokens, head_dim], with tokens missing from the conversation."""


class TrimmedStaticLayer(Trimmed, StaticLayer):
    """One layer's keys and values [batch, heads, allocated, head_dim], of which tokens are missing.

    :func:`reserve` has made the allocation smaller where that was still possible.
    """

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, self.removed

    def get_max_length(self) -> int:
        return self.max_cache_len + self.removed

    unreserved: int = 0
    """Tokens by which :func:`reserve` has made the allocation smaller."""

    def reset(self) -> None:
        self.max_cache_len += self.unreserved
        self.unreserved = 0
        self.cumulative_length = torch.zeros_like(self.cumulative_length)
        super().reset()


_UNRESERVED = "unreserved"
"""Attribute of a static layer that :func:`reserve` notes itself in, of :class:`TrimmedStaticLayer` a field."""


def static(cache: Cache | None) -> bool:
    """Whether ``cache`` allocates all of its length at once."""
    return cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers)


def reserve(cache: Cache, fewer: int) -> None:
    """Let the layers of a static ``cache`` that hold nothing yet allocate ``fewer`` tokens; a negative number: more."""
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if isinstance(layer, StaticLayer) and not layer.is_initialized:
            layer.max_cache_len -= fewer
            setattr(layer, _UNRESERVED, getattr(layer, _UNRESERVED, 0) + fewer)


@functools.cache
def trimmed_class(kind: type) -> Any:
    """The class of a layer of a cache that lacks tokens, for one of class ``kind``."""
    if issubclass(kind, Trimmed):
        return kind
    if kind in (DynamicLayer, DynamicSlidingWindowLayer):
        return TrimmedLayer
    if kind is StaticLayer:
        return TrimmedStaticLayer
    return type(f"Trimmed{kind.__name__}", (Trimmed, kind), {"__module__": __name__})


def can_lack(layer: Any) -> bool:
    """Whether a layer of a cache can hold fewer tokens than the conversation has."""
    kinds = DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
    return isinstance(layer, Trimmed | QUANTIZED) or type(layer) in kinds


def check_cache(cache: Cache | None, even: bool) -> None:
    """Raise :class:`TrimError` unless every layer of ``cache`` can hold the tokens that it is left.

    ``even``: all layers are left the same, at their own positions.
    """
    for index, layer in enumerate(cache.layers if cache is not None else ()):
        if isinstance(layer, StaticLayer) and not even:
            raise TrimError(
                f"layer {index} of the cache is a {type(layer).__name__}, whose steps cannot know of tokens that go "
                "between decoder layers or move: use the method's vision stage alone with positions='keep', or a "
                "DynamicCache (cache_implementation=None or 'dynamic')"
            )
        if not can_lack(layer) and type(layer) not in (LinearAttentionLayer, *SHARED):
            raise TrimError(
                f"layer {index} of the cache is a {type(layer).__name__}, which cannot hold fewer tokens than the "
                "other layers: use a DynamicCache (cache_implementation=None or 'dynamic')"
            )


def check_window(cache: Cache | None, length: int) -> None:
    """Raise :class:`TrimError` if a conversation of ``length`` tokens is longer than a sliding window of ``cache``."""
    for index, layer in enumerate(cache.layers if cache is not None else ()):
        if isinstance(layer, DynamicSlidingWindowLayer) and length >= layer.sliding_window:
            raise TrimError(
                f"the prompt has {length} tokens, but decoder layer {index} sees the last {layer.sliding_window} only: "
                "vision tokens can be removed from prompts that fit into the window"
            )


def trimmed_layer(cache: Cache | None, index: int) -> Trimmed | None:
    """Layer ``index`` of ``cache`` if tokens were removed from it."""
    layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
    return layer if isinstance(layer, Trimmed) else None


def chunk_mask(
    cache: Cache | None,
    index: int,
    past_mask: Tensor | None,
    past: int,
    valid: Bool[Tensor, "batch left"] | None,
    left: int,
) -> Bool[Tensor, "batch keys"] | None:
    """Key mask of layer ``index`` for a chunk of which only ``left`` tokens are left; None when all keys are valid.

    ``past_mask`` is the logical mask [batch, past] of what came before (None: no padding), ``valid`` says which of the
    tokens left are no padding (None: none of them is).
    """
    layer = trimmed_layer(cache, index)
    if layer is not None:
        past_mask = layer.logical_mask(past_mask, past)
    if valid is None:
        return None if past_mask is None else F.pad(past_mask.bool(), (0, left), value=True)
    return F.pad(valid, (past, 0), value=True) if past_mask is None else torch.cat([past_mask.bool(), valid], dim=1)


def make_trimmed(cache: Cache, index: int) -> Trimmed:
    """Make layer ``index`` of a ``cache`` that :func:`check_cache` let pass one that can lack tokens, and return it."""
    while len(cache.layers) <= index:  # a cache built without a config grows layer by layer
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    if isinstance(layer, Trimmed):
        return layer
    trimmed = cache.layers[index] = Trimmed.take_over(layer)
    return trimmed


def physical_length(cache: Cache, index: int) -> int:
    """Tokens that layer ``index`` really holds, or has room for if it is static."""
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    if layer is None or not holds_tokens(layer) or getattr(layer, "is_initialized", False) is False:
        return 0
    if isinstance(layer, StaticLayer):
        return layer.max_cache_len  # what is allocated: how much of it is in use is on the device
    if isinstance(layer, DynamicLayer) and not isinstance(layer, QUANTIZED):
        return layer.keys.shape[-2]  # pyright: ignore[reportOptionalMemberAccess]  # a sliding window forgets
    return layer.held if isinstance(layer, Trimmed) else layer.get_seq_length()


def cache_bytes(cache: Cache | None) -> int:
    """Bytes of all keys and values in ``cache``, as they are stored."""
    return sum(part.nbytes for layer in (cache.layers if cache is not None else ()) for part in _parts(layer))


def _parts(layer: Any) -> Iterator[Tensor]:
    """The tensors in which a layer of a cache stores keys and values."""
    for name in CACHE_TENSORS:
        stored = getattr(layer, name, None)
        yield from (part for part in (stored if isinstance(stored, tuple) else (stored,)) if isinstance(part, Tensor))
