"""Fuyu: patches of any image are mapped to the width of the language model, and are its tokens. No encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.models.family import Arguments, Family, Kind, Picture, register_family
from visiontrim.models.layout import Visual


@register_family
class Fuyu(Family):
    """Patches come in one row, so their grid is not known. The tokens that end its rows are text, and stay."""

    model_types = ("fuyu",)
    checkpoints = "Fuyu"
    features = "last_hidden_state"

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_embed_tokens

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        side = self.model.config.patch_size
        if picture.frames or picture.height % side or picture.width % side:
            raise TrimError(
                f"Fuyu sees images in squares of {side} x {side} pixels and no videos, into which {picture.height} x "
                f"{picture.width} x {picture.frames} cannot be cut: give multiples"
            )
        patches = picture.height // side * (picture.width // side)
        return {"pixel_values": torch.randn(1, patches, 3 * side**2)}

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        _, patches, _ = arguments["pixels"].shape
        return [Visual.of_grid((1, 1, patches))] * len(arguments["pixels"])
