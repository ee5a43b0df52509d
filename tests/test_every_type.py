"""Model types that have no row of their own in tests/families.py: tiny models from their default configurations."""

from __future__ import annotations

import warnings

import pytest
import torch

import visiontrim as vt
from model_types import RUN_SHRUNK
from shrunk import LAYERS, built, difference, prompts, together
from tiny import generate
from visiontrim.models import family_of

pytestmark = pytest.mark.usefixtures("no_grad")

VISION = vt.Random(keep=0.5)
BOTH = VISION | vt.Random(keep=0.5, layer=3)


@pytest.mark.parametrize("name", RUN_SHRUNK)
def test_what_is_removed_is_unseen(name):
    """A padded batch with three images, of two shapes where the type takes any: as masked, or fed what is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = built(name)
        family = family_of(model)
        batch = together(model, prompts(model))
        plain = generate(model, batch, max_new_tokens=2)
        with vt.trim(model, VISION if family.bidirectional else BOTH) as run:
            ours = generate(model, batch, max_new_tokens=2)
        assert difference(model, family, batch, ours, run.trace) < 2e-5
        with vt.trim(model, vt.Random(keep=1.0)):
            whole = generate(model, batch, max_new_tokens=2)
    assert all(a.equal(b) for a, b in zip(whole.logits, plain.logits, strict=True))
    assert (ours.logits[0] - plain.logits[0]).abs().max() > 0.01
    stay = 2 if name == "hunyuan_vl" else 0  # where an image begins and ends
    half = [stay + max(1, round(image.total / 2)) for image in run.trace.images]
    assert [image.per_layer[0] for image in run.trace.images] == half
    assert len({image.number for image in run.trace.images}) == 3
    last = half if family.bidirectional else [stay + max(1, round(image.total / 4)) for image in run.trace.images]
    assert [image.per_layer[LAYERS - 1] for image in run.trace.images] == last
    if family.attentions("image"):
        with vt.trim(model, vt.VisionTrim(keep=0.5, stages="vision")) as run:
            answer = generate(model, batch, max_new_tokens=1)
        assert [image.per_layer[0] for image in run.trace.images] == half
        assert torch.isfinite(answer.logits[0]).all()
