"""The promises of the engine, kept on a tiny random model of every family."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import families
import visiontrim as vt
from families import BIDIRECTIONAL, CONFIGS, HYBRID, LEAN, MISSING, OLD, Prompts, hidden_places
from fed import fed
from model_types import RUN_SHRUNK
from releases import cache_of
from tiny import ANSWER, Masked, close, generate
from visiontrim.commands.listing import show_models
from visiontrim.models import family_of, list_families

pytestmark = pytest.mark.usefixtures("no_grad")

PLANS = {
    "random": vt.Random(keep=0.5) | vt.Random(keep=0.5, layer=1) | vt.Random(keep=0.5, layer=3),
    "visiontrim": vt.VisionTrim(keep=0.5, variant="lean"),
    # nothing merged: masking cannot show merging; a hybrid's stages stand before its full attention
    "both": vt.VisionTrim(keep=0.5, stages="both", guidance="none", layer=3),
}
VISION_PLANS = {
    "random": vt.Random(keep=0.5),
    "visiontrim": vt.VisionTrim(keep=0.5, variant="lean"),
    "merging": vt.VisionTrim(keep=0.5, stages="vision"),
}
WITH_VIDEO = (
    "llava_next_video",
    "llava_onevision",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "lfm3_vl",
)
KINDS = [(name, "image") for name in CONFIGS]
RELATIVES = {"qwen3_5_moe"}  # whose videos are those of a relative
KINDS += [(name, "video") for name in WITH_VIDEO if name in CONFIGS.keys() - RELATIVES]
if OLD:  # where its videos lack their newline
    KINDS.remove(("llava_onevision", "video"))
every_family = pytest.mark.parametrize(("name", "kind"), KINDS, ids=["-".join(pair) for pair in KINDS])
CASES = {
    f"{name}-{kind}-{plan}": (name, kind, method)
    for name, kind in KINDS
    for plan, method in (VISION_PLANS if name in BIDIRECTIONAL else PLANS).items()
    if name not in LEAN or plan == "random"
}
ATTENTIONS = ("sdpa", "eager")
every_family_and_plan = pytest.mark.parametrize(("name", "kind", "plan"), CASES.values(), ids=CASES)
ON_BOTH = {
    f"{case}-{attention}": (*parts, attention)
    for case, parts in CASES.items()
    for attention in ATTENTIONS[: 1 if parts[0] in LEAN else 2]
}
every_plan_on_both_attentions = pytest.mark.parametrize(  # tests of one case in a row, for :func:`trimmed`
    ("name", "kind", "plan", "attention"), ON_BOTH.values(), ids=ON_BOTH, scope="module"
)
KINDS_ON_BOTH = [(*pair, attention) for pair in KINDS for attention in ATTENTIONS[: 1 if pair[0] in LEAN else 2]]
every_batch = pytest.mark.parametrize("rows", [(0,), ()], ids=["single", "batch of 3"])
EVERYTHING = (
    vt.VisionTrim(keep=1.0),
    vt.VisionTrim(keep=1.0, stages="both", layer=3),
    vt.Random(keep=1.0) | vt.Random(keep=1.0, layer=3),
)

model_of = functools.cache(families.build)  # a run leaves no trace, so tests share models


def prompts(name: str, kind: str) -> Prompts:
    """A row with an image, one with two, one without."""
    two = (1, kind, 2, kind, 7)
    if name == "llava_onevision" and kind == "image":  # several images in a row come without tiles
        two = (1, kind, 7)
    return Prompts(name, (3, kind, 5), two, (6,))


@functools.lru_cache(maxsize=4)
def trimmed(name, kind, plan, attention):
    """By rows, of which () is all, what one run generates for them after each other, and the traces."""
    model, found = model_of(name, attention), {}
    with vt.trim(model, plan) as run:
        for rows in ((), (0,), (1,), (2,)):
            found[rows] = generate(model, prompts(name, kind).batch(*rows)), run.trace
    return found


@functools.lru_cache(maxsize=8)
def first_logits(name, kind, attention, rows):
    """Of the plain model [rows, vocabulary]."""
    return generate(model_of(name, attention), prompts(name, kind).batch(*rows), max_new_tokens=1).logits[0]


@every_plan_on_both_attentions
@every_batch
def test_removal_equals_masking_and_the_cache_is_as_reported(name, kind, plan, attention, rows):
    """Hybrids: it equals the model that is fed only what is left."""
    model, inputs = model_of(name, attention), prompts(name, kind).batch(*rows)
    ours, trace = trimmed(name, kind, plan, attention)[rows]
    assert held_in(cache_of(ours)) == [width + ANSWER - 1 for width in expected_widths(model, inputs, trace)]
    check_against_the_oracle(model, prompts(name, kind), rows or (0, 1, 2), ours, trace)
    plain = first_logits(name, kind, attention, rows)
    assert (plain[:2] - ours.logits[0][:2]).abs().max() > 0.01  # something was removed


def check_against_the_oracle(model, prompts: Prompts, rows: Sequence[int], ours, trace) -> None:
    """What was generated for ``rows`` is what the plain model says with hidden tokens; a hybrid: without them."""
    inputs = prompts.batch(*rows)
    hidden, mask = hidden_places(prompts.name, inputs, trace), inputs["attention_mask"].bool()
    if prompts.name not in HYBRID:
        with Masked(model, mask, hidden):
            reference = generate(model, inputs)
        assert ours.sequences.equal(reference.sequences)
        for a, b in zip(ours.logits, reference.logits, strict=True):
            close(a, b, 2e-5)
        return
    for place, row in enumerate(rows):
        of_row = {layer: places[place, mask[place]] for layer, places in hidden.items()}
        reference = fed(model, prompts.batch(row), of_row, ours.sequences[place, mask.shape[1] :])
        for a, b in zip(ours.logits, reference, strict=True):
            close(a[place], b, 2e-5)


def held_in(cache) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers if hasattr(layer, "keys")]


def expected_widths(model, inputs, trace) -> list[int]:
    """Tokens of the longest row in every decoder layer: its text, and what is said to be left of its images."""
    text = inputs["attention_mask"].sum(1) - family_of(model).placeholders(inputs["input_ids"]).sum(1)
    left = [
        [sum(image.per_layer[layer] for image in trace.images if image.sample == row) for row in range(len(text))]
        for layer in range(families.LAYERS)
    ]
    widths = [int((text + torch.tensor(counts)).max()) for counts in left]
    assert widths == list(trace.widths)
    recurrent = family_of(model).recurrent
    held = [width for layer, width in enumerate(widths) if layer not in recurrent]
    assert held == [length for layer, length in enumerate(trace.cache_lengths) if layer not in recurrent]
    return held


@pytest.mark.parametrize(("name", "kind", "attention"), KINDS_ON_BOTH, ids=map("-".join, KINDS_ON_BOTH))
@every_batch
def test_keeping_everything_is_bit_identical(name, kind, attention, rows):
    model, inputs = model_of(name, attention), prompts(name, kind).batch(*rows)
    plain = generate(model, inputs)
    for plan in EVERYTHING[:1] if name in BIDIRECTIONAL else EVERYTHING:
        with vt.trim(model, plan):
            ours = generate(model, inputs)
        assert all(a.equal(b) for a, b in zip(ours.logits, plain.logits, strict=True))
    after = generate(model, inputs, max_new_tokens=1)
    assert after.logits[0].equal(plain.logits[0])


@every_plan_on_both_attentions
def test_a_batch_equals_its_rows(name, kind, plan, attention):
    found = trimmed(name, kind, plan, attention)
    together, _ = found[()]
    for row in range(3):
        alone, _ = found[row,]
        for a, b in zip(together.logits, alone.logits, strict=True):
            close(a[row], b[0], 2e-5)


@every_family_and_plan
def test_counts_are_as_asked(name, kind, plan):
    model, inputs = model_of(name), prompts(name, kind).batch(0)
    with vt.trim(model, plan) as run:
        generate(model, inputs, max_new_tokens=1)
    stay = sum(image.marks for image in run.trace.images) if name == "video_llava" else 0
    for image in run.trace.images:
        counts = [len(stage.index) for stage in image.stages]
        halves = [max(1, round(image.total / 2)), max(1, round(image.total / 4)), max(1, round(image.total / 8))]
        if isinstance(plan, vt.Plan):
            assert counts == halves
        elif isinstance(plan, vt.Random) or plan.stages == "vision":
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


@pytest.mark.parametrize("name", [name for name, kind in KINDS if kind == "video"])
def test_a_number_may_be_meant_for_each_frame(name):
    model, inputs = model_of(name), Prompts(name, (3, "video", 5)).batch()
    with vt.trim(model, "random", keep=3, per="frame") as run:
        ours = generate(model, inputs)
    assert [len(image.stages[0].index) for image in run.trace.images] == [3] * families.FRAMES
    with vt.trim(model, "random", keep=3) as run:
        generate(model, inputs)
    assert [len(image.stages[0].index) for image in run.trace.images] == [3]
    assert torch.isfinite(ours.logits[0]).all()


@pytest.mark.parametrize("name", [name for name, kind in KINDS if kind == "video"])
def test_images_and_videos_in_one_prompt(name):
    model, inputs = model_of(name), Prompts(name, (3, "image", 2, "video", 5)).batch()
    with vt.trim(model, PLANS["random"]) as run:
        ours = generate(model, inputs)
    check_against_the_oracle(model, Prompts(name, (3, "image", 2, "video", 5)), (0,), ours, run.trace)
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
    """Stages, batches and several images: the matrix above; video: WITH_VIDEO; turns: test_generate."""
    names = {model_of(name).config.model_type for name in CONFIGS}
    assert set(list_families()) - names - MISSING <= set(RUN_SHRUNK)  # tests/test_every_type.py
    for name, cls in list_families().items():
        if name in RUN_SHRUNK or name in MISSING:
            continue
        assert cls.video == (name in WITH_VIDEO)
        before = "before layers with full attention" if name in HYBRID else name not in BIDIRECTIONAL
        assert cls.supports()["language_stage"] == before
    towers = {name for name in CONFIGS if family_of(model_of(name)).vision_width is not None}
    guided = {name for name, cls in list_families().items() if cls.text_tower}
    assert guided == towers - {"pixtral", "paligemma", "paligemma2"}


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_what_attends_in_both_directions_has_no_stage_between_layers(name):
    with pytest.raises(vt.TrimError, match=r"attend in both directions.*before layer 2.*use a method's vision stage"):
        vt.trim(model_of(name), vt.Random(keep=0.5) | vt.Random(keep=0.5, layer=2))


@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
def test_prompts_longer_than_a_sliding_window_are_refused(name):
    model, inputs = model_of(name), Prompts(name, (3, "image", 56 if name == "gemma3" else 44)).batch()
    assert inputs["input_ids"].shape[1] == 64
    with (
        pytest.raises(vt.TrimError, match=r"prompt has 64 tokens, but decoder layer 0 sees the last 64 only"),
        vt.trim(model, "random", keep=0.5),
    ):
        generate(model, inputs)


def test_videos_in_the_placeholders_of_images_are_refused():
    model, inputs = model_of("glm4v"), Prompts("glm4v", (3, "image", 5)).batch()
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    inputs["video_grid_thw"] = inputs.pop("image_grid_thw")
    with vt.trim(model, "random", keep=0.5), pytest.raises(vt.TrimError, match=r"the video tokens of Glm4vFor.*frames"):
        model(**inputs)


def test_videos_of_onevision_need_a_newer_transformers():
    model, inputs = model_of("llava_onevision"), Prompts("llava_onevision", (3, "video", 5)).batch()
    with vt.trim(model, "random", keep=0.5):
        if OLD:
            with pytest.raises(vt.TrimError, match=r"came without its newline: transformers .* is too old"):
                generate(model, inputs)
        else:
            assert len(generate(model, inputs).logits) == ANSWER
