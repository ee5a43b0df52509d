"""What the engine must know about a family of models, and nothing else."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from inspect import Parameter, signature
from typing import Any, ClassVar, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from visiontrim.core.errors import TrimError
from visiontrim.models.layout import Grid, Kind, Packing, Picture, Visual
from visiontrim.models.parts import ATTENTIONS, FINAL_NORMS, INPUT_NORMS, TEXT_MODELS, first_of
from visiontrim.models.refused import REFUSED

ENTRY_POINTS = "visiontrim.models"

RECURRENT = ("linear_attention", "conv")
"""Types of decoder layers, as configurations name them, that carry a state from token to token."""

Arguments = Mapping[str, Any]
"""What ``get_image_features``, ``get_video_features`` or ``get_audio_features`` was called with, by name; ``pixels``
whatever theirs is called (``pixel_values``, ``pixel_values_videos``, ...), which differs between releases."""


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
    sound: ClassVar[bool] = False
    """Whether the model takes sound, whose tokens a run can reduce as well."""
    text_tower: ClassVar[bool] = False
    """Whether tokens are selected in the space of a CLIP encoder, where a CLIP text tower can guide."""
    mrope: ClassVar[bool] = False
    """Whether a position is several numbers (time, row, column), so that survivors can only keep their own."""
    axes: int = 3
    """How many numbers, where it is several."""
    _with_sound: bool = False
    bidirectional: ClassVar[bool] = False
    """Whether the language model lets the tokens of an image attend to each other in both directions."""
    no_stages: ClassVar[str] = "lets image tokens attend in both directions"
    """Of a bidirectional family, why no tokens can be removed between decoder layers."""
    hybrid: ClassVar[bool] = False
    """Whether most decoder layers have linear attention, before which no tokens can be ranked."""
    turns: ClassVar[bool] = True
    """Whether a conversation can go on from its cache."""
    adjoining: ClassVar[bool] = False
    """Whether images without text between them are tiles of one image."""
    features: ClassVar[str] = "pooler_output"
    """Field of what ``get_image_features`` gives in which vision tokens come; see :meth:`field`."""
    row_ends: bool = False
    """Whether the processor writes a token of the text's behind every row of an image: see ``engine/rows.py``."""
    merging: ClassVar[str] = "no"
    """Whether tokens can be merged between the encoder's layers, in words: see :meth:`encoder_layers`."""
    masked: ClassVar[bool] = False
    """Whether the encoder's layers take an attention mask after the hidden states."""
    factor: int = 1
    """Patches along a side of what becomes one vision token behind the encoder's layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    @classmethod
    def supports(cls) -> dict[str, Any]:
        """What works with the family, for tables; ``tests/test_families.py`` runs each cell."""
        return {
            "checkpoints": cls.checkpoints,
            "vision_stage": True,
            "merging_in_the_encoder": cls.merging,
            "language_stage": "before layers with full attention" if cls.hybrid else not cls.bidirectional,
            "guided_by": ["text tower", "embeddings"] if cls.text_tower else ["embeddings"],
            "scores": cls.scores,
            "keep_counts_per": cls.unit,
            "video": cls.video,
            "several_images": True,
            "batch": True,
            "turns": cls.turns,
        }

    @property
    def core(self) -> Any:
        """The module that calls encoder, projector and language model, and sees ``input_ids``."""
        return getattr(self.model, "model", self.model)  # facts may be asked of a core alone, without a head

    @property
    def language_model(self) -> Any:
        """The text model without its head; has ``layers`` and ``rotary_emb``."""
        core = self.core
        return core.text_model if not hasattr(core, "language_model") else core.language_model

    @abstractmethod
    def encoder(self, kind: Kind) -> Any:
        """The encoder of pictures, or of sound."""

    def input_norm(self, layer: int) -> Callable[[Tensor], Tensor]:
        """What decoder layer ``layer`` does first to its hidden states [..., dim]."""
        decoder = self.language_model.layers[layer]
        norm = next((getattr(decoder, name) for name in INPUT_NORMS if hasattr(decoder, name)), None)
        if norm is None and not hasattr(decoder, "post_attention_layernorm"):
            raise TrimError(
                f"the norm before the attention of {type(decoder).__name__} is not known: use a method's vision stage, "
                "or write the fact down (CONTRIBUTING.md)"
            )
        return _unchanged if norm is None else norm  # norms stand behind the attention, as in OLMo-2

    @property
    def projector(self) -> Any | None:
        """A module, called with features [..., dim], that maps every token by itself; None where there is none."""
        return None

    @property
    def final_norm(self) -> Any:
        """The norm after the last decoder layer."""
        return first_of(self.language_model, FINAL_NORMS, "norm after the last layer")

    def decoder_attention(self, layer: int) -> Any:
        """The attention module of decoder layer ``layer``."""
        return first_of(self.language_model.layers[layer], ATTENTIONS, "attention module")

    @functools.cached_property
    def recurrent(self) -> frozenset[int]:
        """Decoder layers without attention: a state that every token goes into takes the place of keys and values."""
        kinds = getattr(self.language_model.config, "layer_types", None) or ()
        return frozenset(index for index, kind in enumerate(kinds) if kind in RECURRENT)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What of the model's inputs, besides text, has tokens that can be reduced; sound after :meth:`with_sound`."""
        pictures: tuple[Kind, ...] = ("image", "video") if self.video else ("image",)
        return (*pictures, "audio") if self._with_sound else pictures

    def with_sound(self) -> Self:
        """The same facts with sound among the :attr:`kinds`. Raises :class:`TrimError` for a model that hears none."""
        if not self.sound:
            raise TrimError(
                f"{type(self.model).__name__} takes no sound, or nobody said where its tokens are: leave keep_audio out"
            )
        hearing = copy.copy(self)
        hearing._with_sound = True
        return hearing

    def field(self, kind: Kind) -> str:
        """Field of what ``get_image_features``, or that of another ``kind``, gives in which tokens come."""
        return self.features

    @property
    def pictures(self) -> tuple[Kind, ...]:
        """The :attr:`kinds` that are seen, not heard."""
        return tuple(kind for kind in self.kinds if kind != "audio")

    def placeholders(self, input_ids: Int[Tensor, "batch tokens"], *kinds: Kind) -> Bool[Tensor, "batch tokens"]:
        """Which of ``input_ids`` stand for tokens of ``kinds``, or of any kind."""
        config = self.model.config
        ids = [getattr(config, f"{kind}_token_id") for kind in kinds or self.kinds]
        first, *others = (input_ids == number for number in ids)  # numbers stay on the host
        return functools.reduce(torch.logical_or, others, first)

    def attentions(self, kind: Kind) -> Sequence[Any]:
        """The attention modules of the encoder's layers, in order; () if they cannot be listened to."""
        return ()

    def encoder_layers(self, kind: Kind) -> Sequence[Any]:
        """The encoder's layers, each called with hidden states [pictures, special tokens + patches, dim].

        With a :meth:`packing` these are [patches, dim] of all pictures, and ``cu_seqlens``, ``max_seqlen`` and
        ``position_embeddings`` come with them. () where tokens cannot be merged between the layers.
        """
        return ()

    def depth(self, kind: Kind) -> int:
        """Layers of the encoder that its output passes through."""
        return self.scored(kind) + 1

    def packing(self, kind: Kind, grids: Sequence[Grid]) -> Packing | None:
        """How the encoder has the tokens of pictures of these grids in one sequence; None: as rows of a batch."""
        return None

    def windowed(self, kind: Kind, layer: int) -> bool:
        """Whether an encoder layer sees windows of a picture instead of all of it."""
        return False

    def rotary(self, kind: Kind, positions: Float[Tensor, "patches 2"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines [patches, head_dim], float32, that layers with a :meth:`packing` get for (row, column)."""
        raise TrimError(f"{type(self).__name__} packs pictures into one sequence and does not say how it rotates them")

    def pixels(self, kind: Kind, arguments: Arguments) -> Float[Tensor, "tokens channels values"]:
        """Pixels of everything that becomes a vision token, in the order of placeholders, as the model gets them."""
        raise TrimError(
            f"{type(self).__name__} does not say which pixels its tokens come from: use a method that compares none"
        )

    def mergers(self, kind: Kind) -> Sequence[Any]:
        """Modules behind or between the encoder's layers that make vision tokens of units of patches."""
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

    def filled(self, kind: Kind, arguments: Arguments) -> list[int] | None:
        """Patches of each row where rows of the encoder's batch are padded at the end; None: none is."""
        return None

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        """Noise in the form in which the processor would give one such picture: for measuring without weights.

        Sizes are those that the processor resizes to. Raises :class:`TrimError` for sizes that it would not give.
        """
        config = self.model.config.vision_config
        sides = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        if picture.frames:
            raise TrimError(f"{type(self).__name__} takes no videos: leave the frames out")
        if (picture.height, picture.width) != tuple(sides):
            raise TrimError(
                f"{type(self).__name__} sees every image as {sides[0]} x {sides[1]} pixels, not as "
                f"{picture.height} x {picture.width}: leave the size out"
            )
        noise = {"pixel_values": torch.randn(1, 3, *sides)}
        wanted = signature(self.core.get_image_features).parameters.get("image_sizes")
        if wanted is not None and wanted.default is Parameter.empty:
            noise["image_sizes"] = torch.tensor([sides])
        return noise

    def joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """What pictures, or rows of a batch, have under a name of :meth:`noise`, for one call."""
        return torch.cat(list(parts))

    def along(self, input_ids: Int[Tensor, "batch tokens"], kind: Kind) -> dict[str, Tensor]:
        """What the processor gives beside ``input_ids`` of a prompt with pictures of one kind, as long as they are."""
        if not self.mrope:
            return {}
        return {"mm_token_type_ids": self.placeholders(input_ids).long() * (1 if kind == "image" else 2)}

    @abstractmethod
    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        """The images, videos or sounds of a call, in the order of their placeholders.

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
        return "_deepstack_process" if hasattr(self.language_model, "_deepstack_process") else None

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


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


class Generic(Family):
    """Any model whose parts are where transformers puts them today; nothing is known of grids and attention.

    Each image that ``get_image_features`` gives is a row of tokens, and methods that read the encoder's attention are
    told that there is none.
    """

    model_types = ()

    @staticmethod
    def missing(model: Any) -> list[str]:
        """The parts that ``model`` has not got."""
        core = getattr(model, "model", None)
        parts = {
            "config.image_token_id": getattr(getattr(model, "config", None), "image_token_id", None),
            "model.get_image_features": getattr(core, "get_image_features", None),
            "model.language_model.layers": next(
                (True for name in TEXT_MODELS if hasattr(getattr(core, name, None), "layers")), None
            ),
        }
        return [name for name, part in parts.items() if part is None]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        videos = getattr(self.model.config, "video_token_id", None) is not None
        videos = videos and hasattr(self.core, "get_video_features")
        return super().kinds if videos else ("image",)

    def encoder(self, kind: Kind) -> Any:
        raise TrimError(f"the encoder of {type(self.model).__name__} is not known: CONTRIBUTING.md shows how to add it")

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        return [Visual.of_grid((1, 1, length)) for length in lengths or () if length]


def unwrapped(model: Any) -> Any:
    """The model of transformers inside what peft or ``torch.compile`` made of it, which calls it by its own names."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family_of(model: PreTrainedModel) -> Family:
    """The facts about ``model``, :class:`Generic` ones if nobody wrote them down.

    Raises :class:`TrimError` for a model without the parts of a vision-language model.
    """
    known = list_families()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in known:
        return known[model_type](model)
    if model_type in REFUSED:
        raise TrimError(
            f"{type(model).__name__} (model_type {model_type!r}) is not supported: {REFUSED[model_type]} "
            "(`visiontrim models` lists what runs)"
        )
    missing = Generic.missing(model)
    if missing:
        raise TrimError(
            f"{type(model).__name__} (model_type {model_type!r}) is not supported: it has no {', no '.join(missing)}, "
            f"which a model without facts of its own needs; known are {', '.join(known)}, and CONTRIBUTING.md shows "
            "how to add a family"
        )
    return Generic(model)
