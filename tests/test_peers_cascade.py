"""FastV, PyramidDrop, V2Drop, DART and the readings, each against its specification."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
import visiontrim as vt
from language import left_by, mean, random, seen_by
from tiny import Masked, both_attentions, close, every_batch, hidden_places, llava, prompts, sample
from views import changed
from visiontrim.core.signals import Sides, Text

no_grad = pytest.mark.usefixtures("no_grad")


# ------------------------------------------------------------------------------------------------ FastV


def test_fastv_budgets():
    for keep, layer, count in ((192, 2, 166), (128, 2, 98), (64, 2, 30), (192, 3, 152), (128, 3, 82), (64, 3, 11)):
        assert left_by(vt.FastV(keep=keep, layer=layer)) == [576] * layer + [count] * (32 - layer)
    assert left_by(vt.FastV()) == [576] * 2 + [288] * 30
    assert left_by(vt.FastV(keep=(0.5,), layer=3))[3] == 288
    assert left_by(vt.FastV(keep=(128,)))[-1] == 128, "the count at the end, where that is what is budgeted"


def test_fastv_keeps_the_highest_scores_in_order_and_the_lower_of_equal_ones():
    (step,) = vt.FastV(keep=(3,)).steps()
    view = changed(seen_by(step, 6), {"decoder.last_attention": torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.2, 0.0]])})
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
    plain = llava(attention)
    with Masked(plain, inputs["attention_mask"], hidden):
        close(logits[alive], plain(**inputs).logits[alive])


# ------------------------------------------------------------------------------------------------ PyramidDrop


def test_pyramiddrop_budgets():
    assert left_by(vt.PyramidDrop()) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert mean(vt.PyramidDrop()) == 270
    assert left_by(vt.PyramidDrop(keep=270)) == left_by(vt.PyramidDrop())
    assert left_by(vt.PyramidDrop(), 100, 40) == [100] * 10 + [50] * 10 + [25] * 10 + [12] * 10
    with pytest.raises(vt.TrimError, match="start at an earlier layer"):
        mean(vt.PyramidDrop(keep=128))


@no_grad
@both_attentions
@every_batch
def test_pyramiddrop_ranks_by_the_coming_layer_at_the_positions_of_then(rows, attention):
    """Against a plain forward of each image's survivors at consecutive positions: kept sets and logits."""
    inputs, model = prompts(*rows), llava(attention)
    method = vt.PyramidDrop(keep=(9, 4), layers=(1, 3))
    with vt.trim(model, method) as run:
        logits = model(**inputs).logits
    decoder = llava("eager").model.language_model
    for row in range(len(logits)):
        one = sample(inputs, row)
        hidden = llava("eager").model.get_input_embeddings()(one["input_ids"])
        is_image = one["input_ids"][0] == tiny.IMAGE
        if "pixel_values" in one:
            features = llava("eager").model.get_image_features(one["pixel_values"]).pooler_output
            hidden[0, is_image] = torch.cat(list(features))
        blocks = list(is_image.nonzero()[:, 0].split(tiny.PATCHES)) if is_image.any() else []
        images = [image for image in run.trace.images if image.sample == row]
        left = torch.arange(hidden.shape[1])
        for index, layer in enumerate(decoder.layers):
            rotary = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
            if index in (1, 3) and blocks:
                last = layer.self_attn(layer.input_layernorm(hidden), rotary, mask)[1].mean(1)[0, -1]
                stays = torch.ones(len(left), dtype=torch.bool)
                for image, block in enumerate(blocks):
                    here = torch.isin(left, block).nonzero()[:, 0]
                    top = here[last[here].topk({1: 9, 3: 4}[index]).indices.sort().values]
                    stays[here] = False
                    stays[top] = True
                    ours = images[image].stages[index // 2].index
                    assert torch.equal(left[top], block[0] + ours)
                hidden, left = hidden[:, stays], left[stays]
                rotary = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
                mask = mask[..., stays, :][..., stays]
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=mask)
        reference = llava("eager").lm_head(decoder.norm(hidden))
        close(logits[row, -1], reference[0, -1])


# ------------------------------------------------------------------------------------------------ V2Drop


@pytest.mark.parametrize(
    ("keep", "counts", "published"),
    [
        ((0.5, 0.3, 0), (288, 86, 0), 193.4),
        ((0.28, 0.25, 0), (161, 40, 0), 130.7),
        ((0.05, 0.05, 0), (28, 1, 0), 66.4),
        ((0.5, 0.5, 1), (288, 144, 1), 202.8),
    ],
)
def test_v2drop_budgets(keep, counts, published):
    first, second, third = counts
    method = vt.V2Drop(keep=keep)
    assert left_by(method) == [576] * 3 + [first] * 14 + [second] * 5 + [third] * 10
    assert round(mean(method), 1) == published


def test_v2drop_keeps_the_largest_updates():
    step = vt.V2Drop(keep=(3, 1, 0)).steps()[0]
    before = random(1, 5, 8)
    update = torch.tensor([1.0, 3.0, -4.0, 0.0, 3.0])[None, :, None] * random(1, 1, 8, seed=3)
    view = changed(seen_by(step, 5), {"decoder.previous": before}, features=before + update)
    assert step.select(view).index.tolist() == [[1, 2, 4]]


