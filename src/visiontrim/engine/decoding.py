"""What the tokens of an answer see of the vision tokens in the cache, step by step.

The layers before a method's :class:`~visiontrim.core.method.Decoding` see everything. The attention of the new token in
the last of them is computed again for its one row, the method answers which vision tokens it sees from the next layer
on, and the others are hidden there by a mask that lives for this step. The cache is not touched: every layer holds
what it held, so that the next step can choose anew. A mask saves neither memory nor the reading of keys. (Copying 30 %
of them together, layer by layer and step by step, moves nearly as many bytes: they are read, written and read again.)

A mask over keys is what every implementation of attention in transformers understands: sdpa and eager as 4 axes, flash
attention as the padding mask [batch, keys], in which gaps are allowed.

What a step has to know of the one before lives in the cache layer, so it follows beams, and it is forgotten when a
prompt comes. A cache that another run began knows of no vision tokens, and all of it stays visible.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Decoding
from visiontrim.core.view import Glance
from visiontrim.engine.cache import Glanced, Trimmed, make_trimmed, physical_length, trimmed_layer
from visiontrim.engine.context import Context
from visiontrim.engine.forward import Forward, Prefill
from visiontrim.engine.pack import gather, pack_left
from visiontrim.engine.segment import Segment
from visiontrim.models.family import Family
from visiontrim.ops.attention import attention_rows


class DecodingStage:
    """The steps of decoding of one run. Raises :class:`TrimError` where its layer cannot be what the method wants."""

    def __init__(self, family: Family, decoding: Decoding, steps: Mapping[int, object], context: Context) -> None:
        self._family = family
        self._model = family.language_model
        self._decoding = decoding
        self._context = context
        self.layer = layer = decoding.layer
        """The decoder layer from which on the answer sees a part."""
        if not 1 <= layer < len(self._model.layers):
            raise TrimError(
                f"the answer would see a part of the vision tokens from decoder layer {layer} on, but the model has "
                f"{len(self._model.layers)} layers: give one of 1 to {len(self._model.layers) - 1}"
            )
        if steps and max(steps) >= layer:
            raise TrimError(
                f"tokens are removed before decoder layer {max(steps)}, but from layer {layer} on the answer sees a "
                f"part of what the layer before holds: let it do so from layer {max(steps) + 1} on"
            )

    def enter(self, forward: Forward) -> None:
        """Look at a pass before it begins. Raises :class:`TrimError` for several tokens of an answer at once."""
        forward.answers = self._answers(forward)
        held = self._held(forward)
        if held is not None and held.glanced is not None and not forward.answers:
            held.glanced.attention = held.glanced.shown = None

    def _answers(self, forward: Forward) -> bool:
        """Whether the pass is that of one token of an answer."""
        call = self._context.call
        end = None if call is None else call.prompt_end
        if end is None:  # a forward of the caller's own: one token goes on with an answer, several are a prompt
            return forward.length == 1 and not isinstance(forward, Prefill)
        if forward.past + forward.length > end and (forward.length > 1 or isinstance(forward, Prefill)):
            raise TrimError(
                f"{forward.past + forward.length - end} tokens of the answer came in one pass, but what they see is "
                "chosen one by one: generate with a cache, and without prompt lookup or an assistant"
            )
        return forward.past + forward.length > end

    def _held(self, forward: Forward) -> Trimmed | None:
        return trimmed_layer(forward.cache, self.layer)

    def note(self, prefill: Prefill) -> None:
        """Tell the cache where it holds vision tokens, now that the prompt is cached."""
        if prefill.cache is None:
            return
        alive = prefill.attended
        seen = self._family.placeholders(prefill.call.forward_ids, *self._family.pictures)
        image = gather(seen, alive.origin) & alive.valid
        places, valid = pack_left(image)
        places = places + physical_length(prefill.cache, self.layer) - image.shape[1]
        held = make_trimmed(prefill.cache, self.layer)
        if (earlier := held.glanced) is not None:
            places, valid = torch.cat([earlier.places, places], 1), torch.cat([earlier.valid, valid], 1)
        held.glanced = Glanced(places, valid)

    def before_layer(self, forward: Forward) -> None:
        """Choose what this step sees from here on, and mask the rest."""
        held = self._held(forward)
        if not forward.answers or held is None or (glanced := held.glanced) is None:
            return
        with self._context.hearing():
            attention = self._attention(forward).gather(1, glanced.places).masked_fill(~glanced.valid, 0.0)
            glance = Glance(attention, glanced.valid, glanced.attention, glanced.shown)
            shown = self._decoding.select(glance)
            if shown.shape != attention.shape or shown.dtype != torch.bool:
                raise TrimError(
                    f"{type(self._decoding).__name__} answered {shown.dtype} of shape {tuple(shown.shape)} for the "
                    f"attention to {tuple(attention.shape)} vision tokens: give bool of the same shape"
                )
            glanced.attention, glanced.shown = attention, shown & glanced.valid
            forward.segment = Segment(self._visible(forward, held, glanced.valid & ~shown))

    def _attention(self, forward: Forward) -> Float[Tensor, "batch keys"]:
        """The row of the new token in the layer just passed, mean over heads."""
        assert forward.passed is not None
        query, key, scaling = forward.passed
        before = trimmed_layer(forward.cache, self.layer - 1)
        mask = forward.mask if before is None else before.logical_mask(forward.mask, forward.past + 1)
        mask = None if mask is None else mask[:, -key.shape[2] :].bool()
        return attention_rows(query, key, scaling=scaling, key_mask=mask)[:, :, 0].mean(1)

    @staticmethod
    def _visible(forward: Forward, held: Trimmed, hidden: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch length"]:
        """Key mask in logical columns without the vision tokens that are ``hidden``."""
        assert held.glanced is not None
        places, length = held.glanced.places, forward.past + 1
        mask = held.logical_mask(forward.mask, length)
        gone = torch.zeros(len(places), length + 1, dtype=torch.bool, device=places.device)
        gone.scatter_(1, torch.where(hidden, held.removed + places, length), True)  # the last one: nobody
        return ~gone[:, :-1] if mask is None else mask.bool() & ~gone[:, :-1]
