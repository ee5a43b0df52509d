"""Where the question's token features come from: a text tower, or the language model's own embeddings."""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPModel, PreTrainedTokenizerBase, ProcessorMixin

from visiontrim.core.autocast import lowered
from visiontrim.core.errors import TrimError
from visiontrim.core.signals import Text
from visiontrim.models.checkpoints import loaded, whole
from visiontrim.models.family import Family

Reader = ProcessorMixin | PreTrainedTokenizerBase
"""What reads a question: a tokenizer, or a processor with one."""

READINGS = 64
"""Lists of questions that a tower remembers what it read of."""
MAX_WINDOWS = 16
"""Longest question, in windows of the text tower; the cost of guidance grows with every text token."""


class Guidance(ABC):
    """Questions and vision tokens in one space."""

    of_normalised: ClassVar[bool] = False
    """Whether the space was trained on patches after the encoder's final norm."""

    @abstractmethod
    def encode(self, questions: Sequence[str]) -> Text:
        """Token features of every question, padded to the longest."""

    @abstractmethod
    def embed(self, features: Float[Tensor, "images tokens dim"]) -> Float[Tensor, "images tokens joint"]:
        """Patch features in the space of :meth:`encode`."""


class TextTower(Guidance):
    """The text half of a CLIP model and the two projections into its joint space.

    The last questions are remembered with what was read of them, over all runs, while the weights stay as they are.

    Args:
        model: the CLIP model that the vision encoder of the VLM was taken from. Only its text tower and projections
            are used, in the model's own dtype and on its own device.
        tokenizer: its tokenizer.
    """

    of_normalised = True

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if not all(hasattr(model, part) for part in ("text_model", "text_projection", "visual_projection")):
            raise TrimError(
                f"a {type(model).__name__} is no text tower: give a CLIPModel (with text_model, text_projection and "
                "visual_projection), its name, or its directory"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.context: int = model.text_model.config.max_position_embeddings
        self._readings: OrderedDict[tuple[str, ...], Text] = OrderedDict()
        self._read_with: object = None

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs) -> TextTower:
        """Load a CLIP checkpoint by hub name or directory, for instance ``openai/clip-vit-large-patch14-336``."""
        config = loaded("text tower", name, AutoConfig.from_pretrained)
        if not hasattr(config, "projection_dim"):
            raise TrimError(f"{str(name)!r} is a {config.model_type}, which is no text tower: give a CLIP checkpoint")
        model = whole("text tower", name, CLIPModel.from_pretrained, **kwargs).eval()
        return cls(model, loaded("tokenizer of the text tower", name, AutoTokenizer.from_pretrained))

    def check_fits(self, family: Family) -> None:
        """Raise :class:`TrimError` if the joint space cannot be the one of the VLM's vision encoder."""
        width = self.model.visual_projection.in_features
        if family.vision_width is None:
            raise TrimError(
                f"{type(family).__name__} selects tokens in the language model's space, which no text tower shares: "
                "leave text_tower out and pass processor="
            )
        if width != family.vision_width:
            raise TrimError(
                f"the text tower's visual projection takes features of width {width}, but the vision encoder gives "
                f"{family.vision_width}: use the CLIP checkpoint that the encoder was taken from"
            )

    def encode(self, questions: Sequence[str]) -> Text:
        """See :meth:`Guidance.encode`. A question longer than the tower's context is encoded in windows, none is cut.

        Every token of a window counts, the special ones included, as in the released code of VisionTrim. Questions are
        remembered together, as they were asked: in another company they are rounded otherwise.
        """
        state, key = self._state(), tuple(questions)
        if state is None or state != self._read_with:
            self.forget()
            self._read_with = state
        text = self._readings.get(key)
        if text is None:
            text = self._readings[key] = self._encode(questions)
            if len(self._readings) > READINGS:
                self._readings.popitem(last=False)
        self._readings.move_to_end(key)
        return text

    def forget(self) -> None:
        """Read every question anew from now on."""
        self._readings.clear()

    def _state(self) -> object:
        """What changes with the weights that read, wherever they are; None where nothing tells."""
        model = self.model  # without the vision encoder that may stand beside
        weights = [*model.text_model.parameters(), *model.text_projection.parameters(), model.logit_scale]
        if any(weight.is_inference() for weight in weights):  # count no changes
            return None
        half = tuple(lowered(weights[0].device))
        return (half, *((weight.data_ptr(), weight._version) for weight in weights))

    @torch.inference_mode(False)  # what is remembered serves runs in any mode
    @torch.no_grad()
    def _encode(self, questions: Sequence[str]) -> Text:
        rows = [self._windows(question) for question in questions]
        windows = [torch.tensor(window) for row in rows for window in row]
        weight = self.model.text_projection.weight
        ids = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)
        # padding stands on the right of causal attention, so the tokens before it do not notice, whatever it is
        states = self.model.text_projection(self.model.text_model(input_ids=ids.to(weight.device)).last_hidden_state)
        parts = iter([state[: len(window)] for state, window in zip(states, windows, strict=True)])
        encoded = [torch.cat([next(parts) for _ in row]) for row in rows]
        text = _padded(encoded, scale=float(self.model.logit_scale.detach().exp()))
        ends = torch.zeros_like(text.mask)
        for number, row in enumerate(rows):
            ends[number, [end - 1 for end in itertools.accumulate(map(len, row))]] = True
        return dataclasses.replace(text, ends=ends)

    def _windows(self, question: str) -> list[list[int]]:
        ids = self.tokenizer(question)["input_ids"]
        if len(ids) <= self.context:
            return [ids]
        content = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        first = ids.index(content[0])
        start, end = ids[:first], ids[first + len(content) :]
        room = self.context - len(start) - len(end)
        windows = [start + content[i : i + room] + end for i in range(0, len(content), room)]
        if len(windows) > MAX_WINDOWS:
            raise TrimError(
                f"the question has {len(content)} tokens, over {MAX_WINDOWS} windows of the text tower's "
                f"{self.context}: shorten it, or use guidance=none"
            )
        return windows

    @torch.no_grad()
    def embed(self, features: Tensor) -> Tensor:
        projection = self.model.visual_projection
        return projection(features.to(projection.weight.device, projection.weight.dtype)).to(features.device)


