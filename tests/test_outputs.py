"""What a forward gives out beside logits: one length, the prompt's, and never a trace of how tokens are removed."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import ModelOutput

import families
import visiontrim as vt
from releases import CACHE
from tiny import LAYERS, PLANS, ROWS, Masked, close, hidden_places, llava, prompts

ROW = prompts(*ROWS["single"])


def tensors(value):
    """All tensors in an output."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | ModelOutput):
        yield from (part for inner in value.values() for part in tensors(inner))
    elif isinstance(value, list | tuple):
        yield from (part for inner in value for part in tensors(inner))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@torch.no_grad()
def test_hidden_states_have_the_length_of_the_prompt_and_are_those_of_the_layers(plan, rows):
    model, inputs, left = llava(), prompts(*rows), []
    layers = model.model.language_model.layers
    hooks = [layer.register_forward_hook(lambda m, a, output: left.append(output)) for layer in layers]
    with vt.trim(model, plan):
        output = model(**inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    length = inputs["input_ids"].shape[1]
    assert [state.shape[1] for state in output.hidden_states] == [length] * (LAYERS + 1)
    for state, narrow in zip(output.hidden_states[1:-1], left, strict=False):  # the last one is normalised
        assert narrow.shape[1] < length or plan is PLANS["language"]
        torch.testing.assert_close(state[:, -1], narrow[:, -1], rtol=0, atol=0)
        assert set(state[0].unique(dim=0)[:, 0].tolist()) <= {0.0, *narrow[0, :, 0].tolist()}
    torch.testing.assert_close(output.hidden_states[-1], model_last(model, plan, inputs), rtol=0, atol=0)


def model_last(model, plan, inputs):
    with vt.trim(model, plan):
        return model.model(**inputs).last_hidden_state


@torch.no_grad()
def test_hidden_states_of_what_stays_are_those_of_the_model_that_masks_the_rest():
    model, stay = llava(), -5  # text after the image, which no removal moves
    with vt.trim(model, PLANS["both"]) as run:
        states = model(**ROW, output_hidden_states=True).hidden_states
    with Masked(model, ROW["attention_mask"], hidden_places(ROW, run.trace)):
        expected = model(**ROW, output_hidden_states=True).hidden_states
    for state, right in zip(states, expected, strict=True):
        close(state[:, stay:], right[:, stay:])


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
@torch.no_grad()
def test_no_field_of_an_output_holds_infinities(name):
    model, inputs = families.build(name, "sdpa"), families.Prompts(name, (3, "image", 5)).batch(0)
    with vt.trim(model, vt.Random(keep=0.5)):
        outputs = [model(**inputs), model.model(**inputs)]
    for output in outputs:
        for value in tensors({field: output[field] for field in output if field != CACHE}):
            assert value.isfinite().all()
