"""Families that merge neighbouring patches before the language model: InternVL, Idefics3, Mistral3 and relatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.models.family import Arguments, Family, Kind, Picture, register_family
from visiontrim.models.layout import Grid, Visual, equal_grids, squares


class _Square(Family):
    """Tiles of one square size, whose patches are merged ``factor`` x ``factor``."""

    @property
    def side(self) -> int:
        """Patches along a side of a tile."""
        config = self.model.config.vision_config
        sides = [size[0] if isinstance(size, list | tuple) else size for size in (config.image_size, config.patch_size)]
        return sides[0] // sides[1]

    @property
    def tile(self) -> Grid:
        """(1, rows, columns) of the tokens of one tile."""
        return 1, self.side // self.factor, self.side // self.factor

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        return equal_grids(lengths or (), self.tile)

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        tiles = values.flatten(1).view(-1, self.side, self.side, values[0].numel()).permute(0, 3, 1, 2)
        return F.avg_pool2d(tiles, self.factor).permute(0, 2, 3, 1).reshape(-1, *values.shape[1:])


@register_family
class InternVL(_Square):
    """Tiles of one image follow each other without text between them, and share its budget."""

    model_types = ("internvl",)
    checkpoints = "InternVL3 (-hf); a video comes as images"
    scores = "[CLS] of each tile, mean over each shuffled unit"
    unit = "image with its tiles, or tile"
    adjoining = True
    merging = "whole shuffled units"

    def __init__(self, model) -> None:
        super().__init__(model)
        self.factor = round(1 / self.model.config.downsample_ratio)

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        """An image of several tiles gets an overview after them."""
        side = self.model.config.vision_config.image_size[0]
        if picture.frames or picture.height % side or picture.width % side:
            raise TrimError(
                f"InternVL sees images as tiles of {side} x {side} pixels, into which {picture.height} x "
                f"{picture.width} x {picture.frames} cannot be cut: give multiples, and a video as images"
            )
        tiles = picture.height // side * (picture.width // side)
        return {"pixel_values": torch.randn(tiles + (tiles > 1), 3, side, side)}

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_tower

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [layer.attention for layer in self.encoder(kind).encoder.layer]

    def encoder_layers(self, kind: Kind) -> Sequence[Any]:
        return self.encoder(kind).encoder.layer

    def pixels(self, kind: Kind, arguments: Arguments) -> Tensor:
        return squares(arguments["pixels"], self.model.config.vision_config.patch_size[0] * self.factor)

    def mergers(self, kind: Kind) -> Sequence[Any]:
        return (self.core.multi_modal_projector,)

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        return [Visual.of_grid(self.tile)] * len(arguments["pixels"])

    def scored(self, kind: Kind) -> int:
        state = self.model.config.vision_feature_layer % (len(self.attentions(kind)) + 1)
        return max(state - 1, 0)

    @property
    def special_tokens(self) -> int:
        return 1


@register_family
class Idefics3(_Square):
    """Tiles are written as images of their own, with text between them, and each is one here too."""

    model_types = ("idefics3", "smolvlm")
    checkpoints = "Idefics3, SmolVLM, SmolVLM2; a video comes as images"
    scores = "attention received, mean over each shuffled unit"
    unit = "tile"

    def __init__(self, model) -> None:
        super().__init__(model)
        self.factor = self.model.config.scale_factor

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        return {key: value[None] for key, value in super().noise(picture).items()}

    @property
    def language_model(self) -> Any:
        return self.core.text_model

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_model

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [layer.self_attn for layer in self.encoder(kind).encoder.layers]


@register_family
class GraniteDocling(_Square):
    """Tiles as Idefics3 has them, and DeepStack; on the fine route twice the tokens along a side."""

    model_types = ("granite_docling",)
    checkpoints = "Granite Docling (2026)"
    scores = "attention received, mean over each shuffled unit"
    unit = "tile"

    def __init__(self, model) -> None:
        super().__init__(model)
        self.factor = self.model.config.vision_config.scale_factor

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_model

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [layer.self_attn for layer in self.encoder(kind).encoder.layers]

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        pixels = super().noise(picture)["pixel_values"][None]
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}

    def _merged(self, arguments: Arguments) -> int:
        return self.factor if arguments.get("tile_fine_mask") is None else self.factor // 2

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        side = self.side // self._merged(arguments)
        return equal_grids(lengths or (), (1, side, side))

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        tiles = values.flatten(1).view(-1, self.side, self.side, values[0].numel()).permute(0, 3, 1, 2)
        return F.avg_pool2d(tiles, self._merged(arguments)).permute(0, 2, 3, 1).reshape(-1, *values.shape[1:])


@register_family
class Idefics2(Family):
    """Learned queries of a resampler stand for an image, so they have no places on a grid."""

    model_types = ("idefics2",)
    checkpoints = "Idefics2"

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        return {key: value[None] for key, value in super().noise(picture).items()}

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_model

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        return equal_grids(lengths or (), (1, 1, self.model.config.perceiver_config.resampler_n_latents))


@register_family
class Mistral3(Family):
    """Pixtral encoder: images of any size in one sequence, merged in the projector."""

    model_types = ("mistral3",)
    row_ends = True
    checkpoints = "Mistral Small 3.1 and later, Ministral 3"
    scores = "attention received, mean over each merged unit"

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_tower

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [layer.attention for layer in self.encoder(kind).transformer.layers]

    def scored(self, kind: Kind) -> int:
        state = self.model.config.vision_feature_layer % (len(self.attentions(kind)) + 1)
        return max(state - 1, 0)

    def _sides(self, arguments: Arguments) -> list[tuple[int, int]]:
        patch = self.model.config.vision_config.patch_size
        return [(int(height) // patch, int(width) // patch) for height, width in arguments["image_sizes"]]

    def chunks(self, kind: Kind, arguments: Arguments) -> list[int]:
        return [rows * columns for rows, columns in self._sides(arguments)]

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        merge = self.model.config.spatial_merge_size
        return [Visual.of_grid((1, rows // merge, columns // merge)) for rows, columns in self._sides(arguments)]

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        merge, flat = self.model.config.spatial_merge_size, values.flatten(1)
        images = [
            F.avg_pool2d(image.view(rows, columns, -1).permute(2, 0, 1), merge).flatten(1).T
            for image, (rows, columns) in zip(
                flat.split(self.chunks(kind, arguments)), self._sides(arguments), strict=True
            )
        ]
        return torch.cat(images).view(-1, *values.shape[1:])
