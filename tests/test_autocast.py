"""A float32 model under torch.autocast: every method sees what its weights' precision gives, and chooses by that."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from unittest import mock

import pytest
import torch

import visiontrim as vt
from families import Prompts, build
from test_matrix import REFUSED, small
from visiontrim.core import autocast
from visiontrim.engine import encoder, select, vision

pytestmark = pytest.mark.usefixtures("no_grad")

model_of = functools.cache(build)


def spied(original, calls):
    def checked_select(step, view):
        keep = original(step, view)
        calls.append((step, view, keep, torch.is_autocast_enabled("cpu")))
        return keep

    return checked_select


CASES = [
    (name, family)
    for name in vt.list_methods()
    for family in ("llava", "qwen2_5_vl")
    if (name, family, "image") not in REFUSED
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_choice_is_that_of_full_precision(name, family):
    model, inputs = model_of(family), Prompts(family, (3, "image", 5), (1, "image", 2, "image", 7)).batch()
    method, calls = small(name), []
    with ExitStack() as stack:
        for part in (vision, encoder, select):
            stack.enter_context(mock.patch.object(part, "checked_select", spied(select.checked_select, calls)))
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        with vt.trim(model, method):
            out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert torch.is_autocast_enabled("cpu")
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2
    for step, view, keep, lowered in calls:
        assert not lowered
        assert view.features.dtype == torch.float32
        again = step.select(view)
        assert torch.equal(keep.index, again.index)


def test_offloaded_weights_lie_where_no_autocast_is():
    meta = torch.device("meta")
    assert autocast.lowered(meta) == []
    with torch.autocast("cpu"):
        assert autocast.lowered(meta) == ["cpu"]
