"""Prompts that go through the language model in chunks, with stages at the encoder's output or inside the encoder."""

from __future__ import annotations

import functools

import pytest
import torch

import families
import visiontrim as vt
from families import Prompts
from releases import CACHE, cache_of
from tiny import ANSWER, ROWS, close, generate, llava, prompts
from visiontrim.engine.upstream import slices_features

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.skipif(not slices_features(), reason="this release hands chunks no images"),
]
model_of = functools.cache(families.build)
every_batch = pytest.mark.parametrize("rows", ROWS)


def check_as_in_one(model, inputs, run, sizes, **options) -> None:
    """Logits, sequences, trace and report are those of an unchunked prefill."""
    whole = generate(model, inputs, **options)
    trace, report = run.trace, run.report
    for size in sizes:
        ours = generate(model, inputs, prefill_chunk_size=size, **options)
        assert ours.sequences.equal(whole.sequences)
        for a, b in zip(ours.logits, whole.logits, strict=True):
            close(a, b)
        for a, b in zip(run.trace.images, trace.images, strict=True):
            assert (a.sample, a.number, a.per_layer) == (b.sample, b.number, b.per_layer)
            assert all(one.index.equal(other.index) for one, other in zip(a.stages, b.stages, strict=True))
        assert run.trace.length == trace.length
        assert run.trace.positions.shape[-1] == trace.length
        assert (run.trace.positions == trace.positions).all()
        assert run.report.kept_tokens == report.kept_tokens
        assert run.report.kv_bytes >= report.kv_bytes  # padding of chunks, of rows that are left fewer tokens


@every_batch
@pytest.mark.parametrize(("method", "positions"), [("random:keep=3", "keep"), ("visionzip:keep=5", "compact")])
def test_chunks_are_the_prompt_in_one(rows, method, positions):
    """Also those of which nothing is left, and those without an image."""
    model, inputs = llava(), prompts(*ROWS[rows])
    with vt.trim(model, method, positions=positions) as run:
        check_as_in_one(model, inputs, run, (3, 64), max_new_tokens=3)


def test_chunks_hold_what_one_prefill_holds():
    """And decoding goes on as after one, without a mask."""
    model, inputs = llava(), prompts(*ROWS["single"])
    del inputs["attention_mask"]
    with vt.trim(model, "random:keep=3") as run:
        whole = generate(model, inputs)
        report = run.report
        for size in (8, 12, 24):  # the last chunk of 12 and 24 is a single token
            ours = generate(model, inputs, prefill_chunk_size=size)
            assert [a.shape for a in ours.logits] == [a.shape for a in whole.logits]
            close(torch.stack(ours.logits), torch.stack(whole.logits))
        assert str(run.report) == str(report)
        lengths = {layer.keys.shape[2] for layer in cache_of(ours).layers}
    assert lengths == {1 + 3 + 3 + 5 + ANSWER - 1}


