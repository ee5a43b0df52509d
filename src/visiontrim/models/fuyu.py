"""Fuyu: patches of any image are mapped to the width of the language model, and are its tokens. No encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visiontrim.models.family import Arguments, Family, Kind, register_family
from visiontrim.models.layout import Visual


@register_family
class Fuyu(Family):
    """Patches come in one row, so their grid is not known. The tokens that end its rows are text, and stay."""

    model_types = ("fuyu",)
    checkpoints = "Fuyu"
    features = "last_hidden_state"

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_embed_tokens

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        _, patches, _ = arguments["pixels"].shape
        return [Visual.of_grid((1, 1, patches))] * len(arguments["pixels"])
