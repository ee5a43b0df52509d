"""Runs that are open: found again, left while the model is at work, in the way of copies; and what opens none."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import visiontrim as vt
from tiny import generate, llava, prompts

INPUTS = prompts((3, "image", 5))
PLAN = vt.Random(keep=9) | vt.FastV(keep=0.5, layer=2)


class Acting(BaseStreamer):
    """Calls a function at the second token."""

    def __init__(self, act):
        self.act, self.tokens = act, 0

    def put(self, value):
        self.tokens += 1
        if self.tokens == 3:  # the prompt comes first
            self.act()

    def end(self):
        pass


def test_a_forgotten_run_is_found_and_removed():
    model, other = llava(), llava(seed=1)
    plain = generate(model, INPUTS).logits
    assert vt.current(model) is None
    vt.remove(model)  # nothing to do
    vt.trim(model, "random", keep=4).attach()
    gc.collect()
    run = vt.current(model)
    assert run is not None
    assert run.method == vt.Random(keep=4)
    assert vt.current(other) is None
    generate(model, INPUTS)
    assert run.report.kept_tokens == 4
    with pytest.raises(vt.TrimError, match=r"already has an open run \(random:keep=4\): leave it by visiontrim.remove"):
        vt.trim(model, "random", keep=5).attach()
    vt.remove(model)
    assert vt.current(model) is None
    assert all(a.equal(b) for a, b in zip(generate(model, INPUTS).logits, plain, strict=True))


def test_a_generate_of_the_users_own_comes_back():
    """Attributes of the instance are as they were: the user's wrapper is called inside, and is there again after."""
    model, calls = llava(), []

    def own(*arguments, **options):
        calls.append(len(arguments))
        return type(model).generate(model, *arguments, **options)

    model.generate = own
    before = dict(vars(model))
    with vt.trim(model, "random", keep=4) as run:
        assert model.generate is not own
        generate(model, INPUTS)
    assert run.report.kept_tokens == 4
    assert calls == [0]
    assert model.generate is own
    assert vars(model) == before
    del model.generate
    with vt.trim(model, "random", keep=4):
        generate(model, INPUTS)
    assert "generate" not in vars(model)


def test_a_run_keeps_no_model_alive():
    model = llava()
    vt.trim(model, "random", keep=4).attach()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_run_cannot_be_left_by_a_streamer():
    model = llava()
    with vt.trim(model, PLAN):
        expected = model.generate(**INPUTS, max_new_tokens=6)
    refused = []

    def leave():
        with pytest.raises(vt.TrimError, match=r"cannot be left from within a call of its model \(by a streamer"):
            vt.remove(model)
        refused.append(True)

    with vt.trim(model, PLAN):
        ours = model.generate(**INPUTS, max_new_tokens=6, streamer=Acting(leave))
    assert refused
    assert ours.equal(expected)


def test_leaving_waits_for_calls_in_other_threads():
    model, began, order, outputs = llava(), threading.Event(), [], []
    with vt.trim(model, PLAN):
        expected = model.generate(**INPUTS, max_new_tokens=12)

    def answer():
        outputs.append(model.generate(**INPUTS, max_new_tokens=12, streamer=Acting(began.set)))
        order.append("answered")

    thread = threading.Thread(target=answer)
    with vt.trim(model, PLAN):
        thread.start()
        assert began.wait(60)
    order.append("left")
    thread.join()
    assert order[0] == "answered" or outputs[0].equal(expected)  # the thread may be slow to say so
    assert outputs[0].equal(expected)
    assert vt.current(model) is None


def test_a_forward_that_was_interrupted_does_not_hold_the_run():
    model = llava()

    def interrupt(*_):
        raise KeyboardInterrupt

    with vt.trim(model, PLAN):
        handle = model.model.language_model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**INPUTS)
        handle.remove()
    assert vt.current(model) is None
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO()), lambda m: copy.deepcopy(m.model)],
    ids=["deepcopy", "pickle", "torch.save", "deepcopy of the core"],
)
def test_copies_are_refused_in_a_sentence_while_a_run_is_open(copied):
    model = llava()
    plain = generate(model, INPUTS).logits
    with vt.trim(model, PLAN):
        with pytest.raises(vt.TrimError, match=r"with an open run cannot be copied or pickled.*leave the run first"):
            copied(model)
        ours = generate(model, INPUTS).logits
    with vt.trim(copy.deepcopy(model), PLAN) as run:
        assert all(a.equal(b) for a, b in zip(generate(run.model, INPUTS).logits, ours, strict=True))
    assert all(a.equal(b) for a, b in zip(generate(model, INPUTS).logits, plain, strict=True))


def test_a_model_is_saved_as_it_is_while_a_run_is_open(tmp_path):
    model = llava()
    model.save_pretrained(tmp_path / "before")
    with vt.trim(model, PLAN):
        model.save_pretrained(tmp_path / "during")
        assert copy.deepcopy(model.state_dict()).keys() == model.state_dict().keys()
    for before in (tmp_path / "before").iterdir():
        assert (tmp_path / "during" / before.name).read_bytes() == before.read_bytes(), before.name


def test_what_cannot_be_a_run_is_one_sentence():
    model = llava()
    for call, said in (
        (lambda: vt.trim(model, vt.VisionTrim), r"VisionTrim is a class: give an object, VisionTrim\(keep=64\)"),
        (lambda: vt.trim(model, "random", question=5), r"question=5 is no text: give a string"),
        (lambda: vt.trim(model, text_tower=llava(seed=1)), r"a LlavaForConditionalGeneration is no text tower"),
        (lambda: vt.current(3), r"3 is no model"),
    ):
        with pytest.raises(vt.TrimError, match=said):
            call()
    assert vt.current(model) is None


def test_numbers_of_numpy_are_numbers():
    model = llava()
    for keep in (np.int64(4), np.float32(0.25), np.float64(0.25)):
        for method in (vt.Random(keep=keep), "random"):
            with vt.trim(model, method, keep=keep if method == "random" else None) as run:
                generate(model, INPUTS, max_new_tokens=1)
            assert run.report.kept_tokens == 4
            assert type(run.method.to_dict()["keep"]) in (int, float)
    assert vt.Random(keep=np.int64(4)) == vt.Random(keep=4)


def recompute_layers(model) -> None:
    """Switch gradient checkpointing on, by the name that all releases know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 5.24 prefers another
        model.gradient_checkpointing_enable({"use_reentrant": False})


@pytest.mark.parametrize("method", ["visiontrim:keep=8", "fastv:keep=0.6", "pyramiddrop:keep=12", "tome:keep=8"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "within the run"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradient(method, late):
    seen = []
    for checkpoint in (False, True):
        model = llava().train()
        if checkpoint and not late:
            recompute_layers(model)
        with vt.trim(model, method):
            if checkpoint and late:
                recompute_layers(model)
            loss = model(**INPUTS, labels=INPUTS["input_ids"]).loss
            loss.backward()
        seen.append([loss.detach(), *(part.grad for part in model.parameters() if part.grad is not None)])
        layers = model.model.language_model.layers
        assert all(layer.gradient_checkpointing is checkpoint for layer in layers)
        assert not any("forward" in layer.__dict__ for layer in layers)
    assert len(seen[0]) == len(seen[1])
    for plain, checkpointed in zip(*seen, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)
