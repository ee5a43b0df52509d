"""Methods of 2026 between decoder layers, against slow references and answers by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import tiny
import visiontrim as vt
from language import left_by, mean, seen_by
from peers import ranked
from releases import CACHE, cache_of
from tiny import close, generate, llava, prompts, sample
from views import changed
from visiontrim.core.budget import spread
from visiontrim.core.signals import Sides
from visiontrim.ops.information import mutual_information


def first(method):
    return method.steps()[0]


def on_grid(view: vt.View, grid: tuple[int, int, int]) -> vt.View:
    places = torch.cartesian_prod(*map(torch.arange, grid))
    return dataclasses.replace(view, coordinates=places.expand(len(view.features), -1, -1), grid=grid)


# ------------------------------------------------------------------------------------------------ VLM-Pruner


def slow_vlm_pruner(view, b, method, count):
    keys = view.decoder.keys.tokens[b].double().transpose(0, 1).flatten(1)
    x, places = view.features[b].double(), view.coordinates[b].double()
    n, diagonal = len(x), math.hypot(*view.grid[1:])
    taken = [ranked(keys.abs().sum(-1))[0]]
    while len(taken) < min(method.pivots, count):
        gap = [-1.0 if i in taken else min(float((keys[i] - keys[j]).norm()) for j in taken) for i in range(n)]
        taken.append(ranked(gap)[0])
    unit = F.normalize(x[:, ranked(x.var(0, correction=0))[:256]], dim=-1)

    def alike(i):
        apart = min(
            diagonal if places[i, 0] != places[j, 0] else float((places[i, 1:] - places[j, 1:]).norm()) for j in taken
        )
        return max(float(unit[i] @ unit[j]) for j in taken) * (1 + method.buffer * apart / diagonal)

    threshold = 0.8
    while len(taken) < count:
        order = sorted((i for i in range(n) if i not in taken), key=lambda i: (alike(i), i))
        for start in range(0, len(order), 16):
            batch = order[start : start + 16]
            value = {i: alike(i) for i in batch}
            new = [i for i in batch if value[i] < threshold]
            if len(new) > count - len(taken):
                new = sorted(batch, key=lambda i: value[i])[: count - len(taken)]
            taken += new
            if len(taken) == count or (start == 0 and not new):
                break
        threshold += 0.1
    kept, outputs = sorted(taken), []
    dropped = {i: [] for i in kept}
    for i in range(n):
        if i not in kept:
            dropped[max(kept, key=lambda j: float(unit[i] @ unit[j]))].append(i)
    for j in kept:
        weight = [max(1e-8, float(unit[i] @ unit[j])) for i in dropped[j]]
        rest = sum(w * x[i] for w, i in zip(weight, dropped[j], strict=True))
        mixed = (1 - method.recovery) * x[j] + method.recovery * rest / sum(weight) if weight else x[j]
        outputs.append(mixed)
    return kept, torch.stack(outputs)


@pytest.mark.parametrize(("count", "options"), [(12, {}), (30, {"buffer": 0.0}), (3, {}), (25, {"recovery": 0.3})])
def test_vlm_pruner(count, options):
    method = vt.VLMPruner(keep=(count,), **options)
    view = on_grid(seen_by(first(method), 48, 48, images=2), (1, 6, 8))
    spread = Sides(view.decoder.keys.tokens - 0.5, view.decoder.keys.text)
    view = changed(view, {"decoder.keys": spread}, features=view.features - 0.4)
    kept = first(method).select(view)
    for b in range(2):
        index, features = slow_vlm_pruner(view, b, method, count)
        assert kept.index[b].tolist() == index
        torch.testing.assert_close(kept.features[b].double(), features, rtol=1e-4, atol=1e-5)


def test_vlm_pruner_by_hand():
    """A uniform picture still fills its count, nearest places first; without recovery nothing is merged."""
    method = vt.VLMPruner(keep=(9,), pivots=1)
    view = on_grid(seen_by(first(method), 25, 25), (1, 5, 5))
    keys = view.decoder.keys.tokens.clone()
    keys[:, :, 12] = 9.0  # the middle is the pivot
    view = changed(view, {"decoder.keys": Sides(keys, view.decoder.keys.text)}, features=torch.ones(1, 25, 8))
    kept = first(method).select(view)
    assert kept.index.tolist() == [[6, 7, 8, 11, 12, 13, 16, 17, 18]]
    torch.testing.assert_close(kept.features, torch.ones(1, 9, 8))
    bare = first(vt.VLMPruner(keep=(9,), pivots=1, recovery=0.0)).select(view)
    assert bare.features is bare.assignment is None
    assert bare.index.equal(kept.index)
    for budget, published in ((192, 216), (128, 156), (64, 96)):
        assert mean(vt.FastV(keep=(budget,))) == published
    assert left_by(vt.VLMPruner(keep=(20,)), 64)[1:3] == [64, 20]
    for options, message in (
        ({"pivots": 0}, "pivots=0"),
        ({"buffer": -1.0}, "buffer"),
        ({"recovery": 2.0}, "no share"),
    ):
        with pytest.raises(vt.TrimError, match=message):
            vt.VLMPruner(**options)


# ------------------------------------------------------------------------------------------------ IVC-Prune


def slow_ivc(view, b, count, method):
    values, text = view.decoder.values.tokens[b].double(), view.decoder.values.text[b].double()
    words = [t for t in range(text.shape[1]) if view.text.question.mask[b, t]]
    heads, n, dim = values.shape

    def alike(row):  # [heads, dim] -> W of it and all image tokens
        share = torch.zeros(n, dtype=torch.float64)
        for h in range(heads):
            logits = [row[h] @ values[h, j] / dim**0.5 for j in range(n)]
            if method.variant == "code":
                logits += [row[h] @ text[h, t] / dim**0.5 for t in words]
            share += torch.stack(logits).softmax(0)[:n] / heads
        return share

    of_text = sum(alike(text[:, t]) for t in words)
    seeds = ranked(of_text)[: max(1, round(method.seeds * n))]
    f = (of_text + sum(alike(values[:, i]) for i in seeds)).tolist()
    waves = view.decoder.mean_rotary[b]
    places = {i for axis in (0, 1) for i in ranked(waves[:, axis])[: round(method.coordinates * n)]}
    order = sorted(range(n), key=lambda i: (0 if i in seeds else 1 if i in places else 2, -f[i], i))
    return sorted(order[:count]), seeds, places


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize(("count", "seeds"), [(20, 0.1), (5, 0.05), (2, 0.1)])
def test_ivc_prune(variant, count, seeds):
    method = vt.IVCPrune(keep=(count,), variant=variant, seeds=seeds)
    view = seen_by(first(method), 40, 40, images=2)
    values = Sides(6 * view.decoder.values.tokens - 3, 6 * view.decoder.values.text - 3)
    mask = view.text.question.mask.clone()
    mask[1, :2] = False
    question = dataclasses.replace(view.text.question, mask=mask)
    view = changed(view, {"decoder.values": values, "text.question": question})
    kept = first(method).select(view)
    for b in range(2):
        index, chosen, places = slow_ivc(view, b, count, method)
        assert kept.index[b].tolist() == index
        assert count < len(chosen) or set(chosen) <= set(index)
        assert count < 20 or places <= set(index)


def test_ivc_prune_by_hand():
    """Equal values leave ties, by index; coordinates depend on places alone."""
    method = vt.IVCPrune(keep=(6,), coordinates=0.1)
    view = seen_by(first(method), 20, 20)
    flat = Sides(torch.ones(1, 2, 20, 4), torch.ones(1, 2, 7, 4))
    waves = torch.zeros(1, 20, 2)
    waves[0, [17, 18], 0], waves[0, [18, 19], 1] = 1.0, 1.0
    view = changed(view, {"decoder.values": flat, "decoder.mean_rotary": waves})
    assert first(method).select(view).index.tolist() == [[0, 1, 2, 17, 18, 19]]
    other = dataclasses.replace(view, features=view.features + 1)
    assert first(method).select(other).index.tolist() == [[0, 1, 2, 17, 18, 19]]
    with pytest.raises(vt.TrimError, match="seeds=2"):
        vt.IVCPrune(seeds=2.0)


class Wide(vt.IVCPrune):
    narrows_cache = False


@torch.no_grad()
def test_the_cache_of_every_layer_is_narrowed_to_what_went_on():
    """In a padded batch, against the cache of the same run without narrowing; then the conversation goes on."""
    model, inputs = llava(), prompts((3, "image", 5), (1, "image", 2, "image", 7), (6,))
    method, caches = vt.IVCPrune(keep=(7,), layer=2), []
    for run_of in (method, Wide(keep=(7,), layer=2)):
        cache = DynamicCache(config=model.config.text_config)
        with vt.trim(model, run_of) as run:
            model(**(inputs | {CACHE: cache}))
        caches.append(cache)
    narrow, wide = caches
    for row, ids in enumerate(inputs["input_ids"]):
        blocks = (ids == tiny.IMAGE).nonzero()[:, 0].split(16) if (ids == tiny.IMAGE).any() else ()
        images = [image for image in run.trace.images if image.sample == row]
        text = [place for place in range(len(ids)) if inputs["attention_mask"][row, place] and ids[place] != tiny.IMAGE]
        kept = text + [int(i) for of, image in zip(blocks, images, strict=True) for i in of[image.stages[0].index]]
        for index in range(len(narrow.layers)):
            held = wide.layers[index].keys[row]
            expected = held[:, sorted(kept)] if index < 2 else held[:, -len(kept) :]
            assert torch.equal(narrow.layers[index].keys[row][:, -len(kept) :], expected)
    assert len({layer.keys.shape[-2] for layer in narrow.layers}) == 1
    with vt.trim(model, method):
        begun = generate(model, inputs, max_new_tokens=4)
        more = torch.cat([begun.sequences, torch.full((3, 2), 17)], 1)
        mask = F.pad(inputs["attention_mask"], (0, 6), value=1)
        cache = cache_of(begun)
        again = model.generate(input_ids=more, attention_mask=mask, **{CACHE: cache}, max_new_tokens=3)
    assert again.shape == (3, more.shape[1] + 3)
    with vt.trim(model, method):
        for row in (0, 1):
            alone = generate(model, sample(inputs, row), max_new_tokens=4)
            close(torch.stack(alone.logits)[:, 0], torch.stack(begun.logits)[:, row])


@dataclasses.dataclass(frozen=True)
class Spy(vt.Random):
    """Notes the views that it is shown."""

    seen: list = dataclasses.field(default_factory=list, compare=False)
    name = "spy-2026"

    @property
    def needs(self):
        return frozenset({"decoder.values", "decoder.mean_rotary", "text.question"})

    def select(self, view):
        self.seen.append(view)
        return super().select(view)


@torch.no_grad()
@tiny.both_attentions
def test_values_and_waves_are_those_of_the_layer(attention):
    inputs, spy, model = prompts((3, "image", 5), (1, "image", 2, "image", 7)), Spy(keep=6, layer=2), llava(attention)
    noted = {}
    layer = model.model.language_model.layers[1]
    handles = [
        layer.self_attn.v_proj.register_forward_hook(lambda m, a, out: noted.update(values=out)),
        layer.register_forward_pre_hook(lambda m, a, k: noted.update(k), with_kwargs=True),
    ]
    with vt.trim(model, spy):
        model(**inputs)
    for handle in handles:
        handle.remove()
    (view,) = spy.seen
    heads = view.decoder.values.tokens.shape[1]
    values = noted["values"].unflatten(-1, (heads, -1)).transpose(1, 2)
    waves = torch.stack([part.mean(-1) for part in noted["position_embeddings"]], -1).expand(len(values), -1, -1)
    number = 0
    for row, ids in enumerate(inputs["input_ids"]):
        for block in (ids == tiny.IMAGE).nonzero()[:, 0].split(16):
            close(view.decoder.values.tokens[number], values[row][:, block])
            close(view.decoder.mean_rotary[number], waves[row, block])
            after = torch.arange(block[-1] + 1, len(ids))
            after = after[ids[after] != tiny.IMAGE]
            close(view.decoder.values.text[number][:, view.text.question.mask[number]], values[row][:, after])
            number += 1


# ------------------------------------------------------------------------------------------------ TransPrune


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("noted", [True, False])
def test_transprune(attention, noted):
    method = vt.TransPrune(keep=(7, 3, 1), attention=attention)
    step = first(method)
    view = seen_by(step, 20, 20, images=2)
    past = torch.rand(2, 20, generator=torch.Generator().manual_seed(5)) if noted else None
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    signals = {"decoder.previous": view.decoder.previous - 0.4}
    if attention:
        signals["text.question"] = dataclasses.replace(view.text.question, mask=mask)
    view = changed(view, signals, noted=past)
    kept = step.select(view)
    for b in range(2):
        u, y = view.decoder.previous[b].double(), view.features[b].double()
        turn = [math.exp(1 - float(u[i] @ y[i] / u[i].norm() / y[i].norm())) for i in range(20)]
        ttv = [float(y[i].norm() / u[i].norm()) * turn[i] / sum(turn) for i in range(20)]
        ttv = [w + (float(past[b, i]) if noted else 0.0) for i, w in enumerate(ttv)]
        score = [w / sum(ttv) for w in ttv]
        if attention:
            words = view.decoder.text_attention[b].double()[:, mask[b]].mean(0).sum(0)
            score = [s + float(w / words.sum()) for s, w in zip(score, words, strict=True)]
        index = sorted(ranked(score)[:7])
        assert kept.index[b].tolist() == index
        torch.testing.assert_close(kept.noted[b].double(), torch.tensor([ttv[i] for i in index]).double())


def test_transprune_by_hand():
    """A layer that only scales all by the same number tells nothing: ties go by index; a turn or a growth tells."""
    step = first(vt.TransPrune(keep=(2, 2, 1), attention=False))
    view = seen_by(step, 5, 5)
    before = torch.eye(5)[None, :, :5]
    same = changed(view, {"decoder.previous": before}, features=3 * before)
    assert step.select(same).index.tolist() == [[0, 1]]
    torch.testing.assert_close(step.select(same).noted, torch.full((1, 2), 3 / 5))
    after = before.clone()
    after[0, 3] *= 2  # grows
    after[0, 4] = -after[0, 4]  # turns round
    turned = changed(view, {"decoder.previous": before}, features=after)
    assert step.select(turned).index.tolist() == [[3, 4]]
    assert left_by(vt.TransPrune()) == left_by(vt.PyramidDrop())


@torch.no_grad()
def test_what_is_noted_goes_on_with_its_tokens():
    """Through two stages of a padded batch: the second adds to what the first noted of the tokens that are left."""
    model, inputs = llava(), prompts((3, "image", 5), (1, "image", 2, "image", 7), (6,))
    seen = []

    class Watched(vt.TransPrune):
        def choose(self, view, count):
            seen.append((view, super().choose(view, count)))
            return seen[-1][1]

    with vt.trim(model, Watched(keep=(9, 4), layers=(1, 3))):
        model(**inputs)
    (before, kept), (after, _) = seen
    assert before.noted is None
    assert torch.equal(after.noted, kept.noted)
    assert after.noted.shape == (3, 9)


# ------------------------------------------------------------------------------------------------ AutoPrune


def slow_bits(attention, mask):
    attention, total = attention.double(), 0.0
    words = [t for t in range(attention.shape[1]) if mask[t]]
    for head in attention:
        for v in range(head.shape[1]):
            p = sum(float(head[t, v]) for t in words) / len(words)
            total += sum(float(head[t, v]) / len(words) * math.log2(float(head[t, v]) / p) for t in words)
    return total


def test_mutual_information():
    attention = torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(1)) / 8
    mask = torch.tensor([[True] * 5, [False, True, True, False, True]])
    ours = mutual_information(attention, mask)
    for b in range(2):
        assert float(ours[b]) == pytest.approx(slow_bits(attention[b], mask[b]), rel=1e-4)
    equal = torch.rand(1, 3, 1, 8).expand(1, 3, 5, 8)
    assert float(mutual_information(equal, mask[:1])) == pytest.approx(0.0, abs=1e-5)
    # two words, each at a token of its own: one bit a head
    apart = torch.eye(2)[None, None].expand(1, 3, 2, 2)
    assert float(mutual_information(apart, torch.ones(1, 2, dtype=torch.bool))) == pytest.approx(3.0)


def test_the_curve_of_autoprune():
    """By hand at two informations; the mean is met, shares never rise, more bits keep fewer early and more late."""
    method = vt.AutoPrune(keep=128)
    assert method.shares(2.0, (1, 9), 32) == (0.5, 0.5)
    assert method.shares(0.0, (1, 16), 32) == pytest.approx(
        (1 / (1 + math.exp(0.4 * (1 - 15.3))), 1 / (1 + math.exp(0.4 * 0.7)))
    )
    assert method.shares(0.0, (2, 32), 64) == method.shares(0.0, (1, 16), 32)
    left = {}
    for bits in (0.0, 0.5, 1.0, 2.0):
        share = method.shares(bits, (1, 3, 7, 16), 32)
        assert sorted(share, reverse=True) == list(share)
        left[bits] = spread(128, 576, (1, 3, 7, 16), 32, share)
        assert (
            576 + 2 * left[bits][0] + 4 * left[bits][1] + 9 * left[bits][2] + 16 * left[bits][3]
        ) / 32 == pytest.approx(128, abs=0.5)
    assert min(left[bits][0] for bits in (0.0, 0.5, 1.0)) > left[2.0][0]
    assert left[0.0][-1] < left[0.5][-1] < left[1.0][-1] < left[2.0][-1]
    assert len(set(left[2.0])) <= 2  # flat, but for what rounding leaves


@torch.no_grad()
@pytest.mark.parametrize("ranking", [None, "pyramiddrop:layers=[1,2,4]", "v2drop:keep=0.5,layers=[1,3]", "dart"])
def test_autoprune_gives_any_cascade_its_counts(ranking):
    """Counts of each picture are those of its own information; a padded batch equals its samples."""
    model, inputs = llava(), prompts((3, "image", 5), (1, "image", 2, "image", 7), (6,))
    method = vt.AutoPrune(keep=9, ranking=ranking, slope=4.0)  # attention of tiny models tells little
    with vt.trim(model, method) as run:
        logits = model(**inputs).logits[:, -1]
        images = run.trace.images
        for row in (0, 1):
            close(model(**sample(inputs, row)).logits[0, -1], logits[row], 1e-4)
    assert all(abs(sum(image.per_layer) / len(image.per_layer) - 9) <= 0.5 for image in images)
    steps = method.steps_for(vt.Layers(encoder=4, decoder=len(images[0].per_layer)))
    places = tuple(step.site.index for step in steps)
    for image in images:
        counts = [image.per_layer[place] for place in places]
        options = {
            spread(9, 16, places, len(image.per_layer), method.shares(bits / 1000, places, len(image.per_layer)))
            for bits in range(0, 101)
        }
        assert tuple(counts) in options


def test_autoprune_asks_for_what_it_needs():
    steps = vt.AutoPrune(ranking="fastv").steps()
    assert [step.needs for step in steps] == [{"decoder.last_attention", "decoder.text_attention", "text.question"}]
    assert all(step.own_counts for step in steps)
    later = vt.AutoPrune(ranking="v2drop").steps()[1]
    assert later.needs == {"decoder.previous"}
    with pytest.raises(vt.TrimError, match="does not know what its first stage measured"):
        later.select(seen_by(later, 20, 20))
    assert vt.AutoPrune(ranking="pyramiddrop").positions == "compact"
    for options, message in (
        ({"ranking": "divprune"}, "has no stages between decoder layers alone"),
        ({"ranking": 3}, "write the method down"),
        ({"keep": (1, 2, 3, 4)}, "is not a number"),
        ({"slope": -1.0}, "slope=-1.0"),
    ):
        with pytest.raises(vt.TrimError, match=message):
            vt.AutoPrune(**options)
    method = vt.AutoPrune(ranking="pyramiddrop:layers=[1,2,4]", keep=0.5)
    assert vt.load_method(method.to_dict()) == method
    step = first(vt.AutoPrune(keep=100))
    view = seen_by(step, 576, images=2)
    sharp = view.decoder.text_attention.clone()
    sharp[0], sharp[1] = 1 / 576, torch.eye(576)[:7]
    with pytest.raises(vt.TrimError, match="2 images share a batch"):
        step.select(changed(view, {"decoder.text_attention": sharp}))
