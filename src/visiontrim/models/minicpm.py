"""MiniCPM-V 4.6: images of any size as patches in one row, merged 2 x 2 within the encoder and 2 x 2 behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.models.family import Arguments, Family, Kind, Picture, register_family
from visiontrim.models.layout import Visual


@register_family
class MiniCPMV(Family):
    """Slices of one image are images of their own. ``downsample_mode="4x"`` merges behind the encoder alone."""

    model_types = ("minicpmv4_6",)
    checkpoints = "MiniCPM-V 4.6; a slice is an image, a frame too"
    scores = "attention received, mean over each merged unit"
    hybrid = True

    def __init__(self, model) -> None:
        super().__init__(model)
        self.factor = 2**self.model.config.merger_times

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("image",) if self.model.config.video_token_id is None else ("image", "video")

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_tower

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [layer.self_attn for layer in self.encoder(kind).encoder.layers]

    def _scored(self, kind: Kind, arguments: Arguments) -> list[tuple[int, int]]:
        """(rows, columns) of what the last layer of the encoder sees of every image."""
        config = self.model.config
        within = 1 if (arguments.get("downsample_mode") or config.downsample_mode) == "4x" else 2
        sizes = arguments["target_sizes" if kind == "image" else "target_sizes_videos"]
        sizes = sizes if kind == "image" else sizes.repeat(len(arguments["pixels"]), 1)
        return [(rows // within, columns // within) for rows, columns in sizes.tolist()]

    def chunks(self, kind: Kind, arguments: Arguments) -> list[int]:
        return [rows * columns for rows, columns in self._scored(kind, arguments)]

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        factor = self.factor
        sides = self._scored(kind, arguments)
        return [Visual.of_grid((1, rows // factor, columns // factor)) for rows, columns in sides]

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        flat, sides = values.flatten(1), self._scored(kind, arguments)
        images = [
            F.avg_pool2d(image.view(rows, columns, -1).permute(2, 0, 1), self.factor).flatten(1).T
            for image, (rows, columns) in zip(flat.split(self.chunks(kind, arguments)), sides, strict=True)
        ]
        return torch.cat(images).view(-1, *values.shape[1:])

    def joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), -1 if name == "pixel_values" else 0)

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        patch = self.model.config.vision_config.patch_size
        unit = patch * 2 * self.factor
        if picture.frames or picture.height % unit or picture.width % unit:
            raise TrimError(
                f"MiniCPMV sees images in units of {unit} x {unit} pixels, and is measured without videos, into which "
                f"{picture.height} x {picture.width} x {picture.frames} cannot be cut: give multiples"
            )
        rows, columns = picture.height // patch, picture.width // patch
        pixels = torch.randn(1, 3, patch, rows * columns * patch)
        return {"pixel_values": pixels, "target_sizes": torch.tensor([[rows, columns]])}
