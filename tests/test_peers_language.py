"""Published methods inside the language model: each against its specification, and all against promises."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tiny
import visiontrim as vt
from tiny import Masked, both_attentions, close, every_batch, generate, hidden_places, llava, prompts, sample
from visiontrim.core.budget import at_depths, mean_per_layer, spread
from visiontrim.core.method import Method, Step
from visiontrim.core.view import Sides, Text
from visiontrim.methods.cascade import Cascade
from visiontrim.methods.sparsevlm import raters
from visiontrim.ops.recycle import density_peaks
from visiontrim.ops.spreading import absorb

no_grad = pytest.mark.usefixtures("no_grad")
generator = torch.Generator()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator.manual_seed(seed))


def seen_by(step: Step, tokens: int = 576, entered: int = 576, num_layers: int = 32, images: int = 1) -> vt.View:
    """Random vision tokens of width 8, and random values of every signal that ``step`` needs."""
    dim, heads, kv_heads, head_dim, words = 8, 4, 2, 4, 7
    signals: dict = {
        "last_attention": random(images, tokens),
        "next_attention": random(images, tokens),
        "previous": random(images, tokens, dim),
        "text": Text(random(images, words, dim), torch.ones(images, words, dtype=torch.bool), 1.0),
        "text_attention": random(images, heads, words, tokens),
        "embeddings": Sides(random(images, entered, dim, seed=2), random(images, words, dim, seed=3)),
        "normed": Sides(random(images, tokens, dim, seed=4), random(images, words, dim, seed=5)),
        "queries": Sides(random(images, heads, tokens, head_dim), random(images, heads, words, head_dim, seed=6)),
        "keys": Sides(random(images, kv_heads, tokens, head_dim, seed=7), random(images, kv_heads, words, head_dim)),
        "rotary": Sides(random(images, tokens, 2 * head_dim) + 1, random(images, words, 2 * head_dim) + 1),
    }
    fields = {name: signal for name, signal in signals.items() if name in step.needs}
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
    view = replace(seen_by(step, 6), last_attention=torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.2, 0.0]]))
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
    view = replace(seen_by(step, 5), features=before + update, previous=before)
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


# ------------------------------------------------------------------------------------------------ SparseVLM


@pytest.mark.parametrize(
    ("version", "keep", "counts", "published"),
    [
        ("v1.5", (300, 200, 110), (309, 204, 113), 206.5),
        ("v1.5", (303, 110, 36), (312, 117, 39), 145.4),
        ("v1.5", (238, 48, 26), (249, 55, 27), 114.1),
        ("v1.5", (66, 30, 17), (82, 32, 18), 82.3),
        ("v2.0", (300, 200, 118), (300, 200, 118), 206.8),
        ("v2.0", (238, 108, 60), (238, 108, 60), 144.1),
        ("v2.0", (246, 54, 28), (246, 54, 28), 113.9),
        ("v2.0", (66, 34, 20), (66, 34, 20), 81.8),
    ],
)
def test_sparsevlm_budgets(version, keep, counts, published):
    first, second, third = counts
    method = vt.SparseVLM(keep=keep, version=version)
    assert left_by(method) == [576] * 3 + [first] * 4 + [second] * 9 + [third] * 16
    assert mean(method) == pytest.approx(published, abs=0.051)


def test_sparsevlm_192_as_its_authors_log_it():
    """A pruning layer counted with what it leaves: 2 layers of 576, then 309 from layer 2 on, and so on."""
    counts = left_by(vt.SparseVLM())
    assert sum(counts[1:] + counts[-1:]) / 32 == 192.03125
    assert mean(vt.SparseVLM()) == 206.5


@pytest.mark.parametrize("keep", [64, 100, 192, 300, 575])
def test_sparsevlm_counts_clusters_into_a_mean(keep):
    assert abs(mean(vt.SparseVLM(keep=keep)) - keep) <= 0.25


def test_raters_by_hand():
    # two vision tokens; words along the axes: the first word fits both, the second one of them, the third none
    vision = torch.tensor([[[2.0, 0.0], [2.0, 2.0]]])
    words = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, True, False]])
    table = torch.tensor([[2.0, 0.0, -2.0], [2.0, 2.0, -4.0]]).softmax(-1)
    rating = table.mean(0)
    wanted = [*(rating > rating.mean()).tolist(), False]
    assert wanted == [True, False, False, False]
    assert raters(Sides(vision, words), Text(words, mask, 1.0)).tolist() == [wanted]
    alike = torch.ones(1, 4, 2)
    assert raters(Sides(vision, alike), Text(alike, mask, 1.0)).equal(mask)


def test_sparsevlm_scores_are_the_raters_rows():
    step = vt.SparseVLM(keep=(4, 2, 1)).steps()[0]
    view = seen_by(step, 9, images=2)
    rating = raters(view.embeddings, view.text)
    score = step.method.score(view)
    for image in range(2):
        rows = [view.text_attention[image, :, t].double().mean(0) for t in range(7) if rating[image, t]]
        close(score[image].double(), torch.stack(rows).mean(0), 1e-6)


def test_sparsevlm_plus_divides_by_what_positions_give():
    step = vt.SparseVLM(keep=(4, 2, 1), version="v2.0", heads=1).steps()[0]
    angles = torch.tensor([1.0, 0.1])

    def rotary(places: Tensor) -> Tensor:
        turned = (places[:, None] * angles).repeat(1, 2)
        return torch.cat([turned.cos(), turned.sin()], -1)[None]

    view = seen_by(step, 9)
    view = replace(view, rotary=Sides(rotary(torch.arange(9.0)), rotary(torch.arange(10.0, 17.0))))
    rows = raters(view.embeddings, view.text)[0].nonzero()[:, 0].tolist()
    corrected = torch.zeros(2, 9, dtype=torch.float64)
    for head in range(2):
        for v in range(9):
            for t in rows:
                # an all-ones query and key, rotated: 2 cos(angle (10 + t - v)) for each pair of dimensions
                by_position = sum(2 * math.cos(angle * (10 + t - v)) for angle in (1.0, 0.1)) / math.sqrt(4)
                corrected[head, v] += float(view.text_attention[0, head, t, v]) / by_position / len(rows)
    wanted = corrected[corrected.sum(1).argmax()]
    torch.testing.assert_close(step.method.score(view)[0].double(), wanted, rtol=1e-3, atol=1e-4)
    assert step.select(view).features is None


def test_density_peaks_against_double_loops():
    features = random(2, 14, 3) * torch.tensor([1.0, 2.0, 3.0])
    count = neighbours = 3
    found = density_peaks(features, count, neighbours)
    for image in range(2):
        points = features[image].double()
        distance = [[float((a - b).norm()) / math.sqrt(3) for b in points] for a in points]
        density = [math.exp(-sum(d * d for d in sorted(row)[:neighbours]) / neighbours) for row in distance]
        largest = max(map(max, distance))
        delta = []
        for i, row in enumerate(distance):
            denser = [row[j] for j in range(14) if density[j] > density[i]]
            delta.append(min(denser) if denser else largest)
        ranked = sorted(range(14), key=lambda i: -density[i] * delta[i])
        centres = sorted(ranked[:count])
        assert found.centres[image].tolist() == centres
        went = [
            centres.index(i) if i in centres else min(range(3), key=lambda c: distance[i][centres[c]])
            for i in range(14)
        ]
        assert found.assignment[image].tolist() == went
        for c in range(count):
            members = [points[i] for i in range(14) if went[i] == c]
            close(found.features[image, c].double(), torch.stack(members).mean(0), 1e-5)


def test_density_peaks_of_equal_points():
    found = density_peaks(torch.ones(1, 5, 2), 2, 2)
    assert found.centres.tolist() == [[0, 1]]
    assert found.assignment.tolist() == [[0, 1, 0, 0, 0]]
    assert torch.equal(found.features, torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="6 centres"):
        density_peaks(torch.ones(1, 5, 2), 6, 2)


def test_sparsevlm_recycles_behind_the_kept_tokens():
    method = vt.SparseVLM(keep=(300, 200, 110))
    step = method.steps()[0]
    view = seen_by(step)
    keep = step.select(view)
    score = method.score(view)[0]
    kept = score.topk(300).indices.sort().values
    assert keep.index[0, :300].equal(kept)
    assert torch.equal(keep.features[0, :300], view.features[0, kept])
    assert keep.complement[0].tolist() == [False] * 300 + [True] * 9
    others = torch.tensor([i for i in range(576) if i not in set(kept.tolist())])
    recycled = others[score[others].topk(83).indices.sort().values]
    merged = density_peaks(view.features[:, recycled], 9, 9)
    assert torch.equal(keep.features[0, 300:], merged.features[0])
    assert keep.index[0, 300:].equal(recycled[merged.centres[0]])
    went = keep.assignment[0]
    assert went[kept].equal(torch.arange(300))
    assert went[recycled].equal(300 + merged.assignment[0])
    assert int((went < 0).sum()) == 576 - 300 - 83


@no_grad
def test_positions_of_the_versions():
    """v1.5 goes on at consecutive positions, in every layer after what it caches; v2.0 at the original ones."""
    assert (vt.SparseVLM().positions, vt.SparseVLM(version="v2.0").positions) == ("compact", "keep")
    model, inputs, turned = llava(), prompts((3, "image", 5)), {0: [], 4: []}
    table = model.model.language_model.rotary_emb(torch.zeros(1), torch.arange(40)[None])[0][0]

    def watch(layer):
        def hook(module, args, kwargs):
            cosines = kwargs["position_embeddings"][0][0]
            turned[layer].append([int((table - row).abs().sum(-1).argmin()) for row in cosines])

        return hook

    layers = model.model.language_model.layers
    for version in ("v1.5", "v2.0"):
        with vt.trim(model, vt.SparseVLM(keep=(9, 6, 3), version=version)) as run:
            handles = [layers[index].register_forward_pre_hook(watch(index), with_kwargs=True) for index in turned]
            generate(model, inputs, max_new_tokens=2)
        for handle in handles:
            handle.remove()
        width = run.trace.widths[4]
        prompt, decoded = turned[4][-2:]
        if version == "v1.5":
            assert prompt == list(range(width))
            assert decoded == [width]
        else:
            assert decoded == [25]
            assert prompt[:4] == [0, 1, 2, 3]
            assert prompt[-5:] == [20, 21, 22, 23, 24]


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

    words = [t for t in range(view.text.mask.shape[1]) if view.text.mask[image, t]]
    vision = by_norm(view.keys.tokens, range(view.features.shape[1]))[:4]
    pivots = [view.normed.tokens[image, i] for i in vision]
    pivots += [view.normed.text[image, t] for t in by_norm(view.keys.text, words)[:4]]
    kept = list(vision)
    for number, pivot in enumerate(pivots):
        share = (count - 4) // len(pivots) + (number < (count - 4) % len(pivots))
        pool = [i for i in range(view.features.shape[1]) if i not in kept]
        kept += sorted(pool, key=lambda i, p=pivot: cosine(view.normed.tokens[image, i], p))[:share]
    return sorted(kept)


@pytest.mark.parametrize("count", [4, 12, 21, 36, 39])
def test_dart_against_a_slow_reference(count):
    (step,) = vt.DART(keep=(count,)).steps()
    view = seen_by(step, 40, images=3)
    view = replace(view, normed=Sides(view.normed.tokens - 0.5, view.normed.text - 0.5))
    mask = view.text.mask.clone()
    mask[0, 2:] = False  # two words only; and padding on the left, whose keys are the largest
    mask[2, :3] = False
    view.keys.text[2, :, :3] = 9.0
    view = replace(view, text=Text(view.text.tokens, mask, 1.0))
    keep = step.select(view)
    for image in range(3):
        assert keep.index[image].tolist() == slow_dart(view, image, count)
    larger = replace(view, normed=Sides(7 * view.normed.tokens, 7 * view.normed.text))
    assert step.select(larger).index.equal(keep.index)


def test_dart_takes_duplicates_of_a_pivot_last():
    (step,) = vt.DART(keep=(19,), vision_pivots=1).steps()
    view = seen_by(step, 20)
    pivot = int(view.keys.tokens.abs().sum((1, 3)).argmax())
    twin = (pivot + 1) % 20
    view.normed.tokens[:, twin] = view.normed.tokens[:, pivot]
    view.normed.text[:] = view.normed.tokens[:, [pivot]]
    (gone,) = set(range(20)) - set(step.select(view).index[0].tolist())
    assert gone == twin


# ------------------------------------------------------------------------------------------------ FiCoCo-L


def test_ficoco_budgets():
    counts = left_by(vt.FiCoCoL())
    assert counts == [576] * 6 + [576 - 14 * step for step in range(1, 27)]
    assert mean(vt.FiCoCoL()) == pytest.approx(422.4, abs=0.051)
    assert mean(vt.FiCoCoL(r=21)) == pytest.approx(345.7, abs=0.051)
    for keep in (334, 400, 500):
        assert abs(mean(vt.FiCoCoL(keep=keep)) - keep) <= 0.5
    with pytest.raises(vt.TrimError, match="raise keep to 334"):
        mean(vt.FiCoCoL(keep=300))


def slow_ficoco(view: vt.View, image: int, r: int, beta=0.6, gamma=0.6, eps=0.998) -> tuple[list[int], Tensor]:
    words = [t for t in range(view.text.mask.shape[1]) if view.text.mask[image, t]]
    n, m = view.features.shape[1], len(words)

    def logits(queries, keys, i, j):
        share = queries.shape[1] // keys.shape[1]
        products = [
            float(queries[image, h, i].double() @ keys[image, h // share, j].double()) for h in range(queries.shape[1])
        ]
        return sum(products) / len(products)

    q, k = view.queries, view.keys
    inner = [[logits(q.tokens, k.tokens, i, j) for j in range(n)] for i in range(n)]
    asked = [[logits(q.text, k.tokens, t, j) for j in range(n)] for t in words]
    redundancy = [beta * sum(inner[i]) / n - (1 - beta) * sum(asked[t][i] for t in range(m)) / m for i in range(n)]
    dropped = sorted(range(n), key=lambda i: -redundancy[i])[:r]
    kept = [i for i in range(n) if i not in dropped]

    def softmax(values):
        top = max(values)
        exps = [math.exp(value - top) for value in values]
        return [e / sum(exps) for e in exps]

    onward = [softmax(asked[t] + [logits(q.text, k.text, words[t], u) for u in words]) for t in range(m)]
    outputs = {j: (view.features[image, j].double(), 1.0) for j in kept}
    for i in dropped:
        row = softmax(inner[i] + [logits(q.tokens, k.text, i, t) for t in words])
        c = [gamma * row[j] + (1 - gamma) / m * sum(row[n + t] * onward[t][j] for t in range(m)) for j in kept]
        ordered, place = sorted(c), eps * (len(kept) - 1)
        low = ordered[int(place)]
        threshold = low + (ordered[min(int(place) + 1, len(kept) - 1)] - low) * (place - int(place))
        chosen = {j: value for j, value in zip(kept, c, strict=True) if value >= threshold - 1e-12}
        for j, value in chosen.items():
            alpha = value / sum(chosen.values())
            total, weight = outputs[j]
            outputs[j] = total + alpha * view.features[image, i].double(), weight + alpha
    return kept, torch.stack([outputs[j][0] / outputs[j][1] for j in kept])


@pytest.mark.parametrize("eps", [0.998, 0.8])
def test_ficoco_against_a_slow_reference(eps):
    step = vt.FiCoCoL(r=5, eps=eps).steps()[0]
    view = seen_by(step, 24, images=2)
    mask = view.text.mask.clone()
    mask[0, :3] = False
    view = replace(view, text=Text(view.text.tokens, mask, 1.0))
    keep = step.select(view)
    for image in range(2):
        kept, outputs = slow_ficoco(view, image, 5, eps=eps)
        assert keep.index[image].tolist() == kept
        close(keep.features[image].double(), outputs, 1e-5)
        assert (keep.assignment[image] >= 0).all()


def test_a_token_merged_into_its_equal_changes_nothing():
    x = random(1, 1, 8)
    close(absorb(x, x, torch.tensor([[[0.3]]]), 0.998), x, 1e-6)
    both = absorb(random(1, 2, 8, seed=2), x, torch.tensor([[[0.75, 0.25]]]), 0.0)
    close(both[0, 0], (random(1, 2, 8, seed=2)[0, 0] + 0.75 * x[0, 0]) / 1.75, 1e-6)
    close(both[0, 1], (random(1, 2, 8, seed=2)[0, 1] + 0.25 * x[0, 0]) / 1.25, 1e-6)


# ------------------------------------------------------------------------------------------------ readings


def test_parvts_keeps_what_resembles_the_words():
    (step,) = vt.ParVTS(keep=(2,)).steps()
    view = seen_by(step, 5, entered=5)
    directions = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 3.0], [1.0, -1.0]])
    words = torch.tensor([[5.0, 0.0], [1.0, 1.0], [0.0, -9.0]])
    view = replace(
        view,
        embeddings=Sides(directions[None], words[None]),
        text=Text(words[None], torch.tensor([[True, True, False]]), 1.0),
    )
    # mean cosines with (1, 0) and (1, 1): .85, .35, -.85, .85 (by symmetry), .35
    assert step.select(view).index.tolist() == [[0, 3]]
    assert mean(vt.ParVTS()) == 128


def test_adsc_keeps_centres_of_equal_intervals():
    step = vt.ADSC(keep=(4, 2, 1)).steps()[0]
    assert step.select(seen_by(step, 10)).index.tolist() == [[math.floor((i + 0.5) * 10 / 4) for i in range(4)]]
    assert mean(vt.ADSC()) == 270


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


# ------------------------------------------------------------------------------------------------ docs


PAGE = (Path(__file__).parent.parent / "docs" / "papers-language.md").read_text()
CALLS = re.findall(r"^\|[^`]*\| `([^`]+)` \| ([\d, .]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("call", "left", "per_layer"), CALLS)
def test_the_settings_of_the_docs(call, left, per_layer):
    method = vt.load_method(call)
    sites = [step.site.index for step in method.steps()]
    counts = left_by(method)
    wanted = [int(count) for count in re.findall(r"\d+", left)]
    ours = [counts[site] for site in sites]
    assert (ours[:1] + ours[-1:] if "..." in left else ours) == wanted
    assert mean(method) == pytest.approx(float(per_layer), abs=0.051)


def test_the_docs_name_every_method_inside_the_language_model():
    inside = {name for name, method in vt.list_methods().items() if issubclass(method, Cascade)}
    assert {call.partition(":")[0] for call, *_ in CALLS} == inside
