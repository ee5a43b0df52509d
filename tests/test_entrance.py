"""The vision stage without a run gives what enters the language model inside a run."""

from __future__ import annotations

import functools

import pytest
import torch

import visiontrim as vt
from families import IMAGE, VIDEO, Prompts, build
from visiontrim.engine.entrance import Entrance
from visiontrim.engine.memory import Memory

pytestmark = pytest.mark.usefixtures("no_grad")

model_of = functools.cache(build)
CASES = [
    ("llava", "image", "visionzip:keep=6"),
    ("llava", "image", "tome:keep=6"),
    ("llava", "image", "none"),
    ("llava_next", "image", "visionzip:keep=0.4"),
    ("llava_next", "image", "none"),
    ("qwen2_5_vl", "image", "divprune:keep=0.5"),
    ("qwen2_5_vl", "video", "uniform:keep=0.5"),
    ("qwen3_vl", "image", "avgpool:keep=0.5"),
    ("internvl", "image", "fastervlm:keep=3"),
]


def pictures(inputs, kind):
    names = ("pixel_values" if kind == "image" else "pixel_values_videos", f"{kind}_grid_thw", "image_sizes")
    return {name: inputs[name] for name in names if name in inputs}


def entering(model, method, inputs):
    """What the first decoder layer gets inside a run, and the run's trace."""
    seen = []

    def note(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = model.model.language_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    with vt.trim(model, method) as run:
        model(**inputs)
    hook.remove()
    return seen[0][0], run.trace


@pytest.mark.parametrize(("family", "kind", "method"), CASES)
def test_an_entrance_gives_what_enters_in_a_run(family, kind, method):
    model = model_of(family)
    prompts = Prompts(family, (3, kind, 5, kind, 2))
    inputs = prompts.batch()
    expected, trace = entering(model, method, inputs)
    tiles = [len(visual.pixels["pixel_values"]) for visual in prompts.rows[0][1]] if family == "internvl" else ()
    entered = Entrance(model.model, vt.load_method(method))(kind, tiles=tiles, **pictures(inputs, kind))
    assert len(entered) == 2
    ids = inputs["input_ids"][0]
    embeds = model.get_input_embeddings()(ids)
    places = (ids == (IMAGE if kind == "image" else VIDEO)).nonzero()[:, 0]
    left = torch.ones_like(ids, dtype=torch.bool)
    for number, image in enumerate(entered):
        own, places = places[: image.total], places[image.total :]
        left[own] = False
        left[own[image.index]] = True
        embeds[own[image.index]] = image.features
        per_layer = [part.per_layer for part in trace.images if part.number == number]
        assert [part.per_layer for part in image.parts] == per_layer
    assert not len(places)
    assert torch.equal(embeds[left], expected)


def test_deepstack_features_go_with_their_tokens():
    model = model_of("qwen3_vl")
    inputs = Prompts("qwen3_vl", (3, "image", 5)).batch()
    whole = model.model.get_image_features(**pictures(inputs, "image"), return_dict=True)
    (image,) = Entrance(model, vt.Random(keep=0.5))(**pictures(inputs, "image"))
    assert len(image.deepstack) == len(whole.deepstack_features) > 0
    for kept, every in zip(image.deepstack, whole.deepstack_features, strict=True):
        every = every if isinstance(every, torch.Tensor) else torch.cat(list(every))
        assert torch.equal(kept, every[image.index])


def test_entrances_share_a_memory_and_do_not_disturb_each_other():
    model, encoded = model_of("llava"), []
    inputs = pictures(Prompts("llava", (3, "image", 5)).batch(), "image")
    memory = Memory(2, once_each=True)
    small, large = (Entrance(model.model, vt.FasterVLM(keep=keep), memory=memory) for keep in (3, 9))
    other = Entrance(model.model, vt.Random(keep=4), memory=memory)
    alone = {keep: Entrance(model.model, vt.FasterVLM(keep=keep))(**inputs)[0] for keep in (3, 9)}
    layer = model.model.vision_tower.encoder.layers[0]
    hook = layer.register_forward_pre_hook(lambda *_: encoded.append(1))
    for entrance, keep in ((small, 3), (large, 9), (small, 3)):
        (image,) = entrance(**inputs)
        assert torch.equal(image.index, alone[keep].index)
        assert torch.equal(image.features, alone[keep].features)
    assert len(encoded) == 1, "the same picture for the same signals"
    assert len(other(**inputs)[0].index) == 4
    assert len(encoded) == 2, "another method listens to other signals"
    hook.remove()
    with vt.trim(model, vt.Random(keep=5)) as run:
        assert len(small(**inputs)[0].index) == 3
        model(**Prompts("llava", (3, "image", 5)).batch())
    assert run.report.mean == 5
    assert not model.model._forward_pre_hooks


def test_pictures_that_make_one_image_share_its_budget():
    model = model_of("internvl")
    inputs = pictures(Prompts("internvl", (3, "image", 5), (3, "image", 5)).batch(), "image")
    count = len(inputs["pixel_values"])
    (image,) = Entrance(model, vt.Random(keep=6))(**inputs, tiles=[count])
    assert len(image.index) == 6
    assert image.total == sum(entered.total for entered in Entrance(model, vt.NoTrim())(**inputs))
    with pytest.raises(vt.TrimError, match=f"{count} pictures were encoded, but 1, 1, 1, 1 announced"):
        Entrance(model, vt.Random(keep=6))(**inputs, tiles=[1, 1, 1, 1])


def test_what_acts_inside_the_language_model_is_refused():
    for method in (vt.FastV(keep=0.5, layer=2), vt.Random(keep=4) | vt.Random(keep=2, layer=3)):
        with pytest.raises(vt.TrimError, match="acts from decoder layer"):
            Entrance(model_of("llava"), method)
    with pytest.raises(vt.TrimError, match="positions of their members"):
        Entrance(model_of("llava"), vt.PPE(keep=4))
