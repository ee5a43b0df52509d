"""Merging inside the vision encoder: which tokens merge, what later layers see, and where merged tokens stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import visiontrim as vt
from releases import CACHE
from tiny import ROWS, both_attentions, close, every_batch, generate, keeps_everything, llava, prompts, sample
from visiontrim.core.method import EncoderLayer
from visiontrim.engine.survivors import Merging, Survivors
from visiontrim.ops.matching import match

pytestmark = pytest.mark.usefixtures("no_grad")

MERGING = {
    "oim": vt.LUVC(stages="vision"),
    "oim of mass": vt.LUVC(stages="vision", keep=4, calls=2, proportional=True, pairs="fixed"),
    "luvc": vt.LUVC(),
    "tome": vt.ToMe(keep=5),
    "oim, then visiontrim": vt.LUVC(stages="vision") | vt.VisionTrim(keep=5),
    "tome, then a decoder layer": vt.ToMe(keep=9, proportional=False) | vt.Random(keep=3, layer=2),
}
every_merging = pytest.mark.parametrize("plan", MERGING.values(), ids=MERGING)


# ------------------------------------------------------------------------------------------------ places


def test_a_merged_token_stands_at_the_member_nearest_to_the_mean():
    """On 2 x 3: {0, 1, 2} have their mean at 1; {3, 5} at 4, which is no member, and 3 is the first of two as near."""
    now = Survivors(torch.tensor([[3, 0, 4]]), torch.tensor([[1, 1, 1, 0, 2, 0]]), torch.zeros(1, 3, dtype=torch.bool))
    merging = Merging((1, 2, 3), None, now, ((EncoderLayer(1), now),))
    assert merging.mass.tolist() == [[2, 3, 1]]
    assert merging.slots.tolist() == [[3, 1, 4]]
    settled, _ = merging.settled()
    assert settled.index.tolist() == [[1, 3, 4]]
    assert settled.assignment.tolist() == [[0, 0, 0, 1, 2, 1]]


@dataclass(frozen=True)
class Halves(vt.Step):
    """Merges the pairs (0, 1), (2, 3), ... of a row."""

    layer: int = 1
    by_mass: bool = False
    name: ClassVar[str] = "halves"

    @property
    def site(self) -> EncoderLayer:
        return EncoderLayer(self.layer)

    @property
    def proportional(self) -> bool:
        return self.by_mass

    def select(self, view: vt.View) -> vt.Keep:
        batch, tokens, dim = view.features.shape
        mean = view.features.view(batch, tokens // 2, 2, dim).mean(2)
        index = torch.arange(0, tokens, 2).expand(batch, -1)
        return vt.Keep(index, mean, (torch.arange(tokens) // 2).expand(batch, -1))


def halved(hidden: torch.Tensor, special: int) -> torch.Tensor:
    patches = hidden[:, special:]
    return torch.cat([hidden[:, :special], (patches[:, ::2] + patches[:, 1::2]) / 2], 1)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@both_attentions
def test_merged_tokens_are_those_of_a_hand_run_tower(tower, attention):
    model, inputs = llava(attention, tower=tower), prompts((3, "image", 5, "image", 2))
    encoder, special = model.model.vision_tower, 1 if tower == "clip" else 0
    hidden = encoder.embeddings(inputs["pixel_values"])
    hidden = encoder.pre_layrnorm(hidden) if tower == "clip" else hidden
    for index in range(3):  # the last layer but one is projected
        hidden = halved(hidden, special) if index in (1, 2) else hidden
        hidden = encoder.encoder.layers[index](hidden, None)
    projected = model.model.multi_modal_projector(hidden[:, special:])
    seen = {}
    with vt.trim(model, Halves(1) | Halves(2)) as run:
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args: seen.update(embeds=args[0])
        )
        model(**inputs)
        handle.remove()
    # of every four patches of a row the second is as near to the middle as the third
    assert [image.stages[-1].index.tolist() for image in run.trace.images] == [[1, 5, 9, 13]] * 2
    assert run.trace.images[0].stages[-1].assignment.tolist() == [n // 4 for n in range(16)]
    assert torch.equal(seen["embeds"][0, 4:8], projected[0])
    assert torch.equal(seen["embeds"][0, 13:17], projected[1])


def test_position_ids_are_those_of_the_slots():
    model, inputs = llava(), prompts((3, "image", 5))
    seen = {}
    with vt.trim(model, Halves(1) | Halves(2)):
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(cosines=kwargs["position_embeddings"][0]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
    places = torch.tensor([[0, 1, 2, 3, *(4 + slot for slot in (1, 5, 9, 13)), 20, 21, 22, 23, 24]])
    expected = model.model.language_model.rotary_emb(torch.zeros(1), places)[0]
    assert torch.equal(seen["cosines"], expected)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@both_attentions
def test_attention_in_proportion_to_mass_cannot_tell_equal_tokens_from_a_merged_one(tower, attention):
    model, inputs = llava(attention, tower=tower, dtype=torch.float64), prompts((3, "image", 5), dtype=torch.float64)
    layers, special = model.model.vision_tower.encoder.layers, 1 if tower == "clip" else 0

    def double(module, args):
        patches = halved(args[0], special)[:, special:].repeat_interleave(2, 1)
        return (torch.cat([args[0][:, :special], patches], 1), *args[1:])

    outputs = {}
    handle = layers[1].register_forward_pre_hook(double)
    for method in ("none", Halves(1, by_mass=True), Halves(1)):
        watch = layers[2].register_forward_hook(lambda m, a, output, key=str(method): outputs.update({key: output}))
        with vt.trim(model, method):
            model(**inputs)
        watch.remove()
    handle.remove()
    whole, by_mass, alone = outputs.values()
    scale = whole.abs().max()  # features of a SigLIP reach 100
    close(by_mass[:, special:] / scale, whole[:, special::2] / scale)
    close(by_mass[:, :special] / scale, whole[:, :special] / scale)
    if special:  # without [CLS] all masses are equal, and it makes no difference
        assert (alone[:, special:] - whole[:, special::2]).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------ the engine


@every_merging
@both_attentions
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_batch_equals_its_samples(plan, attention, tower):
    model, inputs = llava(attention, tower=tower), prompts(*ROWS["batch"])
    with vt.trim(model, plan):
        batch = torch.stack(generate(model, inputs).logits, 1)
        for row in range(len(batch)):
            close(batch[row], torch.stack(generate(model, sample(inputs, row)).logits, 1)[0])


@every_merging
def test_later_encoder_layers_see_fewer_tokens(plan):
    model, inputs = llava(), prompts((3, "image", 5))
    lengths = []
    handles = [
        layer.register_forward_hook(lambda m, a, output: lengths.append(output.shape[1]))
        for layer in model.model.vision_tower.encoder.layers
    ]
    with vt.trim(model, plan) as run:
        model(**inputs)
    inside = [stage for stage in run.trace.images[0].stages if isinstance(stage.site, EncoderLayer)]
    expected = [17] * 4
    for stage in inside:
        expected[stage.site.index :] = [1 + len(stage.index)] * (4 - stage.site.index)
    assert lengths == expected
    assert lengths[-1] < 17
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("plan", [plan for plan in MERGING.values() if not isinstance(plan, vt.Plan)], ids=str)
@every_batch
@both_attentions
def test_keeping_everything_is_bit_identical(plan, rows, attention):
    keeps_everything(plan, llava(attention), prompts(*rows))


@every_merging
def test_counts_are_exact_and_cached(plan):
    model, inputs = llava(), prompts((3, "image", 5))
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, plan) as run:
        model(**(inputs | {CACHE: cache}))
        more = prompts((4, "image", 2), seed=2)
        ids, past = more["input_ids"], cache.get_seq_length()
        positions = torch.arange(past, past + ids.shape[1])[None]
        model(input_ids=ids, pixel_values=more["pixel_values"], position_ids=positions, **{CACHE: cache})
    per_layer = {
        "oim": [8] * 5,
        "oim of mass": [4] * 5,
        "luvc": [8, 8, 4, 2, 0],  # 0.45 x 8 = 3.6, 0.45^2 x 8 = 1.62
        "tome": [5] * 5,
        "oim, then visiontrim": [5] * 5,
        "tome, then a decoder layer": [9, 9, 3, 3, 3],
    }[next(name for name, known in MERGING.items() if known is plan)]
    assert list(run.report.per_layer) == per_layer
    assert [layer.keys.shape[-2] for layer in cache.layers] == [9 + 7 + 2 * count for count in per_layer]


@pytest.mark.parametrize("keep", [0.8, 8, 3])
def test_both_halves_meet_a_mean(keep):
    model, inputs = llava(), prompts((3, "image", 5))
    with vt.trim(model, "luvc", keep=keep) as run:
        model(**inputs)
    assert abs(run.report.mean - (keep if isinstance(keep, int) else keep * 16)) <= 0.5


def test_every_token_is_carried_by_a_slot_of_its_own():
    model, inputs = llava(), prompts((3, "image", 5), (2, "image", 7))
    with vt.trim(model, vt.LUVC(stages="vision")) as run:
        model(**inputs)
    for image in run.trace.images:
        stage = image.stages[-1]
        assert stage.index.tolist() == sorted(set(stage.index.tolist()))
        assert stage.assignment[stage.index].tolist() == list(range(len(stage.index)))
        assert sorted(set(stage.assignment.tolist())) == list(range(len(stage.index)))


def test_tome_merges_by_the_keys_of_the_layer_before():
    model, inputs = llava(), prompts((3, "image", 5))
    layer = model.model.vision_tower.encoder.layers[0]
    seen = {}
    layer.self_attn.k_proj.register_forward_hook(lambda m, a, output: seen.update(keys=output))
    with vt.trim(model, vt.ToMe(keep=9)) as run:
        model(**inputs)
    keys = seen["keys"][0, 1:].view(16, 4, 8).mean(1)
    source, target = match(keys[None], 3)
    stage = run.trace.images[0].stages[0]
    alone = [n for n in range(16) if n not in source[0].tolist()]
    assert stage.index.tolist() == alone
    for s, t in zip(source[0].tolist(), target[0].tolist(), strict=True):
        assert stage.assignment[s] == stage.assignment[t]


def test_a_layer_after_the_merges_needs_flops_for_what_is_left():
    model, inputs = llava("eager"), prompts((3, "image", 5))
    counted = []
    for method in ("none", "luvc"):
        with vt.trim(model, method), FlopCounterMode(display=False) as counter:
            model(**inputs)
        counts = counter.get_flop_counts()
        counted.append(sum(sum(ops.values()) for name, ops in counts.items() if name.endswith("encoder.layers.3")))
    linear = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert counted == [linear * tokens + 4 * 32 * tokens**2 for tokens in (17, 9)]


def test_the_model_is_as_before():
    model, inputs = llava(), prompts((3, "image", 5))
    plain = model(**inputs).logits
    configs = {name: id(module.config) for name, module in model.named_modules() if hasattr(module, "config")}
    with vt.trim(model, "tome", keep=5):
        assert not torch.equal(model(**inputs).logits, plain)
    assert {n: id(m.config) for n, m in model.named_modules() if hasattr(m, "config")} == configs
    assert not any(layer._forward_pre_hooks for layer in model.model.vision_tower.encoder.layers)
    assert torch.equal(model(**inputs).logits, plain)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Halves(3), "before encoder layer 3, but the output of the encoder passes through 3 layers"),
    ],
)
def test_places_that_cannot_work(method, message):
    with pytest.raises(vt.TrimError, match=message):
        vt.trim(llava(), method)


@pytest.mark.parametrize("first", [Halves(1), vt.Random(keep=3)], ids=str)
def test_stages_out_of_order(first):
    with pytest.raises(vt.TrimError, match="order them from the vision encoder"):
        first | Halves(1)  # pyright: ignore[reportUnusedExpression]


def test_flash_attention_cannot_weigh_by_mass():
    model = llava()
    model.model.vision_tower.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(vt.TrimError, match="flash_attention_2 cannot do: set proportional=false"):
        vt.trim(model, vt.ToMe(keep=5))
    vt.trim(model, vt.ToMe(keep=5, proportional=False))


def test_more_than_half_at_a_time():
    model = llava()
    with vt.trim(model, "tome", keep=2), pytest.raises(vt.TrimError, match="would merge 12 of 16 tokens"):
        model(**prompts((3, "image", 5)))


def test_a_broken_grid_has_no_axes():
    model = llava()
    with vt.trim(model, Halves(1) | vt.LUVC(stages="vision", calls=1)), pytest.raises(vt.TrimError, match="put it"):
        model(**prompts((3, "image", 5)))


def test_a_layer_below_zero_is_no_place():
    with pytest.raises(vt.TrimError, match="stands before encoder layer 0 or a later one"):
        EncoderLayer(-1)
