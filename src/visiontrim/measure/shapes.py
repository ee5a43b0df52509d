"""Shapes of models: configurations without weights, by the name of a preset or from a file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from visiontrim import zoo
from visiontrim.core.errors import TrimError
from visiontrim.models.checkpoints import check_there, loaded
from visiontrim.models.family import Picture

PRESETS = Path(__file__).parent.parent / "presets"
"""One JSON file a preset: the checkpoint that it describes, its picture, and facts of its configuration."""
BUNDLED = "bundled"
MOST_PIXELS = 2**26
"""Of a picture or of all frames of a video: they are made as noise, in about 30 bytes a pixel."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's configuration, and the picture that it is measured with."""

    name: str
    checkpoint: str
    config: PreTrainedConfig
    picture: Picture

    @classmethod
    def load(cls, name: str) -> Shape:
        """A preset, ``bundled``, a directory or config.json, or a hub name of which only the configuration is read.

        Raises :class:`TrimError` for what is none of these.
        """
        if name == BUNDLED:
            return cls.of_config(name, AutoConfig.from_pretrained(zoo.MODEL_DIR))
        path = PRESETS / f"{name}.json"
        if path.parent == PRESETS and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            config = AutoConfig.for_model(**content["config"])
            return cls(name, content["checkpoint"], config, Picture(**content["picture"]))
        if "/" not in name and not Path(name).exists():
            raise TrimError(
                f"{name!r} is no preset, directory or hub name of a configuration: presets are "
                f"{', '.join(preset_names())}"
            )
        check_there("configuration of", name, checkpoints())
        return cls.of_config(name, loaded("configuration of", name, AutoConfig.from_pretrained))

    @classmethod
    def of_config(cls, name: str, config: PreTrainedConfig) -> Shape:
        """That of a configuration. Raises :class:`TrimError` for one of a model that sees no pictures."""
        vision: Any = getattr(config, "vision_config", None)
        if vision is None:
            raise TrimError(
                f"{name} is a {config.model_type}, which has no vision encoder: give a vision-language model"
            )
        size = getattr(vision, "image_size", None)
        if size is None or hasattr(vision, "insert_layer_id"):  # any size, whatever MiniCPM-V's says
            size = 480 if hasattr(vision, "pooling_kernel_size") else 448
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return cls(name, name, config, Picture(height, width))

    def seeing(self, height: int, width: int, frames: int) -> Shape:
        """The same model with pictures of another size. Raises :class:`TrimError` for more than ``MOST_PIXELS``."""
        if (pixels := height * width * max(frames, 1)) > MOST_PIXELS:
            raise TrimError(
                f"{height} x {width} x {max(frames, 1)} are {pixels:,} pixels: give at most {MOST_PIXELS:,}, or a part "
                "of the video"
            )
        return replace(self, picture=Picture(height, width, frames))

    @property
    def dtype(self) -> torch.dtype:
        """Of the published weights; float32 where the configuration does not say."""
        dtype: Any = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def build(self, device: str, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
        """A model of this shape with random weights; on the "meta" device with none at all."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # so that no tensor is made in a wider type first
        try:
            with torch.device(device):
                return AutoModelForImageTextToText.from_config(
                    self.config, dtype=dtype, attn_implementation=attention
                ).eval()
        finally:
            torch.set_default_dtype(before)

    def sliced(self, layers: int) -> Shape:
        """The same widths with ``layers`` decoder layers, and the encoder's in the same proportion, rounded up.

        Raises :class:`TrimError` for more layers than there are.
        """
        config = copy.deepcopy(self.config)
        text, vision = config.text_config, config.vision_config
        depth = text.num_hidden_layers
        if not 1 <= layers <= depth:
            raise TrimError(f"layers={layers}, but {self.name} has {depth} decoder layers: give 1 to {depth}")
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        key = "depth" if hasattr(vision, "depth") else "num_hidden_layers"
        encoder = max(2, -(-getattr(vision, key) * layers // depth))
        setattr(vision, key, encoder)
        if getattr(vision, "fullatt_block_indexes", None):
            vision.fullatt_block_indexes = [encoder - 1]
        if getattr(vision, "deepstack_visual_indexes", None):
            vision.deepstack_visual_indexes = [encoder - 1]
        return replace(self, name=f"{self.name}, {layers} of {depth} layers", config=config)

    def narrow(self) -> Shape:
        """The same layers and token counts with tiny widths: what runs anywhere in no time."""
        config = copy.deepcopy(self.config)
        if "per_layer_config" in config.text_config.to_dict():
            config.text_config = _narrow_by_layer(config.text_config)
        else:
            _set(config.text_config, _NARROW_TEXT)
        _set(config.vision_config, _NARROW_VISION)
        _set(config, {"hidden_size": _WIDTH, "projection_dim": _WIDTH})
        rope = getattr(config.text_config, "rope_parameters", None)
        if isinstance(rope, Mapping) and "mrope_section" in rope:
            config.text_config.rope_parameters = {**rope, "mrope_section": [2, 3, 3]}
        return replace(self, config=config)


def checkpoints() -> list[str]:
    """Hub names of the checkpoints that presets describe."""
    return sorted({json.loads(path.read_text(encoding="utf-8"))["checkpoint"] for path in PRESETS.glob("*.json")})


def preset_names() -> list[str]:
    """Names of all presets."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


_WIDTH, _HEADS = 32, 2
_HEAD_DIM = _WIDTH // _HEADS
_NARROW_TEXT = {
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "moe_intermediate_size": _WIDTH,
    "shared_expert_intermediate_size": _WIDTH,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": _HEAD_DIM,
    "linear_num_key_heads": _HEADS,
    "linear_num_value_heads": _HEADS,
    "linear_key_head_dim": _HEAD_DIM,
    "linear_value_head_dim": _HEAD_DIM,
}
_NARROW_VISION = {
    "hidden_size": _WIDTH,
    "embed_dim": _WIDTH,
    "out_hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_attention_heads": _HEADS,
    "num_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": _HEAD_DIM,
    "projection_dim": _WIDTH,
}


def _narrow_by_layer(text: Any) -> Any:
    """Of a text model with layers that have other heads than the rest, or inputs of their own (Gemma 4)."""
    told = text.to_dict()
    told.pop("per_layer_config")
    told |= {key: value for key, value in _NARROW_TEXT.items() if told.get(key) is not None}
    told |= {"global_head_dim": _HEAD_DIM, "num_global_key_value_heads": None}
    if told.get("hidden_size_per_layer_input"):
        told["hidden_size_per_layer_input"] = 2
    return type(text)(**told)


def _set(config: Any, values: Mapping[str, Any]) -> None:
    """Change those of ``values`` that ``config`` has."""
    for key, value in values.items():
        if getattr(config, key, None) is not None:
            setattr(config, key, value)
