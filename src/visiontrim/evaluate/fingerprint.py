"""What tells two models apart that answer questions: weights, configuration, processor, text tower, releases.

An answer is used again only where all of this is the same. Sums are of integers, so they are exact, and equal on every
device.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from visiontrim.ask import Speaker

CHUNK = 2**24
"""Values of a tensor that are summed at a time."""
PATHS = ("_name_or_path", "name_or_path", "transformers_version", "tokenizer_file", "vocab_file", "merges_file")
"""What says where something came from, and not what it is."""
_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(module: nn.Module) -> str:
    """Eight digits that tell weights, their order and their dtype apart."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(f"{name}{tuple(value.shape)}{value.dtype}{_sums(value)}".encode())
    return total.hexdigest()[:8]


def setup(speaker: Speaker) -> str:
    """Eight digits that tell apart what else than the model's weights makes an answer."""
    model, processor, tower = speaker.model, speaker.processor, speaker.text_tower
    generation = getattr(model, "generation_config", None)
    parts: list[Any] = [
        model.config.to_dict(),
        model.config._attn_implementation,
        None if generation is None else generation.to_dict(),
        _processor(processor),
        getattr(speaker.normalise, "__qualname__", ""),
        None
        if tower is None
        else (fingerprint(tower.model), tower.model.config.to_dict(), _tokenizer(tower.tokenizer)),
        [(name, version(name)) for name in ("visiontrim", "torch", "transformers")],
    ]
    return _digest(parts)


def _processor(processor: Any) -> list[Any]:
    parts = [getattr(processor, name, None) for name in ("image_processor", "video_processor")]
    own = {name: value for name, value in vars(processor).items() if isinstance(value, str | int | float | bool)}
    return [own, [None if part is None else part.to_dict() for part in parts], _tokenizer(processor.tokenizer)]


def _tokenizer(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for name in ("padding", "truncation"):  # those of the last call
        rules.pop(name, None)
    text = json.dumps(rules, sort_keys=True)
    return [hashlib.sha256(text.encode()).hexdigest(), tokenizer.special_tokens_map, tokenizer.model_max_length]


def _digest(value: Any) -> str:
    text = json.dumps(_without_paths(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _without_paths(part) for name, part in value.items() if name not in PATHS}
    if isinstance(value, list | tuple):
        return [_without_paths(part) for part in value]
    return value


def _sums(value: Tensor) -> tuple[int, int]:
    """Sum of the bits of all values, and the same weighted by their places, both modulo 2^64."""
    flat = value.detach().contiguous().flatten()
    bits = flat.view(_WIDTHS[flat.element_size()]) if flat.dtype != torch.bool else flat.to(torch.uint8)
    plain = weighted = 0
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].long()
        places = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        plain += int(part.sum())
        weighted += int((part * places).sum())
    return plain % 2**64, weighted % 2**64
