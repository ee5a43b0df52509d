"""Hand-made views of the vision encoder's output with every signal, and what the tests of methods share."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from views import grouped, signals_of
from visiontrim.core.signals import Signal, Text
from visiontrim.core.view import Keep, View
from visiontrim.methods import (
    AvgPool,
    CDPruner,
    DivPrune,
    FasterVLM,
    HiPrune,
    MMTok,
    PruMerge,
    PruMergePlus,
    PruneSID,
    VisionZip,
    VisPruner,
    VScan,
)

MIDDLE = {"middle": 1}
"""Encoder layers of the views here."""
EVERY = [
    AvgPool(),
    CDPruner(),
    DivPrune(),
    FasterVLM(),
    HiPrune(**MIDDLE, share=0.5),
    HiPrune(**MIDDLE, share=0.5, variant="release"),
    MMTok(),
    PruMerge(neighbours=5),
    PruMerge(neighbours=5, variant="release"),
    PruMergePlus(neighbours=5),
    PruMergePlus(neighbours=5, variant="release"),
    PruneSID(),
    PruneSID(variant="release"),
    VScan(stages="vision", shallow=1, window=3),
    VisPruner(),
    VisionZip(),
    VisionZip(variant="release"),
]


def make_view(seed=0, grid=(1, 6, 7), batch=2, dim=8, words=5, width=9) -> View:
    """The last question is padded, the last image has features around a common mean."""
    generator = torch.Generator().manual_seed(seed)
    total = grid[0] * grid[1] * grid[2]

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    def attention():
        return (2 * noise(batch, total)).softmax(-1)

    features = noise(batch, total, dim)
    features[-1] += 2 * noise(dim)
    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[-1, -1] = False
    ends = F.one_hot(mask.sum(-1) - 1, words).bool()
    ranks = ("encoder.cls_attention", "encoder.column_attention")
    signals: dict[Signal, object] = {(name, layer): attention() for name in ranks for layer in (1, -1)}
    signals |= {f"encoder.{name}_attention": attention() for name in ("cls", "received", "column")}
    signals |= {
        "encoder.keys": noise(batch, 2, total, 4),
        "encoder.projected": (features @ noise(dim, width) / 8).tanh(),
    }
    joint = noise(batch, total, 6)
    signals |= {
        "text.joint": joint,
        "text.joint_normalised": joint,
        "text.question": Text(noise(batch, words, 6), mask, 14.0, ends),
        "text.words": Text(noise(batch, words, width), mask, 100.0),
        ("encoder.keys", -1): noise(batch, 2, total, 4),
        ("encoder.cls_attention_wide", -1): attention(),
    }
    return View(
        features=features,
        coordinates=torch.cartesian_prod(*map(torch.arange, grid)).expand(batch, -1, -1),
        grid=grid,
        entered=total,
        num_layers=32,
        **grouped(signals),
    )


def answer(method, view) -> Keep:
    step = method.steps()[0]
    return step.select(view)


def rows(view: View, images: list[int]) -> View:
    """The view of some of the images."""

    def pick(value):
        if isinstance(value, torch.Tensor):
            return value[images]
        if isinstance(value, Text):
            ends = None if value.ends is None else value.ends[images]
            return Text(value.tokens[images], value.mask[images], value.scale, ends)
        return value

    signals = grouped({signal: pick(value) for signal, value in signals_of(view).items()})
    fields = {f.name: pick(getattr(view, f.name)) for f in dataclasses.fields(View)}
    return View(**fields | signals)


def cosines(values):
    unit = F.normalize(values.double(), dim=-1)
    return (unit @ unit.mT).tolist()


def ranked(scores):
    """Indices by falling score, ties by index."""
    scores = scores.tolist() if isinstance(scores, torch.Tensor) else list(scores)
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def image(view: View, number: int) -> dict[str, torch.Tensor]:
    names = ("projected", "cls_attention", "column_attention", "keys")
    values = {"features": view.features} | {name: view.encoder[name] for name in names}
    return {name: value[number].double() for name, value in values.items()}
