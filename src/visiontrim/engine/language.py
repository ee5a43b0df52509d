"""The seam before the language model, and the stages between its layers.

generate() and the model see the uncompressed prompt throughout. The hooks here squeeze removed tokens out on the way
in, give later layers the masks and rotary embeddings of the tokens that are left, note what every cache layer lacks,
and put the last hidden states back to full length on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Decoding, Positions, Step
from visiontrim.core.trace import Trace
from visiontrim.engine.cache import (
    cache_bytes,
    check_cache,
    check_window,
    chunk_mask,
    make_trimmed,
    physical_length,
    trimmed_layer,
)
from visiontrim.engine.call import Call
from visiontrim.engine.context import Context
from visiontrim.engine.decoding import DecodingStage
from visiontrim.engine.forward import Alive, Forward, Heard, Prefill, Removal
from visiontrim.engine.hearing import Hearing
from visiontrim.engine.masks import narrowed_mask
from visiontrim.engine.members import Members
from visiontrim.engine.pack import gather, is_empty_slot, unpack
from visiontrim.engine.replaced import Replaced
from visiontrim.engine.select import place_groups, select_between_layers
from visiontrim.engine.unmerging import Unmerging
from visiontrim.engine.upstream import Upstream, given_cache
from visiontrim.models.family import Family


class LanguageStage:
    """Hooks on the language model (the seam) and, where needed, on its layers."""

    def __init__(
        self,
        family: Family,
        steps: Mapping[int, Step],
        decoding: Decoding | None,
        positions: Positions,
        narrow: bool,
        context: Context,
    ) -> None:
        self._family = family
        self._model = family.language_model
        self._upstream = Upstream(self._model)
        self._steps = steps
        self._compact = positions == "compact"
        self._members = Members(family, context) if positions == "members" else None
        self._unmerging = Unmerging(family, steps, context) if positions == "unmerged" else None
        self._narrow_from = min(steps, default=len(self._model.layers)) if narrow else len(self._model.layers)
        """The decoder layer from which on only what the last stage left stays cached."""
        self._context = context
        self._hearing = Hearing(family, steps, decoding, context)
        self._decoding = DecodingStage(family, decoding, steps, context) if decoding is not None else None

    def attach(self) -> list:
        """Install the hooks and return what removes them again."""
        removers = [
            self._model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        if self._members is not None:
            removers.append(self._members.attach())
        if self._unmerging is not None:
            removers += self._unmerging.attach()
        if self._family.bidirectional:
            removers.append(self._family.core.register_forward_pre_hook(self._before_masks, with_kwargs=True))
        if self._family.deepstack is not None:
            removers.append(Replaced(self._model, self._family.deepstack, self._add_features))
        # flash attention reads gaps in position_ids as borders of packed sequences, so no layer may get them
        flash = "flash" in (self._model.config._attn_implementation or "")
        hooked = self._steps.keys() | self._hearing.remembers
        if self._decoding is not None:
            hooked = hooked | {self._decoding.layer}
        first = 0 if flash else min(hooked, default=len(self._model.layers))
        for index in range(first, len(self._model.layers)):
            hook = self._layer_hook(index)
            removers.append(self._model.layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        return removers + self._hearing.attach()

    def _before_masks(self, module, args, kwargs):
        """Give a model that prepares its own masks the padding of the tokens that are left, and keep the caller's."""
        call, cache, mask = self._context.call, given_cache(kwargs), kwargs.get("attention_mask")
        if call is None:
            return None
        call.mask, first = mask, trimmed_layer(cache, 0)
        if cache is None or first is None:
            return None
        self._check_plain(mask)
        length = cache.get_seq_length() + kwargs["input_ids"].shape[1]
        return args, kwargs | {"attention_mask": first.logical_mask(mask, length)}

    def _check_plain(self, mask: object) -> None:
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise TrimError("attention_mask is not 2-D [batch, tokens]: removed tokens need the plain padding mask")

    def _enter(self, module, args, kwargs):
        call, cache = self._context.call, given_cache(kwargs)
        if kwargs.get("inputs_embeds") is None:  # the text model, called by itself
            return None
        call = call if call is not None and call.carries_vision else None
        use_cache = self._model.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if call is not None and cache is None and use_cache:
            cache = kwargs[self._upstream.cache_name] = self._upstream.new_cache()
        trimmed = cache is not None and any(trimmed_layer(cache, index) for index in range(len(cache.layers)))
        if call is None and not trimmed:
            return None
        self._check_once(cache)
        forward = self._context.forward = self._forward(call, cache, kwargs)
        if self._decoding is not None:
            self._decoding.enter(forward)
        first = trimmed_layer(cache, 0)
        if isinstance(forward, Prefill) and any(group.kept < group.total for group in forward.groups):
            self._prune_at_seam(forward, kwargs)
        elif first is not None:
            if not self._family.bidirectional:  # there it was done before the masks were made
                kwargs["attention_mask"] = first.logical_mask(forward.mask, forward.past + forward.length)
            if first.shift is not None:
                kwargs["position_ids"] = forward.positions - first.shift[:, None]
        return args, kwargs

    def _check_once(self, cache: Cache | None) -> None:
        """Refuse a cache that cannot go on in this run. What one call makes of it needs no look in every step."""
        call = self._context.call
        if call is not None and cache is not None and call.checked is cache:
            return
        self._check_stages(cache)
        check_cache(cache)
        if call is not None:
            call.checked = cache

    def _check_stages(self, cache: Cache | None) -> None:
        """Refuse a cache that lost tokens where no stage of this run begins: one mask serves a whole stage."""
        before = 0
        for index in range(len(self._model.layers)):
            layer = trimmed_layer(cache, index)
            removed = 0 if layer is None else layer.removed
            if removed != before and index not in self._steps and index:
                raise TrimError(
                    f"decoder layer {index} of the cache lacks {removed} tokens and the one before it {before}, but no "
                    "stage of this run stands between them: continue the conversation with the method that began it"
                )
            before = removed

    def _forward(self, call: Call | None, cache: Cache | None, kwargs: dict[str, Any]) -> Forward:
        """The state of a pass, once it is clear that it can work."""
        embeds, mask, positions = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get("position_ids")
        batch, length = embeds.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        if self._family.bidirectional and self._context.call is not None:
            mask = self._context.call.mask
        self._check_plain(mask)
        if positions is None:
            positions = torch.arange(past, past + length, device=embeds.device)[None]
        if self._compact and positions.ndim != 2:
            raise TrimError(f"positions='compact' needs one position per token, not {len(positions)}: use 'keep'")
        if call is None:
            return Forward(cache, mask, length, past, positions)
        origin = torch.arange(length, device=embeds.device).expand(batch, -1)
        valid = torch.ones_like(origin, dtype=torch.bool) if mask is None else mask[:, -length:].bool()
        alive = Alive(origin, valid, [], [])
        prefill = Prefill(cache, mask, length, past, positions, call=call, alive=alive, chunk_valid=valid)
        place_groups(prefill, self._family)
        self._hearing.enter(prefill, embeds)
        return prefill

    def _prune_at_seam(self, prefill: Prefill, kwargs: dict[str, Any]) -> None:
        check_window(prefill.cache, prefill.past + prefill.length)
        embeds = kwargs["inputs_embeds"]
        columns = [
            column.gather(1, group.now.index.sort(-1).values)
            for column, group in zip(prefill.alive.columns, prefill.groups, strict=True)
        ]
        marks = [
            mark[:, : group.marks_beside(group.kept)]
            for mark, group in zip(prefill.alive.marks, prefill.groups, strict=True)
        ]
        prefill.entered = columns
        image = self._family.placeholders(prefill.call.forward_ids)
        index = self._narrow(prefill, 0, ~(image & is_empty_slot(embeds)), columns, marks)
        kwargs["inputs_embeds"] = gather(embeds, index)
        if self._unmerging is not None:
            prefill.repeated = self._unmerging.repeated(prefill, embeds)
        kwargs["position_ids"] = self._positions(prefill, 0)
        if self._family.bidirectional:
            alive = prefill.alive
            kwargs["attention_mask"] = narrowed_mask(kwargs.get("attention_mask"), alive.origin, alive.valid)
        else:
            kwargs["attention_mask"] = self._chunk_mask(prefill, 0)

    def _narrow(self, prefill: Prefill, layer: int, keep: Tensor, columns: list[Tensor], marks: list[Tensor]) -> Tensor:
        """Drop tokens from decoder layer ``layer`` on; returns the places, before, of what is left."""
        index, prefill.alive = prefill.alive.narrowed(keep, columns, marks, prefill.rows)
        prefill.removals.append(Removal(layer, prefill.alive))
        prefill.overrides["position_ids"] = None  # layers use them for nothing but finding packed sequences
        return index

    def _chunk_mask(self, prefill: Prefill, layer: int) -> Tensor:
        return chunk_mask(prefill.cache, layer, prefill.past_mask, prefill.past, prefill.alive.valid)

    def _positions(self, forward: Forward, layer: int) -> Tensor:
        """Position ids of what attention sees of the chunk, for decoder layer ``layer``."""
        positions = forward.positions
        if isinstance(forward, Prefill):
            origin = forward.attended.origin
            if positions.ndim == 3:
                positions = torch.stack([gather(channel, origin) for channel in positions])
            else:
                positions = gather(positions, origin)
        if not self._compact:
            return positions
        earlier = trimmed_layer(forward.cache, layer)
        if earlier is not None and earlier.shift is not None:
            positions = positions - earlier.shift[:, None]
        if isinstance(forward, Prefill):
            rank_before = gather(forward.chunk_valid.cumsum(1), forward.alive.origin)
            positions = positions - (rank_before - forward.alive.valid.cumsum(1))
        return positions

    def _add_features(self, add: Callable, hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
        """DeepStack: ``features`` are added to the tokens at ``places`` [batch, length], now to those that are left."""
        prefill: Forward | None = self._context.forward
        if not isinstance(prefill, Prefill) or not prefill.removals:
            return add(hidden, places, features)
        origin, valid = prefill.alive.origin, prefill.alive.valid
        number = places.flatten().cumsum(0).view_as(places) - 1
        left = gather(places, origin) & valid
        return add(hidden, left, features[gather(number, origin)[left]])

    def _layer_hook(self, layer: int):
        def hook(module, args, kwargs):
            forward: Forward | None = self._context.forward
            if forward is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer in self._steps:
                hidden = self._start_segment(forward, layer, hidden, args, kwargs)
            if isinstance(forward, Prefill):
                self._hearing.remember(forward, layer, hidden)
            elif self._decoding is not None and layer == self._decoding.layer:
                self._decoding.before_layer(forward, hidden)
            if not forward.overrides:
                return None
            kwargs = kwargs | {key: value for key, value in forward.overrides.items() if key in kwargs}
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        return hook

    def _start_segment(
        self, forward: Forward, layer: int, hidden: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> Tensor:
        """Select at a language stage, and fix what the layers of its segment get."""
        cache, earlier, index = forward.cache, trimmed_layer(forward.cache, layer), None
        if isinstance(forward, Prefill):
            with self._context.choosing():
                self._hearing.before_step(forward, layer, hidden, args, kwargs)
                hidden, keep, columns, marks = select_between_layers(
                    forward, self._steps[layer], hidden, len(self._model.layers), self._family.input_norm(layer)
                )
                forward.heard = Heard(embeddings=forward.heard.embeddings)
            if columns is not None:
                index = self._narrow(forward, layer, keep, columns, marks)
                hidden = gather(hidden, index)
        if isinstance(forward, Prefill) and forward.removals:
            mask = self._chunk_mask(forward, layer)
        elif earlier is not None:
            mask = earlier.logical_mask(forward.mask, forward.past + forward.length)
        else:  # nothing is missing here
            return hidden
        forward.overrides["attention_mask"] = self._upstream.mask(hidden, mask, cache, layer)
        if self._compact:
            positions = self._positions(forward, layer)
            forward.overrides["position_embeddings"] = self._model.rotary_emb(hidden, position_ids=positions)
        elif isinstance(forward, Prefill) and self._members is not None:
            forward.overrides["position_embeddings"] = self._members.rotary(forward, hidden)
        elif index is not None:
            rotary = forward.overrides.get("position_embeddings", kwargs["position_embeddings"])
            forward.overrides["position_embeddings"] = tuple(_gather_rotary(part, index) for part in rotary)
        return hidden

    def _leave(self, module, args, kwargs, output):
        prefill: Forward | None = self._context.forward
        self._context.forward = None
        if not isinstance(prefill, Prefill) or output is None:  # None: the forward raised
            return None
        self._note_removals(prefill)
        if self._decoding is not None:
            self._decoding.note(prefill)
        self._context.finish(self._trace(prefill))
        if not prefill.removals:
            return None
        alive, labels = prefill.alive, prefill.call.labels
        output["last_hidden_state"] = unpack(output.last_hidden_state, alive.origin, alive.valid, prefill.length)
        if labels is not None:
            left = torch.zeros_like(labels).scatter_add_(1, alive.origin, alive.valid.long())
            labels.masked_fill_(left == 0, -100)
        return output

    def _note_removals(self, prefill: Prefill) -> None:
        """Tell every cache layer which of its tokens are missing."""
        cache = prefill.cache
        if cache is None or not prefill.removals:
            return
        ends = [removal.start for removal in prefill.removals[1:]] + [len(self._model.layers)]
        for removal, end in zip(prefill.removals, ends, strict=True):
            attended = removal.alive if prefill.repeated is None else prefill.repeated.alive
            valid = attended.valid
            padded = not bool(valid.all())
            for index in range(removal.start, end):
                shift, mask, left = None, None, valid
                layer = make_trimmed(cache, index)
                if index >= self._narrow_from:
                    left = prefill.alive.valid
                    layer.narrow(prefill.alive.within(removal.alive, prefill.length), valid.shape[1])
                if padded or prefill.past:
                    mask = chunk_mask(cache, index, prefill.past_mask, prefill.past, left)
                if self._compact:
                    shift = prefill.chunk_valid.sum(1) - valid.sum(1)
                    shift = shift if layer.shift is None else shift + layer.shift
                layer.note_removal(prefill.length - left.shape[1], prefill.prompt_end, mask, shift)

    def _trace(self, prefill: Prefill) -> Trace:
        cache, layers = prefill.cache, len(self._model.layers)
        batch = prefill.alive.origin.shape[0]
        copies = batch // prefill.call.samples
        images = sorted(
            (row, group.numbers[image], group.part.before, place, image)
            for place, group in enumerate(prefill.groups)
            for image, row in enumerate(group.rows)
            if row % copies == 0
        )
        widths = [prefill.length] * layers
        for removal in prefill.removals:
            widths[removal.start :] = [removal.alive.origin.shape[1]] * (layers - removal.start)
        attended = widths if prefill.repeated is None else [prefill.repeated.alive.origin.shape[1]] * layers
        lengths = () if cache is None else tuple(physical_length(cache, index) for index in range(layers))
        return Trace(
            images=tuple(prefill.groups[n].trace(image, row // copies, layers) for row, _, _, n, image in images),
            batch=batch,
            copies=copies,
            length=prefill.length,
            past=prefill.past,
            widths=tuple(widths),
            attended=tuple(attended),
            cache_lengths=lengths,
            cache_bytes=cache_bytes(cache),
        )


def _gather_rotary(part: Tensor, index: Tensor) -> Tensor:
    """Cosines or sines [batch or 1, tokens, dim], or [axes, batch, tokens, dim], of the tokens at ``index``."""
    if part.ndim == 4:
        return torch.stack([gather(axis, index) for axis in part])
    return gather(part, index)
