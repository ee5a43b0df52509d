"""The vision stage: where the encoder's features become vision tokens.

It knows what was encoded and asks a step which tokens stay; it does not know the language model.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Step
from visiontrim.core.signals import EncoderSignals, Key, TextSignals, name_of
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
from visiontrim.models.family import Family, Kind


class VisionStage:
    """Wraps ``get_image_features`` and ``get_video_features``. Features leave in full number, dropped slots marked.

    Tokens are selected before the projector where there is one that maps each by itself, else from the finished
    features. Without a step it only notes which images of which grid were encoded.
    """

    def __init__(
        self,
        family: Family,
        step: Step | None,
        per: str,
        apart: bool,
        memory: Memory | None,
        inside: Mapping[int, Step],
        questions: Questions,
        context: Context,
    ) -> None:
        self._family = family
        self._step = step
        self._per = per
        self._apart = apart
        self._memory = memory
        needs = frozenset() if step is None else step.needs
        self._under = needs, tuple(inside.items())
        """What a remembered encoding must have been made for."""
        self._of_encoder, self._of_text = EncoderSignals.among(needs), TextSignals.among(needs)
        if step is not None:
            heard = {EncoderSignals.spelled(name) for name in AT_OUTPUT}
            others = {TextSignals.spelled(name) for name in TextSignals.names} | {
                EncoderSignals.spelled(name) for name in ("projected", "sensitivity")
            }
            check_needs(step, heard | others, "at the encoder's output", layers=heard)
        self._questions = questions
        self._context = context

    def attach(self) -> list:
        """Install the hooks and return what removes them again."""
        family, removers = self._family, []
        for kind in family.kinds:
            removers.append(Replaced(family.core, f"get_{kind}_features", functools.partial(self._encode, kind)))
        if family.projector is not None:
            removers.append(family.projector.register_forward_pre_hook(self._before_projector))
            removers.append(family.projector.register_forward_hook(self._after_projector))
        if "joint_last" in self._of_text and family.projector is not None:  # else tokens are no longer its patches
            removers.append(family.encoder("image").register_forward_hook(self._after_encoder))
        if self._memory is not None:
            for encoder in {family.encoder(kind) for kind in family.kinds}:
                removers.append(Replaced(encoder, "forward", functools.partial(self._remember, self._memory)))
        for module, signals in self._to_hear().items():
            removers.append(AttentionProbe(module, functools.partial(self._hear, signals)))
        return removers

    def _to_hear(self) -> dict[Any, list[Key]]:
        """The attention modules that signals come from, each with its signals."""
        modules: dict[Any, list[Key]] = {}
        for kind, signal in itertools.product(self._family.kinds, sorted(self._of_encoder, key=str)):
            name, layer = signal if isinstance(signal, tuple) else (signal, self._family.scored(kind))
            attentions = self._family.attentions(kind)
            if name == "cls_attention" and not self._family.special_tokens:  # without [CLS] there is this instead
                name = "received_attention"
                signal = (name, layer) if isinstance(signal, tuple) else name
            absent = name == "cls_attention_wide" and not self._family.special_tokens
            if name not in AT_OUTPUT or absent or not attentions:
                continue
            if not -len(attentions) <= layer < len(attentions):
                raise TrimError(
                    f"{self._step} reads {name} of encoder layer {layer}, but the encoder has {len(attentions)} layers"
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
            together = check_encoded(output, function, family.features)
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
            setattr(output, family.features, features.view_as(together) if isinstance(together, Tensor) else changed)
        return output

    def _remember(self, memory: Memory, encode: Callable, *args, **kwargs):
        call: Call | None = self._context.call
        if call is None or call.encoding is None:
            return encode(*args, **kwargs)
        return memory.encode(encode, call.encoding, self._under, args, kwargs)

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
        segments = encoding.placed or placed(call, encoding, family, self._per, self._apart, lengths)
        inside, step, changed = encoding.inside, self._step, False
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
        family = self._family
        seen = {key: value.transpose(1, 2) if name_of(key) == "keys" else value for key, value in signals.items()}
        if "projected" in self._of_encoder:
            seen["projected"] = family.to_language(features)
        if "sensitivity" in self._of_encoder and family.projector is not None:
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
        family, questions, asked, seen = self._family, self._questions, self._of_text, {}
        if not questions.asked:
            return TextSignals()
        batch, device = call.rows, features.device
        if "words" in asked:
            if questions.words is None:
                raise TrimError(
                    f"{self._step} compares vision tokens with the language model's own embeddings of the question: "
                    "pass processor= so that the question can be read"
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
