"""Qwen-VL from 2 on, and what is built alike: pictures of any size, their patches merged 2 x 2 at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from visiontrim.core.errors import TrimError
from visiontrim.models.family import Arguments, Family, Kind, Picture, register_family
from visiontrim.models.layout import Grid, Packing, Segment, Visual


@register_family
class QwenVL(Family):
    """Tokens are selected after the merger. The encoder has no [CLS]: attention received, pooled over the unit."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    checkpoints = "Qwen2-VL, Qwen2.5-VL, Qwen3-VL"
    scores = "attention received, mean over each merged unit"
    unit = "image, video, or frame"
    video = True
    mrope = True
    merging = "whole merged units"

    def __init__(self, model) -> None:
        super().__init__(model)
        self.factor = self.encoder("image").spatial_merge_size

    def encoder(self, kind: Kind) -> Any:
        return self.core.visual

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [block.attn for block in self.encoder(kind).blocks]

    def encoder_layers(self, kind: Kind) -> Sequence[Any]:
        return self.encoder(kind).blocks

    def mergers(self, kind: Kind) -> Sequence[Any]:
        encoder = self.encoder(kind)
        return (encoder.merger, *getattr(encoder, "deepstack_merger_list", ()))

    def depth(self, kind: Kind) -> int:
        return len(self.encoder(kind).blocks)

    def windowed(self, kind: Kind, layer: int) -> bool:
        full = getattr(self.encoder(kind), "fullatt_block_indexes", None)
        return full is not None and layer not in full

    def scored(self, kind: Kind) -> int:
        """The last layer in which all patches of a frame attend to each other."""
        whole = [layer for layer in range(self.depth(kind)) if not self.windowed(kind, layer)]
        return whole[-1] if whole else super().scored(kind)

    def packing(self, kind: Kind, grids: Sequence[Grid]) -> Packing:
        chunks = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
        encoder = self.encoder(kind)
        if not hasattr(encoder, "fullatt_block_indexes"):
            return Packing(torch.arange(sum(chunks)), chunks)
        factor = self.factor
        patches = torch.tensor([(frames, rows * factor, columns * factor) for frames, rows, columns in grids])
        order, ends = get_vision_window_index(patches, factor, encoder.window_size, encoder.patch_size)
        return Packing(order, chunks, (ends.diff() // factor**2).tolist())

    def rotary(self, kind: Kind, positions: Float[Tensor, "patches 2"]) -> tuple[Tensor, Tensor]:
        frequencies = self.encoder(kind).rotary_pos_emb.inv_freq.float()
        angles = (positions[..., None] * frequencies.to(positions.device)).flatten(1)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def pixels(self, kind: Kind, arguments: Arguments) -> Tensor:
        time = self.model.config.vision_config.temporal_patch_size
        patches = arguments["pixels"].view(-1, self.factor**2, 3, time, self.model.config.vision_config.patch_size**2)
        if kind == "image":  # stands there ``time`` times
            patches = patches[:, :, :, :1]
        return patches.transpose(1, 2).flatten(2)

    def _grids(self, kind: Kind, arguments: Arguments) -> Tensor:
        return arguments.get(f"{kind}_grid_thw", arguments.get("image_grid_thw"))

    def chunks(self, kind: Kind, arguments: Arguments) -> list[int]:
        return [
            rows * columns for frames, rows, columns in self._grids(kind, arguments).tolist() for _ in range(frames)
        ]

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        config = self.model.config.vision_config
        unit, time = config.patch_size * config.spatial_merge_size, getattr(config, "temporal_patch_size", 1)
        if picture.height % unit or picture.width % unit or picture.frames % time:
            raise TrimError(
                f"{type(self).__name__} sees images in units of {unit} x {unit} pixels and {time} frames, into which "
                f"{picture.height} x {picture.width} x {picture.frames} cannot be cut: give multiples"
            )
        rows, columns = picture.height // config.patch_size, picture.width // config.patch_size
        grid = torch.tensor([[max(picture.frames // time, 1), rows, columns]])
        pixels = torch.randn(int(grid.prod()), 3 * time * config.patch_size**2)
        name = "pixel_values_videos" if picture.frames else "pixel_values"
        return {name: pixels, f"{picture.kind}_grid_thw": grid}

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        return [Visual.of_grid(grid) for grid in self._tokens(kind, arguments)]

    def _tokens(self, kind: Kind, arguments: Arguments) -> list[Grid]:
        return [
            (frames, rows // self.factor, columns // self.factor)
            for frames, rows, columns in self._grids(kind, arguments).tolist()
        ]

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        merged = values.view(-1, self.factor**2, *values.shape[1:]).mean(1)
        order = self.packing(kind, self._tokens(kind, arguments)).order
        return merged[order.argsort().to(merged.device)]


@register_family
class Qwen35(QwenVL):
    """The same encoder without DeepStack; three of four decoder layers have gated linear attention."""

    model_types = ("qwen3_5", "qwen3_5_moe")
    checkpoints = "Qwen3.5, Qwen3.6"
    hybrid = True


@register_family
class Glm(QwenVL):
    """Pictures as Qwen-VL has them. The frames of a video stand in the placeholders of images: images only."""

    model_types = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
    checkpoints = "GLM-4.1V, GLM-4.5V, GLM-4.6V, GLM-OCR"
    unit = "image"
    video = False
    merging = "no"

    def encoder_layers(self, kind: Kind) -> Sequence[Any]:
        return ()  # a convolution joins the units behind the layers


class _Whole(QwenVL):
    """Those between whose encoder layers nothing merges: that was not tried."""

    merging = "no"

    def encoder_layers(self, kind: Kind) -> Sequence[Any]:
        return ()

    def mergers(self, kind: Kind) -> Sequence[Any]:
        return ()


@register_family
class OmniThinker(_Whole):
    """The thinker of an omni model. Its sound may stand between the frames of a video, in the order of time."""

    model_types = ("qwen2_5_omni_thinker",)
    checkpoints = "the thinker of Qwen2.5-Omni; sound whole, or `keep_audio=`"
    sound = True

    def encoder(self, kind: Kind) -> Any:
        return self.core.audio_tower if kind == "audio" else super().encoder(kind)

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return () if kind == "audio" else super().attentions(kind)

    def field(self, kind: Kind) -> str:
        return "last_hidden_state" if kind == "audio" else super().field(kind)

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        if kind != "audio":
            return super().visuals(kind, arguments, lengths)
        frames = arguments["feature_attention_mask"].sum(-1).tolist()
        return [Visual.of_grid((self._heard(count), 1, 1)) for count in frames]

    def _heard(self, frames: int) -> int:
        """Tokens of so many frames of a spectrogram: one convolution of stride 2, and the mean of every two."""
        return _halved(frames) // 2


@register_family
class Qwen3OmniThinker(OmniThinker):
    """Its sound is cut into windows, each of which goes through three convolutions of stride 2."""

    model_types = ("qwen3_omni_moe_thinker",)
    checkpoints = "the thinker of Qwen3-Omni; sound whole, or `keep_audio=`"

    def _heard(self, frames: int) -> int:
        window = 2 * self.encoder("audio").n_window
        whole, rest = divmod(frames, window)
        return sum(count * _halved(_halved(_halved(size))) for count, size in ((whole, window), (1, rest)))


def _halved(frames: int) -> int:
    return (frames + 1) // 2


@register_family
class CohereCompass(_Whole):
    """Qwen3-VL's encoder and DeepStack before a decoder of Cohere's."""

    model_types = ("cohere_compass",)
    checkpoints = "North Micro Vision"


@register_family
class Cosmos3Edge(_Whole):
    """A SigLIP 2 encoder whose patches come in the order of their units; they are merged behind it."""

    model_types = ("cosmos3_edge",)
    checkpoints = "Cosmos3-Edge"

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [layer.self_attn for layer in self.encoder(kind).encoder.layers]

    def depth(self, kind: Kind) -> int:
        return len(self.attentions(kind))


@register_family
class Ernie(_Whole):
    """Units of two frames of a video become one token; decoder layers have experts of their own for vision tokens."""

    model_types = ("ernie4_5_vl_moe",)
    checkpoints = "ERNIE-4.5-VL"

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_tower

    def along(self, input_ids: Tensor, kind: Kind) -> dict[str, Tensor]:
        kinds = super().along(input_ids, kind)
        return kinds | {"moe_mm_token_type_ids": kinds["mm_token_type_ids"]}

    def _tokens(self, kind: Kind, arguments: Arguments) -> list[Grid]:
        time = self.core.resampler_model.temporal_merge_size if kind == "video" else 1
        return [(frames // time, rows, columns) for frames, rows, columns in super()._tokens(kind, arguments)]

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        merged = values.view(-1, self.factor**2, *values.shape[1:]).mean(1)
        if kind == "image":
            return merged
        frames = [rows * columns for frames, rows, columns in super()._tokens(kind, arguments) for _ in range(frames)]
        one_by_one = merged.split(frames)
        return torch.cat([(a + b) / 2 for a, b in zip(one_by_one[::2], one_by_one[1::2], strict=True)])


@register_family
class HunYuan(_Whole):
    """Every image begins and ends with a learned token, and so does every row of its grid; the first two stay."""

    model_types = ("hunyuan_vl",)
    checkpoints = "HunyuanOCR"
    unit = "image"
    video = False

    def __init__(self, model) -> None:
        Family.__init__(self, model)
        config = self.model.config
        self.factor = config.vision_config.spatial_merge_size
        self.axes = len(config.text_config.rope_parameters["mrope_section"])

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_tower

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [layer.self_attn for layer in self.encoder(kind).layers]

    def depth(self, kind: Kind) -> int:
        return len(self.attentions(kind))

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        return [self._visual(rows, columns) for _, rows, columns in self._tokens(kind, arguments)]

    @staticmethod
    def _visual(rows: int, columns: int) -> Visual:
        places = 1 + torch.arange(rows * (columns + 1)).view(rows, columns + 1)
        length = places.numel() + 2
        marks = torch.cat([torch.tensor([0, length - 1]), places[:, -1]])
        return Visual(length, (Segment((1, rows, columns), places[:, :-1].flatten(), marks, marks_stay=2),))

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        """Patches are in raster order here; what is no patch gets zeros."""
        images, flat = [], values.flatten(1)
        visuals, chunks = self.visuals(kind, arguments, None), self.chunks(kind, arguments)
        for visual, patches in zip(visuals, flat.split(chunks), strict=True):
            segment, image = visual.segments[0], flat.new_zeros(visual.length, flat.shape[-1])
            _, rows, columns = segment.grid
            units = patches.view(rows, self.factor, columns, self.factor, -1).mean((1, 3))
            image[segment.index.to(flat.device)] = units.flatten(0, 1)
            images.append(image)
        return torch.cat(images).view(-1, *values.shape[1:])
