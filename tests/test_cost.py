"""Cost without weights: the formula beside counted operations, cache bytes, and public sizes of models."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import visiontrim as vt
from families import CONFIGS
from releases import cache_of
from shrunk import CHANGES, configuration
from visiontrim import zoo
from visiontrim.cli import app
from visiontrim.engine.cache import cache_bytes
from visiontrim.measure.cost import costs
from visiontrim.measure.noise import noise_prompt
from visiontrim.measure.shapes import Shape, preset_names
from visiontrim.models.family import Picture, family_of

NONE = vt.load_method("none")
BILLIONS = {
    "gemma-4-31b": 31.27,
    "gemma-4-e4b": 7.63,
    "internvl3-2b": 2.09,
    "internvl3-8b": 7.94,
    "internvl3.5-8b": 8.53,
    "llava-1.5-7b": 7.06,
    "llava-1.5-13b": 13.35,
    "llava-next-7b": 7.06,
    "llava-onevision-7b": 8.03,
    "minicpm-v-4.6": 1.3,
    "qwen2.5-vl-3b": 3.75,
    "qwen2.5-vl-7b": 8.29,
    "qwen3-vl-8b": 8.77,
    "qwen3-vl-30b-a3b": 31.07,
    "qwen3.5-9b": 9.41,
    "qwen3.5-35b-a3b": 35.11,
    "qwen3.6-27b": 27.36,
    "smolvlm2-2.2b": 2.25,
    "video-llava-7b": 7.37,
}
"""Parameters that the checkpoints have, as the hub shows them; those of Gemma 4 E4B without its sound encoder."""


def counted(model, inputs: dict, answer: int) -> tuple[int, int]:
    """FLOPs of a generate() without those of rotary encodings, by torch's counter, and bytes of its cache."""
    options = {"max_new_tokens": answer, "min_new_tokens": answer, "do_sample": False}
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model.generate(**inputs, **options, return_dict_in_generate=True)
    rotary = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(rotary), cache_bytes(cache_of(output))


@pytest.mark.parametrize("name", sorted(BILLIONS))
def test_presets_have_the_public_number_of_parameters(name):
    model = Shape.load(name).build("meta", torch.bfloat16)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == BILLIONS[name]


def test_every_preset_is_checked():
    assert preset_names() == sorted(BILLIONS)


