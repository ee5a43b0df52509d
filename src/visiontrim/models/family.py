"""What the engine must know about a family of models, and nothing else."""

from __future__ import annotations

import difflib
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from visiontrim.core.errors import TrimError
from visiontrim.models.layout import Visual

ENTRY_POINTS = "visiontrim.models"

Kind = Literal["image", "video"]
Arguments = Mapping[str, Any]
"""What ``get_image_features`` or ``get_video_features`` was called with, by name."""


class Family(ABC):
    """Facts about one model. A subclass names its parts; construction refuses what cannot work, with the reason.

    ``get_image_features`` and ``get_video_features`` of :attr:`core` give the features that replace placeholders.
    Tokens are selected there, or before the :attr:`projector` where that maps every token by itself.
    """

    model_types: ClassVar[tuple[str, ...]]
    """Values of ``config.model_type`` that the family covers."""
    checkpoints: ClassVar[str]
    """What people know the family by."""
    scores: ClassVar[str] = "none"
    """What of the encoder's attention can rank tokens."""
    unit: ClassVar[str] = "image"
    """What ``keep`` counts in, see ``per`` of :func:`visiontrim.trim`."""
    video: ClassVar[bool] = False
    """Whether the model takes videos as such."""
    text_tower: ClassVar[bool] = False
    """Whether tokens are selected in the space of a CLIP encoder, where a CLIP text tower can guide."""
    mrope: ClassVar[bool] = False
    """Whether a position is several numbers (time, row, column), so that survivors can only keep their own."""
    bidirectional: ClassVar[bool] = False
    """Whether the language model lets the tokens of an image attend to each other in both directions."""
    adjoining: ClassVar[bool] = False
    """Whether images without text between them are tiles of one image."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    @classmethod
    def supports(cls) -> dict[str, Any]:
        """What works with the family, for tables; ``tests/test_families.py`` runs each cell."""
        return {
            "checkpoints": cls.checkpoints,
            "vision_stage": True,
            "language_stage": not cls.bidirectional,
            "guided_by": ["text tower", "embeddings"] if cls.text_tower else ["embeddings"],
            "scores": cls.scores,
            "keep_counts_per": cls.unit,
            "video": cls.video,
            "several_images": True,
            "batch": True,
            "turns": not cls.bidirectional,
        }

    @property
    def core(self) -> Any:
        """The module that calls encoder, projector and language model, and sees ``input_ids``."""
        return self.model.model

    @property
    def language_model(self) -> Any:
        """The text model without its head; has ``layers``, ``rotary_emb`` and ``embed_tokens``."""
        return self.core.language_model

    @abstractmethod
    def encoder(self, kind: Kind) -> Any:
        """The vision encoder."""

    @property
    def projector(self) -> Any | None:
        """A module, called with features [..., dim], that maps every token by itself; None where there is none."""
        return None

    @property
    def final_norm(self) -> Any:
        """The norm after the last decoder layer."""
        return self.language_model.norm

    def decoder_attention(self, layer: int) -> Any:
        """The attention module of decoder layer ``layer``."""
        return self.language_model.layers[layer].self_attn

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What the model takes besides text."""
        return ("image", "video") if self.video else ("image",)

    def placeholders(
        self, input_ids: Int[Tensor, "batch tokens"], kind: Kind | None = None
    ) -> Bool[Tensor, "batch tokens"]:
        """Which of ``input_ids`` stand for tokens of ``kind``, or of any kind."""
        config = self.model.config
        ids = [getattr(config, f"{name}_token_id") for name in ((kind,) if kind else self.kinds)]
        return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))

    def attentions(self, kind: Kind) -> Sequence[Any]:
        """The attention modules of the encoder's layers, in order; () if they cannot be listened to."""
        return ()

    def scored(self, kind: Kind) -> int:
        """Number of the layer in :meth:`attentions` whose output becomes vision tokens."""
        return len(self.attentions(kind)) - 1

    @property
    def special_tokens(self) -> int:
        """Tokens before the patches in the encoder's sequence: 1 with [CLS], else 0."""
        return 0

    def chunks(self, kind: Kind, arguments: Arguments) -> list[int] | None:
        """Patches that attend to each other, one count per chunk, where the encoder gets all images in one sequence.

        None: each image (tile, frame) is a row of a batch of its own.
        """
        return None

    @abstractmethod
    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        """The images or videos of a call, in the order of their placeholders.

        ``lengths`` are the sizes of the tensors in which the features come, None where a projector is still to come.
        """

    def source(self, kind: Kind, arguments: Arguments) -> Int[Tensor, " placeholders"] | None:
        """For every placeholder the token at the projector's input that it comes from, -1 for none; None: the same."""
        return None

    def pooled(self, kind: Kind, arguments: Arguments, values: Float[Tensor, "patches *rest"]) -> Tensor:
        """Values of the encoder's patches (without special ones), as the placeholders would have them."""
        source = self.source(kind, arguments)
        return values if source is None else values[source.clamp(min=0)]

    @property
    def deepstack(self) -> str | None:
        """The function of the language model that adds features of earlier encoder layers between its first layers."""
        return None

    @property
    def vision_width(self) -> int | None:
        """Width of the encoder's features, if tokens are selected in them."""
        return None

    def normalised_last_hidden(
        self, last_hidden_state: Float[Tensor, "images sequence dim"]
    ) -> Float[Tensor, "images tokens dim"]:
        """The patches of the encoder's last layer after its final norm, which the joint space was trained on."""
        return last_hidden_state[:, self.special_tokens :]

    def normalised(self, features: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        """Selected features after the encoder's final norm, if there is one."""
        return features

    def to_language(self, features: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape hidden"]:
        """Selected features in the space of the language model's embeddings."""
        # forward() itself: the engine's hooks on the projector must not see this call
        return features if self.projector is None else self.projector.forward(features)


FamilyType = TypeVar("FamilyType", bound=type[Family])
_registered: dict[str, type[Family]] = {}


def register_family(cls: FamilyType) -> FamilyType:
    """Class decorator: use the family for its ``model_types``."""
    for model_type in cls.model_types:
        _registered[model_type] = cls
    return cls


@functools.cache
def _load_plugins() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        point.load()


def list_families() -> dict[str, type[Family]]:
    """All families by ``model_type``: the package's own and those of plug-ins (entry points ``visiontrim.models``)."""
    _load_plugins()
    return dict(sorted(_registered.items()))


def family_of(model: PreTrainedModel) -> Family:
    """The facts about ``model``. Raises :class:`TrimError` for a family that is not known."""
    known = list_families()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in known:
        close = difflib.get_close_matches(str(model_type), known, n=1)
        hint = f", did you mean to load it as {close[0]!r}?" if close else ""
        raise TrimError(
            f"{type(model).__name__} (model_type {model_type!r}) is not supported{hint}: known are "
            f"{', '.join(known)}; CONTRIBUTING.md shows how to add a family"
        )
    return known[model_type](model)