class EmbeddingGuidance(Guidance):
    """The language model's own input embeddings of the question, against the projected vision tokens."""

    scale = 100.0
    """Factor of the cosine. No temperature was trained for this space; 100 is where CLIP's training ends."""

    def __init__(self, family: Family, tokenizer: PreTrainedTokenizerBase) -> None:
        self._family = family
        self._tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, questions: Sequence[str]) -> Text:
        embedding = self._family.language_model.get_input_embeddings()
        limit = getattr(self._family.language_model.config, "max_position_embeddings", None)
        encoded = []
        for question in questions:
            ids = self._tokenizer(question, add_special_tokens=False)["input_ids"]
            if limit is not None and len(ids) > limit:
                raise TrimError(f"the question has {len(ids)} tokens, more than the model's {limit} positions")
            encoded.append(embedding(torch.tensor(ids, device=embedding.weight.device)))
        return _padded(encoded, self.scale)

    @torch.no_grad()
    def embed(self, features: Tensor) -> Tensor:
        return self._family.to_language(features)


def guidance_of(
    family: Family,
    text_tower: str | Path | TextTower | None,
    processor: Reader | None,
) -> Guidance | None:
    """What reads a question for the model of ``family``: the text tower, or the language model's own embeddings.

    Raises :class:`TrimError` for a tower that does not fit.
    """
    if text_tower is not None:
        if isinstance(text_tower, CLIPModel):
            raise TrimError("a CLIPModel alone cannot read text: pass TextTower(model, tokenizer), or its name")
        if not isinstance(text_tower, str | Path | TextTower):
            raise TrimError(
                f"a {type(text_tower).__name__} is no text tower: pass the name or directory of a CLIP checkpoint, or "
                "TextTower(model, tokenizer)"
            )
        if not isinstance(text_tower, TextTower):  # it stays on the CPU, where half precision is slow, and rounds
            text_tower = TextTower.from_pretrained(text_tower, dtype=torch.float32)
        text_tower.check_fits(family)
        return text_tower
    return words_of(family, processor)


def words_of(family: Family, processor: Reader | None) -> Guidance | None:
    """The language model's own embeddings of a question, if there is a tokenizer to read it."""
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    return None if tokenizer is None else EmbeddingGuidance(family, tokenizer)


def _padded(rows: Sequence[Float[Tensor, "text joint"]], scale: float) -> Text:
    tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    if not math.isfinite(scale):
        raise TrimError(f"the text tower's logit scale is {scale}: its checkpoint is damaged")
    return Text(tokens, mask, scale)
