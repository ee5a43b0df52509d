"""What a run adds to a call, in operations: counted, so that no clock and no load is in it."""

from __future__ import annotations

import copy
import functools
import sys
from contextlib import nullcontext

import pytest
import torch

import visiontrim as vt
from releases import CACHE, cache_of
from tiny import ROWS, llava, prompts
from visiontrim.measure.counting import Counting

METHODS = {
    "none": vt.load_method("none"),
    "random": vt.Random(keep=6),
    "lean": vt.VisionTrim(keep=6, variant="lean"),
    "visiontrim": vt.VisionTrim(keep=6),
    "fastv": vt.FastV(keep=10, layer=2),
    "pyramiddrop": vt.load_method("pyramiddrop:keep=0.6"),
}
VISION = ("random", "lean")
"""Without a stage inside the language model."""
pytestmark = pytest.mark.usefixtures("no_grad")


@functools.cache
def counts(name: str | None, rows: str) -> tuple[Counting, Counting, Counting]:
    """Of generate() with 1, 2 and 3 new tokens; ``name`` None: the plain model."""
    model, inputs, found = llava(), prompts(*ROWS[rows]), []
    with nullcontext() if name is None else vt.trim(model, METHODS[name]):
        model.generate(**inputs, max_new_tokens=2)  # what is made once per model
        for tokens in (1, 2, 3):
            with Counting() as count:
                model.generate(**inputs, max_new_tokens=tokens)
            found.append(count)
    first, second, third = found
    return first, second, third


def beside_plain(name: str, rows: str, what: str) -> tuple[int, int]:
    """What the prefill, and a step of decoding after the first, have more than the plain model's."""
    (first, second, third), (plain, plain2, plain3) = counts(name, rows), counts(None, rows)
    step = getattr(third, what) - getattr(second, what)
    return getattr(first, what) - getattr(plain, what), step - (getattr(plain3, what) - getattr(plain2, what))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_decoding_is_the_plain_model(name):
    assert beside_plain(name, "single", "kernels")[1] == 0
    assert beside_plain(name, "single", "waits")[1] == 0
    assert beside_plain(name, "single", "copies")[1] == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_decoding_of_a_padded_batch_waits_for_nothing(name):
    """Each stage extends its mask; the plain model does so once."""
    assert beside_plain(name, "batch", "waits")[1] == 0
    stages = 3 if name == "pyramiddrop" else 1
    assert beside_plain(name, "batch", "kernels")[1] <= 4 + 2 * stages


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_prefill_waits_once(name, rows):
    """For what ids and mask hold, before the encoder is queued; transformers looks once more at every stage's mask."""
    own = 1 + (1 if name == "visiontrim" else 0)  # where the text after each image begins
    stages = {"visiontrim": 1, "fastv": 1, "pyramiddrop": 3}.get(name, 0) if rows == "batch" else 0
    assert beside_plain(name, rows, "waits")[0] <= own + 2 * stages
    assert beside_plain(name, rows, "copies")[0] <= 2  # rows of images, and where each begins


PYTHON = {"none": 190, "random": 105, "lean": 105, "visiontrim": 165, "fastv": 185, "pyramiddrop": 395}
"""Calls of Python functions that a step of decoding may have more than the plain model's."""


@functools.cache
def calls_of_a_step(name: str | None) -> float:
    model, inputs, made = llava(), prompts(*ROWS["single"]), []

    def count(frame, event, function):
        made[-1] += event in ("call", "c_call")

    with nullcontext() if name is None else vt.trim(model, METHODS[name]):
        for tokens in (3, 5, 9):
            made.append(0)
            sys.setprofile(count)
            try:
                model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens)
            finally:
                sys.setprofile(None)
    return (made[2] - made[1]) / 4


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_decoding_runs_little_python(name):
    """Six looks at whether it needs the run, and a hook before every layer from the first stage on."""
    assert calls_of_a_step(name) - calls_of_a_step(None) <= PYTHON[name]


def test_counting_counts():
    with Counting() as count:
        values = torch.arange(4) + 1
        assert values.sum().item() == 10
        values[values > 2].tolist()
        torch.tensor([1, 2])
        torch.tensor([])
        values.view(2, 2)
        torch.zeros(0)
    assert count.stops == {"item": 1, "tolist": 1, "index.Tensor": 1}
    assert (count.copies, count.views, count.empty) == (1, 1, 1)
    assert count.kernels >= 5


def test_another_attention_gets_its_masks_again():
    """A step that needed no help with one implementation says nothing of another, whose masks fit one length alone."""
    model, inputs = llava(), prompts(*ROWS["single"])
    own = model.config._attn_implementation
    with vt.trim(model, METHODS["visiontrim"]):
        done = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
        cache, last = cache_of(done), done.sequences[:, -1:]
        assert cache.layers[-1].still == own
        expected = model(input_ids=last, **{CACHE: copy.deepcopy(cache)}).logits
        model.set_attn_implementation("eager")
        try:
            found = model(input_ids=last, **{CACHE: cache}).logits
        finally:
            model.set_attn_implementation(own)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
