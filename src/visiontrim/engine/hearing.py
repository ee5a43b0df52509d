"""What steps between decoder layers see beside hidden states: queries and keys, embeddings, the layer's input.

Probes (:mod:`.probe`) stay on the attention modules that a step listens to for as long as a run is open; in a step of
decoding they do nothing, unless the method chooses what it sees (:mod:`.decoding`). What is heard lives in the pass, so
threads do not mix, and rows of attention are computed when the step's view is built, only those that it asks for. It
knows what decoder layers show; it does not know what is chosen by it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import DecoderLayer, Decoding, Step
from visiontrim.core.signals import DecoderSignals, Key, Sides, Text, TextSignals
from visiontrim.engine.cache import chunk_mask
from visiontrim.engine.context import Context
from visiontrim.engine.contract import check_heard
from visiontrim.engine.forward import Attended, Prefill
from visiontrim.engine.probe import AttentionProbe
from visiontrim.engine.signals import check_needs
from visiontrim.engine.upstream import Cache, Upstream
from visiontrim.models.family import Family, Kind
from visiontrim.ops.attention import attention_rows

_OF_THE_LAYER_PASSED = {"last_attention", "text_attention", "queries", "keys", "values"}
_TWO_SIDED = ("normed", "queries", "keys", "values", "rotary")
_GIVEN = {DecoderSignals.spelled(name) for name in DecoderSignals.names} | {"text.question"}

ROWS = 64
"""Rows of text whose attention is computed at a time."""


class _Heard(Exception):  # noqa: N818  # no error: it ends a look ahead
    """The layer that was asked has shown its queries and keys."""


class Hearing:
    """Listens to the decoder layers around the steps, and keeps what their views will show."""

    def __init__(
        self,
        family: Family,
        upstream: Upstream,
        steps: Mapping[int, Mapping[Kind, Step]],
        decoding: Decoding | None,
        context: Context,
    ) -> None:
        self._family = family
        self._before_answers = set() if decoding is None else {decoding.layer - 1}
        self._context = context
        self._needs = {
            layer: DecoderSignals.among(frozenset().union(*(step.needs for step in of_kinds.values())))
            for layer, of_kinds in steps.items()
        }
        asked = {layer for layer, needs in self._needs.items() if needs & _OF_THE_LAYER_PASSED}
        self._instead = {layer for layer in asked if layer - 1 in upstream.recurrent}
        """Decoder layers that show what the layer before, which has no attention, cannot."""
        self._passed = {layer - 1 for layer in asked - self._instead}
        self._of_values = {layer - 1 for layer, needs in self._needs.items() if "values" in needs}
        self._coming = self._instead | {layer for layer, needs in self._needs.items() if "next_attention" in needs}
        self.remembers = {layer - 1 for layer, needs in self._needs.items() if "previous" in needs}
        """Decoder layers whose input is kept."""
        for step in (step for of_kinds in steps.values() for step in of_kinds.values()):
            check_needs(step, _GIVEN, "between decoder layers")

    def attach(self) -> list[AttentionProbe]:
        """Install the probes and return what removes them again."""
        return [
            AttentionProbe(
                self._family.decoder_attention(layer),
                functools.partial(self._hear, layer),
                self._hear_values if layer in self._of_values else None,
            )
            for layer in sorted(self._passed | self._coming | self._before_answers)
        ]

    def _hear(self, layer: int, query: Tensor, key: Tensor, scaling: float | None) -> None:
        prefill = self._context.forward
        if not isinstance(prefill, Prefill):
            if prefill is not None and prefill.answers and layer in self._before_answers:
                prefill.passed = Attended(query, key, scaling)
            return
        if prefill.heard.ahead:
            prefill.heard.coming = Attended(query, key, scaling)
            raise _Heard
        if layer in self._passed:
            prefill.heard.passed = Attended(query, key, scaling)

    def _hear_values(self, value: Tensor) -> None:
        prefill = self._context.forward
        if isinstance(prefill, Prefill) and not prefill.heard.ahead:
            prefill.heard.values = value

    def enter(self, prefill: Prefill, embeds: Float[Tensor, "batch length dim"]) -> None:
        """Keep the input embeddings if a step will ask for them."""
        if any("embeddings" in needs for needs in self._needs.values()):
            prefill.heard.embeddings = embeds

    def remember(self, prefill: Prefill, layer: int, hidden: Float[Tensor, "batch width dim"]) -> None:
        """Keep what enters ``layer`` if the step after it asks."""
        if layer in self.remembers:
            prefill.heard.previous = hidden

    @torch.no_grad()
    def before_step(
        self,
        prefill: Prefill,
        layer: int,
        hidden: Float[Tensor, "batch width dim"],
        args: tuple,
        kwargs: Mapping[str, Any],
    ) -> None:
        """Prepare what the step before ``layer``, which is called with ``args`` and ``kwargs``, asks for."""
        needs = self._needs[layer]
        if "normed" in needs:
            prefill.heard.normed = self._family.final_norm(hidden)
        if "rotary" in needs:
            prefill.heard.rotary = _cosines_and_sines(kwargs.get("position_embeddings"), layer)
        if "mean_rotary" in needs:
            prefill.heard.mean_rotary = _mean_rotary(kwargs.get("position_embeddings"), layer)
        if layer - 1 in self._passed:
            check_heard(prefill.heard.passed is not None, f"the attention of decoder layer {layer - 1}")
        if layer in self._coming:
            self._look_ahead(prefill, layer, args, kwargs)
            check_heard(prefill.heard.coming is not None, f"the attention of decoder layer {layer}")
        if layer in self._instead:
            prefill.heard.passed = prefill.heard.coming
            prefill.heard.of = layer
        else:
            prefill.heard.of = layer - 1

    def _look_ahead(self, prefill: Prefill, layer: int, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Let ``layer`` run up to its attention, which shows the queries and keys that it is about to compute.

        ``forward`` itself, so that no hook sees the call, and on a copy of the cache, so that the keys of earlier turns
        are seen and nothing is cached. No fact about the architecture is needed.
        """
        kwargs = {key: _detached(value, layer) if isinstance(value, Cache) else value for key, value in kwargs.items()}
        prefill.heard.ahead = True
        try:
            self._family.language_model.layers[layer].forward(*args, **kwargs)
        except _Heard:
            pass
        finally:
            prefill.heard.ahead = False


