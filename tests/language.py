"""Views between decoder layers with every signal, and what methods leave of them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import visiontrim as vt
from views import grouped
from visiontrim.core.method import Layers, Method, Step
from visiontrim.core.signals import Sides, Text

generator = torch.Generator()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator.manual_seed(seed))


def seen_by(step: Step, tokens: int = 576, entered: int = 576, num_layers: int = 32, images: int = 1) -> vt.View:
    """Random vision tokens of width 8, and random values of every signal that ``step`` needs."""
    dim, heads, kv_heads, head_dim, words = 8, 4, 2, 4, 7
    signals: dict = {
        "decoder.last_attention": random(images, tokens),
        "decoder.next_attention": random(images, tokens),
        "decoder.previous": random(images, tokens, dim),
        "text.question": Text(random(images, words, dim), torch.ones(images, words, dtype=torch.bool), 1.0),
        "decoder.text_attention": random(images, heads, words, tokens),
        "decoder.embeddings": Sides(random(images, entered, dim, seed=2), random(images, words, dim, seed=3)),
        "decoder.normed": Sides(random(images, tokens, dim, seed=4), random(images, words, dim, seed=5)),
        "decoder.queries": Sides(
            random(images, heads, tokens, head_dim), random(images, heads, words, head_dim, seed=6)
        ),
        "decoder.keys": Sides(
            random(images, kv_heads, tokens, head_dim, seed=7), random(images, kv_heads, words, head_dim)
        ),
        "decoder.values": Sides(
            random(images, kv_heads, tokens, head_dim, seed=8), random(images, kv_heads, words, head_dim, seed=9)
        ),
        "decoder.mean_rotary": random(images, tokens, 2, seed=10),
        "decoder.rotary": Sides(random(images, tokens, 2 * head_dim) + 1, random(images, words, 2 * head_dim) + 1),
    }
    side = round(entered**0.5)
    return vt.View(
        features=random(images, tokens, dim, seed=1),
        coordinates=torch.zeros(images, tokens, 3, dtype=torch.long),
        grid=(1, side, entered // side),
        entered=entered,
        num_layers=num_layers,
        **grouped({name: signal for name, signal in signals.items() if name in step.needs}),
    )


def left_by(method: Method, entered: int = 576, num_layers: int = 32) -> list[int]:
    """Tokens of an image that each decoder layer processes."""
    counts, before, noted = [entered] * num_layers, entered, None
    for step in method.steps_for(Layers(encoder=0, decoder=num_layers)):
        kept = step.select(dataclasses.replace(seen_by(step, before, entered, num_layers), noted=noted))
        before, noted = kept.index.shape[1], kept.noted
        counts[step.site.index :] = [before] * (num_layers - step.site.index)
    return counts


def mean(method: Method, entered: int = 576, num_layers: int = 32) -> float:
    return sum(left_by(method, entered, num_layers)) / num_layers
