"""Molmo 2: a view of the whole and tiles of an image, whose patches are pooled by what the processor says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontrim.models.family import Arguments, Family, Kind, Picture, register_family
from visiontrim.models.layout import Visual


@register_family
class Molmo2(Family):
    """All image tokens of a prompt attend to each other. Features are added to the placeholders' embeddings.

    The processor writes a token of the text's behind every row. A token is the mean of the patches that
    ``image_token_pooling`` lists, weighted by attention. Placeholders of videos have the id of those of images: videos
    are refused.
    """

    model_types = ("molmo2",)
    checkpoints = "Molmo 2; videos are refused"
    scores = "attention received, mean over the patches of a token"
    bidirectional = True
    row_ends = True

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_tower

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [layer.self_attn for layer in self.encoder(kind).layers]

    def scored(self, kind: Kind) -> int:
        """The last layer that the adapter reads."""
        layers = len(self.attentions(kind))
        return max(layer % layers for layer in self.model.config.adapter_config.vision_feature_layer)

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        """A view of the whole alone, which is one of the sizes that there are."""
        vision = self.model.config.vision_config
        _, _, height, width = super().noise(picture)["pixel_values"].shape
        rows, columns = height // vision.patch_size, width // vision.patch_size
        units = F.pad(torch.arange(rows * columns).view(rows, columns), (0, columns % 2, 0, rows % 2), value=-1)
        units = units.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).transpose(1, 2)
        pixels = torch.randn(1, rows * columns, 3 * vision.patch_size**2)
        grid = torch.tensor([[*units.shape[:2], 0, 0]])
        return {"pixel_values": pixels, "image_token_pooling": units.reshape(-1, 4), "image_grids": grid}

    def joined(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Patches are counted over all pictures of a call."""
        if name != "image_token_pooling":
            return super().joined(name, parts)
        starts = accumulate((int(part.max()) + 1 for part in parts), initial=0)
        return torch.cat(
            [torch.where(part < 0, part, part + start) for part, start in zip(parts, starts, strict=False)]
        )

    def along(self, input_ids: Tensor, kind: Kind) -> dict[str, Tensor]:
        return {"mm_token_type_ids": self.placeholders(input_ids).long()}

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        return [self._visual(*sides) for sides in arguments["image_grids"].tolist()]

    @staticmethod
    def _visual(low_rows: int, low_columns: int, rows: int, columns: int) -> Visual:
        """The view of the whole, then the mosaic of tiles, if there is one."""
        whole = Visual.of_grid((1, low_rows, low_columns))
        if not rows * columns:
            return whole
        mosaic = Visual.of_grid((1, rows, columns)).segments[0]
        moved = replace(mosaic, index=mosaic.index + whole.length)
        return Visual(whole.length + rows * columns, (*whole.segments, moved))

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        of_token = arguments["image_token_pooling"].to(values.device)
        there = (of_token >= 0).view(*of_token.shape, *(1 for _ in values.shape[1:]))
        pooled = (values[of_token.clamp(min=0)] * there).sum(1) / there.sum(1).clamp(min=1)
        return pooled[there.flatten(1).any(1)]