FAMILIES = ("llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "mistral3")


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_of_other_families(name):
    """Newlines, positions of several numbers, DeepStack, tiles, ends of rows."""
    model, inputs = model_of(name), Prompts(name, (3, "image", 5), (1, "image", 2, "image", 7)).batch()
    with vt.trim(model, "random:keep=0.5") as run:
        check_as_in_one(model, inputs, run, (9,), max_new_tokens=2)


def test_chunks_behind_merging_inside_the_encoder():
    model, inputs = llava(), prompts(*ROWS["batch"])
    with vt.trim(model, "tome:keep=8") as run:
        check_as_in_one(model, inputs, run, (5,), max_new_tokens=2)


def test_a_turn_of_text_alone_comes_in_chunks_whatever_the_method():
    model, inputs = llava(), prompts((3, "image", 5))
    with vt.trim(model, vt.Random(keep=5) | vt.Random(keep=2, layer=2)):
        first = generate(model, inputs, max_new_tokens=2)
        asked = torch.cat([first.sequences, torch.tensor([[50, 51, 52, 53]])], 1)
        later = {"input_ids": asked, "attention_mask": torch.ones_like(asked), CACHE: cache_of(first)}
        ours = generate(model, later, max_new_tokens=2, prefill_chunk_size=2)
        again = generate(model, inputs, max_new_tokens=2)
        whole = generate(model, later | {CACHE: cache_of(again)}, max_new_tokens=2)
    close(torch.stack(ours.logits), torch.stack(whole.logits))


def test_beams_and_everything_kept():
    model, inputs = llava(), prompts(*ROWS["batch"])
    with vt.trim(model, "random:keep=3"):
        whole = generate(model, inputs, num_beams=2)
        ours = generate(model, inputs, num_beams=2, prefill_chunk_size=6)
    assert ours.sequences.equal(whole.sequences)
    plain = generate(model, inputs, prefill_chunk_size=6)
    with vt.trim(model, "random:keep=1.0") as run:
        ours = generate(model, inputs, prefill_chunk_size=6)
    assert all(a.equal(b) for a, b in zip(ours.logits, plain.logits, strict=True))
    assert run.report.mean == 16


def test_a_second_turn_comes_in_chunks_too():
    """One that brings a new image."""
    model, inputs = llava(), prompts((3, "image", 5))
    image = prompts((2, "image", 4), seed=7)
    with vt.trim(model, "random:keep=3") as run:
        first = generate(model, inputs, max_new_tokens=2, prefill_chunk_size=6)
        asked = torch.cat([first.sequences, image["input_ids"]], 1)
        later = {"input_ids": asked, "attention_mask": torch.ones_like(asked), "pixel_values": image["pixel_values"]}
        found = []
        for size in (None, 4):
            cache = cache_of(generate(model, inputs, max_new_tokens=2))
            found.append(generate(model, later | {CACHE: cache}, prefill_chunk_size=size, max_new_tokens=3))
        assert run.trace.past == first.sequences.shape[1] - 1
        assert run.trace.images[0].per_layer == (3,) * 5
    close(torch.stack(found[1].logits), torch.stack(found[0].logits))


@pytest.mark.parametrize(
    ("name", "method", "size", "message"),
    [
        ("llava", vt.FastV(layer=2), 8, r"prefill_chunk_size=8 shows a method between .*: use None .*output alone"),
        ("llava", "dycoke:view_layer=2", 8, r"prefill_chunk_size=8 shows a method between"),
        ("llava", "ppe:keep=0.5", 8, r"cuts through merged tokens, which positions='members'"),
        ("llava", "random:keep=3", 1, r"prefill_chunk_size=1 is what a step of decoding has: use 2 or more"),
        ("gemma3", "random:keep=3", 8, r"Gemma3For.* lets image tokens attend in both directions: use None"),
        ("qwen3_5", "random:keep=3", 8, r"padding, which go into the state of layers with linear attention: use None"),
    ],
)
def test_what_chunks_would_change_is_refused(name, method, size, message):
    model, inputs = model_of(name), Prompts(name, (3, "image", 5)).batch()
    with vt.trim(model, method), pytest.raises(vt.TrimError, match=message):
        generate(model, inputs, prefill_chunk_size=size)
    generate(model, inputs, max_new_tokens=1)


def test_static_caches_take_no_chunks():
    model, inputs = llava(), prompts((3, "image", 5))
    del inputs["attention_mask"]
    with vt.trim(model, "random:keep=3"), pytest.raises(vt.TrimError, match=r"static cache.*use None"):
        generate(model, inputs, prefill_chunk_size=8, cache_implementation="static")


def test_padding_stands_on_no_empty_slot():
    """A row may begin with an image, of which the first token goes."""
    model, inputs = llava(), prompts((3, "image", 5))
    ids = torch.cat([inputs["input_ids"][:, 4:], torch.full((1, 21), 30)])
    with vt.trim(model, vt.Random(keep=2, seed=3)) as run:
        ours = generate(model, {"input_ids": ids, "pixel_values": inputs["pixel_values"]})
        assert 0 not in run.trace.images[0].stages[0].index
        single = generate(model, {"input_ids": ids[:1], "pixel_values": inputs["pixel_values"]})
    close(torch.stack(ours.logits)[:, :1], torch.stack(single.logits))
