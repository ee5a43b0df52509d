"""Models that accelerate moves about, peft wraps, and bitsandbytes and torchao quantise."""

from __future__ import annotations

import accelerate
import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import families
import visiontrim as vt
from families import LAYERS, Prompts, hidden_places
from tiny import Masked, close, generate

pytestmark = pytest.mark.usefixtures("no_grad")

PLAN = vt.VisionTrim(keep=0.5, guidance="none") | vt.Random(keep=0.25, layer=2)
ALL = vt.Random(keep=1.0) | vt.Random(keep=1.0, layer=2)
both_shapes = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])


def batch(name: str) -> dict[str, torch.Tensor]:
    return Prompts(name, (3, "image", 5), (1, "image", 2)).batch()


def same(ours, reference) -> bool:
    return all(a.equal(b) for a, b in zip(ours.logits, reference.logits, strict=True))


def trimmed(model, inputs, plan=PLAN):
    with vt.trim(model, plan) as run:
        return generate(model, inputs), run


@both_shapes
def test_weights_offloaded_to_the_host(name):
    """Every parameter is on the meta device between the forwards of its module."""
    model, inputs = families.build(name), batch(name)
    reference, _ = trimmed(families.build(name), inputs)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    ours, _ = trimmed(model, inputs)
    assert same(ours, reference)


@both_shapes
def test_a_device_map_over_two_places(name, tmp_path):
    """Every second decoder layer and the norm are read from disk; two accelerators could not be had."""
    model, inputs = families.build(name), batch(name)
    reference, _ = trimmed(families.build(name), inputs)
    parts = [part for part, _ in model.model.named_children() if part != "language_model"]
    text = [part for part, _ in model.model.language_model.named_children() if part != "layers"]
    places = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    places |= {f"model.language_model.{part}": "disk" if part == "norm" else "cpu" for part in text}
    places |= {f"model.language_model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(LAYERS)}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert next(model.model.language_model.layers[1].parameters()).is_meta
    ours, _ = trimmed(model, inputs)
    assert same(ours, reference)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@both_shapes
def test_adapters(name):
    """Adapters on the language model; the same when merged into its weights."""
    inputs = batch(name)
    options = peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    model = peft.get_peft_model(families.build(name), options).eval()
    plain = generate(model, inputs)
    assert same(trimmed(model, inputs, ALL)[0], plain)
    ours, run = trimmed(model, inputs)
    assert all(len(image.stages[0].index) == image.total // 2 for image in run.trace.images)
    assert not same(ours, trimmed(families.build(name), inputs)[0])  # the adapters matter
    assert same(generate(model, inputs), plain)
    reference, _ = trimmed(model.merge_and_unload(), inputs)
    close(torch.stack(ours.logits), torch.stack(reference.logits), 5e-5)


def eight_bit(old: nn.Linear) -> nn.Module:
    return bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=old.bias is not None, has_fp16_weights=False)


def four_bit(old: nn.Linear) -> nn.Module:
    options = {"bias": old.bias is not None, "compute_dtype": torch.float32, "quant_type": "nf4"}
    return bnb.nn.Linear4bit(old.in_features, old.out_features, **options)


def replace_linear(model, new_layer) -> None:
    for module in list(model.model.modules()):
        for name, old in list(module.named_children()):
            if type(old) is nn.Linear:
                new = new_layer(old)
                new.load_state_dict(old.state_dict())
                setattr(module, name, new.to("cpu"))


QUANTISE = {
    "bitsandbytes int8": lambda model: replace_linear(model, eight_bit),
    "bitsandbytes nf4": lambda model: replace_linear(model, four_bit),
    "torchao int8": lambda model: quantize_(model, Int8WeightOnlyConfig()),
}


@both_shapes
@pytest.mark.parametrize("quantise", QUANTISE.values(), ids=QUANTISE)
def test_quantised_linear_layers(name, quantise):
    model, inputs = families.build(name), batch(name)
    before = generate(model, inputs)
    quantise(model)
    plain = generate(model, inputs)
    assert not same(plain, before)
    assert same(trimmed(model, inputs, ALL)[0], plain)
    ours, run = trimmed(model, inputs)
    with Masked(model, inputs["attention_mask"], hidden_places(name, inputs, run.trace)):
        reference = generate(model, inputs)
    close(torch.stack(ours.logits), torch.stack(reference.logits), 2e-5)
