"""Anyres images, as LLaVA-NeXT has them: an overview, and a mosaic of tiles whose rows end in newline tokens."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.models.family import Arguments, Kind, Picture, register_family
from visiontrim.models.layout import Segment, Visual, with_newlines
from visiontrim.models.llava import LlavaLike


class AnyRes(LlavaLike):
    """What LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision share: the packing of tiles, read off the model itself."""

    def packed(self, arguments: Arguments, values: Tensor, newline: Tensor) -> list[Tensor]:
        """``values`` of all tiles' patches [tiles, patches, channels] laid out as the placeholders of each image."""
        counts = self._tiles(arguments)
        images, _ = self.core.pack_image_features(
            values.split(counts), arguments["image_sizes"], image_newline=newline, **self._packing(arguments)
        )
        return list(images)

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        side = self.model.config.vision_config.image_size
        if picture.frames:
            return {"pixel_values_videos": torch.randn(1, picture.frames, 3, side, side)}
        sizes = {"image_sizes": torch.tensor([[picture.height, picture.width]])}
        return {"pixel_values": torch.randn(1, *self._tiles(sizes), 3, side, side)} | sizes

    def _packing(self, arguments: Arguments) -> dict[str, Any]:
        return {"vision_feature_select_strategy": self.model.config.vision_feature_select_strategy}

    def _tiles(self, arguments: Arguments) -> list[int]:
        """Pictures that the encoder sees of each image: its overview and its tiles."""
        count = importlib.import_module(type(self.core).__module__).image_size_to_num_patches
        config = self.model.config
        return [
            count(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in arguments["image_sizes"]
        ]

    def _origins(self, arguments: Arguments) -> list[Tensor]:
        """For every placeholder of each image the patch that it comes from, -1 for newlines."""
        patches = self.tile[1] * self.tile[2]
        # in float64 every patch number is exact
        numbers = torch.arange(sum(self._tiles(arguments)) * patches, dtype=torch.float64)
        images = self.packed(arguments, numbers.view(-1, patches, 1), torch.tensor([-1.0], dtype=torch.float64))
        return [image[:, 0].long() for image in images]


@register_family
class LlavaNext(AnyRes):
    model_types = ("llava_next",)
    checkpoints = "LLaVA-NeXT (1.6)"
    scores = "[CLS] of each tile; attention received with SigLIP"
    unit = "image with its tiles, or tile"
    text_tower = True

    def __init__(self, model) -> None:
        super().__init__(model)
        self.known = self.knows_towers("clip_vision_model", "siglip_vision_model")

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        patches = self.tile[1] * self.tile[2]
        return [with_newlines(origin < 0, self.tile, origin // patches) for origin in self._origins(arguments)]

    def source(self, kind: Kind, arguments: Arguments) -> Tensor | None:
        return torch.cat(self._origins(arguments))


@register_family
class LlavaNextVideo(LlavaNext):
    """Frames of a video are pooled before the projector."""

    model_types = ("llava_next_video",)
    checkpoints = "LLaVA-NeXT-Video"
    scores = "[CLS] of each tile or frame"
    unit = "image with its tiles, tile, video, or frame"
    video = True
    text_tower = True

    @property
    def _stride(self) -> int:
        return self.model.config.spatial_pool_stride

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        if kind == "image":
            return super().visuals(kind, arguments, lengths)
        videos, frames = arguments["pixels"].shape[:2]
        _, rows, columns = self.tile
        return [Visual.of_grid((frames, rows // self._stride, columns // self._stride))] * videos

    def source(self, kind: Kind, arguments: Arguments) -> Tensor | None:
        return super().source(kind, arguments) if kind == "image" else None

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        if kind == "image":
            return super().pooled(kind, arguments, values)
        return _on_frames(values, self.tile[1:], lambda frames: F.avg_pool2d(frames, self._stride))


@register_family
class LlavaOnevision(AnyRes):
    """Large mosaics and the frames of videos are resampled after the projector, so tokens are selected after that."""

    model_types = ("llava_onevision",)
    checkpoints = "LLaVA-OneVision"
    scores = "attention received"
    unit = "image with its tiles, tile, video, or frame"
    video = True

    def __init__(self, model) -> None:
        super().__init__(model)
        self.known = self.knows_towers("siglip_vision_model")

    @property
    def projector(self) -> None:
        return None

    @property
    def vision_width(self) -> None:
        return None

    def _packing(self, arguments: Arguments) -> dict[str, Any]:
        return {"vision_aspect_ratio": arguments.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio}

    def _tiles(self, arguments: Arguments) -> list[int]:
        counts = super()._tiles(arguments)
        numbers = arguments.get("batch_num_images")
        if numbers is None:
            return counts
        alone = [number == 1 for number in numbers for _ in range(int(number))]  # several images come without tiles
        return [count if single else 1 for count, single in zip(counts, alone, strict=True)]

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        if kind == "video":
            videos, frames = arguments["pixels"].shape[:2]
            grid = (frames, -(-self.tile[1] // 2), -(-self.tile[2] // 2))
            total = grid[0] * grid[1] * grid[2]
            if sum(lengths or ()) == videos * total:  # this release adds the newline where no one sees it
                raise TrimError(
                    f"LLaVA-OneVision's video of {total} tokens came without its newline: transformers "
                    f"{transformers.__version__} is too old for its videos, use 5.19 or newer"
                )
            newline = Segment(grid, torch.arange(total), torch.tensor([total]))
            return [Visual(total + 1, (newline,))] * videos
        patches = self.tile[1] * self.tile[2]
        blank = torch.zeros(sum(self._tiles(arguments)), patches, 1)
        return [with_newlines(image[:, 0] > 0, self.tile) for image in self.packed(arguments, blank, torch.ones(1))]

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        flat = values.flatten(1)  # [patches, channels]
        if kind == "video":
            videos, frames = arguments["pixels"].shape[:2]
            pooled = self.core.apply_pooling(flat.view(videos * frames, self.tile[1] * self.tile[2], -1))
            pooled = F.pad(pooled.reshape(videos, -1, flat.shape[-1]), (0, 0, 0, 1)).flatten(0, 1)
        else:
            tiles = flat.view(-1, self.tile[1] * self.tile[2], flat.shape[-1])
            pooled = torch.cat(self.packed(arguments, tiles, flat.new_zeros(flat.shape[-1])))
        return pooled.view(-1, *values.shape[1:])


def _on_frames(values: Tensor, side: tuple[int, int], pool) -> Tensor:
    """``pool`` applied to the [channels, rows, columns] of every frame of ``values`` [frames x patches, ...]."""
    frames = values.flatten(1).view(-1, *side, values[0].numel()).permute(0, 3, 1, 2)
    return pool(frames).permute(0, 2, 3, 1).reshape(-1, *values.shape[1:])
