"""What the engine must know about a family of models, and nothing else."""

from __future__ import annotations

import difflib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from visiontrim.core.errors import TrimError

ENTRY_POINTS = "visiontrim.models"


class Family(ABC):
    """Facts about one model. A subclass names its parts; construction refuses what cannot work, with the reason."""

    model_types: ClassVar[tuple[str, ...]]
    """Values of ``config.model_type`` that the family covers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    @property
    @abstractmethod
    def core(self) -> Any:
        """The module that calls encoder, projector and language model, and sees ``input_ids``."""

    @property
    @abstractmethod
    def vision_tower(self) -> Any:
        """The encoder: called with ``pixel_values``."""

    @property
    @abstractmethod
    def special_tokens(self) -> int:
        """Tokens before the patches in the encoder's sequence: 1 with [CLS], else 0."""

    @property
    @abstractmethod
    def projector(self) -> Any:
        """Called with the selected patch features [images, tokens, dim]; maps every token by itself."""

    @property
    @abstractmethod
    def language_model(self) -> Any:
        """The text model without its head; has ``layers``, ``rotary_emb`` and ``embed_tokens``."""

    @property
    def final_norm(self) -> Any:
        """The norm after the last decoder layer."""
        return self.language_model.norm

    def decoder_attention(self, layer: int) -> Any:
        """The attention module of decoder layer ``layer``."""
        return self.language_model.layers[layer].self_attn

    @property
    @abstractmethod
    def placeholder_ids(self) -> tuple[int, ...]:
        """Token ids that stand for one vision token each."""

    def placeholders(self, input_ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Which of ``input_ids`` stand for vision tokens."""
        return torch.isin(input_ids, torch.tensor(self.placeholder_ids, device=input_ids.device))

    @property
    @abstractmethod
    def vision_width(self) -> int:
        """Width of the patch features."""

    @property
    @abstractmethod
    def scored_attention(self) -> Any:
        """The attention module of the encoder layer whose output is projected."""

    @abstractmethod
    def grid(self, pixel_values: Float[Tensor, "images channels height width"]) -> tuple[int, int, int]:
        """(frames, rows, columns) of the patches of one image."""

    @abstractmethod
    def normalised_last_hidden(
        self, last_hidden_state: Float[Tensor, "images sequence dim"]
    ) -> Float[Tensor, "images tokens dim"]:
        """The patches of the encoder's last layer after its final norm, which the joint space was trained on."""


_registered: dict[str, Callable[[PreTrainedModel], Family]] = {}


def register_family(cls: type[Family]) -> type[Family]:
    """Class decorator: use the family for its ``model_types``."""
    for model_type in cls.model_types:
        _registered[model_type] = cls
    return cls


@functools.cache
def _load_plugins() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        point.load()


def family_of(model: PreTrainedModel) -> Family:
    """The facts about ``model``. Raises :class:`TrimError` for a family that is not known."""
    _load_plugins()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _registered:
        close = difflib.get_close_matches(str(model_type), _registered, n=1)
        hint = f", did you mean to load it as {close[0]!r}?" if close else ""
        raise TrimError(
            f"{type(model).__name__} (model_type {model_type!r}) is not supported{hint}: known are "
            f"{', '.join(sorted(_registered))}; CONTRIBUTING.md shows how to add a family"
        )
    return _registered[model_type](model)
