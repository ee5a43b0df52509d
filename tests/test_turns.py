"""Conversations: further turns on the cache of a compressed prompt, with and without new images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import visiontrim as vt
from releases import CACHE, cache_of
from tiny import ROWS, Masked, both_attentions, close, every_plan, generate, hidden_places, llava, prompts

pytestmark = pytest.mark.usefixtures("no_grad")


def turn(model, cache, ids, mask, **inputs):
    out = model.generate(
        input_ids=ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=4, do_sample=False, **inputs
    )
    return out, torch.cat([mask, mask.new_ones(mask.shape[0], out.shape[1] - mask.shape[1])], 1)


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def whole_conversation(model, ids: Tensor, mask: Tensor, hidden: dict[int, Tensor], pixel_values: Tensor) -> Tensor:
    """Logits of one masked forward over all turns."""
    seen = mask[:, : next(iter(hidden.values())).shape[1]]
    with Masked(model, seen, hidden):
        return model(
            input_ids=ids, attention_mask=mask, position_ids=places(mask), pixel_values=pixel_values, use_cache=False
        ).logits


def next_logits(model, plan, cache, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits after what ``cache`` and the last token, which generate() did not cache, hold."""
    past = cache.get_seq_length()
    assert past == ids.shape[1] - 1
    with vt.trim(model, plan):
        return model(
            input_ids=ids[:, past:], attention_mask=mask, position_ids=places(mask)[:, past:], **{CACHE: cache}
        ).logits[:, -1]


@every_plan
@both_attentions
@pytest.mark.parametrize("lazy", [True, False], ids=["bare cache", "configured cache"])
@pytest.mark.parametrize("rows", [ROWS["single"], [(3, "image", 5), (1, "image", "image", 2)]], ids=["single", "batch"])
def test_three_turns_equal_the_masked_conversation(plan, attention, lazy, rows):
    model, first = llava(attention), prompts(*rows)
    cache = DynamicCache() if lazy else DynamicCache(config=model.config.text_config)
    ids, mask, traces = first["input_ids"], first["attention_mask"], []
    with vt.trim(model, plan) as run:
        ids, mask = turn(model, cache, ids, mask, pixel_values=first["pixel_values"])
        traces.append(run.trace)
        for seed in (2, 3):
            question = prompts(*[(6,)] * len(rows), seed=seed)
            ids = torch.cat([ids, question["input_ids"]], 1)
            mask = torch.cat([mask, question["attention_mask"]], 1)
            ids, mask = turn(model, cache, ids, mask)
    reference = whole_conversation(model, ids, mask, hidden_places(first, traces[0]), first["pixel_values"])
    assert torch.equal(reference[:, -5:-1].argmax(-1), ids[:, -4:])
    close(next_logits(model, plan, cache, ids, mask), reference[:, -1])


@every_plan
@both_attentions
def test_image_in_a_later_turn(plan, attention):
    model = llava(attention)
    first, second = prompts((3, "image", 5), (6, "image")), prompts((2, "image", 4), ("image", 6), seed=5)
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, plan) as run:
        ids, mask = turn(model, cache, first["input_ids"], first["attention_mask"], pixel_values=first["pixel_values"])
        hidden = hidden_places(first, run.trace)
        before = ids.shape[1]
        ids = torch.cat([ids, second["input_ids"]], 1)
        mask = torch.cat([mask, second["attention_mask"]], 1)
        ids, mask = turn(model, cache, ids, mask, pixel_values=second["pixel_values"])
        later = hidden_places(second, run.trace)
    pad = torch.nn.functional.pad
    both = {
        layer: pad(hidden[layer], (0, before + later[layer].shape[1] - hidden[layer].shape[1]))
        | pad(later[layer], (before, 0))
        for layer in hidden
    }
    order = [first["pixel_values"][0], second["pixel_values"][0], first["pixel_values"][1], second["pixel_values"][1]]
    reference = whole_conversation(model, ids, mask, both, torch.stack(order))
    assert torch.equal(reference[:, -5:-1].argmax(-1), ids[:, -4:])
    close(next_logits(model, plan, cache, ids, mask), reference[:, -1])


@every_plan
def test_compact_positions_continue_consecutively(plan):
    model, inputs = llava(), prompts((3, "image", 5))
    seen: dict[int, list] = {0: [], 4: []}

    def watch(layer):
        def hook(module, args, kwargs):
            cosines = kwargs["position_embeddings"][0]
            table = model.model.language_model.rotary_emb(args[0], torch.arange(40)[None])[0][0]
            seen[layer].append([int((table - row).abs().sum(-1).argmin()) for row in cosines[0]])

        return hook

    with vt.trim(model, plan, positions="compact") as run:
        handles = [
            model.model.language_model.layers[i].register_forward_pre_hook(watch(i), with_kwargs=True) for i in seen
        ]
        generate(model, inputs, max_new_tokens=3)
    for handle in handles:
        handle.remove()
    for layer, steps in seen.items():
        width = run.trace.widths[layer]
        assert steps == [list(range(width)), [width], [width + 1]]


def test_a_cache_with_other_stages_is_refused():
    model, inputs = llava(), prompts((3, "image", 5))
    with vt.trim(model, vt.Random(keep=5, layer=2)):
        cache = cache_of(generate(model, inputs))
    with vt.trim(model, vt.Random(keep=5, layer=3)), pytest.raises(vt.TrimError, match="layer 2 of the cache lacks 11"):
        model(input_ids=torch.tensor([[20, 21]]), **{CACHE: cache})
