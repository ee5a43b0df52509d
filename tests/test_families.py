"""The promises of the engine, kept on a tiny random model of every family."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

import families
import visiontrim as vt
from families import CONFIGS, Prompts, hidden_places
from tiny import Masked, close, generate
from visiontrim.cli import show_models
from visiontrim.models import family_of, list_families

pytestmark = pytest.mark.usefixtures("no_grad")

PLANS = {
    "random": vt.Random(keep=0.5) | vt.Random(keep=0.5, layer=1) | vt.Random(keep=0.5, layer=3),
    "visiontrim": vt.VisionTrim(keep=0.5),
    "both": vt.VisionTrim(keep=0.5, stages="both", guidance="none"),  # nothing merged: masking cannot show merging
}
WITH_VIDEO = ("llava_next_video", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
KINDS = [(name, "image") for name in CONFIGS] + [(name, "video") for name in WITH_VIDEO]
every_family = pytest.mark.parametrize(("name", "kind"), KINDS, ids=["-".join(pair) for pair in KINDS])
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])

model_of = functools.cache(families.build)  # a run leaves no trace, so tests share models


def prompts(name: str, kind: str) -> Prompts:
    """A row with an image, one with two, one without."""
    two = (1, kind, 2, kind, 7)
    if name == "llava_onevision" and kind == "image":  # several images in a row come without tiles
        two = (1, kind, 7)
    return Prompts(name, (3, kind, 5), two, (6,))


@every_family
@every_plan
@both_attentions
def test_removal_equals_masking(name, kind, plan, attention):
    model, inputs = model_of(name, attention), prompts(name, kind).batch()
    with vt.trim(model, plan) as run:
        ours = generate(model, inputs)
    with Masked(model, inputs["attention_mask"], hidden_places(name, inputs, run.trace)):
        reference = generate(model, inputs)
    assert ours.sequences.equal(reference.sequences)
    for step, (a, b) in enumerate(zip(ours.logits, reference.logits, strict=True)):
        close(a, b, 2e-5), step
    plain = generate(model, inputs)
    assert (plain.logits[0][:2] - ours.logits[0][:2]).abs().max() > 0.01  # something was removed


@every_family
@both_attentions
def test_keeping_everything_is_bit_identical(name, kind, attention):
    model, inputs = model_of(name, attention), prompts(name, kind).batch()
    plain = generate(model, inputs)
    for plan in (vt.Random(keep=1.0) | vt.Random(keep=1.0, layer=2), vt.VisionTrim(keep=1.0)):
        with vt.trim(model, plan):
            ours = generate(model, inputs)
        assert all(a.equal(b) for a, b in zip(ours.logits, plain.logits, strict=True))
    after = generate(model, inputs)
    assert all(a.equal(b) for a, b in zip(after.logits, plain.logits, strict=True))


@every_family
@every_plan
def test_a_batch_equals_its_rows(name, kind, plan):
    model, rows = model_of(name), prompts(name, kind)
    with vt.trim(model, plan):
        together = generate(model, rows.batch())
    for row in range(2):
        with vt.trim(model, plan):
            alone = generate(model, rows.batch(row))
        for a, b in zip(together.logits, alone.logits, strict=True):
            close(a[row], b[0], 2e-5)


@every_family
@every_plan
def test_counts_are_as_asked_and_the_cache_as_reported(name, kind, plan):
    model, inputs = model_of(name), prompts(name, kind).batch(0)
    with vt.trim(model, plan) as run:
        cache = generate(model, inputs, max_new_tokens=1).past_key_values
    text = inputs["input_ids"].shape[1] - int(family_of(model).placeholders(inputs["input_ids"]).sum())
    layers = run.report.per_layer
    assert [keys.keys.shape[-2] for keys in cache.layers] == [count + text for count in layers]
    stay = sum(image.marks for image in run.trace.images) if name == "video_llava" else 0
    for image in run.trace.images:
        counts = [len(stage.index) for stage in image.stages]
        halves = [max(1, round(image.total / 2)), max(1, round(image.total / 4)), max(1, round(image.total / 8))]
        if isinstance(plan, vt.Plan):
            assert counts == halves
        elif plan.stages == "vision":
            assert counts == halves[:1]
    assert run.report.kept_tokens == sum(len(image.stages[0].index) for image in run.trace.images) + stay


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl"])
def test_a_number_is_meant_for_the_whole_image(name):
    model, inputs = model_of(name), Prompts(name, (3, "image", 5)).batch()
    with vt.trim(model, "random", keep=5) as run:
        generate(model, inputs, max_new_tokens=1)
    assert len(run.trace.images) == 2
    assert run.report.images == 1
    assert sum(len(image.stages[0].index) for image in run.trace.images) == 5


def test_a_number_may_be_meant_for_each_tile():
    model, inputs = model_of("llava_next"), Prompts("llava_next", (3, "image", 5)).batch()
    with vt.trim(model, "random", keep=3, per="tile") as run:
        generate(model, inputs, max_new_tokens=1)
    assert [image.grid for image in run.trace.images] == [(1, 4, 4)] * 5
    assert [len(image.stages[0].index) for image in run.trace.images] == [3] * 5
    assert run.report.kept_tokens == 15


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_number_may_be_meant_for_each_frame(name):
    model, inputs = model_of(name), Prompts(name, (3, "video", 5)).batch()
    with vt.trim(model, "random", keep=3, per="frame") as run:
        ours = generate(model, inputs)
    assert [len(image.stages[0].index) for image in run.trace.images] == [3] * families.FRAMES
    with vt.trim(model, "random", keep=3) as run:
        generate(model, inputs)
    assert [len(image.stages[0].index) for image in run.trace.images] == [3]
    assert torch.isfinite(ours.logits[0]).all()


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_images_and_videos_in_one_prompt(name):
    model, inputs = model_of(name), Prompts(name, (3, "image", 2, "video", 5)).batch()
    with vt.trim(model, PLANS["random"]) as run:
        ours = generate(model, inputs)
    with Masked(model, inputs["attention_mask"], hidden_places(name, inputs, run.trace)):
        reference = generate(model, inputs)
    for a, b in zip(ours.logits, reference.logits, strict=True):
        close(a, b, 2e-5)
    assert run.report.images == 2


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "mistral3"])
def test_a_later_turn_selects_anew_without_encoding_again(name):
    model, inputs = model_of(name), Prompts(name, (3, "image", 5)).batch()
    calls = []
    handle = family_of(model).attentions("image")[0].register_forward_hook(lambda *_: calls.append(1))
    with vt.trim(model, "visiontrim", keep=0.5):
        reference = generate(model, inputs)
    encoded = len(calls)
    with vt.trim(model, "visiontrim", keep=0.5, remember=1) as run:
        first = generate(model, inputs)
        kept = run.trace.images[0].stages[0].index
        again = generate(model, inputs)
    handle.remove()
    assert len(calls) == 2 * encoded  # of three runs, two encoded
    assert run.trace.images[0].stages[0].index.equal(kept)
    for ours in (first, again):
        assert all(a.equal(b) for a, b in zip(ours.logits, reference.logits, strict=True))
    other = inputs | {"pixel_values": inputs["pixel_values"] + 1.0}
    with vt.trim(model, "visiontrim", keep=0.5, remember=1):
        generate(model, inputs)
        ours = generate(model, other)
    with vt.trim(model, "visiontrim", keep=0.5):
        reference = generate(model, other)
    assert ours.logits[0].equal(reference.logits[0])


def test_long_inputs_make_no_attention_map():
    path = Path(__file__).parent.parent / "benchmarks" / "long.py"
    spec = importlib.util.spec_from_file_location("long", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    largest = module.largest(tokens=2500, keep=64)
    assert largest["vision_tokens"] == 2500
    assert largest["visiontrim"] <= 2**24 < largest["attention_map"] / 5


def test_the_table_of_the_docs_is_what_the_families_say(capsys):
    show_models(markdown=True)
    table = capsys.readouterr().out
    assert table in (Path(__file__).parent.parent / "docs" / "models.md").read_text()


def test_every_cell_of_the_table_was_run():
    """Stages, batches and several images: the matrix above; video: WITH_VIDEO; turns: test_turns."""
    names = {model_of(name).config.model_type for name in CONFIGS}
    assert names == set(list_families())
    for name, cls in list_families().items():
        assert cls.video == (name in WITH_VIDEO)
        assert cls.supports()["language_stage"]
    towers = {name for name in CONFIGS if family_of(model_of(name)).vision_width is not None}
    assert {name for name, cls in list_families().items() if cls.text_tower} == towers - {"pixtral"}
