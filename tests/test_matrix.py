"""Every method on every kind of model: a padded batch, exact budgets, the same bits twice, batch equal to single."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import visiontrim as vt
from families import LAYERS, Prompts, build
from tiny import close, generate

pytestmark = pytest.mark.usefixtures("no_grad")

KINDS = [("llava", "image"), ("llava_next", "image"), ("qwen2_5_vl", "image"), ("qwen2_5_vl", "video")]
"""One that has [CLS], one with tiles and newlines, one with positions of three numbers; and videos."""
BUDGET = {"ficoco-l": 0.7, "holitom-inner": 0.9, "ivc-prune": 0.7, "parvts": 0.7}
"""Fractions for methods whose one stage stands late in a decoder of five layers; 0.5 for all others."""
OPTIONS = {
    "aot": {"shallow": 1},
    "ficoco-v": {"start": 1},
    "hiprune": {"middle": 1},
    "vscan": {"shallow": 1, "layer": 2},
}
"""Layers that a small encoder has."""

BY_MASS, WITHOUT_GRID = ("crossget", "dymu", "tome", "turbo"), ("ficoco-v",)
IN_THE_ENCODER = (*BY_MASS, *WITHOUT_GRID, "luvc", "mustdrop", "pixelprune")
REFUSED = {
    **{
        (name, "llava_next", "image"): "acts inside the vision encoder, which is not supported"
        for name in IN_THE_ENCODER
    },
    **{
        (name, "qwen2_5_vl", kind): "weighs attention by mass, which" for name in BY_MASS for kind in ("image", "video")
    },
    **{(name, "qwen2_5_vl", kind): "left no grid" for name in WITHOUT_GRID for kind in ("image", "video")},
}
"""Combinations that cannot work, each with what the user is told."""

MATRIX = [(name, *kind) for name in vt.list_methods() for kind in KINDS]


@functools.cache
def model_of(family: str):
    return build(family)


def small(name: str) -> vt.Method:
    """The method at its budget."""
    method = vt.list_methods()[name]
    fields = {field.name for field in dataclasses.fields(method)}  # pyright: ignore[reportArgumentType]
    keep = {"keep": BUDGET.get(name, 0.5)} if "keep" in fields else {}
    return vt.load_method(name, **keep, **OPTIONS.get(name, {}))


def promised(method: vt.Method, image) -> bool:
    """Whether an image has the count, or the mean per layer, that its method was asked for."""
    wanted = max(1, round(getattr(method, "keep", 1.0) * image.total))
    counts = [count - image.marks if count > image.total else count for count in image.per_layer]  # newlines
    if len(set(counts)) == 1:
        return counts[0] == wanted
    return abs(sum(counts) / LAYERS - wanted) <= 0.5  # as near as whole tokens allow


@pytest.mark.parametrize(("name", "family", "kind"), MATRIX, ids=lambda part: part)
def test_every_method_on_every_kind(name, family, kind):
    model, method = model_of(family), small(name)
    prompts = Prompts(family, (3, kind, 5), (1, kind, 2, kind, 7), (6,))
    if (message := REFUSED.get((name, family, kind))) is not None:
        with pytest.raises(vt.TrimError, match=message), vt.trim(model, method):
            model(**prompts.batch())
        return
    with vt.trim(model, method) as run:
        logits = torch.stack(generate(model, prompts.batch(), max_new_tokens=1).logits, 1)
        images = run.trace.images
        assert {image.sample for image in images} == {0, 1}
        assert all(promised(method, image) for image in images), [(i.total, i.per_layer) for i in images]
        assert torch.equal(torch.stack(generate(model, prompts.batch(), max_new_tokens=1).logits, 1), logits)
        alone = torch.stack(generate(model, prompts.batch(1), max_new_tokens=1).logits, 1)
        close(logits[1], alone[0])
        assert [i.per_layer for i in run.trace.images] == [i.per_layer for i in images if i.sample == 1]


def test_the_lists_name_methods():
    assert {*BUDGET, *OPTIONS, *IN_THE_ENCODER} <= set(vt.list_methods())
