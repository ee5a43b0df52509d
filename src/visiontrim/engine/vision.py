"""The vision stage: where the encoder's features become vision tokens."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Step
from visiontrim.core.view import Signal, SignalName, View
from visiontrim.engine.call import Call, Encoding, Group, Part, Selected
from visiontrim.engine.guidance import Questions
from visiontrim.engine.memory import Memory
from visiontrim.engine.pack import mark_empty, to_slots
from visiontrim.engine.probe import AttentionProbe
from visiontrim.engine.replaced import Replaced
from visiontrim.engine.select import checked_select
from visiontrim.models.family import Family, Kind
from visiontrim.models.layout import Segment, Visual
from visiontrim.ops.attention import attention_columns, attention_received, attention_rows

if TYPE_CHECKING:
    from visiontrim.engine.session import Session

HEARD = ("cls_attention", "cls_attention_wide", "received_attention", "column_attention", "encoder_keys")
"""Signals that come from an attention module of the encoder."""


class VisionStage:
    """Wraps ``get_image_features`` and ``get_video_features``. Features leave in full number, dropped slots marked.

    Tokens are selected before the projector where there is one that maps each by itself, else from the finished
    features. Without a step it only notes which images of which grid were encoded.
    """

    def __init__(
        self, family: Family, step: Step | None, per: str, remember: int, questions: Questions, session: Session
    ) -> None:
        self._family = family
        self._step = step
        self._per = per
        self._memory = Memory(remember) if remember else None
        self._needs: frozenset[Signal] = step.needs if step is not None else frozenset()
        self._questions = questions
        self._session = session

    def attach(self) -> list:
        """Install the hooks and return what removes them again."""
        family, removers = self._family, []
        for kind in family.kinds:
            removers.append(Replaced(family.core, f"get_{kind}_features", functools.partial(self._encode, kind)))
        if family.projector is not None:
            removers.append(family.projector.register_forward_pre_hook(self._before_projector))
            removers.append(family.projector.register_forward_hook(self._after_projector))
        if "joint_last" in self._needs:
            removers.append(family.encoder("image").register_forward_hook(self._after_encoder))
        if self._memory is not None:
            for encoder in {family.encoder(kind) for kind in family.kinds}:
                removers.append(Replaced(encoder, "forward", functools.partial(self._remember, self._memory)))
        for module, signals in self._to_hear().items():
            removers.append(AttentionProbe(module, functools.partial(self._hear, signals)))
        return removers

    def _to_hear(self) -> dict[Any, list[Signal]]:
        """The attention modules that signals come from, each with its signals."""
        modules: dict[Any, list[Signal]] = {}
        for kind, signal in itertools.product(self._family.kinds, sorted(self._needs, key=str)):
            name, layer = signal if isinstance(signal, tuple) else (signal, self._family.scored(kind))
            attentions = self._family.attentions(kind)
            if name == "cls_attention" and not self._family.special_tokens:  # without [CLS] there is this instead
                name = "received_attention"
                signal = (name, layer) if isinstance(signal, tuple) else name
            absent = name == "cls_attention_wide" and not self._family.special_tokens
            if name not in HEARD or absent or not attentions:
                continue
            if not -len(attentions) <= layer < len(attentions):
                raise TrimError(
                    f"{self._step} reads {name} of encoder layer {layer}, but the encoder has {len(attentions)} layers"
                )
            signals = modules.setdefault(attentions[layer], [])
            signals += [signal] if signal not in signals else []
        return modules

    def _encode(self, kind: Kind, encode: Callable, *args, **kwargs):
        call: Call | None = self._session.call
        if call is None or call.encoding is not None:  # the model's video function may call the one for images
            return encode(*args, **kwargs)
        bound = inspect.signature(encode).bind_partial(*args, **kwargs).arguments
        arguments = {key: value for key, value in bound.items() if key != "kwargs"} | bound.get("kwargs", {})
        call.encoding = encoding = Encoding(kind, arguments)
        try:
            output = encode(*args, **kwargs)
            parts = output.pooler_output
            lengths = [part.shape[:-1].numel() for part in parts]
            features = parts.flatten(0, -2) if isinstance(parts, Tensor) else torch.cat(list(parts))
            if self._family.projector is None:
                encoding.selected = self._select(call, encoding, features, lengths)
                if encoding.selected is not None:
                    kept = encoding.selected
                    features = to_slots(kept.features[None], kept.slots[None], len(features))[0]
        finally:
            call.encoding = None
        if encoding.selected is not None:
            features = mark_empty(features, encoding.selected.blank)
            output.pooler_output = features.view_as(parts) if isinstance(parts, Tensor) else features.split(lengths)
        return output

    def _remember(self, memory: Memory, encode: Callable, *args, **kwargs):
        call: Call | None = self._session.call
        if call is None or call.encoding is None:
            return encode(*args, **kwargs)
        return memory.encode(encode, call.encoding.heard, args, kwargs)

    def _before_projector(self, module, args):
        call: Call | None = self._session.call
        if call is None or call.encoding is None:
            return None
        (features,) = args
        call.encoding.selected = self._select(call, call.encoding, features, None)
        return args if call.encoding.selected is None else (call.encoding.selected.features[None],)

    def _after_projector(self, module, args, output):
        call: Call | None = self._session.call
        if call is None or call.encoding is None or call.encoding.selected is None:
            return None
        kept = call.encoding.selected
        if kept.projected:
            output = output.clone()
        for start, rows in kept.projected:
            output[0, start : start + len(rows)] = rows.to(output.dtype)
        return to_slots(output, kept.slots[None], kept.shape.numel()).view(*kept.shape, -1)

    def _after_encoder(self, module, args, output) -> None:
        call: Call | None = self._session.call
        if call is not None and call.encoding is not None:
            call.encoding.last_hidden = output.last_hidden_state

    def _hear(self, signals: list[Signal], query: Tensor, key: Tensor, scaling: float | None) -> None:
        call: Call | None = self._session.call
        if call is None or call.encoding is None:
            return
        encoding, special = call.encoding, self._family.special_tokens
        with self._session.clock("method"):
            for q, k in _by_chunk(query, key, self._family.chunks(encoding.kind, encoding.arguments)):
                for signal in signals:
                    value = _signal(_name(signal), q, k, scaling, special)
                    encoding.heard.setdefault(signal, []).append(value.flatten(0, 1))

    def _select(
        self, call: Call, encoding: Encoding, tokens: Float[Tensor, "*shape dim"], lengths: list[int] | None
    ) -> Selected | None:
        """Note the groups of what is encoded; with a step, select among the ``tokens`` of all images."""
        family, features = self._family, tokens.flatten(0, -2)
        visuals = family.visuals(encoding.kind, encoding.arguments, lengths)
        source = family.source(encoding.kind, encoding.arguments)
        source = None if source is None else source.to(tokens.device)
        placed = list(self._placed(call, encoding, visuals))
        step, changed = self._step, False
        if step is None:
            call.groups += [group for group, _, _ in placed]
            return None
        signals = self._signals(encoding)
        slots, values, blank, projected, rows = [], [], [], [], 0
        for old, index, marks in placed:
            at, marks_at = (index, marks) if source is None else (source[index], source[marks])
            with self._session.clock("method"), torch.no_grad():
                here: dict[Signal, Tensor] = {signal: value[index] for signal, value in signals.items()}
                keep = checked_select(step, self._view(call, encoding, old, features[at], at, here))
            group = old.after(keep, step.site)
            call.groups.append(group)
            slots.append(at.gather(1, keep.index.sort(-1).values).flatten())
            merged = features[at.gather(1, keep.index)] if keep.features is None else keep.features
            if keep.projected is not None and family.projector is None:
                merged = keep.projected
            elif keep.projected is not None:
                projected.append((rows, keep.projected.flatten(0, 1)))
            values.append(merged.flatten(0, 1))
            changed |= group.kept < group.total or keep.features is not None or keep.projected is not None
            if group.marks_beside(group.kept):
                stay = marks_at[marks_at >= 0]
                slots.append(stay)
                values.append(features[stay])
            else:
                blank.append(marks.flatten())
            rows = sum(map(len, values))
        if not changed:
            return None
        none = torch.zeros(0, dtype=torch.long, device=tokens.device)
        values = torch.cat([value.to(tokens.dtype) for value in values])
        return Selected(torch.cat(slots), values, torch.cat([none, *blank]), tokens.shape[:-1], projected)

    def _placed(
        self, call: Call, encoding: Encoding, visuals: list[Visual]
    ) -> Iterator[tuple[Group, Int[Tensor, "images tokens"], Int[Tensor, "images marks"]]]:
        """The segments by group, each group with the places of its tokens and marks among all placeholders."""
        device = call.input_ids.device
        placeholders = self._family.placeholders(call.input_ids, encoding.kind)
        owners = call.owners(placeholders, visuals)
        starts = list(itertools.accumulate((visual.length for visual in visuals), initial=0))
        number = 1 + max((number for group in call.groups for number in group.numbers), default=-1)
        members: dict[tuple[Part, int], list[tuple[int, int, Segment]]] = {}
        for tiles in self._images(owners, placeholders):
            whole, before = [visuals[tile] for tile in tiles], 0
            for tile, visual in zip(tiles, whole, strict=True):
                for segment, budget, start in visual.split(self._per):
                    if len(tiles) > 1 and self._per == "image":
                        budget, start = sum(tile.total for tile in whole), before + start
                    part = Part(encoding.kind, segment.grid, budget, start, segment.marks_stay)
                    members.setdefault((part, len(segment.marks)), []).append((number, tile, segment))
                before += visual.total
            number += 1
        for (part, _), segments in members.items():
            start = torch.tensor([starts[tile] for _, tile, _ in segments])[:, None]
            offset = torch.tensor([owners[tile][1] for _, tile, _ in segments])[:, None]
            index = torch.stack([segment.index for _, _, segment in segments])
            marks = torch.stack([segment.marks for _, _, segment in segments])
            group = Group.uncompressed(
                tuple(owners[tile][0] for _, tile, _ in segments),
                tuple(number for number, _, _ in segments),
                part,
                (offset + index).to(device),
                (offset + marks).to(device),
            )
            yield group, (start + index).to(device), (start + marks).to(device)

    def _images(self, owners: list[tuple[int, int]], placeholders: Bool[Tensor, "batch tokens"]) -> list[list[int]]:
        """What was encoded, by image: several where the family writes the tiles of an image without text between."""
        if not self._family.adjoining:
            return [[number] for number in range(len(owners))]
        columns = [row.nonzero()[:, 0].tolist() for row in placeholders]
        images: list[list[int]] = []
        for number, (row, first) in enumerate(owners):
            if first > 0 and columns[row][first] == columns[row][first - 1] + 1:
                images[-1].append(number)
            else:
                images.append([number])
        return images

    def _signals(self, encoding: Encoding) -> dict[Signal, Tensor]:
        """What was heard, as the placeholders would have it."""
        with self._session.clock("method"), torch.no_grad():
            return {
                signal: self._family.pooled(encoding.kind, encoding.arguments, torch.cat(parts)[:, None])[:, 0]
                for signal, parts in encoding.heard.items()
            }

    def _view(
        self,
        call: Call,
        encoding: Encoding,
        group: Group,
        features: Float[Tensor, "images tokens dim"],
        at: Int[Tensor, "images tokens"],
        signals: dict[Signal, Tensor],
    ) -> View:
        family, questions = self._family, self._questions
        guidance, batch, device = questions.guidance, call.input_ids.shape[0], features.device
        joint = text = words = None
        if guidance is not None and "text" in self._needs:
            text = questions.for_rows(guidance, group.rows, batch, device)
        if guidance is not None and text is not None:
            if encoding.last_hidden is not None:
                joint = guidance.embed(family.normalised_last_hidden(encoding.last_hidden).flatten(0, 1)[at])
            elif "joint_normalised" in self._needs and guidance.of_normalised:
                joint = guidance.embed(family.normalised(features))
            else:
                joint = guidance.embed(features)
        if "words" in self._needs:
            if questions.asked and questions.words is None:
                raise TrimError(
                    f"{self._step} compares vision tokens with the language model's own embeddings of the question: "
                    "pass processor= so that the question can be read"
                )
            words = questions.for_rows(questions.words, group.rows, batch, device)
        signals = {
            signal: value.transpose(1, 2) if _name(signal) == "encoder_keys" else value
            for signal, value in signals.items()
        }
        return View(
            features=features,
            coordinates=group.coordinates,
            grid=group.grid,
            entered=group.total,
            num_layers=len(family.language_model.layers),
            whole=group.part.whole,
            before=group.part.before,
            cls_attention=signals.get("cls_attention"),
            cls_attention_wide=signals.get("cls_attention_wide"),
            received_attention=signals.get("received_attention"),
            column_attention=signals.get("column_attention"),
            encoder_keys=signals.get("encoder_keys"),
            projected=family.to_language(features) if "projected" in self._needs else None,
            joint=joint,
            text=text,
            words=words,
            at={signal: value for signal, value in signals.items() if isinstance(signal, tuple)},
        )


def _signal(
    name: SignalName,
    query: Float[Tensor, "images heads tokens dim"],
    key: Float[Tensor, "images heads tokens dim"],
    scaling: float | None,
    special: int,
) -> Float[Tensor, "images patches *rest"]:
    """What an attention module says by its queries and keys."""
    match name:
        case "cls_attention":
            return attention_rows(query[:, :, :1], key, scaling=scaling).mean(1)[:, 0, special:]
        case "cls_attention_wide":
            query, key = (side.transpose(1, 2).flatten(2)[:, None] for side in (query[:, :, :1], key))
            return attention_rows(query, key)[:, 0, 0, special:]
        case "column_attention":
            return attention_columns(query, key, scaling=scaling, skip=special)
        case "encoder_keys":
            return key[:, :, special:].transpose(1, 2)
        case _:
            return attention_received(query, key, scaling=scaling, skip=special)


def _by_chunk(query: Tensor, key: Tensor, chunks: list[int] | None) -> Iterable[tuple[Tensor, Tensor]]:
    """Queries and keys of what attends to each other, where a whole sequence of images comes at once."""
    if chunks is None or query.shape[2] != sum(chunks):
        return [(query, key)]
    return zip(query.split(chunks, dim=2), key.split(chunks, dim=2), strict=True)


def _name(signal: Signal) -> SignalName:
    return signal[0] if isinstance(signal, tuple) else signal
