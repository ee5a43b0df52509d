"""Model types that nobody has written facts for keep the same promises, as long as their parts are where usual."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    Florence2Config,
    Florence2ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
)

import families
import model_types
import visiontrim as vt
from families import GENERIC, Prompts, hidden_places
from tiny import Masked, close, generate
from visiontrim.models.family import Generic, family_of, list_families

pytestmark = pytest.mark.usefixtures("no_grad")

PLAN = vt.Random(keep=0.5) | vt.Random(keep=1, layer=3)
every_type = pytest.mark.parametrize("name", GENERIC)
model_of = functools.cache(families.build)


def batch(name: str) -> dict[str, torch.Tensor]:
    return Prompts(name, (3, "image", 5), (1, "image", 2, "image", 7), (6,)).batch()


@every_type
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_removal_equals_masking(name, attention):
    model, inputs = model_of(name, attention), batch(name)
    assert name not in list_families()
    assert isinstance(family_of(model), Generic)
    with vt.trim(model, PLAN) as run:
        ours = generate(model, inputs)
    with Masked(model, inputs["attention_mask"], hidden_places(name, inputs, run.trace)):
        reference = generate(model, inputs)
    for a, b in zip(ours.logits, reference.logits, strict=True):
        close(a, b, 2e-5)
    assert [image.grid[:2] for image in run.trace.images] == [(1, 1)] * 3
    assert len(run.trace.images[0].stages[-1].index) == 1


def test_the_docs_say_what_becomes_of_every_type():
    """A type of a new release that nobody has tried is an error here."""
    assert model_types.table() in (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    refused = [name for names in model_types.reasons().values() for name in names]
    known = [*families.CONFIGS, *GENERIC, *model_types.RUN_SHRUNK, *model_types.RUN_TIMM, *refused]
    assert len(known) == len(set(known))
    if Version(transformers.__version__) >= Version("5.24"):
        assert set(model_types.classes()) <= set(known)


@pytest.mark.parametrize("name", [name for names in model_types.reasons().values() for name in names])
def test_what_cannot_run_says_why(name):
    if Version(transformers.__version__) >= Version("5.24"):  # older releases know fewer, and configure them otherwise
        assert model_types.says_why(name)


@every_type
def test_keeping_everything_is_bit_identical(name):
    model, inputs = model_of(name), batch(name)
    plain = generate(model, inputs)
    with vt.trim(model, vt.Random(keep=1.0)):
        ours = generate(model, inputs)
    assert all(a.equal(b) for a, b in zip(ours.logits, plain.logits, strict=True))


def test_methods_are_told_that_there_is_no_attention():
    model, inputs = model_of("janus"), batch("janus")
    with pytest.raises(vt.TrimError, match="attention"), vt.trim(model, "visiontrim", keep=2):
        generate(model, inputs)


def test_encoder_decoders_are_refused():
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 30}
    config = Florence2Config(text_config={"model_type": "bart", **small})
    with torch.device("meta"):
        model = Florence2ForConditionalGeneration(config)
    with pytest.raises(
        vt.TrimError, match=r"model_type 'florence2'\) is not supported: the answer comes from a decoder"
    ):
        vt.trim(model)


def test_models_without_the_usual_parts_are_refused():
    model = torch.nn.Module()
    model.config = transformers.LlamaConfig()  # type: ignore[assignment]
    missing = "no config.image_token_id, no model.get_image_features, no model.language_model.layers, which a model"
    with pytest.raises(vt.TrimError, match=missing):
        family_of(model)  # pyright: ignore[reportArgumentType]


def test_shared_keys_and_values_have_no_stage_between_layers():
    options = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0}
    text = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 200, "layer_types": ["full_attention"] * 4}
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text | options))
    with pytest.raises(vt.TrimError, match=r"inputs of each token.*between decoder layers"):
        vt.trim(model, vt.Random(keep=0.5) | vt.Random(keep=0.5, layer=1))
