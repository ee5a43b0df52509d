"""MustDrop, against hand-computed answers and loops in float64; and the cache that it narrows after the prefill."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import visiontrim as vt
from peers import rows
from releases import CACHE, cache_of
from tiny import IMAGE, ROWS, both_attentions, close, generate, llava, prompts, sample
from views import changed
from visiontrim.core.method import DecoderLayer, EncoderLayer, Layers, VisionOutput
from visiontrim.core.signals import Text

pytestmark = pytest.mark.usefixtures("no_grad")

SMALL = vt.MustDrop(keep=(7, 3), layers=(2, 4), merged=1.0, key=0.2)
"""On 16 tokens: nine merge, 8 enter, two of them are the key set."""


def of_layers(method: vt.MustDrop) -> tuple[vt.Step, ...]:
    return method.steps_for(Layers(encoder=23, decoder=32))


def test_its_places():
    sites = [step.site for step in of_layers(vt.MustDrop())]
    assert sites == [EncoderLayer(1), VisionOutput(), *map(DecoderLayer, (3, 7, 11, 15))]
    assert [step.site for step in of_layers(vt.MustDrop(stages="language"))] == sites[1:]


# ------------------------------------------------------------------------------------------------ the encoder


def windows_view(features: Tensor, grid: tuple[int, int, int]) -> vt.View:
    places = torch.cartesian_prod(*map(torch.arange, grid)).expand(len(features), -1, -1)
    return vt.View(features, places, grid, features.shape[1], 32)


def slow_windows(features: Tensor, grid: tuple[int, int, int]) -> list[tuple[float, list[int]]]:
    """Mean pairwise cosine and members of every whole window."""
    _, rows, columns = grid
    found = []
    for top in range(0, rows - 2, 3):
        for left in range(0, columns - 2, 3):
            members = [(top + down) * columns + left + across for down in range(3) for across in range(3)]
            cosines = [
                float(torch.cosine_similarity(features[a].double(), features[b].double(), dim=0))
                for a in members
                for b in members
                if a != b
            ]
            found.append((sum(cosines) / 72, members))
    return found


@pytest.mark.parametrize("grid", [(1, 6, 9), (1, 7, 8)])
@pytest.mark.parametrize("merged", [0.3, 0.5, 1.0])
def test_the_most_similar_windows_merge(grid, merged):
    features = torch.randn(2, grid[1] * grid[2], 6, generator=torch.Generator().manual_seed(0))
    features[:, :20] += 1
    keep = of_layers(vt.MustDrop(merged=merged))[0].select(windows_view(features, grid))
    for image in range(2):
        windows = sorted(slow_windows(features[image], grid), key=lambda window: -window[0])
        chosen = [members for _, members in windows[: round(merged * len(windows))]]
        gone = {token for members in chosen for token in members[1:]}
        index = [token for token in range(grid[1] * grid[2]) if token not in gone]
        assert keep.index[image].tolist() == index
        assert len(index) == grid[1] * grid[2] - 8 * len(chosen)
        for place, token in enumerate(index):
            members = next((members for members in chosen if members[0] == token), [token])
            close(keep.features[image, place].double(), features[image, members].double().mean(0))
            assert (keep.assignment[image, members] == place).all()


def test_windows_above_the_threshold_merge():
    """One window of equal features, three of noise."""
    features = torch.randn(1, 36, 32, generator=torch.Generator().manual_seed(0))
    features.view(6, 6, 32)[:3, 3:] = 1.0
    first = of_layers(vt.MustDrop(keep=None))[0]
    assert first.select(windows_view(features, (1, 6, 6))).index.shape[1] == 36 - 8
    twice = torch.cat([features, torch.ones(1, 36, 32)])
    with pytest.raises(vt.TrimError, match="between 1 and 4 for the images"):
        first.select(windows_view(twice, (1, 6, 6)))
    nothing = of_layers(vt.MustDrop(keep=None, similar=2.0))[0].select(windows_view(features, (1, 6, 6)))
    assert nothing.index.shape[1] == 36
    assert nothing.features is None


def test_the_key_set_is_rounded_up_and_marks_alone():
    attention = torch.tensor([[0.1, 0.4, 0.0, 0.2, 0.3]])
    view = changed(windows_view(torch.zeros(1, 5, 4), (1, 1, 5)), {("encoder.cls_attention", -1): attention})
    keep = of_layers(vt.MustDrop(key=0.21))[1].select(view)
    assert keep.index.tolist() == [[0, 1, 2, 3, 4]]
    assert keep.marked.tolist() == [[False, True, False, False, True]]


# ------------------------------------------------------------------------------------------------ the decoder


def text_view(tokens: int = 12, batch: int = 2) -> vt.View:
    generator = torch.Generator().manual_seed(0)
    attention = (3 * torch.randn(batch, 4, 5, tokens, generator=generator)).softmax(-1)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, :2] = False
    marked = torch.zeros(batch, tokens, dtype=torch.bool)
    marked[:, [3, 8]] = True
    view = windows_view(torch.zeros(batch, tokens, 4), (1, 1, tokens))
    question = Text(torch.zeros(batch, 5, 4), mask, 1.0)
    return changed(view, {"decoder.text_attention": attention, "text.question": question}, marked=marked)


def stays(view: vt.View, image: int, share: float, most: float) -> list[int]:
    """Tokens that the two thresholds do not drop, or that are marked."""
    rows = [t for t in range(5) if view.text.question.mask[image, t]]
    mean = view.decoder.text_attention[image].double().mean(0)
    sums = [sum(float(mean[t, v]) for t in rows) for v in range(12)]
    peaks = [max(float(mean[t, v]) for t in rows) for v in range(12)]
    kept = [v for v in range(12) if not (sums[v] < share * sum(sums) and peaks[v] < most)]
    return sorted({*kept, *view.marked[image].nonzero()[:, 0].tolist()})


@pytest.mark.parametrize(("share", "most"), [(0.08, 0.2), (0.06, 0.3), (0.05, 0.25)])
def test_two_thresholds_and_the_key_set(share, most):
    method, view = vt.MustDrop(keep=None, thresholds=(share, most)), text_view()
    for image in range(2):
        one = rows(view, [image])
        expected = stays(view, image, share, most)
        assert 2 < len(expected) < 12
        step = of_layers(method)[2]
        assert step.select(one).index[0].tolist() == expected


def test_a_count_is_what_scaled_thresholds_leave():
    view, method = text_view(), vt.MustDrop(thresholds=(0.06, 0.3))
    factors = [10 ** (step / 500) for step in range(-1500, 1500)]
    for image in range(2):
        sets = [stays(view, image, 0.06 * factor, 0.3 * factor) for factor in factors]
        for count in range(3, 12):
            chosen = method.choose(view, count).index[image].tolist()
            assert chosen in [kept for kept in sets if len(kept) == count]


def test_of_the_key_set_alone_the_best_stay():
    view = text_view()
    index = vt.MustDrop().choose(view, 1).index
    assert set(index[:, 0].tolist()) <= {3, 8}


# ------------------------------------------------------------------------------------------------ the engine


@both_attentions
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_batch_equals_its_samples(attention, tower):
    model, inputs = llava(attention, tower=tower), prompts(*ROWS["batch"])
    with vt.trim(model, SMALL) as run:
        batch = torch.stack(generate(model, inputs).logits, 1)
        assert {image.per_layer for image in run.trace.images} == {(8, 8, 7, 7, 3)}
        for row in range(len(batch)):
            close(batch[row], torch.stack(generate(model, sample(inputs, row)).logits, 1)[0])


def test_the_key_set_survives_to_the_last_layer():
    model, inputs = llava(), prompts((3, "image", 5))
    with vt.trim(model, SMALL) as run:
        model(**inputs)
    (image,) = run.trace.images
    seen = {}
    layer = model.model.vision_tower.encoder.layers[-1].self_attn
    with vt.trim(model, dataclasses.replace(SMALL, stages="language", keep=(9, 4))) as run:
        layer.register_forward_pre_hook(lambda m, a, k: seen.update(hidden=k["hidden_states"]), with_kwargs=True)
        model(**inputs)
    query, key = (
        getattr(layer, f"{side}_proj")(seen["hidden"])[0].view(17, 4, 8).transpose(0, 1) for side in ("q", "k")
    )
    attention = (query[:, :1] @ key.mT / 8**0.5).softmax(-1).mean(0)[0, 1:]
    best = set(attention.topk(4).indices.tolist())  # a fifth of 16, rounded up
    assert set(run.trace.images[0].stages[-1].index.tolist()) == best
    assert len(image.stages[-1].index) == 3


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_the_cache_is_narrowed_to_what_the_last_stage_left(rows):
    """From the first stage on, every layer holds the keys of the final survivors, as they were."""

    class Wide(vt.MustDrop):
        narrows_cache = False

    model, inputs = llava(), prompts(*rows)
    caches = []
    for method in (SMALL, Wide(**{f.name: getattr(SMALL, f.name) for f in dataclasses.fields(SMALL)})):
        cache = DynamicCache(config=model.config.text_config)
        with vt.trim(model, method) as run:
            model(**(inputs | {CACHE: cache}))
        caches.append(cache)
    narrow, wide = caches
    for row in range(len(inputs["input_ids"])):
        images = [image for image in run.trace.images if image.sample == row]
        ids = inputs["input_ids"][row]
        blocks = (ids == IMAGE).nonzero()[:, 0].split(16) if images else ()
        slots = {stage: [] for stage in ("enter", "first", "last")}
        for image, block in zip(images, blocks, strict=True):
            for name, number in (("enter", 1), ("first", 2), ("last", 3)):
                slots[name] += block[image.stages[number].index].tolist()
        text = [place for place in range(len(ids)) if inputs["attention_mask"][row, place] and ids[place] != IMAGE]
        kept = {name: sorted(text + places) for name, places in slots.items()}
        for index, before in enumerate(("enter", "enter", "first", "first", "last")):
            after = before if index < 2 else "last"
            places = [kept[before].index(place) for place in kept[after]]
            held = wide.layers[index].keys[row][:, -len(kept[before]) :][:, places]
            assert torch.equal(narrow.layers[index].keys[row][:, -len(places) :], held)
    lengths = [layer.keys.shape[-2] for layer in narrow.layers]
    assert lengths[2] == lengths[3] == lengths[4] < lengths[0] == lengths[1]


def test_a_narrowed_conversation_goes_on():
    """The first token is that of the wide cache; a second turn runs, and its positions go on after the prompt."""
    model, inputs = llava(), prompts(*ROWS["batch"])
    with vt.trim(model, SMALL):
        first = generate(model, inputs, max_new_tokens=4)
        cache = cache_of(first)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 3
        more = torch.cat([first.sequences, torch.full((3, 2), 17)], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
        again = model.generate(input_ids=more, attention_mask=mask, **{CACHE: cache}, max_new_tokens=3)
    assert again.shape == (3, more.shape[1] + 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vt.MustDrop(key=1.5), "key=1.5 is no share"),
        (lambda: vt.MustDrop(thresholds=(0.1,)), "give two positive numbers"),
        (lambda: vt.MustDrop(keep=(1, 2)), "counts 2 stages"),
    ],
)
def test_options_are_checked(build, message):
    with pytest.raises(vt.TrimError, match=message):
        build()
