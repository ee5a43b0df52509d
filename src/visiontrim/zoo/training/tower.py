"""The vision tower with its text tower, a stock CLIP, and a forward on some of the patches of a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from visiontrim.zoo.questions import WORDS
from visiontrim.zoo.scenes import GRID, PATCH, SIZE
from visiontrim.zoo.training.symbolic import PAD, WORD_ID

MEAN, STD = 127.5, 64.0
"""Of pixel values from 0 to 255."""
JOINT = 96
"""Width of the space that pictures and text share."""
END = WORD_ID["<eot>"]
"""End of a text. It must not be 2, for which CLIP takes the largest word id for the end."""
TEXT_LENGTH = 40


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=JOINT,
        hidden_act="gelu",
    )


def new_clip(generator: torch.Generator, vocabulary: Sequence[str] = WORDS) -> CLIPModel:
    """Both towers. The vision tower begins with sine positions and heads that find alike patches (W_q = W_k)."""
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=JOINT,
        hidden_act="gelu",
        bos_token_id=WORD_ID["<s>"],
        eos_token_id=END,
        pad_token_id=PAD,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision_config().to_dict(), projection_dim=JOINT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())  # CLIP draws its weights from the global generator
        model = CLIPModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
        tower: Any = model.vision_model
        tower.embeddings.position_embedding.weight[1:] = 0.5 * _sine_positions(128)
        tower.embeddings.patch_embedding.weight.normal_(0, 0.05, generator=generator)
        for layer in tower.encoder.layers:
            attention = layer.self_attn
            width = 128 // attention.num_heads
            noise = torch.randn(attention.num_heads, 128, 128, generator=generator)
            match = torch.linalg.qr(noise)[0][:, :width].flatten(0, 1)
            attention.q_proj.weight.copy_(match)
            attention.k_proj.weight.copy_(match)
    return model


def new_projector(hidden: int, generator: torch.Generator) -> nn.ModuleDict:
    """The two-layer projector of LLaVA, under its names."""
    projector = nn.ModuleDict({"linear_1": nn.Linear(128, hidden), "linear_2": nn.Linear(hidden, hidden)})
    with torch.no_grad():
        for linear in projector.values():
            linear.weight.normal_(0, 0.02, generator=generator)  # pyright: ignore
            linear.bias.zero_()  # pyright: ignore
    return projector


def project(projector: nn.ModuleDict, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch hidden"]:
    return projector["linear_2"](nn.functional.gelu(projector["linear_1"](features)))


def _sine_positions(width: int) -> Float[Tensor, "patches width"]:
    quarter = width // 4
    angle = torch.arange(GRID).float()[:, None] / 100 ** (torch.arange(quarter) / quarter)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = (line[:, None].expand(GRID, GRID, -1), line[None].expand(GRID, GRID, -1))
    return torch.cat([rows, columns], dim=-1).reshape(GRID * GRID, width)


def patchify(image: Image.Image) -> UInt8[np.ndarray, "576 192"]:
    """The patches of a picture, row-major, each as the convolution of the tower reads it: channel, row, column."""
    pixels = np.asarray(image).reshape(GRID, PATCH, GRID, PATCH, 3)
    return pixels.transpose(0, 2, 4, 1, 3).reshape(GRID * GRID, 3 * PATCH * PATCH)


def look(
    tower: Any, pixels: UInt8[Tensor, "scenes tokens 192"], patch: Int[Tensor, "scenes tokens"]
) -> list[Float[Tensor, "scenes 1+tokens width"]]:
    """Hidden states of the tower on these patches alone, with [CLS]; with all patches the stock forward's."""
    embeddings = tower.embeddings
    position = embeddings.position_embedding.weight
    seen = ((pixels.float() - MEAN) / STD) @ embeddings.patch_embedding.weight.flatten(1).T + position[1 + patch]
    first = (embeddings.class_embedding + position[0]).expand(len(seen), 1, -1)
    states = [tower.pre_layrnorm(torch.cat([first, seen], dim=1))]
    for layer in tower.encoder.layers:
        states.append(layer(states[-1], attention_mask=None))
    return states


def read_texts(model: CLIPModel, texts: Sequence[Iterable[str]]) -> tuple[Float[Tensor, "texts words joint"], Tensor]:
    """Unit vectors of the joint space for every word of some texts, and the index of the end of each."""
    rows = [[WORD_ID["<s>"], *(WORD_ID[word] for word in words), END] for words in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    hidden = model.text_model(input_ids=ids, attention_mask=(ids != PAD).long()).last_hidden_state
    ends = torch.tensor([len(row) - 1 for row in rows])
    return nn.functional.normalize(model.text_projection(hidden), dim=-1), ends
