"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size as one sequence of patches, merged 2 x 2 at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from visiontrim.models.family import Arguments, Family, Kind, register_family
from visiontrim.models.layout import Visual


@register_family
class QwenVL(Family):
    """Tokens are selected after the merger. The encoder has no [CLS]: attention received, pooled over the unit."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    checkpoints = "Qwen2-VL, Qwen2.5-VL, Qwen3-VL"
    scores = "attention received, mean over each merged unit"
    unit = "image, video, or frame"
    video = True
    mrope = True

    def encoder(self, kind: Kind) -> Any:
        return self.core.visual

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [block.attn for block in self.encoder(kind).blocks]

    def scored(self, kind: Kind) -> int:
        """The last layer in which all patches of a frame attend to each other."""
        full = getattr(self.encoder(kind), "fullatt_block_indexes", None)
        return max(full) if full else super().scored(kind)

    def _grids(self, kind: Kind, arguments: Arguments) -> Tensor:
        return arguments.get(f"{kind}_grid_thw", arguments.get("image_grid_thw"))

    @property
    def deepstack(self) -> str | None:
        return "_deepstack_process" if hasattr(self.language_model, "_deepstack_process") else None

    def chunks(self, kind: Kind, arguments: Arguments) -> list[int]:
        return [
            rows * columns for frames, rows, columns in self._grids(kind, arguments).tolist() for _ in range(frames)
        ]

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        merge = self.encoder(kind).spatial_merge_size
        return [
            Visual.of_grid((frames, rows // merge, columns // merge))
            for frames, rows, columns in self._grids(kind, arguments).tolist()
        ]

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        encoder = self.encoder(kind)
        merged = values.view(-1, encoder.spatial_merge_size**2, *values.shape[1:]).mean(1)
        if not hasattr(encoder, "fullatt_block_indexes"):
            return merged
        # Qwen2.5-VL has the units window by window
        grids = self._grids(kind, arguments)
        order, _ = get_vision_window_index(grids, encoder.spatial_merge_size, encoder.window_size, encoder.patch_size)
        return merged[order.argsort().to(merged.device)]
