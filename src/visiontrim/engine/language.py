"""The seam before the language model, and the stages between its layers.

generate() and the model see the uncompressed prompt throughout. The hooks here squeeze removed tokens out on the way
in, give later layers the masks and rotary embeddings of the tokens that are left, note what every cache layer lacks,
and put the last hidden states back to full length on the way out. It knows when each of these happens; how is known in
the rooms below, and how images were encoded, in none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Decoding, Positions, Step
from visiontrim.engine.cache import (
    check_cache,
    check_window,
    physical_length,
    plain_step,
    reserve,
    seen,
    static,
    trimmed_layer,
)
from visiontrim.engine.call import Call
from visiontrim.engine.chunks import begin_chunks, cut, in_chunks, passed
from visiontrim.engine.context import Context
from visiontrim.engine.contract import check_cached
from visiontrim.engine.decoding import DecodingStage
from visiontrim.engine.forward import Alive, Forward, Heard, Prefill
from visiontrim.engine.hearing import Hearing
from visiontrim.engine.masks import narrowed_mask, static_padding
from visiontrim.engine.members import Members
from visiontrim.engine.pack import gather, is_empty_slot, unpack
from visiontrim.engine.removals import expected_lengths, mark_plain, mark_still, note_removals
from visiontrim.engine.replaced import Replaced
from visiontrim.engine.rows import claim_row_ends
from visiontrim.engine.segments import Segments
from visiontrim.engine.select import place_groups, select_between_layers
from visiontrim.engine.tracing import trace_of
from visiontrim.engine.unmerging import Unmerging
from visiontrim.engine.upstream import (
    PER_TOKEN,
    STATIC_MASKS,
    Cache,
    Upstream,
    attention_of,
    given_cache,
    holds_tokens,
    recomputes,
)
from visiontrim.models.family import Family, Kind


class LanguageStage:
    """Hooks on the language model (the seam) and, where needed, on its layers."""

    def __init__(
        self,
        family: Family,
        steps: Mapping[int, Mapping[Kind, Step]],
        decoding: Decoding | None,
        positions: Positions,
        narrow: bool | Literal["all"],
        upstream: Upstream,
        context: Context,
    ) -> None:
        self._family = family
        self._model = family.language_model
        self._upstream = upstream
        self._steps = steps
        self._compact = positions == "compact"
        self._members = Members(family, context) if positions == "members" else None
        self._segments = Segments(self._upstream, self._compact, self._members)
        self._unmerging = Unmerging(family, self._upstream, steps, context) if positions == "unmerged" else None
        self._narrow_from = len(self._model.layers)
        if narrow and steps:
            self._narrow_from = 0 if narrow == "all" else min(steps)
        """The decoder layer from which on only what the last stage left stays cached."""
        alone = not steps and decoding is None and not family.bidirectional
        self._quiet = positions == "keep" and decoding is None and not family.bidirectional
        """Whether there are steps of decoding that need nothing of the run."""
        self._even = alone and positions == "keep"
        """Whether all layers are left the same tokens, at their own positions."""
        self._context = context
        self._hearing = Hearing(family, upstream, steps, decoding, context)
        self._decoding = DecodingStage(family, decoding, steps, context) if decoding is not None else None

    def passes(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        """Whether a forward of the model or of a part of it is a step of decoding that needs nothing of the run."""
        return self._quiet and plain_step(args, kwargs, self._model.config)

    def attach(self) -> list:
        """Install the hooks and return what removes them again."""
        removers = [
            self._model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        if self._even:
            name, otherwise = STATIC_MASKS
            removers.append(Replaced(self._family.model, name, self._static_masks, otherwise))
        if self._members is not None:
            removers.append(self._members.attach())
        if self._unmerging is not None:
            removers += self._unmerging.attach()
        if self._family.bidirectional:
            removers.append(self._family.core.register_forward_pre_hook(self._before_masks, with_kwargs=True))
        if self._family.deepstack is not None:
            removers.append(Replaced(self._model, self._family.deepstack, self._add_features))
        # flash attention reads gaps in position_ids as borders of packed sequences, so no layer may get them
        flash = self._flash
        hooked = self._steps.keys() | self._hearing.remembers
        if self._decoding is not None:
            hooked = hooked | {self._decoding.layer}
        first = 0 if flash else min(hooked, default=len(self._model.layers))
        for index in range(first, len(self._model.layers)):
            hook = self._layer_hook(index)
            removers.append(self._model.layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        return removers + self._hearing.attach()

    @property
    def _flash(self) -> bool:
        return "flash" in (self._model.config._attn_implementation or "")

    def _static_masks(self, make: Callable, *args: Any, **kwargs: Any) -> Any:
        """What generate() has for masks of static caches: it does not know which padding is left of a row."""
        first = trimmed_layer(given_cache(kwargs), self._upstream.holding(0))
        return make(*args, **kwargs | {"attention_mask": seen(kwargs.get("attention_mask"), first)})

    def _before_masks(self, module, args, kwargs):
        """Give a model that prepares its own masks the padding of the tokens that are left, and keep the caller's."""
        call, cache, mask = self._context.call, given_cache(kwargs), kwargs.get("attention_mask")
        if call is None:
            return None
        call.mask, first = mask, trimmed_layer(cache, self._upstream.holding(0))
        if cache is None or first is None:
            return None
        self._check_plain(mask)
        length = cache.get_seq_length() + kwargs["input_ids"].shape[1]
        return args, kwargs | {"attention_mask": first.logical_mask(mask, length)}

    def _check_plain(self, mask: object) -> None:
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise TrimError("attention_mask is not 2-D [batch, tokens]: removed tokens need the plain padding mask")

    def _enter(self, module, args, kwargs):
        if self.passes(args, kwargs):
            return None
        call, cache = self._context.call, given_cache(kwargs)
        if kwargs.get("inputs_embeds") is None:  # the text model, called by itself
            return None
        if call is not None:
            call.passes += 1
        call = call if call is not None and (call.carries_vision or in_chunks(call, cache)) else None
        use_cache = self._model.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if use_cache and call is not None and recomputes(self._model):
            use_cache = kwargs["use_cache"] = False
        if call is not None and cache is None and use_cache:
            cache = kwargs[self._upstream.cache_name] = self._upstream.new_cache()
        trimmed = cache is not None and any(trimmed_layer(cache, index) for index in range(len(cache.layers)))
        if call is None and not trimmed:
            return None
        self._check_once(cache)
        forward = self._context.forward = self._forward(call, cache, kwargs)
        if self._decoding is not None:
            self._decoding.enter(forward)
        first = trimmed_layer(cache, self._upstream.holding(0))
        if isinstance(forward, Prefill) and forward.staying is not None:
            self._prune_at_seam(forward, kwargs, forward.staying, [], [])
        elif isinstance(forward, Prefill) and any(group.kept < group.total for group in forward.groups):
            self._prune_at_seam(forward, kwargs, *self._survivors(forward, kwargs["inputs_embeds"]))
        elif first is not None:
            if not self._family.bidirectional:  # there it was done before the masks were made
                kwargs["attention_mask"] = first.logical_mask(forward.mask, forward.past + forward.length)
                forward.helped = kwargs["attention_mask"] is not None
            if first.shift is not None:
                kwargs["position_ids"] = forward.positions - first.shift[:, None]
                forward.helped = True
        return args, kwargs

    def _check_once(self, cache: Cache | None) -> None:
        """Refuse a cache that cannot go on in this run. What one call makes of it needs no look in every step."""
        call = self._context.call
        if call is not None and cache is not None and call.checked is cache:
            return
        self._check_stages(cache)
        check_cache(cache, self._even)
        if call is not None:
            call.checked = cache

    def _check_stages(self, cache: Cache | None) -> None:
        """Refuse a cache that lost tokens where no stage of this run begins: one mask serves a whole stage."""
        before, first = 0, self._upstream.holding(0)
        for index in range(len(self._model.layers)):
            if cache is None or index >= len(cache.layers) or not holds_tokens(cache.layers[index]):
                continue
            layer = trimmed_layer(cache, index)
            removed = 0 if layer is None else layer.removed
            if removed != before and index not in self._steps and index != first:
                raise TrimError(
                    f"decoder layer {index} of the cache lacks {removed} tokens and the one before it {before}, but no "
                    "stage of this run stands between them: continue the conversation with the method that began it"
                )
            before = removed

    def _forward(self, call: Call | None, cache: Cache | None, kwargs: dict[str, Any]) -> Forward:
        """The state of a pass, once it is clear that it can work."""
        embeds, mask, positions = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get("position_ids")
        batch, length = embeds.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        if cache is not None and static(cache):
            mask = static_padding(mask, past, getattr(cache.layers[0], "removed", 0), length)
        if self._family.bidirectional and self._context.call is not None:
            mask = self._context.call.mask
        self._check_plain(mask)
        if positions is None:
            positions = torch.arange(past, past + length, device=embeds.device)[None]
        if self._compact and positions.ndim != 2:
            raise TrimError(f"positions='compact' needs one position per token, not {len(positions)}: use 'keep'")
        if call is None:
            within = self._context.call if self._decoding is None else None
            ahead = within.ahead if within is not None and within.owner is None else None
            return Forward(cache, mask, length, past, positions, ahead=ahead)
        origin = torch.arange(length, device=embeds.device).expand(batch, -1)
        valid = torch.ones_like(origin, dtype=torch.bool) if mask is None else mask[:, -length:].bool()
        alive = Alive(origin, valid, [], [], self._lengths(call, batch, length, mask))
        held = tuple(0 if cache is None else physical_length(cache, n) for n in range(len(self._model.layers)))
        prefill = Prefill(cache, mask, length, past, positions, call=call, alive=alive, chunk_valid=valid, held=held)
        if (chunks := call.chunks) is not None:
            if chunks.keep is None:
                begin_chunks(chunks, prefill, self._family)
            cut(chunks, prefill)
            return prefill
        place_groups(prefill, self._family)
        claim_row_ends(prefill, self._family)
        self._hearing.enter(prefill, embeds)
        return prefill

    def _lengths(self, call: Call, batch: int, length: int, mask: Tensor | None) -> tuple[int, ...] | None:
        """Tokens of every row that are no padding; None if only the device knows."""
        if mask is None:
            return (length,) * batch
        there = call.counted
        if there is None or there.valid is None or not there.covers(call.forward_ids) or there.tokens != length:
            return None
        return tuple(valid for valid in there.valid for _ in range(batch // there.rows))

    def _survivors(self, prefill: Prefill, embeds: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Which tokens stay, and the places of those of every group, its marks apart."""
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
        keep = ~(image & is_empty_slot(embeds))
        for rows, all_marks, staying in zip(prefill.rows, prefill.alive.marks, marks, strict=True):
            keep[rows[:, None], all_marks[:, staying.shape[1] :]] = False  # some are text
        return keep, columns, marks

    def _prune_at_seam(
        self, prefill: Prefill, kwargs: dict[str, Any], keep: Tensor, columns: list[Tensor], marks: list[Tensor]
    ) -> None:
        check_window(prefill.cache, prefill.past + prefill.length)
        embeds = kwargs["inputs_embeds"]
        index = self._segments.narrow(prefill, 0, keep, columns, marks)
        kwargs["inputs_embeds"] = left = gather(embeds, index)
        if prefill.alive.padded:  # what stands in for padding may be an empty slot, which is infinite
            kwargs["inputs_embeds"] = left.masked_fill(~prefill.alive.valid[..., None].to(left.device), 0.0)
        if static(prefill.cache):
            self._reserve(prefill)
        if self._unmerging is not None:
            prefill.repeated = self._unmerging.repeated(prefill, embeds)
        kwargs["position_ids"] = self._segments.positions(prefill, 0)
        kwargs |= {name: gather(kwargs[name], index) for name in PER_TOKEN if kwargs.get(name) is not None}
        if self._family.bidirectional:
            alive = prefill.alive
            kwargs["attention_mask"] = narrowed_mask(kwargs.get("attention_mask"), alive.origin, alive.valid)
        else:
            mask = self._segments.key_mask(prefill, 0)
            if mask is None and prefill.cache is None:  # gaps in position_ids would look like packed sequences
                mask = prefill.alive.valid
            kwargs["attention_mask"] = mask

    def _reserve(self, prefill: Prefill) -> None:
        """A static cache gets room for what is left of the chunk."""
        assert prefill.cache is not None
        if self._flash and (prefill.mask is not None or prefill.alive.padded):
            raise TrimError(
                f"rows of {', '.join(map(str, prefill.alive.lengths or ()))} tokens are left of this batch, but with "
                "flash attention a static cache that lacks tokens has no place for padding: use attn_implementation="
                "'sdpa', cache_implementation='dynamic', or rows of equal length"
            )
        prefill.reserved = prefill.length - prefill.alive.width
        reserve(prefill.cache, prefill.reserved)

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
                hidden = self._step(forward, layer, hidden, args, kwargs)
            if isinstance(forward, Prefill):
                self._hearing.remember(forward, layer, hidden)
            elif self._decoding is not None and layer == self._decoding.layer:
                self._decoding.before_layer(forward)
            changed = self._segments.arguments(forward, layer, hidden, kwargs)
            if not changed:
                return None
            if args:
                return (hidden, *args[1:]), kwargs | changed
            return args, kwargs | changed | {"hidden_states": hidden}

        return hook

    def _step(self, forward: Forward, layer: int, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Select at a stage between layers, and begin the segment of the layers after it."""
        index = None
        if isinstance(forward, Prefill):
            with self._context.choosing() as exact:
                given = kwargs | self._segments.arguments(forward, layer, hidden, kwargs)
                self._hearing.before_step(forward, layer, exact(hidden), args, given)
                norm = self._family.input_norm(layer)
                hidden, keep, columns, marks = select_between_layers(
                    forward, self._steps[layer], hidden, len(self._model.layers), norm, exact
                )
                forward.heard = Heard(embeddings=forward.heard.embeddings)
            if columns is not None:
                check_window(forward.cache, forward.past + forward.length)
                index = self._segments.narrow(forward, layer, keep, columns, marks)
                hidden = gather(hidden, index)
        self._segments.begin(forward, layer, index)
        return hidden

    def _leave(self, module, args, kwargs, output):
        if self.passes(args, kwargs):
            return None
        prefill: Forward | None = self._context.forward
        self._context.forward = None
        if not isinstance(prefill, Prefill):
            if self._quiet and prefill is not None and output is not None:
                mark_still(prefill, self._upstream.kinds, attention_of(self._model.config))
            return None
        if output is None:  # the forward raised
            if prefill.cache is not None and prefill.reserved:
                reserve(prefill.cache, -prefill.reserved)
            return None
        layers = len(self._model.layers)
        note_removals(prefill, layers, self._narrow_from, self._compact)
        check_cached(prefill, output, expected_lengths(prefill, layers, self._narrow_from))
        prefill.call.prefilled = True
        if self._decoding is not None:
            self._decoding.note(prefill)
        if (chunks := prefill.call.chunks) is None:
            self._context.finish(trace_of(prefill, layers))
        else:
            mark_plain(prefill.cache, layers, even=not prefill.more)
            if (whole := passed(chunks, prefill)) is not None:
                self._context.finish(trace_of(whole, layers))
        if not prefill.removals:
            return None
        alive, labels = prefill.alive, prefill.call.labels
        output["last_hidden_state"] = _whole(prefill, output.last_hidden_state, layers)
        if (states := output.get("hidden_states")) is not None:  # what enters layer 0, then what leaves every layer
            output["hidden_states"] = tuple(_whole(prefill, state, number) for number, state in enumerate(states))
        if labels is not None:
            left = torch.zeros_like(labels).scatter_add_(1, alive.origin, alive.valid.long())
            labels.masked_fill_(left == 0, -100)
        return output


def _whole(prefill: Prefill, hidden: Tensor, passed: int) -> Tensor:
    """Hidden states that have ``passed`` so many decoder layers, one for every token of the uncompressed chunk."""
    alive = prefill.alive_in(max(passed - 1, 0))
    return hidden if alive is None else unpack(hidden, alive.origin, alive.valid, prefill.length)
