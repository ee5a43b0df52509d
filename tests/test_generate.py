"""What generate() can be asked to do, on families that differ: 1-D and 3-D positions, newlines, masks of their own."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

import families
import visiontrim as vt
from families import BIDIRECTIONAL, CONFIGS, HYBRID, Prompts, hidden_places
from releases import CACHE
from tiny import Masked, close, generate

pytestmark = pytest.mark.usefixtures("no_grad")

NAMES = ("llava", "llava_next", "qwen2_5_vl", "paligemma", "gemma3")
every_family = pytest.mark.parametrize("name", NAMES)
model_of = functools.cache(families.build)


def plan_for(name: str) -> vt.Method:
    vision = vt.Random(keep=0.5)
    return vision if name in BIDIRECTIONAL else vision | vt.Random(keep=0.25, layer=2)


def batch(name: str, seed: int = 1) -> dict[str, Tensor]:
    return Prompts(name, (3, "image", 5), (1, "image", 2), seed=seed).batch()


@every_family
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "temperature": 0.8},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 4, "num_return_sequences": 2},
        {"use_cache": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_ways_to_generate_equal_masking(name, options):
    model, inputs = model_of(name), batch(name)
    with vt.trim(model, plan_for(name)) as run:
        torch.manual_seed(7)
        ours = generate(model, inputs, **options)
    with Masked(model, inputs["attention_mask"], hidden_places(name, inputs, run.trace)):
        torch.manual_seed(7)
        reference = generate(model, inputs, **options)
    assert torch.equal(ours.sequences, reference.sequences)
    close(torch.stack(ours.logits), torch.stack(reference.logits), 2e-5)


@every_family
def test_prompt_lookup_equals_greedy(name):
    model, inputs = model_of(name), Prompts(name, (3, "image", 9)).batch()
    inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -8:-4]
    with vt.trim(model, plan_for(name)):
        greedy = generate(model, inputs, max_new_tokens=10).sequences
        assisted = model.generate(**inputs, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, assisted)


def converse(model, turns: list[dict[str, Tensor]], contexts: list[AbstractContextManager]) -> list:
    """Answers of four tokens to each turn, on one cache."""
    cache, said = DynamicCache(config=model.config.get_text_config()), {}
    outputs = []
    for turn, context in zip(turns, contexts, strict=True):
        along = {key: value for key, value in turn.items() if value.shape == turn["input_ids"].shape}
        said = {key: torch.cat([said[key], value], 1) if said else value for key, value in along.items()}
        with context:
            outputs.append(generate(model, turn | said, **{CACHE: cache}, max_new_tokens=4))
        said["input_ids"] = outputs[-1].sequences
        for key in said.keys() - {"input_ids"}:
            said[key] = pad(said[key], (0, 4), value=int(key == "attention_mask"))
    return outputs


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"paligemma", "paligemma2", *HYBRID}))
def test_a_second_question(name):
    """PaliGemma knows one turn; for hybrids, see test_hybrids."""
    model, question = model_of(name), Prompts(name, (5,), (4,), seed=5).batch()
    question["attention_mask"].fill_(1)
    run = vt.trim(model, plan_for(name))
    turns = [Prompts(name, (3, "image", 5), (1, "image", 2)).batch(), question]
    ours = converse(model, turns, [run, run])
    assert ours[1].sequences.shape[1] == turns[0]["input_ids"].shape[1] + question["input_ids"].shape[1] + 8
    hidden = hidden_places(name, turns[0], run.trace)
    later = {layer: pad(places, (0, 4 + question["input_ids"].shape[1])) for layer, places in hidden.items()}
    mask = pad(turns[0]["attention_mask"], (0, 4 + question["input_ids"].shape[1]), value=1)
    reference = converse(model, turns, [Masked(model, turns[0]["attention_mask"], hidden), Masked(model, mask, later)])
    for mine, other in zip(ours, reference, strict=True):
        assert torch.equal(mine.sequences, other.sequences)
        close(torch.stack(mine.logits), torch.stack(other.logits), 2e-5)


# In a further turn transformers wants the sizes of all images for Qwen's positions, but the pixels of the new ones
# alone: there the whole conversation has to be sent again
@pytest.mark.parametrize("name", ["llava", "llava_next", "gemma3"])
def test_a_new_image_in_a_second_turn(name):
    model, turns = model_of(name), [batch(name), batch(name, seed=5)]
    runs = [vt.trim(model, plan_for(name)) for _ in turns]
    ours = converse(model, turns, runs)
    hidden = [hidden_places(name, turn, run.trace) for turn, run in zip(turns, runs, strict=True)]
    both = {layer: torch.cat([pad(hidden[0][layer], (0, 4)), hidden[1][layer]], 1) for layer in hidden[0]}
    mask = torch.cat([pad(turns[0]["attention_mask"], (0, 4), value=1), turns[1]["attention_mask"]], 1)
    reference = converse(
        model, turns, [Masked(model, turns[0]["attention_mask"], hidden[0]), Masked(model, mask, both)]
    )
    for mine, other in zip(ours, reference, strict=True):
        assert torch.equal(mine.sequences, other.sequences)
        close(torch.stack(mine.logits), torch.stack(other.logits), 2e-5)
