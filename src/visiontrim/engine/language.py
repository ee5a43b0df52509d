"""The seam before the language model, and the stages between its layers.

generate() and the model see the uncompressed prompt throughout. The hooks here squeeze removed tokens out on the way
in, give later layers the masks and rotary embeddings of the tokens that are left, note what every cache layer lacks,
and put the last hidden states back to full length on the way out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Positions, Step
from visiontrim.core.trace import Trace
from visiontrim.engine.cache import (
    cache_bytes,
    check_cache,
    chunk_mask,
    make_trimmed,
    physical_length,
    trimmed_layer,
)
from visiontrim.engine.call import Alive, Call, Forward, Removal
from visiontrim.engine.pack import gather, is_empty_slot, unpack
from visiontrim.engine.select import place_groups, select_between_layers
from visiontrim.models.family import Family


class LanguageStage:
    """Hooks on the language model (the seam) and, where needed, on its layers."""

    def __init__(self, family: Family, steps: Mapping[int, Step], positions: Positions, session) -> None:
        self._family = family
        self._model = family.language_model
        self._steps = steps
        self._compact = positions == "compact"
        self._session = session

    def attach(self) -> list:
        """Install the hooks and return what removes them again."""
        removers = [
            self._model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        # flash attention reads gaps in position_ids as borders of packed sequences, so no layer may get them
        flash = "flash" in (self._model.config._attn_implementation or "")
        first = 0 if flash else min(self._steps, default=len(self._model.layers))
        for index in range(first, len(self._model.layers)):
            hook = self._layer_hook(index)
            removers.append(self._model.layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        return removers

    def _enter(self, module, args, kwargs):
        call: Call | None = self._session.call
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if embeds is None:  # the text model, called by itself
            return None
        prunes = call is not None and call.carries_vision
        use_cache = self._model.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if prunes and cache is None and use_cache:
            cache = kwargs["past_key_values"] = DynamicCache(config=self._model.config)
        trimmed = cache is not None and any(trimmed_layer(cache, index) for index in range(len(cache.layers)))
        if not prunes and not trimmed:
            return None
        check_cache(cache)
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise TrimError("attention_mask is not 2-D [batch, tokens]: removed tokens need the plain padding mask")
        past = cache.get_seq_length() if cache is not None else 0
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
        if self._compact and positions.ndim != 2:
            raise TrimError(f"positions='compact' needs one position per token, not {positions.ndim - 1} axes: use 'keep'")
        forward = self._session.forward = Forward(cache, mask, embeds.shape[1], past, positions)
        if prunes:
            self._start_pruning(forward, call, embeds)
        if prunes and any(group.kept < group.total for group in forward.groups):
            self._prune_at_seam(forward, kwargs)
        elif (first := trimmed_layer(cache, 0) if cache is not None else None) is not None:
            kwargs["attention_mask"] = first.logical_mask(mask, past + forward.length)
            if first.shift is not None:
                kwargs["position_ids"] = positions - first.shift[:, None]
        return args, kwargs

    def _start_pruning(self, forward: Forward, call: Call, embeds: Tensor) -> None:
        """Find every image's tokens in the chunk."""
        forward.call = call
        origin = torch.arange(forward.length, device=embeds.device).expand(embeds.shape[0], -1)
        forward.alive = Alive(origin, torch.ones_like(origin, dtype=torch.bool), [])
        forward.alive.valid = forward.chunk_valid
        place_groups(forward, self._family.placeholders(forward.call.forward_ids))

    def _prune_at_seam(self, forward: Forward, kwargs: dict) -> None:
        embeds = kwargs["inputs_embeds"]
        columns = [
            column.gather(1, group.now.index.sort(-1).values)
            for column, group in zip(forward.alive.columns, forward.groups, strict=True)
        ]
        image = self._family.placeholders(forward.call.forward_ids)
        index = self._narrow(forward, 0, ~(image & is_empty_slot(embeds)), columns)
        kwargs["inputs_embeds"] = gather(embeds, index)
        kwargs["position_ids"] = self._positions(forward, 0)
        kwargs["attention_mask"] = chunk_mask(
            forward.cache, 0, forward.past_mask, forward.past, forward.alive.valid
        )

    def _narrow(self, forward: Forward, layer: int, keep: Tensor, columns: list[Tensor]) -> Tensor:
        """Drop tokens from decoder layer ``layer`` on; returns the places, before, of what is left."""
        index, forward.alive = forward.alive.narrowed(keep, columns, forward.rows)
        forward.removals.append(Removal(layer, forward.alive))
        forward.overrides["position_ids"] = None  # layers use them for nothing but finding packed sequences
        return index

    def _positions(self, forward: Forward, layer: int) -> Tensor:
        """Position ids of what is left of the chunk, for decoder layer ``layer``."""
        positions = forward.positions
        if forward.alive is not None:
            origin = forward.alive.origin
            if positions.ndim == 3:
                positions = torch.stack([gather(channel, origin) for channel in positions])
            else:
                positions = gather(positions, origin)
        if not self._compact:
            return positions
        earlier = trimmed_layer(forward.cache, layer) if forward.cache is not None else None
        if earlier is not None and earlier.shift is not None:
            positions = positions - earlier.shift[:, None]
        if forward.alive is not None:
            rank_before = gather(forward.chunk_valid.cumsum(1), forward.alive.origin)
            positions = positions - (rank_before - forward.alive.valid.cumsum(1))
        return positions

    def _layer_hook(self, layer: int):
        def hook(module, args, kwargs):
            forward: Forward | None = self._session.forward
            if forward is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer in self._steps:
                hidden = self._start_segment(forward, layer, hidden, kwargs)
            if not forward.overrides:
                return None
            kwargs = kwargs | {key: value for key, value in forward.overrides.items() if key in kwargs}
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        return hook

    def _start_segment(self, forward: Forward, layer: int, hidden: Tensor, kwargs: dict) -> Tensor:
        """Select at a language stage, and fix what the layers of its segment get."""
        cache, index = forward.cache, None
        if forward.call is not None:
            with self._session.clock("method"), torch.no_grad():
                hidden, keep, columns = select_between_layers(forward, self._steps[layer], hidden, len(self._model.layers))
            if columns is not None:
                index = self._narrow(forward, layer, keep, columns)
                hidden = gather(hidden, index)
        earlier = trimmed_layer(cache, layer) if cache is not None else None
        if not forward.removals and earlier is None:
            return hidden
        if forward.removals:
            mask = chunk_mask(cache, layer, forward.past_mask, forward.past, forward.alive.valid)
        else:
            mask = earlier.logical_mask(forward.mask, forward.past + forward.length)
        forward.overrides["attention_mask"] = create_causal_mask(
            config=self._model.config, inputs_embeds=hidden, attention_mask=mask, past_key_values=cache, layer_idx=layer
        )
        if self._compact:
            positions = self._positions(forward, layer)
            forward.overrides["position_embeddings"] = self._model.rotary_emb(hidden, position_ids=positions)
        elif index is not None:
            rotary = forward.overrides.get("position_embeddings", kwargs["position_embeddings"])
            forward.overrides["position_embeddings"] = tuple(_gather_rotary(part, index) for part in rotary)
        return hidden

    def _leave(self, module, args, kwargs, output):
        forward: Forward | None = self._session.forward
        self._session.forward = None
        if forward is None or forward.call is None or output is None:  # None: the forward raised
            return None
        self._note_removals(forward)
        self._session.finish(self._trace(forward))
        if not forward.removals:
            return None
        alive = forward.alive
        hidden = unpack(output.last_hidden_state, alive.origin, alive.valid, forward.length)
        if forward.call.labels is not None:
            left = torch.zeros_like(forward.call.labels).scatter_add_(1, alive.origin, alive.valid.long())
            forward.call.labels.masked_fill_(left == 0, -100)
        output["last_hidden_state"] = hidden
        return output

    def _note_removals(self, forward: Forward) -> None:
        """Tell every cache layer which of its tokens are missing."""
        cache = forward.cache
        if cache is None or not forward.removals:
            return
        ends = [removal.start for removal in forward.removals[1:]] + [len(self._model.layers)]
        for removal, end in zip(forward.removals, ends, strict=True):
            alive = removal.alive
            padded = not bool(alive.valid.all())
            for index in range(removal.start, end):
                shift, mask = None, None
                layer = make_trimmed(cache, index)
                if padded or forward.past:
                    mask = chunk_mask(cache, index, forward.past_mask, forward.past, alive.valid)
                if self._compact:
                    shift = forward.chunk_valid.sum(1) - alive.valid.sum(1)
                    shift = shift if layer.shift is None else shift + layer.shift
                layer.note_removal(forward.length - alive.origin.shape[1], forward.prompt_end, mask, shift)

    def _trace(self, forward: Forward) -> Trace:
        cache, layers = forward.cache, len(self._model.layers)
        batch = forward.alive.origin.shape[0]
        copies = batch // (forward.call.samples or forward.call.input_ids.shape[0])
        images = sorted(
            (row, number, image)
            for number, group in enumerate(forward.groups)
            for image, row in enumerate(group.rows)
            if row % copies == 0
        )
        widths = [forward.length] * layers
        for removal in forward.removals:
            widths[removal.start :] = [removal.alive.origin.shape[1]] * (layers - removal.start)
        lengths = () if cache is None else tuple(physical_length(cache, index) for index in range(layers))
        return Trace(
            images=tuple(forward.groups[n].trace(image, row // copies, layers) for row, n, image in images),
            batch=batch,
            copies=copies,
            length=forward.length,
            past=forward.past,
            widths=tuple(widths),
            cache_lengths=lengths,
            cache_bytes=0 if cache is None else cache_bytes(cache),
        )


def _gather_rotary(part: Tensor, index: Tensor) -> Tensor:
    """Cosines or sines [batch or 1, tokens, dim], or [axes, batch, tokens, dim], of the tokens at ``index``."""
    if part.ndim == 4:
        return torch.stack([gather(axis, index) for axis in part])
    return gather(part, index)