def test_llava_1_5_7b_by_hand():
    plain, ours = costs(Shape.load("llava-1.5-7b"), [NONE, vt.Uniform(keep=64)], text=60, answer=1, batch=2)
    layers, width, mlp, words, heads = 32, 4096, 11008, 32064, 32
    assert plain.kv_vision == 2 * 576 * layers * 2 * width * 2  # two rows; keys and values; two bytes
    assert plain.kv_vision / 2 == pytest.approx(302e6, rel=1e-3)
    weights = 4 * width * width + 3 * width * mlp
    for cost, tokens in ((plain, 636), (ours, 124)):
        attention = 4 * heads * (width // heads) * tokens**2
        assert cost.prefill == 2 * (layers * (2 * weights * tokens + attention) + 2 * width * words)
        assert cost.kv_prompt == cost.kv_answer == 2 * tokens * layers * 2 * width * 2
        assert cost.decode == 0
    patches, wide = 577, 1024  # features of the last but one layer, but all 24 layers run
    layer = 2 * 12 * wide * wide * patches + 4 * wide * patches**2
    projector = 2 * (wide * width + width * width)
    assert plain.vision == 2 * (24 * layer + 2 * 588 * wide * 576 + projector * 576)
    assert plain.vision - ours.vision == 2 * projector * (576 - 64)


@pytest.mark.parametrize(
    "method",
    ["none", "uniform:keep=64|uniform:keep=0.25,layer=2", "tome:keep=144", "dymu:keep=144,unmerge=true"],
)
def test_the_formula_is_what_torch_counts_on_the_bundled_model(method):
    shape, model = Shape.load("bundled"), zoo.load().model
    model.set_attn_implementation("sdpa")
    inputs = noise_prompt(family_of(model), shape.picture, 20, 2)
    (cost,) = costs(shape, [vt.load_method(method)], text=20, answer=4, batch=2)
    with vt.trim(model, method) as run:
        flops, cached = counted(model, inputs, 4)
    own = 0
    if method.startswith(("tome", "dymu")):  # the similarities of every layer are the method's own
        own = flops - cost.flops
        assert 0 < own < 0.05 * flops
    assert cost.flops == flops - own
    assert cost.kv_answer == cached // 2  # the checkpoint is float16, zoo.load() gives float32
    lengths = run.trace.cache_lengths
    assert cost.kv_vision * sum(lengths) == cost.kv_prompt * sum(length - 20 for length in lengths)
    assert cost.per_layer == run.report.per_layer
    assert cost.prefill - run.report.flops == 2 * 2 * model.lm_head.weight.numel()


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("llava_next", Picture(112, 112)),
        ("video_llava", Picture(56, 56, 2)),
        ("qwen2_5_vl", Picture(112, 56, 4)),
        ("qwen3_vl", Picture(112, 112)),
        ("internvl", Picture(112, 56)),
    ],
)
def test_the_formula_is_what_torch_counts_in_other_families(name, picture):
    shape = Shape(name, name, CONFIGS[name](), picture)
    model = shape.build("cpu", torch.float32, "sdpa")
    model.generation_config.eos_token_id = None
    inputs = noise_prompt(family_of(model), picture, 8, 1)
    method = "uniform:keep=0.5|uniform:keep=0.5,layer=1"
    (cost,) = costs(shape, [vt.load_method(method)], text=8, answer=2)
    with vt.trim(model, method):
        flops, cached = counted(model, inputs, 2)
    assert cost.flops == flops
    assert cost.kv_answer == cached


