"""Published methods inside the language model: budgets, and what holds for all of them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import tiny
import visiontrim as vt
from releases import CACHE
from tiny import Masked, both_attentions, close, every_batch, generate, hidden_places, llava, prompts, sample
from visiontrim.core.budget import at_depths, mean_per_layer, spread

no_grad = pytest.mark.usefixtures("no_grad")


# ------------------------------------------------------------------------------------------------ budgets


def test_a_budget_over_several_stages():
    assert spread(192, 576, (2,), 32, (0.5,)) == (166,)
    assert spread(270, 576, (8, 16, 24), 32, (0.5, 0.25, 0.125)) == (288, 144, 72)
    assert spread(576, 576, (8, 16, 24), 32, (0.5, 0.25, 0.125)) == (576, 576, 576)
    # 3 x 100 + 2 x 40 + 5 x 20 = 480 = 10 x 48
    assert spread(48, 100, (3, 5), 10, (2, 1)) == (40, 20)
    # the first stage cannot take 2 x 90 of the budget 2 x 100 + 5 x b = 550, the second takes it
    assert spread(85, 100, (3, 5), 10, (2, 1)) == (100, 70)
    assert spread(22, 100, (2, 5), 10, (1, 0)) == (7, 0)
    assert spread(90, 100, (2, 5), 10, (1, 0)) == (100, 80)
    with pytest.raises(vt.TrimError, match="already need a mean of 145"):
        spread(144, 576, (8, 16, 24), 32, (0.5, 0.25, 0.125))


@pytest.mark.parametrize("entered", [16, 100, 576, 2880])
def test_the_mean_is_as_near_as_whole_tokens_allow(entered):
    layers, shares = (3, 17, 22), (0.5, 0.15, 0.05)
    for wanted in range(entered // 5 + 2, entered + 1, max(1, entered // 37)):
        counts = spread(wanted, entered, layers, 32, shares)
        assert abs(mean_per_layer(entered, layers, counts, 32) - wanted) <= 10 / 64  # half a token in the last span
        assert entered >= counts[0] >= counts[1] >= counts[2] >= 1


def test_depths_are_indices_or_fractions():
    assert at_depths((2, 6, 15), 28) == (2, 6, 15)
    assert at_depths((2 / 32, 6 / 32, 15 / 32), 32) == (2, 6, 15)
    assert at_depths((0.25, 0.5, 0.75), 40) == (10, 20, 30)
    assert at_depths((2 / 32, 6 / 32, 15 / 32), 6) == (1, 2, 3)
    for layer in (0, 0.0, 1.0, True, "2"):
        with pytest.raises(vt.TrimError, match=r"no layers|one after the other"):
            vt.FastV(layer=layer)


def test_options_of_cascades_are_checked():
    for keep, message in (((0.5, 0.5), "counts 2 stages"), ((-1,), "keeps nothing"), (0, "keeps nothing")):
        with pytest.raises(vt.TrimError, match=message):
            vt.FastV(keep=keep)
    assert vt.load_method("fastv:keep=[98],layer=3") == vt.FastV(keep=(98,), layer=3)
    assert vt.load_method(str(vt.FastV(keep=(98,), layer=3))) == vt.FastV(keep=(98,), layer=3)


# ------------------------------------------------------------------------------------------------ all of them

SMALL = {
    "fastv": vt.FastV(keep=(6,), layer=2),
    "pyramiddrop": vt.PyramidDrop(),
    "v2drop": vt.V2Drop(),
    "sparsevlm": vt.SparseVLM(keep=(9, 6, 3)),
    "sparsevlm-plus": vt.SparseVLM(keep=(9, 6, 3), version="v2.0", heads=2),
    "dart": vt.DART(keep=(7,)),
    "ficoco-l": vt.FiCoCoL(r=2),
    "parvts": vt.ParVTS(keep=(5,), layer=2),
    "adsc": vt.ADSC(),
}
"""Every method on the tiny model, of 16 patches and 5 decoder layers."""
every_method = pytest.mark.parametrize("method", SMALL.values(), ids=SMALL)


@no_grad
@both_attentions
@every_method
def test_keeping_everything_is_bit_identical(method, attention):
    model, inputs = llava(attention), prompts(*tiny.ROWS["batch"])
    plain = generate(model, inputs, max_new_tokens=3)
    with vt.trim(model, method, keep=1.0):
        ours = generate(model, inputs, max_new_tokens=3)
    assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))


@no_grad
@both_attentions
@every_method
def test_a_batch_equals_its_samples_and_runs_repeat(method, attention):
    model, inputs = llava(attention), prompts(*tiny.ROWS["batch"])
    with vt.trim(model, method) as run:
        batch = torch.stack(generate(model, inputs, max_new_tokens=3).logits, 1)
        again = torch.stack(generate(model, inputs, max_new_tokens=3).logits, 1)
        assert torch.equal(batch, again)
        assert run.report.mean < tiny.PATCHES
        for row in range(len(batch)):
            close(batch[row], torch.stack(generate(model, sample(inputs, row), max_new_tokens=3).logits, 1)[0])


@no_grad
@both_attentions
@pytest.mark.parametrize("name", [name for name, method in SMALL.items() if "sparsevlm" != name != "ficoco-l"])
def test_removal_equals_masking(name, attention):
    """Of all that do not merge, at the original positions: prefill, and decoding on what is cached."""
    inputs, model = prompts(*tiny.ROWS["batch"]), llava(attention)
    with vt.trim(model, SMALL[name], positions="keep") as run:
        ours = generate(model, inputs, max_new_tokens=3)
    with Masked(model, inputs["attention_mask"], hidden_places(inputs, run.trace)):
        reference = generate(model, inputs, max_new_tokens=3)
    close(torch.stack(ours.logits), torch.stack(reference.logits))


@no_grad
@every_batch
@every_method
def test_cache_lengths_are_exact(method, rows):
    model, inputs = llava(), prompts(*rows)
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, method) as run:
        model(**(inputs | {CACHE: cache}))
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    assert tuple(lengths) == run.trace.cache_lengths == run.trace.widths
    per_row = [0] * tiny.LAYERS
    rows_of = {image.sample: [] for image in run.trace.images}
    for image in run.trace.images:
        rows_of[image.sample].append(image.per_layer)
    text = ((inputs["input_ids"] != tiny.IMAGE) & inputs["attention_mask"].bool()).sum(1)
    for row, counts in rows_of.items():
        widths = [int(text[row]) + sum(layer) for layer in zip(*counts, strict=True)]
        per_row = [max(pair) for pair in zip(per_row, widths, strict=True)]
    assert lengths == per_row


@no_grad
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_method
def test_half_precision_runs(method, dtype):
    model, inputs = llava(dtype=dtype), prompts(*tiny.ROWS["batch"], dtype=dtype)
    with vt.trim(model, method):
        assert torch.isfinite(torch.stack(generate(model, inputs, max_new_tokens=2).logits)).all()


@no_grad
@every_method
def test_a_mean_is_reached_on_any_depth(method):
    model, inputs = llava(), prompts(*tiny.ROWS["batch"])
    with vt.trim(model, method, keep=12) as run:
        model(**inputs)
    assert abs(run.report.mean - 12) <= 0.5
