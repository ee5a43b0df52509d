"""The vision stage by itself: these images, these questions, this method; what is kept, and where it belongs.

For engines that run the language model themselves; :class:`~.session.Session` hangs the same stages into a whole model.
It knows the module that holds encoder and projector, with or without a language model's head around it; it does not
know prompts, caches and decoding.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method
from visiontrim.core.trace import ImageTrace
from visiontrim.engine.call import Call
from visiontrim.engine.context import Clock, Context
from visiontrim.engine.contract import check_encoded
from visiontrim.engine.encoder import EncoderStage
from visiontrim.engine.groups import Group
from visiontrim.engine.guidance import Questions
from visiontrim.engine.memory import Memory
from visiontrim.engine.ranks import Ranks
from visiontrim.engine.sites import Per, Sites
from visiontrim.engine.vision import VisionStage
from visiontrim.images import deviations
from visiontrim.models.family import Kind, family_of, unwrapped
from visiontrim.models.text import Reader, TextTower, guidance_of, words_of


@dataclass(frozen=True)
class Entered:
    """What goes on of one image or video."""

    features: Float[Tensor, "kept width"]
    """In the language model's space, in the order of its placeholders."""
    index: Int[Tensor, " kept"]
    """Which of its placeholders each stands for, marks such as newlines included; on the device of the features."""
    total: int
    """Its placeholders before."""
    deepstack: tuple[Float[Tensor, "kept width"], ...]
    """What is added to them after the first decoder layers (Qwen3-VL); () elsewhere."""
    parts: tuple[ImageTrace, ...]
    """What every step left of it, in terms of its grids."""


class Entrance:
    """A method before the language model, called with images instead of being hung into a run.

    Several on one model do not disturb each other: each acts in its own calls alone.

    Args:
        core: a vision-language model of transformers, or its base model without the language model's head.
        method: a method, or several, that acts before the language model.
        text_tower: see :func:`visiontrim.trim`.
        processor: see :func:`visiontrim.trim`.
        per: see :func:`visiontrim.trim`.
        memory: what remembers the encoder's outputs; several entrances of one model may share it. None: nothing does.
        clock: times the method's own work.
        ranks: the processes that share the encoder, each of which calls its own entrance; None: it is in this one.

    Raises:
        TrimError: for a method that acts inside the language model, or needs its positions changed.
    """

    def __init__(
        self,
        core: Any,
        method: Method,
        *,
        text_tower: str | Path | TextTower | None = None,
        processor: Reader | None = None,
        per: Per = "image",
        memory: Memory | None = None,
        clock: Clock | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._family = family = family_of(unwrapped(core))
        self.sites = sites = Sites.of(family, method, between=False)
        """Where its steps stand."""
        if sites.language or method.decoding is not None:
            inside = min(sites.language, default=method.decoding and method.decoding.layer)
            raise TrimError(
                f"{method} acts from decoder layer {inside} on, but here it is chosen what enters the language model, "
                "and nothing later: use its vision stage, or vt.trim()"
            )
        if method.positions in ("members", "unmerged"):
            raise TrimError(
                f"{method} gives merged tokens the positions of their members, which only vt.trim() can: use another "
                "method"
            )
        self._questions = Questions(guidance_of(family, text_tower, processor), words_of(family, processor), None)
        self._context = context = Context(family.model, lambda trace: None, clock, ranks)
        deviation = deviations(getattr(processor, "image_processor", None))
        self._stages = (
            EncoderStage(family, sites.encoder, per, sites.apart, deviation, context),
            VisionStage(family, dict.fromkeys(family.kinds, sites), per, memory, self._questions, context),
        )
        self._one_at_a_time = threading.Lock()

    def __call__(
        self,
        kind: Kind = "image",
        *,
        questions: str | Sequence[str] | None = None,
        tiles: Sequence[int] = (),
        **arguments: Any,
    ) -> list[Entered]:
        """What is kept of the images or videos of one call of the encoder, in their order.

        Args:
            kind: what they are.
            questions: one for all, or one for each, for methods that are guided by text.
            tiles: where several pictures make one image without the model saying so (InternVL, Idefics), how many each
                image has.
            arguments: those of ``get_image_features`` or ``get_video_features``: ``pixel_values``, grids, sizes.
        """
        family = self._family
        encode = f"get_{kind}_features"
        ids = torch.zeros(0, 0, dtype=torch.long, device=_device(arguments))
        call = Call(None, ids, samples=0, forward_ids=ids, alone=True, tiles=tiles)
        with self._one_at_a_time:
            self._questions.asked = questions
            removers: list[Any] = []
            self._context.begin(call)
            try:
                for stage in self._stages:
                    removers += stage.attach()
                output = getattr(family.core, encode)(**arguments)
            finally:
                self._context.end()
                while removers:
                    removers.pop().remove()
        features = _joined(check_encoded(output, encode, family.field(kind)))
        deepstack = [_joined(part) for part in getattr(output, "deepstack_features", None) or ()]
        return self._entered(call.groups, features, deepstack, len(call.tiles))

    def _entered(
        self, groups: list[Group], features: Float[Tensor, "total width"], deepstack: list[Tensor], images: int
    ) -> list[Entered]:
        layers, start, entered = len(self._family.language_model.layers), 0, []
        for row in range(images):
            own = [(group, image) for group in groups for image, owner in enumerate(group.rows) if owner == row]
            left, total, parts = [], 0, []
            for group, image in own:
                left.append(group.places[image][group.now.index[image]])
                left.append(group.marks[image][: group.marks_beside(group.kept)])
                total += group.total + group.marks.shape[1]
                parts.append(group.trace(image, row, layers))
            index = torch.cat(left).sort().values
            kept = [values[start + index] for values in (features, *deepstack)]
            parts.sort(key=lambda part: part.before)
            entered.append(Entered(kept[0], index, total, tuple(kept[1:]), tuple(parts)))
            start += total
        return entered


def _device(arguments: dict[str, Any]) -> torch.device:
    return next((value.device for value in arguments.values() if isinstance(value, Tensor)), torch.device("cpu"))


def _joined(features: Any) -> Float[Tensor, "total width"]:
    """Features of all pictures one after the other, as a model gives them: a tensor, or one for each."""
    parts = [features] if isinstance(features, Tensor) else features
    return torch.cat([part.flatten(0, -2) for part in parts])
