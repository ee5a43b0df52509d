"""The vision stage: where an encoder's features become tokens, of pictures or of sound.

It knows what was encoded and asks a step which tokens stay; it does not know the language model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Step
from visiontrim.core.signals import EncoderSignals, Key, Signal, TextSignals, name_of
from visiontrim.core.view import View
from visiontrim.engine.call import Call, Encoding, Selected
from visiontrim.engine.context import Context
from visiontrim.engine.contract import check_encoded
from visiontrim.engine.groups import Group
from visiontrim.engine.guidance import Questions
from visiontrim.engine.memory import Memory
from visiontrim.engine.pack import mark_empty, to_slots
from visiontrim.engine.placing import placed
from visiontrim.engine.probe import AttentionProbe
from visiontrim.engine.replaced import Replaced
from visiontrim.engine.select import checked_select
from visiontrim.engine.signals import AT_OUTPUT, check_needs, encoder_signals, of_placeholders, projector_sensitivity
from visiontrim.engine.sites import Sites
from visiontrim.models.family import Family, Kind


class VisionStage:
    """Wraps ``get_image_features``, and those of the other kinds. Features leave in full number, dropped slots marked.

    Tokens are selected before the projector where there is one that maps each by itself, else from the finished
    features. Without a step it only notes which images of which grid were encoded. ``sites`` are those of every kind.
    """

    def __init__(
        self,
        family: Family,
        sites: Mapping[Kind, Sites],
        per: str,
        memory: Memory | None,
        questions: Questions,
        context: Context,
    ) -> None:
        self._family = family
        self._steps: dict[Kind, Step | None] = {kind: places.vision for kind, places in sites.items()}
        self._per = per
        self._apart = {kind: places.apart for kind, places in sites.items()}
        self._memory = memory
        needs: dict[Kind, frozenset[Signal]] = {
            kind: frozenset() if step is None else step.needs for kind, step in self._steps.items()
        }
        self._under = {kind: (needs[kind], tuple(places.encoder.items())) for kind, places in sites.items()}
        """What a remembered encoding must have been made for."""
        self._of_encoder: dict[Kind, frozenset[Any]] = {
            kind: EncoderSignals.among(asked) for kind, asked in needs.items()
        }
        self._of_text = {kind: TextSignals.among(asked) for kind, asked in needs.items()}
        for kind, step in self._steps.items():
            if step is not None:
                self._check(step, kind)
        self._questions = questions
        self._context = context

    @staticmethod
    def _check(step: Step, kind: Kind) -> None:
        """Refuse a step that reads what there is none of."""
        given = {TextSignals.spelled(name) for name in TextSignals.names} | {EncoderSignals.spelled("projected")}
        if kind == "audio":
            check_needs(
                step, given, "in sound: choose random, uniform, divprune, evs, or stages between decoder layers"
            )
            return
        heard = {EncoderSignals.spelled(name) for name in AT_OUTPUT}
        given |= heard | {EncoderSignals.spelled("sensitivity")}
        check_needs(step, given, "at the encoder's output", layers=heard)

    def attach(self) -> list:
        """Install the hooks and return what removes them again."""
        family, removers = self._family, []
        for kind in self._steps:
            removers.append(Replaced(family.core, f"get_{kind}_features", functools.partial(self._encode, kind)))
        if family.projector is not None:
            removers.append(family.projector.register_forward_pre_hook(self._before_projector))
            removers.append(family.projector.register_forward_hook(self._after_projector))
        # behind other projectors tokens are no longer its patches
        if "joint_last" in self._of_text["image"] and family.projector is not None:
            removers.append(family.encoder("image").register_forward_hook(self._after_encoder))
        if self._memory is not None:
            for encoder in {family.encoder(kind) for kind in self._steps}:
                removers.append(Replaced(encoder, "forward", functools.partial(self._remember, self._memory)))
        for module, signals in self._to_hear().items():
            removers.append(AttentionProbe(module, functools.partial(self._hear, signals)))
        return removers

    def _to_hear(self) -> dict[Any, list[Key]]:
        """The attention modules that signals come from, each with its signals."""
        modules: dict[Any, list[Key]] = {}
        asked: list[tuple[Kind, Any]] = [
            (kind, signal) for kind in self._steps for signal in sorted(self._of_encoder[kind], key=str)
        ]
        for kind, signal in asked:
            if not (attentions := self._family.attentions(kind)):
                continue
            name, layer = signal if isinstance(signal, tuple) else (signal, self._family.scored(kind))
            if name == "cls_attention" and not self._family.special_tokens:  # without [CLS] there is this instead
                name = "received_attention"
                signal = (name, layer) if isinstance(signal, tuple) else name
            absent = name == "cls_attention_wide" and not self._family.special_tokens
            if name not in AT_OUTPUT or absent:
                continue
            if not -len(attentions) <= layer < len(attentions):
                raise TrimError(
                    f"{self._steps[kind]} reads {name} of encoder layer {layer}, but the encoder has "
                    f"{len(attentions)} layers"
                )
            signals = modules.setdefault(attentions[layer], [])
            signals += [signal] if signal not in signals else []
        return modules

    def _encode(self, kind: Kind, encode: Callable, *args, **kwargs):
        call, family = self._context.call, self._family
        if call is None or call.encoding is not None:  # the model's video function may call the one for images
            return encode(*args, **kwargs)
        bound = inspect.signature(encode).bind_partial(*args, **kwargs).arguments
        arguments = {key: value for key, value in bound.items() if key != "kwargs"} | bound.get("kwargs", {})
        arguments = {"pixels" if key.startswith("pixel_values") else key: value for key, value in arguments.items()}
        call.encoding = encoding = Encoding(kind, arguments)
        try:
            output = encode(*args, **kwargs)
            function = f"{type(family.core).__name__}.get_{kind}_features"
            together = check_encoded(output, function, family.field(kind))
            parts = [together] if isinstance(together, Tensor) and together.ndim == 2 else list(together)
            lengths = [part.shape[:-1].numel() for part in parts]
            features = torch.cat([part.flatten(0, -2) for part in parts])
            if family.projector is None:
                encoding.selected = self._select(call, encoding, features, lengths)
                if encoding.selected is not None:
                    kept = encoding.selected
                    features = to_slots(kept.features[None], kept.slots[None], len(features))[0]
        finally:
            call.encoding = None
        if encoding.selected is not None:
            features = mark_empty(features, encoding.selected.blank)
            changed = [new.view_as(old) for new, old in zip(features.split(lengths), parts, strict=True)]
            setattr(output, family.field(kind), features.view_as(together) if isinstance(together, Tensor) else changed)
        return output

    def _remember(self, memory: Memory, encode: Callable, *args, **kwargs):
        call: Call | None = self._context.call
        if call is None or call.encoding is None:
            return encode(*args, **kwargs)
        return memory.encode(encode, call.encoding, self._under[call.encoding.kind], args, kwargs)

    def _before_projector(self, module, args):
        call: Call | None = self._context.call
        if call is None or call.encoding is None:
            return None
        (features,) = args
        if (inside := call.encoding.inside) is not None:
            pictures, _, dim = features.shape
            features = inside.whole(features.flatten(0, 1)).view(pictures, -1, dim)
        call.encoding.selected = self._select(call, call.encoding, features, None)
        return args if call.encoding.selected is None else (call.encoding.selected.features[None],)

    def _after_projector(self, module, args, output):
        call: Call | None = self._context.call
        if call is None or call.encoding is None or call.encoding.selected is None:
            return None
        kept = call.encoding.selected
        if kept.projected:
            output = output.clone()
        for start, rows in kept.projected:
            output[0, start : start + len(rows)] = rows.to(output.dtype)
        return to_slots(output, kept.slots[None], kept.shape.numel()).view(*kept.shape, -1)

    def _after_encoder(self, module, args, output) -> None:
        call: Call | None = self._context.call
        if call is not None and call.encoding is not None:
            call.encoding.last_hidden = output.last_hidden_state

    def _hear(self, signals: list[Key], query: Tensor, key: Tensor, scaling: float | None) -> None:
        call: Call | None = self._context.call
        if call is None or call.encoding is None:
            return
        with self._context.hearing():
            query, key = self._context.heads(query), self._context.heads(key)
            for signal, value in encoder_signals(self._family, call.encoding, signals, query, key, scaling):
                call.encoding.heard.setdefault(signal, []).append(value)

    def _select(
        self, call: Call, encoding: Encoding, tokens: Float[Tensor, "*shape dim"], lengths: list[int] | None
    ) -> Selected | None:
        """Note the groups of what is encoded; with a step, select among the ``tokens`` of all images."""
        family, features = self._family, tokens.flatten(0, -2)
        source = family.source(encoding.kind, encoding.arguments)
        source = None if source is None else source.to(tokens.device)
        kind = encoding.kind
        segments = encoding.placed or placed(call, encoding, family, self._per, self._apart[kind], lengths)
        inside, step, changed = encoding.inside, self._steps[kind], False
        if step is None and inside is None:
            call.groups += [group for group, _, _ in segments]
            return None
        with self._context.hearing():
            signals = of_placeholders(family, encoding)
        slots, values, blank, projected, rows = [], [], [], [], 0
        for number, (old, index, marks) in enumerate(segments):
            at, marks_at = (index, marks) if source is None else (source[index], source[marks])
            group, merged, keep = old, None, None
            if inside is not None:
                now, history = inside.merging[number].settled()
                group = old = replace(old, now=now, history=history)
                at, index = at.gather(1, now.index), index.gather(1, now.index)
            if step is not None:
                with self._context.choosing() as exact:
                    here: dict[Key, Tensor] = {signal: value[index] for signal, value in signals.items()}
                    keep = self._context.agreed(
                        checked_select(step, self._view(call, encoding, old, exact(features[at]), at, here))
                    )
                group, merged = old.after(keep, step.site), keep.features
                merged = features[at.gather(1, keep.index)] if merged is None else merged
                at = at.gather(1, keep.index.sort(-1).values)
                changed |= keep.features is not None
            call.groups.append(group)
            slots.append(at.flatten())
            if keep is not None and keep.projected is not None:
                if family.projector is None:
                    merged = keep.projected
                else:
                    projected.append((rows, keep.projected.flatten(0, 1)))
                changed = True
            values.append((features[at] if merged is None else merged).flatten(0, 1))
            changed |= group.kept < group.total
            if staying := group.marks_beside(group.kept):
                stay = marks_at[:, :staying]
                slots.append(stay[stay >= 0])
                values.append(features[slots[-1]])
            blank.append(marks[:, staying:].flatten())
            rows = sum(map(len, values))
        if not changed:
            return None
        none = torch.zeros(0, dtype=torch.long, device=tokens.device)
        values = torch.cat([value.to(tokens.dtype) for value in values])
        return Selected(torch.cat(slots), values, torch.cat([none, *blank]), tokens.shape[:-1], projected)

    def _view(
        self,
        call: Call,
        encoding: Encoding,
        group: Group,
        features: Float[Tensor, "images tokens dim"],
        at: Int[Tensor, "images tokens"],
        signals: dict[Key, Tensor],
    ) -> View:
        family, asked = self._family, self._of_encoder[encoding.kind]
        seen = {key: value.transpose(1, 2) if name_of(key) == "keys" else value for key, value in signals.items()}
        if "projected" in asked:
            seen["projected"] = family.to_language(features)
        if "sensitivity" in asked and family.projector is not None:
            seen["sensitivity"] = projector_sensitivity(family, features)
        return View(
            features=features,
            coordinates=group.coordinates,
            grid=group.grid,
            entered=group.total,
            num_layers=len(family.language_model.layers),
            whole=group.part.whole,
            before=group.part.before,
            marked=group.now.marked,
            noted=group.now.noted,
            encoder=EncoderSignals(seen),
            text=self._text(call, encoding, group, features, at),
        )

    @torch.no_grad()
    def _text(
        self,
        call: Call,
        encoding: Encoding,
        group: Group,
        features: Float[Tensor, "images tokens dim"],
        at: Int[Tensor, "images tokens"],
    ) -> TextSignals:
        """What the step asked for of the question, and of the tokens in its space; nothing without a question."""
        family, questions, asked, seen = self._family, self._questions, self._of_text[encoding.kind], {}
        if not questions.asked:
            return TextSignals()
        batch, device = call.rows, features.device
        if "words" in asked:
            if questions.words is None:
                raise TrimError(
                    f"{self._steps[encoding.kind]} compares vision tokens with the language model's own embeddings of "
                    "the question: pass processor= so that the question can be read"
                )
            seen["words"] = questions.for_rows(questions.words, group.rows, batch, device)
        guidance = questions.guidance
        if guidance is None:
            return TextSignals(seen)
        if "question" in asked:
            seen["question"] = questions.for_rows(guidance, group.rows, batch, device)
        if "joint" in asked:
            seen["joint"] = guidance.embed(features)
        if "joint_normalised" in asked:
            seen["joint_normalised"] = guidance.embed(
                family.normalised(features) if guidance.of_normalised else features
            )
        if "joint_last" in asked:
            seen["joint_last"] = guidance.embed(self._last_hidden(encoding, features, at))
        return TextSignals(seen)

    def _last_hidden(
        self, encoding: Encoding, features: Float[Tensor, "images tokens dim"], at: Int[Tensor, "images tokens"]
    ) -> Float[Tensor, "images tokens dim"]:
        """The encoder's normalised last hidden state of the tokens; their features if they are not its patches."""
        if encoding.last_hidden is None:
            return features
        last = self._family.normalised_last_hidden(encoding.last_hidden).flatten(0, 1)
        return (last if encoding.inside is None else encoding.inside.whole(last))[at]
