"""LFM2-VL and LFM3-VL: short convolutions in most decoder layers, and patches merged 2 x 2 in the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontrim.models.family import Arguments, Family, Kind, register_family
from visiontrim.models.layout import Visual
from visiontrim.models.qwen_vl import QwenVL


@register_family
class Lfm2VL(Family):
    """A SigLIP 2 encoder: images of any size as rows that are padded at the end."""

    model_types = ("lfm2_vl",)
    checkpoints = "LFM2-VL"
    scores = "attention received, mean over each merged unit"
    hybrid = True

    def __init__(self, model) -> None:
        super().__init__(model)
        self.factor = self.model.config.downsample_factor

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_tower

    def attentions(self, kind: Kind) -> Sequence[Any]:
        encoder = self.encoder(kind)
        return [layer.self_attn for layer in getattr(encoder, "vision_model", encoder).encoder.layers]

    def _sides(self, arguments: Arguments) -> list[tuple[int, int]]:
        return [(rows, columns) for rows, columns in arguments["spatial_shapes"].tolist()]

    def filled(self, kind: Kind, arguments: Arguments) -> list[int]:
        return [rows * columns for rows, columns in self._sides(arguments)]

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        factor = self.factor
        return [Visual.of_grid((1, rows // factor, columns // factor)) for rows, columns in self._sides(arguments)]

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        flat, sides = values.flatten(1), self._sides(arguments)
        images = [
            F.avg_pool2d(image.view(rows, columns, -1).permute(2, 0, 1), self.factor).flatten(1).T
            for image, (rows, columns) in zip(flat.split(self.filled(kind, arguments)), sides, strict=True)
        ]
        return torch.cat(images).view(-1, *values.shape[1:])


@register_family
class Lfm3VL(QwenVL):
    """Pictures as Qwen-VL has them, but some layers of the encoder are convolutions over the grid of each frame."""

    model_types = ("lfm3_vl",)
    checkpoints = "LFM3-VL"
    hybrid = True
    mrope = False
    merging = "no"

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_tower

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [layer.self_attn for layer in self.encoder(kind).layers if layer.is_attention_layer]

    def encoder_layers(self, kind: Kind) -> Sequence[Any]:
        return ()  # convolutions join the units between the layers

    def mergers(self, kind: Kind) -> Sequence[Any]:
        return ()

    def depth(self, kind: Kind) -> int:
        return len(self.attentions(kind))