def _detached(cache: Cache, layer: int) -> Cache:
    """A cache with the same content, whose layer ``layer`` can grow by itself (DynamicCache grows out of place)."""
    copied = copy.copy(cache)
    copied.layers = list(cache.layers)
    if layer < len(copied.layers):
        copied.layers[layer] = copy.copy(copied.layers[layer])
    return copied


def _cosines_and_sines(rotary: Any, layer: int) -> Float[Tensor, "batch width dim"]:
    if not isinstance(rotary, tuple) or len(rotary) != 2 or rotary[0].ndim != 3:
        raise TrimError(f"decoder layer {layer} has no plain rotary position encoding, which this method corrects for")
    return torch.cat(rotary, -1)


def _mean_rotary(rotary: Any, layer: int) -> Float[Tensor, "batch width 2"]:
    if not isinstance(rotary, tuple) or len(rotary) != 2:
        raise TrimError(f"decoder layer {layer} has no rotary position encoding, by which this method chooses")
    means = torch.stack([part.float().mean(-1) for part in rotary], -1)
    return means.mean(0) if means.ndim == 4 else means  # some releases give the axes of mRoPE one by one


def _heads_first(values: Tensor) -> Tensor:
    return values.transpose(1, 2) if values.ndim == 4 else values


class Asked:
    """The signals that one step asks for, of all images of a prefill; ``norm`` is the coming layer's input norm.

    They are what is chosen by, so none has gradients. Sound counts as text: it may be the question.
    """

    @torch.no_grad()
    def __init__(
        self, prefill: Prefill, step: Step, hidden: Float[Tensor, "batch width dim"], norm: Callable[[Tensor], Tensor]
    ) -> None:
        self._prefill = prefill
        self._hidden = hidden
        self._norm = norm
        self._needs, self._question = DecoderSignals.among(step.needs), "text.question" in step.needs
        assert isinstance(step.site, DecoderLayer)
        self._layer = step.site.index
        alive = prefill.alive
        image = torch.zeros_like(alive.valid)
        for group, rows, *places in zip(prefill.groups, prefill.rows, alive.columns, alive.marks, strict=True):
            for place in places if group.part.kind != "audio" else ():
                image[rows[:, None], place] = True
        asked = alive.valid & (alive.origin < prefill.prompt_end - prefill.past)
        self._is_text = asked & ~image
        self._last = (asked * torch.arange(1, asked.shape[1] + 1, device=asked.device)).argmax(1)
        self._of_tokens = self._chunk_wide()

    @torch.no_grad()
    def of_group(self, number: int) -> tuple[DecoderSignals, TextSignals]:
        """What the view of group ``number`` shows."""
        prefill, needs = self._prefill, self._needs
        rows, column = prefill.rows[number], prefill.alive.columns[number]
        seen: dict[Key, Any] = {name: values[rows[:, None], column] for name, values in self._of_tokens.items()}
        if "query" in needs:
            seen["query"] = self._hidden[rows, self._last[rows]]
        if "next_normed" in needs:
            seen["next_normed"] = self._norm(self._hidden[rows[:, None], column])
        if not self._question and not needs & {"text_attention", "embeddings", *_TWO_SIDED}:
            return DecoderSignals(seen), TextSignals()
        start, mask = self._text_after(rows, column)
        for name in _TWO_SIDED:
            if name in needs:
                of_text = self._of_tokens[name][rows, start:]
                # [batch, tokens, heads, dim] of queries and keys becomes the usual order
                seen[name] = Sides(_heads_first(seen[name]), _heads_first(of_text))
        if "text_attention" in needs:
            seen["text_attention"] = self._text_attention(rows, column, start)
        if (embeddings := prefill.heard.embeddings) is not None and "embeddings" in needs:
            of_text = prefill.alive.origin[rows, start:]
            entered = embeddings[rows[:, None], prefill.entered[number]]
            seen["embeddings"] = Sides(entered, embeddings[rows[:, None], of_text])
        return DecoderSignals(seen), TextSignals(question=Text(self._hidden[rows, start:], mask, scale=1.0))

    def _chunk_wide(self) -> dict[str, Tensor]:
        """Signals as [batch, width, ...] over all tokens of the chunk that are left."""
        heard, width = self._prefill.heard, self._hidden.shape[1]
        wide = {"previous": heard.previous, "normed": heard.normed}
        for name, rotary in (("rotary", heard.rotary), ("mean_rotary", heard.mean_rotary)):
            wide[name] = None if rotary is None else rotary.expand(len(self._hidden), -1, -1)
        if heard.values is not None:
            wide["values"] = heard.values[:, :, -width:].transpose(1, 2)
        if heard.passed is not None:
            query, key, scaling = heard.passed
            wide["keys"] = key[:, :, -width:].transpose(1, 2)
            wide["queries"] = query.transpose(1, 2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        for name, attended, layer in (
            ("last_attention", heard.passed, heard.of),
            ("next_attention", heard.coming, self._layer),
        ):
            if attended is not None and name in self._needs:
                wide[name] = self._attention(attended, layer, self._last[:, None])[:, :, 0].mean(1)[:, -width:]
        return {name: values for name, values in wide.items() if values is not None and name in self._needs}

    def _attention(
        self,
        attended: Attended,
        layer: int,
        places: Int[Tensor, "rows places"],
        rows: Int[Tensor, " rows"] | slice = slice(None),
    ) -> Float[Tensor, "rows heads places keys"]:
        """Attention, in decoder layer ``layer``, from ``places`` of the batch's ``rows`` to all keys."""
        prefill, (query, key, scaling) = self._prefill, attended
        alive = prefill.alive
        valid = alive.valid if alive.padded else None
        mask = chunk_mask(prefill.cache, layer, prefill.past_mask, prefill.past, valid, alive.width)
        mask = None if mask is None else mask[rows, -key.shape[2] :]  # a cache that lacks tokens lacks first columns
        return attention_rows(query[rows], key[rows], places, scaling=scaling, causal=True, key_mask=mask)

    def _text_attention(
        self, rows: Int[Tensor, " images"], column: Int[Tensor, "images kept"], start: int
    ) -> Float[Tensor, "images heads text kept"]:
        attended, width = self._prefill.heard.passed, self._hidden.shape[1]
        assert attended is not None
        places = torch.arange(start, width, device=column.device).expand(len(rows), -1)
        parts = []
        for some in places.split(ROWS, 1):
            attention = self._attention(attended, self._prefill.heard.of, some, rows)[..., -width:]
            index = column[:, None, None].expand(-1, *attention.shape[1:3], -1)
            parts.append(attention.gather(3, index))
        return torch.cat(parts, 2)

    def _text_after(
        self, rows: Int[Tensor, " images"], column: Int[Tensor, "images kept"]
    ) -> tuple[int, Bool[Tensor, "images text"]]:
        """Where the text after each image starts, and which places from there on are text after it.

        The last position of the prompt always is, also if the prompt ends with the image.
        """
        ends = column[:, -1]
        start = int(ends.min())
        places = torch.arange(start, self._hidden.shape[1], device=ends.device)
        mask = self._is_text[rows, start:] & (places > ends[:, None])
        return start, mask | (places == self._last[rows, None])
