"""LLaVA-1.5: an encoder, a projector, and the patches of one layer as vision tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.models.family import Arguments, Family, Kind, register_family
from visiontrim.models.layout import Grid, Visual, squares

_TOWERS = {
    "clip_vision_model": (1, "default"),
    "siglip_vision_model": (0, "full"),
    "pixtral": (0, "full"),
}
"""Encoders: their tokens before the patches, and the vision_feature_select_strategy that leaves the patches alone."""


class LlavaLike(Family):
    """Families that take the patches of one encoder layer through a projector that maps each by itself."""

    known: bool = True
    """Whether the encoder is one of which facts are written down, and its patches alone are what is projected.

    Of any other nothing is read: methods that rank by its attention are told that there is none.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        vision = model.config.vision_config
        if not hasattr(vision, "num_hidden_layers"):
            return
        states = vision.num_hidden_layers
        for layer in self.feature_layers:
            if not -states - 1 <= layer <= states:
                raise TrimError(
                    f"vision_feature_layer={layer}, but the encoder has {states} layers: its configuration is damaged; "
                    f"give {-states - 1} to {states}"
                )

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_tower

    @property
    def projector(self) -> Any:
        return self.core.multi_modal_projector

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The encoder's hidden states that are projected, side by side where there are several (Granite Vision)."""
        layers = self.model.config.vision_feature_layer
        return (layers,) if isinstance(layers, int) else tuple(layers)

    def attentions(self, kind: Kind) -> Sequence[Any]:
        if not self.known:
            return ()
        encoder = self.encoder(kind)
        layers = encoder.transformer.layers if hasattr(encoder, "transformer") else encoder.encoder.layers
        return [layer.attention if hasattr(layer, "attention") else layer.self_attn for layer in layers]

    def scored(self, kind: Kind) -> int:
        # hidden_states[0] are the embeddings, so state i is the output of layer i - 1
        states = len(self.attentions(kind)) + 1
        return max(max(layer % states for layer in self.feature_layers) - 1, 0)

    @property
    def special_tokens(self) -> int:
        return _TOWERS[self.model.config.vision_config.model_type][0] if self.known else 0

    @property
    def vision_width(self) -> int | None:
        return self.model.config.vision_config.hidden_size * len(self.feature_layers) if self.known else None

    @property
    def tile(self) -> Grid:
        """(1, rows, columns) of the patches of one square picture."""
        config = self.model.config.vision_config
        side = config.image_size // config.patch_size
        return 1, side, side

    def normalised_last_hidden(self, last_hidden_state: Tensor) -> Tensor:
        if self.special_tokens == 0:  # SigLIP normalises it itself
            return last_hidden_state
        return self.encoder("image").post_layernorm(last_hidden_state[:, self.special_tokens :])

    def normalised(self, features: Tensor) -> Tensor:
        norm = getattr(self.encoder("image"), "post_layernorm", None)
        return features if norm is None or len(self.feature_layers) > 1 else norm(features)

    def knows_towers(self, *towers: str) -> bool:
        """Whether the encoder is one of ``towers`` and its patches are what is projected."""
        config = self.model.config
        tower = config.vision_config.model_type
        return tower in towers and config.vision_feature_select_strategy == _TOWERS[tower][1]

    def check_towers(self, *towers: str) -> None:
        """Raise :class:`TrimError` unless the encoder is one of ``towers`` and its patches are what is projected."""
        config = self.model.config
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if tower not in towers:
            raise TrimError(f"{type(self).__name__} with a {tower} encoder is not supported: use {', '.join(towers)}")
        if strategy != _TOWERS[tower][1]:
            raise TrimError(
                f"vision_feature_select_strategy={strategy!r} does not leave exactly the patches of a {tower} as "
                f"vision tokens, which would have no grid: use {_TOWERS[tower][1]!r}"
            )
        if not isinstance(config.vision_feature_layer, int):  # towers of which each frame keeps its [CLS]
            raise TrimError(
                f"vision_feature_layer={config.vision_feature_layer} concatenates layers, and it is open which one's "
                "attention should rank their tokens: use a single layer"
            )


@register_family
class Llava(LlavaLike):
    model_types = ("llava",)
    checkpoints = "LLaVA-1.5, BakLLaVA, Pixtral-12B (mistral-community)"
    scores = "[CLS] with CLIP, attention received with SigLIP and Pixtral"
    text_tower = True
    merging = "CLIP and SigLIP"
    masked = True

    def __init__(self, model) -> None:
        super().__init__(model)
        self.known = self.knows_towers(*_TOWERS)
        self.row_ends = self.model.config.vision_config.model_type == "pixtral"

    @property
    def projector(self) -> Any | None:
        return super().projector if self.known else None  # how many tokens it gets is seen behind it

    def encoder_layers(self, kind: Kind) -> Sequence[Any]:
        # Pixtral gets all pictures in one sequence; where several layers are projected, all must have the same tokens
        packed = self.model.config.vision_config.model_type == "pixtral"
        return () if packed or not self.known or len(self.feature_layers) > 1 else self.encoder(kind).encoder.layers

    def pixels(self, kind: Kind, arguments: Arguments) -> Tensor:
        return squares(arguments["pixels"], self.model.config.vision_config.patch_size)

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        if not self.known:
            squares = (math.isqrt(length) for length in lengths or ())
            return [
                Visual.of_grid((1, side, side) if side * side == length else (1, 1, length))
                for side, length in zip(squares, lengths or (), strict=True)
            ]
        patch = self.model.config.vision_config.patch_size
        pixels = arguments["pixels"]
        sizes = arguments.get("image_sizes")  # Pixtral pads images of several sizes to a common one
        if sizes is None or self.model.config.vision_config.model_type != "pixtral":
            return [Visual.of_grid((1, pixels.shape[-2] // patch, pixels.shape[-1] // patch))] * len(pixels)
        return [Visual.of_grid((1, int(height) // patch, int(width) // patch)) for height, width in sizes]

    def chunks(self, kind: Kind, arguments: Arguments) -> list[int] | None:
        if self.model.config.vision_config.model_type != "pixtral":
            return None
        return [visual.total for visual in self.visuals(kind, arguments, None)]
