"""A stock Qwen2.5-VL: its shape, its start, its position ids, and a forward that can lose its vision tokens on the way.

Vision tokens carry no coordinates: the vision tower turns queries and keys only, so where a token lies is known to the
position ids of the decoder (mRoPE) alone. Two heads of the first layer begin as a ruler that writes them into the words
left, right, top and bottom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from visiontrim.zoo.canvas import CELL, Grid
from visiontrim.zoo.questions import CHARACTERS, WORDS
from visiontrim.zoo.scenes import COLORS, KINDS
from visiontrim.zoo.training.decoder import Pass
from visiontrim.zoo.training.packing import TEXT_START, Packed, attention_mask
from visiontrim.zoo.training.symbolic import PAD, WORD_ID, VisionTokens, word_embeddings

VOCABULARY = (*WORDS, "<|vision_start|>", "<|vision_end|>", "<video>")
PREFIX = ("<s>", "USER:", "<|vision_start|>")
IMAGE_START = len(PREFIX)
AFTER_IMAGE = 1
"""<|vision_end|> stands between the image and the first question."""
TOKEN_ID = {word: number for number, word in enumerate(VOCABULARY)}

CONTENT = (*COLORS, *KINDS, *CHARACTERS)
"""The words that objects are made of."""
MATCH, COPY, NOISE = 0.4, 0.35, 0.02
"""Gains of the first queries and keys, of the first values and outputs, and the noise on all of them."""


@dataclass(frozen=True)
class QwenShape:
    """Sizes. Rotary pairs of the decoder's heads turn with time, height and width as ``sections`` says.

    Neighbouring cells turn the fastest pair of the width by ``theta ** (-2 * sum(sections[:2]) / width of a head)``.
    """

    layers: int = 8
    hidden: int = 256
    heads: int = 4
    key_value_heads: int = 2
    mlp: int = 256
    theta: float = 1e4
    sections: tuple[int, int, int] = (2, 8, 22)
    tower_layers: int = 6
    tower_hidden: int = 96
    tower_heads: int = 4
    tower_mlp: int = 192
    full_attention: tuple[int, ...] = (2, 5)
    window_cells: int = 4
    """Width of an attention window of the vision tower."""


def config_of(shape: QwenShape) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "model_type": "qwen2_5_vl_text",
            "vocab_size": len(VOCABULARY),
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "pad_token_id": PAD,
            "bos_token_id": TOKEN_ID["<s>"],
            "eos_token_id": TOKEN_ID["</s>"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape.theta,
                "mrope_section": list(shape.sections),
            },
        },
        vision_config={
            "model_type": "qwen2_5_vl_vision",
            "depth": shape.tower_layers,
            "hidden_size": shape.tower_hidden,
            "num_heads": shape.tower_heads,
            "intermediate_size": shape.tower_mlp,
            "patch_size": CELL // 2,
            "window_size": CELL * shape.window_cells,
            "fullatt_block_indexes": list(shape.full_attention),
            "out_hidden_size": shape.hidden,
        },
        image_token_id=TOKEN_ID["<image>"],
        video_token_id=TOKEN_ID["<video>"],
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def new_model(shape: QwenShape, generator: torch.Generator) -> Qwen2_5_VLForConditionalGeneration:
    """A model whose decoder begins with heads that find alike tokens and copy them, see ``_start_attention``.

    Embeddings, which stay fixed, and the head start as orthonormal words. :mod:`.tower` starts the vision tower.
    """
    model = Qwen2_5_VLForConditionalGeneration(config_of(shape))
    text: Any = model.model.language_model
    embeddings = word_embeddings(shape.hidden, len(VOCABULARY))
    with torch.no_grad():
        for layer in text.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                linear.weight.copy_(NOISE * torch.randn(linear.weight.shape, generator=generator))
            _start_attention(layer.self_attn, embeddings, generator)
        _start_ruler(text.layers[0].self_attn, embeddings, shape)
        text.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.copy_(embeddings)
    text.embed_tokens.requires_grad_(False)
    return model


def _start_attention(attention: Any, embeddings: Tensor, generator: torch.Generator) -> None:
    """Queries equal keys: the words of objects on the slowest rotary pairs, where position hardly counts, other
    directions on the fast ones. Values hold the words of objects and places, outputs give them back.
    """
    width, half = attention.head_dim, attention.head_dim // 2
    hidden = embeddings.shape[1]

    def others(known: Tensor, count: int) -> Tensor:
        """Orthonormal rows, orthogonal to the rows of ``known``."""
        noise = torch.randn(hidden, count, generator=generator)
        return torch.linalg.qr(torch.cat([known.T, noise], dim=1))[0][:, len(known) :].T

    content = embeddings[[WORD_ID[word] for word in CONTENT]]
    said = embeddings[[WORD_ID[word] for word in (*CONTENT, "left", "right", "top", "bottom")]]
    slow = torch.tensor([*range(half - len(content) // 2, half), *range(width - len(content) // 2, width)])
    keys, values = [], []
    for _ in range(attention.num_key_value_heads):
        rows = torch.empty(width, hidden)
        rows[slow] = MATCH * content
        rows[[row for row in range(width) if row not in slow]] = MATCH * others(content, width - len(content))
        keys.append(rows)
        values.append(COPY**0.5 * torch.cat([said, others(said, width - len(said))]))
    groups = attention.num_key_value_groups
    starts = (
        (attention.q_proj, torch.cat([rows for rows in keys for _ in range(groups)])),
        (attention.k_proj, torch.cat(keys)),
        (attention.v_proj, torch.cat(values)),
        (attention.o_proj, torch.cat([rows for rows in values for _ in range(groups)]).T),
    )
    for linear, weight in starts:
        linear.weight.copy_(weight + NOISE * torch.randn(weight.shape, generator=generator))
        if linear.bias is not None:
            linear.bias.zero_()


def _start_ruler(attention: Any, embeddings: Tensor, shape: QwenShape) -> None:
    """Heads 0 and 1, which share keys, look at <s> and USER: alone and weigh them by their distance: at column
    (row) 8 of the image equally, to the right (bottom) <s> more. They add the difference to the words of places.
    """
    width, half = attention.head_dim, attention.head_dim // 2
    norm = math.sqrt(shape.hidden)  # of a token behind the norm of the layer
    first, second = embeddings[TOKEN_ID["<s>"]], embeddings[TOKEN_ID["USER:"]]
    middle = IMAGE_START + 7.5
    scale = math.sqrt(width)  # attention divides by it
    for name in ("k_proj", "v_proj"):
        getattr(attention, name).weight[:width] *= NOISE
    attention.q_proj.weight[: 2 * width] *= NOISE
    attention.o_proj.weight[:, : 2 * width] *= NOISE
    attention.k_proj.weight[half - 1] += 8 / norm * (first + second)
    attention.v_proj.weight[0] += (first - second) / norm
    axes = ((sum(shape.sections[:2]), 2.0, "right", "left"), (sum(shape.sections[:2]) - 1, 1.6, "bottom", "top"))
    for head, (pair, steepness, more, less) in enumerate(axes):
        turn = middle * shape.theta ** (-2 * pair / width)
        attention.k_proj.weight[pair] += 4 / norm * (first - second)
        query = attention.q_proj.bias[head * width : (head + 1) * width]
        query[half - 1] = 10 * scale / 8
        query[pair] = -scale * steepness / 4 * math.sin(turn)
        query[pair + half] = -scale * steepness / 4 * math.cos(turn)
        place = embeddings[WORD_ID[more]] - embeddings[WORD_ID[less]]
        attention.o_proj.weight[:, head * width] += 1.2 * place


def positions(cells: Int[Tensor, "scenes tokens"], grid: Grid, packed: Packed) -> Int[Tensor, "3 scenes all"]:
    """Position ids for time, height and width: of the prefix, the vision tokens, <|vision_end|> and packed text.

    ``cells`` of a clip count on from frame to frame. Text goes on behind the larger side of the grid, whichever vision
    tokens are there (``get_rope_index``).
    """
    scenes = len(cells)
    before = torch.arange(IMAGE_START).expand(scenes, -1)
    after = IMAGE_START + max(grid)
    text = after + AFTER_IMAGE + packed.position - TEXT_START
    behind = torch.cat([torch.full((scenes, AFTER_IMAGE), after), text], dim=1)
    channels = (cells // (grid[0] * grid[1]), cells // grid[1] % grid[0], cells % grid[1])
    return torch.stack([torch.cat([before, IMAGE_START + channel, behind], dim=1) for channel in channels])


def forward(
    model: Qwen2_5_VLForConditionalGeneration,
    vision: VisionTokens,
    grid: Grid,
    packed: Packed,
    seen_by: int | None = None,
) -> Pass:
    """Run the decoder's own layers over the prefix, the vision tokens, <|vision_end|> and packed questions.

    The vision tokens are there for the first ``seen_by`` layers only, for all of them by default.
    """
    text: Any = model.model.language_model
    scenes, tokens = vision.patch.shape
    start = torch.tensor([TOKEN_ID[word] for word in PREFIX]).expand(scenes, -1)
    end = torch.full((scenes, AFTER_IMAGE), TOKEN_ID["<|vision_end|>"])
    embed = text.embed_tokens
    hidden = torch.cat([embed(start), vision.features, embed(end), embed(packed.ids)], dim=1)
    rotary = text.rotary_emb(hidden, positions(vision.patch, grid, packed))
    image_end = IMAGE_START + tokens
    mask = attention_mask(packed.conversation, image_end + AFTER_IMAGE)
    blind = mask.clone()
    blind[:, :, image_end:, IMAGE_START:image_end] = False

    states: list[Float[Tensor, "scenes all hidden"]] = [hidden]
    for number, layer in enumerate(text.layers):
        seen = seen_by is None or number < seen_by
        hidden = layer(hidden, attention_mask=mask if seen else blind, position_embeddings=rotary)
        states.append(hidden)
    return Pass(states, model.lm_head(text.norm(hidden[:, image_end + AFTER_IMAGE :])), mask, rotary)
