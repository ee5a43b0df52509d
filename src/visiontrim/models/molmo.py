"""Molmo 2: a view of the whole and tiles of an image, whose patches are pooled by what the processor says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from visiontrim.models.family import Arguments, Family, Kind, register_family
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
