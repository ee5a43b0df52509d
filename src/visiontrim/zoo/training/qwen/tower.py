"""The vision tower of the small Qwen2.5-VL: its start, and its own layers on a batch of images of one size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from visiontrim.zoo.canvas import CELL, Grid
from visiontrim.zoo.training.qwen.model import QwenShape

MEAN, STD = 0.5, 64 / 255
"""Of all channels, as the image processor of the model has them."""
REACH = 1.5
"""How far from itself a patch looks at first, in patches."""
FOCUS = 2.8
"""Gain of the first looks; the larger, the fewer patches share one."""


def patches_of(images: Sequence[Image.Image], grid: Grid) -> Float[Tensor, "images patches 108"]:
    """Normalised patches of images of ``grid`` cells, in the order of the image processor: the four of a cell follow
    each other, cells row by row; within a patch colour channel, row, column.
    """
    (rows, cols), side = grid, CELL // 2
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    split = pixels.view(len(images), rows, 2, side, cols, 2, side, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return (split.reshape(len(images), rows * cols * 4, 3 * side**2).float() / 255 - MEAN) / STD


def vision_tokens(
    visual: Any, patches: Float[Tensor, "images patches 108"], grid: Grid
) -> Float[Tensor, "images cells hidden"]:
    """Vision tokens of images of one size, as the stock ``visual(...).pooler_output`` has them one after the other."""
    thw = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
    order, ends = get_vision_window_index(
        thw, spatial_merge_size=2, window_size=visual.window_size, patch_size=CELL // 2
    )
    images, count, _ = patches.shape
    in_order = (4 * order[:, None] + torch.arange(4)).flatten()
    # a picture is a film of two frames that are alike
    embed = visual.patch_embed.proj.weight.sum(dim=2).flatten(1)
    hidden = patches[:, in_order] @ embed.T
    cos, sin = (turn[in_order] for turn in visual.rotary_pos_emb(hidden, get_vision_position_ids(thw, 2)))
    for number, block in enumerate(visual.blocks):
        parts = [count] if number in visual.fullatt_block_indexes else ends.diff().tolist()
        hidden = hidden + _attend(block.attn, block.norm1(hidden), cos, sin, parts)
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden).view(images, count // 4, -1)[:, order.argsort()]


def _attend(
    attention: Any, hidden: Float[Tensor, "images patches width"], cos: Tensor, sin: Tensor, parts: list[int]
) -> Float[Tensor, "images patches width"]:
    """Attention within each of the consecutive ``parts`` of the images, which have this many patches."""
    images, count, width = hidden.shape
    qkv = attention.qkv(hidden).view(images, count, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [images, heads, patches, width of a head]

    def turned(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    split = (x.split(parts, dim=2) for x in (turned(query), turned(key), value))
    heard = [F.scaled_dot_product_attention(*part) for part in zip(*split, strict=True)]
    return attention.proj(torch.cat(heard, dim=2).transpose(1, 2).reshape(images, count, width))


def start_tower(visual: Any, shape: QwenShape, generator: torch.Generator) -> None:
    """Let every head look at a place near the patch: biases of queries and keys alone make the rotary turns peak there.

    Heads look along the diagonals in even layers and along the axes in odd ones, and hand on what they see.
    """
    width = shape.tower_hidden

    def orthogonal(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(max(rows, width), width, generator=generator))[0][:rows]

    with torch.no_grad():
        for module in visual.modules():
            if isinstance(module, torch.nn.Linear):
                scale = 0.7 / math.sqrt(module.in_features)
                module.weight.copy_(scale * torch.randn(module.weight.shape, generator=generator))
                module.bias.zero_()
        embed = visual.patch_embed.proj.weight
        embed.copy_(0.05 * torch.randn(embed[:, :, :1].shape, generator=generator).expand_as(embed))
        for number, block in enumerate(visual.blocks):
            attention = block.attn
            size, half = attention.head_dim, attention.head_dim // 2
            match = 0.3 * orthogonal(width)
            attention.qkv.weight.copy_(torch.cat([match, match, orthogonal(width)]))
            turns = visual.rotary_pos_emb.inv_freq[:2]
            for head in range(attention.num_heads):
                angle = 2 * math.pi * head / attention.num_heads + math.pi / 4 * (1 - number % 2)
                query, key = (attention.qkv.bias[part * width + head * size :][:size] for part in (0, 1))
                for axis, offset in enumerate((REACH * math.sin(angle), REACH * math.cos(angle))):
                    pairs = axis * half // 2 + torch.arange(2)
                    query[pairs] = FOCUS * torch.cos(turns * offset)
                    query[pairs + half] = FOCUS * torch.sin(turns * offset)
                    key[pairs] = FOCUS
