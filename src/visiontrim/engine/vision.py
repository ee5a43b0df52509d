"""The vision stage: between the encoder and the projector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Step
from visiontrim.core.view import View
from visiontrim.engine.call import Call, Encoding, Group
from visiontrim.engine.guidance import Questions
from visiontrim.engine.pack import gather, to_slots
from visiontrim.engine.probe import AttentionProbe
from visiontrim.engine.select import checked_select
from visiontrim.models.family import Family
from visiontrim.ops.attention import attention_received, attention_rows

if TYPE_CHECKING:
    from visiontrim.engine.session import Session


class VisionStage:
    """Hooks on encoder and projector. Features leave in full number, dropped slots marked (see :mod:`.pack`).

    Without a step it only notes how many images of which grid were encoded.
    """

    def __init__(self, family: Family, step: Step | None, questions: Questions, session: Session) -> None:
        self._family = family
        self._step = step
        self._needs = step.needs if step is not None else frozenset()
        self._questions = questions
        self._session = session

    def attach(self) -> list:
        """Install the hooks and return what removes them again."""
        family = self._family
        removers = [
            family.vision_tower.register_forward_pre_hook(self._before_encoder, with_kwargs=True),
            family.vision_tower.register_forward_hook(self._after_encoder),
            family.projector.register_forward_pre_hook(self._before_projector),
            family.projector.register_forward_hook(self._after_projector),
        ]
        if self._needs & {"cls_attention", "received_attention"}:
            removers.append(AttentionProbe(family.scored_attention, self._hear_attention))
        return removers

    def _before_encoder(self, module, args, kwargs) -> None:
        call = self._session.call
        if call is not None:
            pixel_values = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
            call.encoding = Encoding(self._family.grid(pixel_values))

    def _hear_attention(self, query: Tensor, key: Tensor, scaling: float | None) -> None:
        call = self._session.call
        if call is None or call.encoding is None:
            return
        special, signals = self._family.special_tokens, call.encoding.signals
        from_cls = special > 0 and "cls_attention" in self._needs
        with self._session.clock("method"):
            if from_cls:
                rows = attention_rows(query[:, :, :1], key, scaling=scaling)
                signals["cls_attention"] = rows.mean(1)[:, 0, special:]
            if not from_cls or "received_attention" in self._needs:
                signals["received_attention"] = attention_received(query, key, scaling=scaling, skip=special)

    def _after_encoder(self, module, args, output) -> None:
        call = self._session.call
        if call is not None and call.encoding is not None and "joint_last" in self._needs:
            call.encoding.last_hidden = output.last_hidden_state

    def _before_projector(self, module, args):
        call: Call | None = self._session.call
        if call is None or call.encoding is None:
            return None
        (features,) = args
        encoding = call.encoding
        images, tokens = features.shape[:2]
        rows = call.rows_of_images(self._family.placeholders(call.input_ids), [tokens] * images)
        group = Group.uncompressed(rows, encoding.grid, features.device)
        if tokens != group.total:
            raise TrimError(
                f"the encoder gives {tokens} vision tokens for a grid of {' x '.join(map(str, group.grid))} patches: "
                "this variant of the model is not supported"
            )
        if self._step is not None:
            with self._session.clock("method"), torch.no_grad():
                keep = checked_select(self._step, self._view(call, encoding, group, features))
            group = group.after(keep, self._step.site)
            if keep.index.shape[1] < group.total or keep.features is not None:
                encoding.slots = keep.index.sort(-1).values
                kept = gather(features, keep.index) if keep.features is None else keep.features.to(features.dtype)
                args = (kept,)
        call.groups.append(group)
        return args

    def _after_projector(self, module, args, output):
        call = self._session.call
        if call is None or call.encoding is None:
            return None
        encoding, call.encoding = call.encoding, None
        if encoding.slots is None:
            return None
        frames, rows, columns = encoding.grid
        return to_slots(output, encoding.slots, frames * rows * columns)

    def _view(self, call: Call, encoding: Encoding, group: Group, features: Tensor) -> View:
        guidance = self._questions.guidance
        joint = text = None
        if guidance is not None and "text" in self._needs:
            text = self._questions.for_rows(group.rows, call.input_ids.shape[0], features.device)
            if text is not None:
                last = encoding.last_hidden
                joint = guidance.embed(features if last is None else self._family.normalised_last_hidden(last))
        return View(
            features=features,
            coordinates=group.coordinates,
            grid=group.grid,
            entered=group.total,
            num_layers=len(self._family.language_model.layers),
            joint=joint,
            text=text,
            cls_attention=encoding.signals.get("cls_attention"),
            received_attention=encoding.signals.get("received_attention"),
        )
