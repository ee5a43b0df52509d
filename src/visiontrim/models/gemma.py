"""PaliGemma, Gemma 3 and Gemma 4: language models in which image tokens attend to each other in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.models.family import Arguments, Family, Kind, Picture, register_family
from visiontrim.models.layout import Grid, Visual, equal_grids


class _Gemma(Family):
    """Square pictures, all of the same size."""

    scores = "attention received"
    bidirectional = True

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_tower

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [layer.self_attn for layer in self.encoder(kind).encoder.layers]

    @property
    def side(self) -> int:
        """Patches along a side of a picture."""
        config = self.model.config.vision_config
        return config.image_size // config.patch_size

    @property
    def picture(self) -> Grid:
        """(1, rows, columns) of the tokens of one picture."""
        return 1, self.side, self.side


@register_family
class PaliGemma(_Gemma):
    """The whole prompt, text included, attends in both directions."""

    model_types = ("paligemma",)
    checkpoints = "PaliGemma, PaliGemma 2"
    turns = False

    @property
    def projector(self) -> Any:
        return self.core.multi_modal_projector

    @property
    def vision_width(self) -> int:
        return self.model.config.vision_config.hidden_size

    def along(self, input_ids: Tensor, kind: Kind) -> dict[str, Tensor]:
        return {"token_type_ids": input_ids.new_zeros(input_ids.shape)}

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        return [Visual.of_grid(self.picture)] * len(arguments["pixels"])


@register_family
class Gemma3(_Gemma):
    """Patches are averaged before the projection, so tokens are selected after it."""

    model_types = ("gemma3", "shieldgemma2")
    checkpoints = "Gemma 3, ShieldGemma 2"

    @property
    def picture(self) -> Grid:
        side = self.core.multi_modal_projector.tokens_per_side
        return 1, side, side

    def along(self, input_ids: Tensor, kind: Kind) -> dict[str, Tensor]:
        return {"token_type_ids": self.placeholders(input_ids).long()}

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        return equal_grids(lengths or (), self.picture)

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        images = values.flatten(1).view(-1, self.side, self.side, values[0].numel()).permute(0, 3, 1, 2)
        pooled = F.avg_pool2d(images, self.side // self.picture[1])
        return pooled.permute(0, 2, 3, 1).reshape(-1, *values.shape[1:])


@register_family
class Gemma4(Family):
    """Images of any size as rows that are padded at the end, their patches averaged 3 x 3 behind the encoder.

    The model makes the masks of its layers itself, and may give every layer an input of its own for every token. Small
    ones share keys and values among layers.
    """

    model_types = ("gemma4",)
    checkpoints = "Gemma 4; videos as images"
    scores = "attention received, mean over each averaged unit"
    bidirectional = True
    no_stages = "makes the masks of all layers, and their inputs of each token, before the first one"

    def __init__(self, model) -> None:
        super().__init__(model)
        self.factor = getattr(self.model.config.vision_config, "pooling_kernel_size", 1)  # some have text alone

    def encoder(self, kind: Kind) -> Any:
        return self.core.vision_tower

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return [layer.self_attn for layer in self.encoder(kind).encoder.layers]

    def along(self, input_ids: Tensor, kind: Kind) -> dict[str, Tensor]:
        return {"mm_token_type_ids": self.placeholders(input_ids).long()}

    def noise(self, picture: Picture) -> dict[str, Tensor]:
        patch = self.model.config.vision_config.patch_size
        unit = patch * self.factor
        if picture.frames or picture.height % unit or picture.width % unit:
            raise TrimError(
                f"{type(self).__name__} sees images in units of {unit} x {unit} pixels and no videos, into which "
                f"{picture.height} x {picture.width} x {picture.frames} cannot be cut: give multiples"
            )
        rows, columns = picture.height // patch, picture.width // patch
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
        return {"pixel_values": torch.rand(1, rows * columns, 3 * patch**2), "image_position_ids": places[None]}

    def _places(self, arguments: Arguments) -> list[Tensor]:
        """(column, row) [patches, 2] of the patches of each image."""
        return [places[(places != -1).all(-1)] for places in arguments["image_position_ids"]]

    def filled(self, kind: Kind, arguments: Arguments) -> list[int]:
        return [len(places) for places in self._places(arguments)]

    def visuals(self, kind: Kind, arguments: Arguments, lengths: Sequence[int] | None) -> list[Visual]:
        sides = [(places.amax(0) + 1) // self.factor for places in self._places(arguments)]
        return [Visual.of_grid((1, int(rows), int(columns))) for columns, rows in sides]

    def pooled(self, kind: Kind, arguments: Arguments, values: Tensor) -> Tensor:
        flat, images = values.flatten(1), []
        for places, patches in zip(self._places(arguments), flat.split(self.filled(kind, arguments)), strict=True):
            columns, rows = (places.to(flat.device) // self.factor).unbind(-1)
            sums = flat.new_zeros(len(places) // self.factor**2, flat.shape[-1])
            images.append(sums.index_add(0, rows * (columns.max() + 1) + columns, patches) / self.factor**2)
        return torch.cat(images).view(-1, *values.shape[1:])


@register_family
class Gemma4Unified(Gemma4):
    """Patches go into the language model as they are: there is no encoder whose attention could rank them."""

    model_types = ("gemma4_unified",)
    scores = "none"

    def __init__(self, model) -> None:
        super().__init__(model)
        self.factor = 1

    def encoder(self, kind: Kind) -> Any:
        return self.core.embed_vision

    def attentions(self, kind: Kind) -> Sequence[Any]:
        return ()