@no_grad
@every_batch
def test_v2drop_measures_what_the_layer_before_added(rows):
    inputs, model, added = prompts(*rows), llava(), []
    layer = model.model.language_model.layers[1]
    handle = layer.register_forward_hook(lambda _, args, output: added.append((output - args[0]).norm(dim=-1)))
    with vt.trim(model, vt.V2Drop(keep=(6, 3, 0), layers=(2, 3, 4))) as run:
        model(**inputs)
    handle.remove()
    blocks = {row: list(ids.nonzero()[:, 0].split(16)) for row, ids in enumerate(inputs["input_ids"] == tiny.IMAGE)}
    for image in run.trace.images:
        update = added[0][image.sample, blocks[image.sample].pop(0)]
        assert image.stages[0].index.tolist() == sorted(update.topk(6).indices.tolist())


# ------------------------------------------------------------------------------------------------ DART


@pytest.mark.parametrize(("budget", "published"), [(192, 219.8), (128, 159.8), (64, 99.8)])
def test_dart_budgets(budget, published):
    method = vt.DART(keep=(4 + 8 * (budget // 8),))
    assert mean(method) == pytest.approx(published, abs=0.051)
    assert left_by(vt.DART(keep=budget)) == left_by(vt.FastV(keep=budget))


def slow_dart(view: vt.View, image: int, count: int) -> list[int]:
    def by_norm(keys, places):
        return sorted(places, key=lambda i: -float(keys[image, :, i].double().abs().sum()))

    def cosine(a, b):
        return float((a.double() @ b.double()) / a.double().norm() / b.double().norm())

    words = [t for t in range(view.text.question.mask.shape[1]) if view.text.question.mask[image, t]]
    vision = by_norm(view.decoder.keys.tokens, range(view.features.shape[1]))[:4]
    pivots = [view.decoder.normed.tokens[image, i] for i in vision]
    pivots += [view.decoder.normed.text[image, t] for t in by_norm(view.decoder.keys.text, words)[:4]]
    kept = list(vision)
    for number, pivot in enumerate(pivots):
        share = (count - 4) // len(pivots) + (number < (count - 4) % len(pivots))
        pool = [i for i in range(view.features.shape[1]) if i not in kept]
        kept += sorted(pool, key=lambda i, p=pivot: cosine(view.decoder.normed.tokens[image, i], p))[:share]
    return sorted(kept)


@pytest.mark.parametrize("count", [4, 12, 21, 36, 39])
def test_dart_against_a_slow_reference(count):
    (step,) = vt.DART(keep=(count,)).steps()
    view = seen_by(step, 40, images=3)
    normed = Sides(view.decoder.normed.tokens - 0.5, view.decoder.normed.text - 0.5)
    mask = view.text.question.mask.clone()
    mask[0, 2:] = False  # two words only; and padding on the left, whose keys are the largest
    mask[2, :3] = False
    view.decoder.keys.text[2, :, :3] = 9.0
    question = Text(view.text.question.tokens, mask, 1.0)
    view = changed(view, {"decoder.normed": normed, "text.question": question})
    keep = step.select(view)
    for image in range(3):
        assert keep.index[image].tolist() == slow_dart(view, image, count)
    larger = changed(view, {"decoder.normed": Sides(7 * normed.tokens, 7 * normed.text)})
    assert step.select(larger).index.equal(keep.index)


def test_dart_takes_duplicates_of_a_pivot_last():
    (step,) = vt.DART(keep=(19,), vision_pivots=1).steps()
    view = seen_by(step, 20)
    pivot = int(view.decoder.keys.tokens.abs().sum((1, 3)).argmax())
    twin = (pivot + 1) % 20
    view.decoder.normed.tokens[:, twin] = view.decoder.normed.tokens[:, pivot]
    view.decoder.normed.text[:] = view.decoder.normed.tokens[:, [pivot]]
    (gone,) = set(range(20)) - set(step.select(view).index[0].tolist())
    assert gone == twin


# ------------------------------------------------------------------------------------------------ readings


def test_parvts_keeps_what_resembles_the_words():
    (step,) = vt.ParVTS(keep=(2,)).steps()
    view = seen_by(step, 5, entered=5)
    directions = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 3.0], [1.0, -1.0]])
    words = torch.tensor([[5.0, 0.0], [1.0, 1.0], [0.0, -9.0]])
    question = Text(words[None], torch.tensor([[True, True, False]]), 1.0)
    signals = {"decoder.embeddings": Sides(directions[None], words[None]), "text.question": question}
    view = changed(view, signals, features=torch.zeros(1, 5, 2))
    # mean cosines with (1, 0) and (1, 1): .85, .35, -.85, .85 (by symmetry), .35
    assert step.select(view).index.tolist() == [[0, 3]]
    assert mean(vt.ParVTS()) == 128


def test_adsc_keeps_centres_of_equal_intervals():
    step = vt.ADSC(keep=(4, 2, 1)).steps()[0]
    assert step.select(seen_by(step, 10)).index.tolist() == [[math.floor((i + 0.5) * 10 / 4) for i in range(4)]]
    assert mean(vt.ADSC()) == 270
