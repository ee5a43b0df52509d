"""Whether what is to be measured can fit at all: told by arithmetic, before anything is allocated by what is asked.

The sums are lower bounds: what passes may still be too much.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedConfig

from visiontrim.core.errors import TrimError
from visiontrim.measure.shapes import Shape
from visiontrim.report import scaled


def check_room(
    shape: Shape, device: torch.device, dtype: torch.dtype, *, batch: int, text: int, answer: int, weights: bool
) -> None:
    """Raise :class:`TrimError` for more text than the model has positions, or more bytes than the device has.

    ``weights`` says whether those are still to be made.
    """
    config: Any = shape.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and text + answer > positions:
        raise TrimError(
            f"{text:,} text tokens and {answer:,} of the answer are more than the {positions:,} positions of "
            f"{shape.name}: lower --text or --answer"
        )
    picture = 3 * shape.picture.height * shape.picture.width * max(shape.picture.frames, 1)
    size = batch * ((text + answer) * _token_numbers(config) + picture) * dtype.itemsize
    if weights:
        size += sum(parameter.numel() for parameter in shape.build("meta", dtype).parameters()) * dtype.itemsize
    if size > (there := _bytes(device)):
        raise TrimError(
            f"{shape.name} with {batch:,} prompts of {text:,} text tokens takes at least {scaled(size, 'B')} "
            f"({str(dtype).removeprefix('torch.')}), {device} has {scaled(there, 'B')}: lower "
            f"{'--batch, --layers or --text' if weights else '--batch or --text'}"
        )


def _token_numbers(config: PreTrainedConfig) -> int:
    """Keys and values of a token in all layers; 0 where the configuration does not say."""
    layers, heads = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)
    if not layers or not heads:
        return 0
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    return 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * width


def _bytes(device: torch.device) -> int:
    """Of its memory, free or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not tell
        return 2**63
