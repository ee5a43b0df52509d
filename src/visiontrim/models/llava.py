"""LLaVA-1.5: a CLIP or SigLIP encoder, a projector, and the patches of one layer as vision tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from visiontrim.core.errors import TrimError
from visiontrim.models.family import Family, register_family

_TOWERS = {"clip_vision_model": (1, "default"), "siglip_vision_model": (0, "full")}
"""Encoders: their tokens before the patches, and the vision_feature_select_strategy that leaves the patches alone."""


@register_family
class Llava(Family):
    model_types = ("llava",)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        config = self.model.config
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if tower not in _TOWERS:
            raise TrimError(f"LLaVA with a {tower} encoder is not supported: use one of {', '.join(_TOWERS)}")
        if strategy != _TOWERS[tower][1]:
            raise TrimError(
                f"vision_feature_select_strategy={strategy!r} does not leave exactly the patches of a {tower} as "
                f"vision tokens, which would have no grid: use {_TOWERS[tower][1]!r}"
            )
        if not isinstance(config.vision_feature_layer, int):
            raise TrimError(
                f"vision_feature_layer={config.vision_feature_layer} concatenates layers, and it is open which one's "
                "attention should rank their tokens: use a single layer"
            )

    @property
    def core(self) -> Any:
        return self.model.model

    @property
    def vision_tower(self) -> Any:
        return self.core.vision_tower

    @property
    def special_tokens(self) -> int:
        return _TOWERS[self.model.config.vision_config.model_type][0]

    @property
    def projector(self) -> Any:
        return self.core.multi_modal_projector

    @property
    def language_model(self) -> Any:
        return self.core.language_model

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return (self.model.config.image_token_id,)

    @property
    def vision_width(self) -> int:
        return self.model.config.vision_config.hidden_size

    @property
    def scored_attention(self) -> Any:
        layers = self.vision_tower.encoder.layers
        # hidden_states[0] are the embeddings, so state i is the output of layer i - 1
        state = self.model.config.vision_feature_layer % (len(layers) + 1)
        return layers[max(state - 1, 0)].self_attn

    def grid(self, pixel_values: Tensor) -> tuple[int, int, int]:
        patch = self.model.config.vision_config.patch_size
        return 1, pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch

    def normalised_last_hidden(self, last_hidden_state: Tensor) -> Tensor:
        if self.special_tokens == 0:  # SigLIP normalises it itself
            return last_hidden_state
        return self.vision_tower.post_layernorm(last_hidden_state[:, self.special_tokens :])
