"""Video-LLaVA: images and frames through towers of their own, with the [CLS] of every frame among the vision tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontrim.models.family import Arguments, Kind, Picture, register_family
from visiontrim.models.layout import Segment, Visual
from visiontrim.models.llava import LlavaLike


@register_family
class VideoLlava(LlavaLike):
    model_types = ("video_llava",)
    checkpoints = "Video-LLaVA"
    scores = "[CLS] of each frame"
    unit = "image, video, or frame; the [CLS] of a frame always stays"
    video = True
    text_tower = True

    def __init__(self, model) -> None:
        super().__init__(model)
        self.check_towers("clip_vision_model")

    def encoder(self, kind: Kind) -> Any:
        return self.core.image_tower if kind == "image" else self.core.video_tower

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        pixels = super().noise(Picture(picture.height, picture.width))["pixel_values"]
        return (
            {"pixel_values_videos": pixels.expand(picture.frames, -1, -1, -1)[None]}
            if picture.frames
            else {"pixel_values": pixels}
        )

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        if kind == "image":
            return [Visual.of_grid(self.tile)] * len(arguments["pixels"])
        videos, frames = arguments["pixels"].shape[:2]
        _, rows, columns = self.tile
        places = torch.arange(frames * (1 + rows * columns)).view(frames, -1)
        segment = Segment((frames, rows, columns), places[:, 1:].flatten(), places[:, 0], marks_stay=frames)
        return [Visual(places.numel(), (segment,))] * videos

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        if kind == "image":
            return values
        frames = values.flatten(1).view(-1, self.tile[1] * self.tile[2], values[0].numel())
        return F.pad(frames, (0, 0, 1, 0)).reshape(-1, *values.shape[1:])  # [CLS] gets zeros
