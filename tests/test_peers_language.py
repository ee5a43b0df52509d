"""Published methods inside the language model: each against its specification, and all against promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tiny
import visiontrim as vt
from tiny import Masked, both_attentions, close, every_batch, generate, hidden_places, llava, prompts, sample
from visiontrim.core.budget import at_depths, mean_per_layer, spread
from visiontrim.core.method import Method, Step

no_grad = pytest.mark.usefixtures("no_grad")
generator = torch.Generator()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator.manual_seed(seed))


def seen_by(step: Step, tokens: int = 576, entered: int = 576, num_layers: int = 32, images: int = 1) -> vt.View:
    """Random vision tokens of width 8, and random values of every signal that ``step`` needs."""
    dim = 8
    shapes = {
        "last_attention": (images, tokens),
        "next_attention": (images, tokens),
        "previous": (images, tokens, dim),
    }
    fields = {name: random(*shape) for name, shape in shapes.items() if name in step.needs}
    side = round(entered**0.5)
    return vt.View(
        features=random(images, tokens, dim, seed=1),
        coordinates=torch.zeros(images, tokens, 3, dtype=torch.long),
        grid=(1, side, entered // side),
        entered=entered,
        num_layers=num_layers,
        **fields,
    )


def left_by(method: Method, entered: int = 576, num_layers: int = 32) -> list[int]:
    """Tokens of an image that each decoder layer processes."""
    counts, before = [entered] * num_layers, entered
    for step in method.steps_on(num_layers):
        before = step.select(seen_by(step, before, entered, num_layers)).index.shape[1]
        counts[step.site.index :] = [before] * (num_layers - step.site.index)
    return counts


def mean(method: Method, entered: int = 576, num_layers: int = 32) -> float:
    return sum(left_by(method, entered, num_layers)) / num_layers


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


# ------------------------------------------------------------------------------------------------ FastV


def test_fastv_budgets():
    for keep, layer, count in ((192, 2, 166), (128, 2, 98), (64, 2, 30), (192, 3, 152), (128, 3, 82), (64, 3, 11)):
        assert left_by(vt.FastV(keep=keep, layer=layer)) == [576] * layer + [count] * (32 - layer)
    assert left_by(vt.FastV()) == [576] * 2 + [288] * 30
    assert left_by(vt.FastV(keep=(0.5,), layer=3))[3] == 288
    assert left_by(vt.FastV(keep=(128,)))[-1] == 128, "the count at the end, where that is what is budgeted"


def test_fastv_keeps_the_highest_scores_in_order_and_the_lower_of_equal_ones():
    (step,) = vt.FastV(keep=(3,)).steps()
    view = seen_by(step, 6)
    object.__setattr__(view, "last_attention", torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.2, 0.0]]))
    keep = step.select(view)
    assert keep.index.tolist() == [[1, 2, 3]]
    assert keep.features is None


@no_grad
@both_attentions
@every_batch
def test_fastv_is_the_row_of_the_eager_model(rows, attention):
    """Kept sets from the eager model's own attention map: the last real position of every row, whatever the padding."""
    inputs, model = prompts(*rows), llava(attention)
    with vt.trim(model, vt.FastV(keep=(6,), layer=2)) as run:
        logits = model(**inputs).logits
    row_maps = llava("eager")(**inputs, output_attentions=True).attentions[1].mean(1)[:, -1]
    blocks = {row: list(ids.nonzero()[:, 0].split(16)) for row, ids in enumerate(inputs["input_ids"] == tiny.IMAGE)}
    for image in run.trace.images:
        scores = row_maps[image.sample, blocks[image.sample].pop(0)]
        assert image.stages[0].index.tolist() == sorted(scores.topk(6).indices.tolist())
    hidden = hidden_places(inputs, run.trace)
    alive = inputs["attention_mask"].bool() & ~hidden[2]
    with Masked(llava(attention), inputs["attention_mask"], hidden) as masked:
        close(logits[alive], masked.model(**inputs).logits[alive])


# ------------------------------------------------------------------------------------------------ all of them

SMALL = {
    "fastv": vt.FastV(keep=(6,), layer=2),
    "pyramiddrop": vt.PyramidDrop(),
    "v2drop": vt.V2Drop(),
    "sparsevlm": vt.SparseVLM(keep=(9, 6, 3)),
    "sparsevlm-plus": vt.SparseVLM(keep=(9, 6, 3), version="v2.0", heads=2),
    "dart": vt.DART(keep=(7,)),
    "ficoco-l": vt.FiCoCoL(r=2),
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
@every_batch
@every_method
def test_cache_lengths_are_exact(method, rows):
    model, inputs = llava(), prompts(*rows)
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, method) as run:
        model(**inputs, past_key_values=cache)
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
