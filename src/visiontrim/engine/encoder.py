"""Dropping and merging inside the vision encoder: before its first layer, or between two of them.

The layers after it, the projector and the language model run on fewer tokens. Special tokens ([CLS], registers)
stand before the patches and never merge. Behind the encoder every place holds what its token was merged into, and
:mod:`.vision` keeps the slots of the survivors, so that generate() sees the uncompressed prompt. It knows the encoder's
layers; it does not know where the tokens stand in a prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Step
from visiontrim.core.signals import EncoderSignals, Key
from visiontrim.core.view import View
from visiontrim.engine.call import Call, Encoding
from visiontrim.engine.context import Context, Exact
from visiontrim.engine.inside import Inside
from visiontrim.engine.pack import gather
from visiontrim.engine.placing import placed
from visiontrim.engine.probe import AttentionProbe
from visiontrim.engine.select import checked_select
from visiontrim.engine.signals import ALWAYS, BETWEEN, PIXELS, check_needs, encoder_signals, pixel_signals
from visiontrim.engine.survivors import Merging, Survivors, coordinates
from visiontrim.models.family import Family


class EncoderStage:
    """Hooks on the encoder's layers. Without steps there are none."""

    def __init__(
        self,
        family: Family,
        steps: Mapping[int, Step],
        per: str,
        apart: bool,
        deviation: Sequence[float] | None,
        context: Context,
    ) -> None:
        self._family = family
        self._steps = steps
        self._per = per
        self._apart = apart
        self._deviation = deviation
        self._context = context
        self._layers = family.encoder_layers("image")
        attention = family.encoder("image").config._attn_implementation or "" if steps else ""
        for index, step in steps.items():
            if step.proportional and ("flash" in attention or not family.masked):
                which = attention if family.masked else f"the encoder of {type(family).__name__}"
                raise TrimError(
                    f"{step} weighs attention by mass, which {which} cannot do: set proportional=false"
                    + (", or load the model with attn_implementation='sdpa'" if family.masked else "")
                )
            given = PIXELS | ALWAYS | (BETWEEN if index else frozenset())
            where = "in the encoder" if index else "before the first encoder layer"
            check_needs(step, {EncoderSignals.spelled(name) for name in given}, where)
            if "encoder.colours" in step.needs and deviation is None:
                raise TrimError(
                    f"{step} compares colours in [0, 1], but how the model's processor normalised them is not known: "
                    "pass processor="
                )

    def attach(self) -> list:
        """Install the hooks and return what removes them again."""
        if not self._steps:
            return []
        family, removers = self._family, []
        for index in range(min(self._steps), len(self._layers)):
            hook = functools.partial(self._before_layer, index)
            removers.append(self._layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        for index, step in self._steps.items():
            if EncoderSignals.among(step.needs) & BETWEEN:
                module = family.attentions("image")[index - 1]
                removers.append(AttentionProbe(module, functools.partial(self._hear, step)))
        if family.mergers("image"):
            last = self._layers[family.depth("image") - 1]
            # before transformers' own hook, which keeps the states of layers
            removers.append(last.register_forward_hook(self._after_layers, prepend=True))
        for merger in family.mergers("image"):
            removers.append(merger.register_forward_pre_hook(self._before_merger))
            removers.append(merger.register_forward_hook(self._after_merger))
        return removers

    def _encoding(self) -> Encoding | None:
        call = self._context.call
        return None if call is None else call.encoding

    def _inside(self) -> Inside | None:
        """Where the tokens are, once some merged."""
        encoding = self._encoding()
        return None if encoding is None else encoding.merged

    def _before_layer(self, index: int, module, args, kwargs):
        call: Call | None = self._context.call
        if call is None or call.encoding is None:
            return None
        changed: dict[str, Any] = {}
        if index in self._steps:
            hidden = args[0] if args else kwargs["hidden_states"]
            with self._context.choosing() as exact:
                changed["hidden_states"] = self._merge(call, call.encoding, index, hidden, exact)
        if (inside := self._inside()) is not None:
            windowed = self._family.windowed(call.encoding.kind, index)
            changed |= _arguments(inside, windowed, [name for name, value in kwargs.items() if value is not None])
            if (bias := inside.bias(self._family.special_tokens)) is not None:
                hidden = args[0] if args else kwargs["hidden_states"]
                bias = bias.to(hidden.dtype)[:, None, None]
                mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
                changed["attention_mask"] = bias if mask is None else mask + bias
        names = ("hidden_states", "attention_mask")[: len(args)]  # the layer's leading parameters
        args = (*(changed.pop(name, args[place]) for place, name in enumerate(names)), *args[len(names) :])
        return args, kwargs | changed

    def _merge(self, call: Call, encoding: Encoding, index: int, hidden: Tensor, exact: Exact) -> Tensor:
        """Let the step before layer ``index`` merge tokens of what the layer gets."""
        step, special = self._steps[index], self._family.special_tokens
        inside = encoding.inside or self._begin(call, encoding)
        patches = hidden if inside.packing is not None else hidden[:, special:].flatten(0, 1)
        tokens = [group.flatten(2) for group in inside.tokens(patches)]
        heard: dict[Key, list[Tensor]] = {
            name: inside.tokens(torch.cat(parts)) for name, parts in encoding.between.items()
        }
        encoding.between = {}
        pixels = pixel_signals(inside, encoding, EncoderSignals.among(step.needs), self._deviation)
        keeps, outputs = [], []
        for number, features in enumerate(tokens):
            signals: dict[Key, Tensor] = {name: values[number].mean(2) for name, values in heard.items()}
            signals |= {name: values[number] for name, values in pixels.items()}
            keep = self._context.agreed(
                checked_select(step, self._view(encoding, inside, number, exact(features), signals))
            )
            keeps.append(keep)
            outputs.append(gather(features, keep.index) if keep.features is None else keep.features.to(hidden.dtype))
        encoding.inside = after = inside.after(keeps, step)
        if not after.merged or after.places is inside.places:
            return hidden
        patches = after.sequence(outputs).view(-1, hidden.shape[-1])
        if after.packing is not None:
            return patches
        return torch.cat([hidden[:, :special], patches.view(len(hidden), -1, hidden.shape[-1])], 1)

    def _view(
        self,
        encoding: Encoding,
        inside: Inside,
        number: int,
        features: Float[Tensor, "images tokens dim"],
        signals: dict[Key, Tensor],
    ) -> View:
        assert encoding.placed is not None
        merging, part = inside.merging[number], encoding.placed[number].group.part
        seen = {name: _as_seen(name, value) for name, value in signals.items()}
        box = {} if merging.lattice is None else {"lattice": merging.lattice}
        return View(
            features=features,
            coordinates=coordinates(merging.now.index, merging.grid),
            grid=merging.grid,
            entered=merging.now.assignment.shape[1],
            num_layers=len(self._family.language_model.layers),
            whole=part.whole,
            before=part.before,
            marked=merging.now.marked,
            noted=merging.now.noted,
            encoder=EncoderSignals(seen, mass=merging.mass, unit=inside.unit, **box),
        )

    def _begin(self, call: Call, encoding: Encoding) -> Inside:
        encoding.placed = placed(call, encoding, self._family, self._per, self._apart, None)
        groups = [(group.grid, tokens) for group, tokens, _ in encoding.placed]
        merging = [
            Merging(grid, grid, Survivors.uncompressed(tokens.shape[0], tokens.shape[1], tokens.device))
            for grid, tokens in groups
        ]
        return Inside.begin(self._family, encoding.kind, merging, [tokens for _, tokens in groups])

    def _after_layers(self, module, args, output):
        inside = self._inside()
        if inside is None or inside.packing is not None:
            return None
        special = self._family.special_tokens
        patches = inside.raster(output[:, special:].flatten(0, 1))
        return torch.cat([output[:, :special], patches], 1)

    def _before_merger(self, module, args):
        inside = self._inside()
        if inside is None or inside.packing is not None:
            return None
        return (inside.slots(args[0].flatten(0, 1))[None], *args[1:])

    def _after_merger(self, module, args, output):
        inside = self._inside()
        if inside is None:
            return None
        whole = inside.packed(inside.whole(output.flatten(0, -2)))
        return whole if inside.packing is not None else whole.view(sum(map(len, inside.at)), -1, output.shape[-1])

    def _hear(self, step: Step, query: Tensor, key: Tensor, scaling: float | None) -> None:
        encoding = self._encoding()
        if encoding is None:
            return
        instead = "cls_attention" if self._family.special_tokens else "received_attention"
        asked = EncoderSignals.among(step.needs) & BETWEEN
        needs: set[Key] = {instead if name == "cls_attention" else name for name in asked}
        if not self._family.special_tokens:
            needs.discard("cls_query")
        with self._context.hearing():
            query, key = self._context.heads(query), self._context.heads(key)
            for name, value in encoder_signals(self._family, encoding, needs, query, key, scaling):
                encoding.between.setdefault(name, []).append(value)


def _as_seen(signal: Key, value: Float[Tensor, "images tokens *rest"]) -> Tensor:
    """A signal as a view has it, of one that was carried along with the tokens."""
    match signal:
        case "keys" | "queries":
            return value.transpose(1, 2)
        case "cls_query":
            return value[:, :1].transpose(1, 2)  # every token of a picture carries the same
        case _:
            return value


def _arguments(inside: Inside, windowed: bool, wanted: Collection[str]) -> dict[str, Any]:
    """What a layer of an encoder with all pictures in one sequence gets of them, of the ``wanted`` names."""
    chunks = inside.chunks(windowed)
    if chunks is None:
        return {}
    device = inside.places[0].device
    ends = F.pad(torch.tensor(chunks, device=device).cumsum(0, dtype=torch.int32), (1, 0))
    given = {"cu_seqlens": ends, "max_seqlen": max(chunks), "position_embeddings": inside.rotary}
    return {name: value for name, value in given.items() if name in wanted}
