"""Images as the processor of each model type would give them, of the sizes of ``tests/shrunk.py``."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def _of_ocr2(number: int, generator: torch.Generator) -> dict[str, Any]:
    """A view of the whole, with one tile or two before."""
    given: dict[str, Any] = {"pixel_values": torch.randn(1, 3, 64, 64, generator=generator)}
    tiles = torch.randn(1 + number % 2, 3, 64, 64, generator=generator)
    return given | {"pixel_values_local": tiles, "num_local_patches": torch.tensor([1 + number % 2])}


def _of_molmo2(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A view of 4 x 4 patches, and one or no tile, pooled 2 x 2; what is pooled is counted over all tiles of a call."""
    rows, columns = (2, 2) if number % 2 else (0, 0)
    tiles = 1 + number % 2
    units = torch.arange(16 * tiles).view(tiles, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4)
    grids = torch.tensor([[2, 2, rows, columns]])
    pixels = torch.randn(tiles, 16, 14 * 14 * 3, generator=generator)
    return {"pixel_values": pixels, "image_token_pooling": units, "image_grids": grids}


def _of_granite4(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(1, 3, 3, 56, 56, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[56, 112]])}


def _padded(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """8 x 8 or 4 x 12 pixels, padded to the same size."""
    sizes = (8, 8) if number % 2 else (4, 12)
    pixels = torch.zeros(1, 3, 12, 12)
    pixels[..., : sizes[0], : sizes[1]] = torch.randn(1, 3, *sizes, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([sizes])}


def _of_fuyu(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 12, 14 * 14 * 3, generator=generator)}


def _of_tiles(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """As many tiles as rows have; those of padding are seen to be zeros, or said to be none."""
    pixels = torch.randn(1, 1, 3, 56, 56, generator=generator)
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


OF_TYPE = {
    "apertus1p5": _padded,
    "chameleon": lambda number, generator: {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)},
    "deepseek_ocr2": _of_ocr2,
    "emu3": _padded,
    "fuyu": _of_fuyu,
    "granite4_vision": _of_granite4,
    "granite_docling": _of_tiles,
    "idefics2": lambda *given: {"pixel_values": _of_tiles(*given)["pixel_values"]},
    "molmo2": _of_molmo2,
}
"""Images of types whose processors give something of their own."""


def pixels_of(model: Any, number: int) -> dict[str, Tensor]:
    """An image as the processor would give it: where any size goes, a square one and a long one by turns."""
    names = signature(model.model.get_image_features).parameters
    vision, generator = getattr(model.config, "vision_config", None), torch.Generator().manual_seed(number)
    patch = getattr(vision, "patch_size", 14)
    patch = patch if isinstance(patch, int) else patch[0]
    if "image_grid_thw" in names:
        rows, columns = (4, 4) if number % 2 else (2, 16)
        values = 3 * getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1)) * patch**2
        square = model.config.model_type in ("kimi_k25", "paddleocr_vl")
        shape = (rows * columns, *((3, patch, patch) if square else (values,)))
        given = {"image_grid_thw": torch.tensor([[1, rows, columns]])}
        if "image_merge_sizes" in names:
            given["image_merge_sizes"] = torch.tensor([2])
        return {"pixel_values": torch.randn(shape, generator=generator)} | given
    if model.config.model_type in OF_TYPE:
        return OF_TYPE[model.config.model_type](number, generator)
    if "image_position_ids" in names:  # patches of 4 x 3 or 2 x 6 units in a padded row
        factor = getattr(vision, "pooling_kernel_size", 1) if hasattr(vision, "hidden_size") else 1
        rows, columns = (2 * factor, 3 * factor) if number % 2 else (factor, 4 * factor)
        places = torch.full((6 * factor**2 + factor**2, 2), -1)
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
        places[: len(grid)] = grid
        side = getattr(vision, "model_patch_size", patch)
        values = 0.3 * torch.rand(1, len(places), 3 * side**2, generator=generator)
        return {"pixel_values": values, "image_position_ids": places[None]}
    side = getattr(vision, "image_size", 56)
    side = side if isinstance(side, int) else side[0]
    given = {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}
    if "target_sizes" in names:  # patches in one row
        rows, columns = (4, 4) if number % 2 else (4, 8)
        if model.config.model_type != "minicpm_ocr":  # these merge four patches within the encoder
            rows, columns = (8, 8) if number % 2 else (4, 16)
        given = {"pixel_values": torch.randn(1, 3, patch, rows * columns * patch, generator=generator)}
        given["target_sizes"] = torch.tensor([[rows, columns]])
    if "high_res_pixel_values" in names:
        given["high_res_pixel_values"] = torch.randn(1, 3, 64, 64, generator=generator)
    return given


def _axis(key: str, given: dict[str, Tensor]) -> int:
    """Along which images of one call stand one after the other."""
    return -1 if key == "pixel_values" and "target_sizes" in given else 0


def of_row(key: str, images: list[dict[str, Tensor]]) -> Tensor:
    """The images of one row; where rows hold tiles [rows, tiles, ...], they stand beside each other."""
    tiles = images[0]["pixel_values"].ndim == 5 and "image_sizes" not in images[0]
    return torch.cat(_counted(key, images), 1 if tiles else _axis(key, images[0]))


def _counted(key: str, images: list[dict[str, Tensor]]) -> list[Tensor]:
    """What each has under ``key``; indices of patches are counted over all of them."""
    patches = [one["pixel_values"].shape[:2].numel() for one in images]
    before = [sum(patches[:number]) if key == "image_token_pooling" else 0 for number in range(len(images))]
    return [one[key] + start if start else one[key] for one, start in zip(images, before, strict=True)]


def of_batch(key: str, rows: list[dict[str, Tensor]]) -> Tensor:
    """The same of all rows; those with fewer tiles are padded."""
    parts, axis = _counted(key, rows), _axis(key, rows[0])
    most = max(part.shape[1] for part in parts) if parts[0].ndim > 1 else 0
    if "image_sizes" not in rows[0] and (key == "pixel_attention_mask" or (key == "pixel_values" and axis == 0)):
        parts = [pad(part, (*(0 for _ in part.shape[2:] * 2), 0, most - part.shape[1])) for part in parts]
    return torch.cat(parts, axis)