@pytest.mark.parametrize("shares", [{}, {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}])
def test_layers_of_gemma_4_differ_in_heads_and_some_share(shares):
    """Whole attention has wider heads, and layers that share are passed by the last token of the prompt alone."""
    kinds = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    wide = {"layer_types": kinds, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    config = configuration("gemma4", CHANGES["gemma4"] | {"text_config": wide | shares})
    shape = Shape("gemma4", "gemma4", config, Picture(96, 144))
    model = shape.build("cpu", torch.float32, "sdpa")
    model.generation_config.eos_token_id = None
    inputs = noise_prompt(family_of(model), shape.picture, 8, 1)
    (cost,) = costs(shape, [vt.load_method("uniform:keep=0.5")], text=8, answer=3)
    with vt.trim(model, "uniform:keep=0.5"):
        flops, cached = counted(model, inputs, 3)
    averaging = 2 * 54 * 6 * 64  # of 54 patches to 6 tokens of width 64, by a product with a matrix that is no weight
    assert cost.flops == flops - averaging
    assert cost.kv_answer == cached
    assert cost.kv_vision * (8 + 3) == cost.kv_prompt * 3


@pytest.mark.parametrize(
    "method",
    ["none", "visiontrim", "fastv", "tome:keep=144", "dymu:keep=144,unmerge=true", "luvc", "dycoke:view_layer=3"],
)
def test_further_text_is_arithmetic(monkeypatch, method):
    """What a longer prompt costs by the formula is what is counted where all of it runs."""
    shape, chosen = Shape.load("bundled"), [vt.load_method(method)]
    ours = costs(shape, chosen, text=150, answer=3, batch=2)
    monkeypatch.setattr("visiontrim.measure.cost.SAMPLE", 150)
    assert costs(shape, chosen, text=150, answer=3, batch=2) == ours


def test_no_number_is_too_large_to_count():
    plain = json.loads(
        CliRunner()
        .invoke(
            app, ["cost", "bundled", "--text", "100000000", "--answer", "1000000000000", "--batch", "1000000", "--json"]
        )
        .stdout
    )["plain"]
    layers, token = 8, plain["kv_vision"] // (8 * 576)  # bytes of a token in a layer, of the whole batch
    assert plain["kv_prompt"] == layers * token * (100_000_000 + 576)
    assert plain["kv_answer"] == layers * token * (100_000_000 + 576 + 10**12 - 1)


def test_a_formula_that_does_not_hold_is_not_used(monkeypatch):
    strange = torch.nn.Linear(1, 1)
    monkeypatch.setattr(
        "visiontrim.measure.cost._layers", lambda family: [*list(family.language_model.layers)[:7], strange]
    )
    costs(Shape.load("bundled"), [NONE], text=60)
    with pytest.raises(vt.TrimError, match="the formula knows nothing: give at most 60 text tokens"):
        costs(Shape.load("bundled"), [NONE], text=61)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_experts_count_as_far_as_tokens_are_sent_to_them(name):
    """Torch's counter sees the experts that run, but no step of linear attention."""
    shape = Shape(name, name, CONFIGS[name](), Picture(112, 112))
    model = shape.build("cpu", torch.float32, "sdpa")
    model.generation_config.eos_token_id = None
    model.set_experts_implementation("eager")  # the counter does not know grouped products
    method = "uniform:keep=0.5|uniform:keep=0.5,layer=1"
    (cost,) = costs(shape, [vt.load_method(method)], text=8, answer=2)
    with vt.trim(model, method):
        flops, cached = counted(model, noise_prompt(family_of(model), shape.picture, 8, 1), 2)
    linear = [layer.linear_attn for layer in model.model.language_model.layers if hasattr(layer, "linear_attn")]
    assert bool(linear) == name.startswith("qwen3_5")
    if linear:  # the chunks of the rule and the convolutions, which the formula leaves out
        assert cost.flops < flops < 3 * cost.flops
    else:
        assert cost.flops == flops
    assert cost.kv_answer == cached
    assert cost.weights == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_a_mixture_costs_its_active_experts_and_weighs_all():
    """Qwen3.5-35B-A3B: about 3 of 35 billion weights take part in a token."""
    (cost,) = costs(Shape.load("qwen3.5-35b-a3b"), [NONE], text=60, answer=2)
    tokens = cost.vision_tokens + 60
    assert 2 * 2.2e9 < cost.prefill / tokens < 2 * 3.2e9
    assert 2 * 2.7e9 < cost.decode < 2 * 3.7e9
    assert cost.weights == pytest.approx(2 * 35.1e9, rel=1e-3)


def test_the_command():
    told = CliRunner().invoke(app, ["cost", "bundled", "--method", "fastv", "--keep", "300", "--keep", "0.5", "--json"])
    content = json.loads(told.stdout)
    assert content["plain"]["vision_tokens"] == 576
    assert [one["method"] for one in content["methods"]] == ["fastv:keep=300", "fastv:keep=0.5"]
    assert content["methods"][0]["mean"] == pytest.approx(300, abs=1)
    table = CliRunner().invoke(app, ["cost", "bundled", "--method", "fastv"]).stdout
    assert "vision tokens by decoder layer: 0-1: 576, 2-" in table
    assert "llava-hf/llava-1.5-7b-hf" in CliRunner().invoke(app, ["cost", "--list"]).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "presets are"),
        (["llava-1.5-7b", "--size", "100x100"], "336 x 336"),
        (["qwen2.5-vl-3b", "--size", "100x100"], "units of 28 x 28"),
        (["internvl3-2b", "--size", "448x448x2"], "a video as images"),
    ],
)
def test_mistakes(arguments, message):
    error = CliRunner().invoke(app, ["cost", *arguments]).exception
    assert isinstance(error, vt.TrimError)
    assert message in str(error)
