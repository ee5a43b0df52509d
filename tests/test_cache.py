"""Cache layers that lack tokens: what they count, and what happens to their masks when rows move."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

import tiny
import visiontrim as vt
from releases import CACHE
from tiny import close, generate, llava, prompts
from visiontrim.engine.cache import TrimmedLayer, cache_bytes, check_cache, physical_length

pytestmark = pytest.mark.usefixtures("no_grad")


def filled(rows=((3, "image", 5), (1, "image", 2, "image", 7)), keep=6, **options):
    model, inputs = llava(), prompts(*rows)
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, vt.Random(keep=keep, **options)):
        model(**(inputs | {CACHE: cache}))
    return model, inputs, cache


def test_logical_and_physical_length():
    _, inputs, cache = filled(layer=2)
    length = inputs["input_ids"].shape[1]
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2 + [TrimmedLayer] * 3
    assert [layer.get_seq_length() for layer in cache.layers] == [length] * tiny.LAYERS
    held = [physical_length(cache, index) for index in range(tiny.LAYERS)]
    assert held == [length] * 2 + [1 + 1 + 6 + 2 + 6 + 7] * 3
    for layer, keys in zip(cache.layers, held, strict=True):
        assert layer.get_mask_sizes(4) == (keys + 4, length - keys)
    text = 2 * 2 * 16 * 4  # keys and values, two heads of 16, float32
    assert cache_bytes(cache) == len(inputs["input_ids"]) * sum(held) * text


def test_rows_take_their_mask_along():
    _, _, cache = filled()
    layer = cache.layers[0]
    assert isinstance(layer, TrimmedLayer)
    assert layer.key_mask is not None
    first, second = layer.key_mask.clone()
    assert not torch.equal(first, second), "the rows are padded differently"
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.key_mask, torch.stack([second, first]))
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.key_mask, torch.stack([second, second, first, first]))
    layer.batch_select_indices(torch.tensor([2]))
    assert torch.equal(layer.key_mask, first[None])
    assert layer.keys.shape[0] == 1


def test_only_what_follows_the_prompt_can_be_cropped():
    model, inputs, cache = filled(rows=[(3, "image", 5)])
    length = inputs["input_ids"].shape[1]
    with vt.trim(model, "random", keep=6):
        before = model(torch.tensor([[7]]), **{CACHE: copy.deepcopy(cache)}).logits
        model(torch.tensor([[9, 11]]), **{CACHE: cache})
        cache.crop(-2)
        assert cache.get_seq_length() == length
        close(model(torch.tensor([[7]]), **{CACHE: cache}).logits, before)
        with pytest.raises(vt.TrimError, match="cannot crop 3 tokens: only the 1 tokens after the compressed prompt"):
            cache.crop(-3)


def test_a_copy_continues_by_itself():
    model, _, cache = filled()
    fork = copy.deepcopy(cache)
    token, mask = torch.tensor([[7], [8]]), torch.ones(2, cache.get_seq_length() + 1, dtype=torch.long)
    with vt.trim(model, "random", keep=6):
        ours = model(token, attention_mask=mask, **{CACHE: cache}).logits
        theirs = model(token, attention_mask=mask, **{CACHE: fork}).logits
    assert torch.equal(ours, theirs)
    assert physical_length(fork, 0) == physical_length(cache, 0)


def test_reset_forgets_what_was_removed():
    model, inputs, cache = filled()
    cache.reset()
    assert cache.get_seq_length() == 0
    with vt.trim(model, "random", keep=6):
        again = generate(model, inputs, **{CACHE: cache})
        fresh = generate(model, inputs)
    assert torch.equal(again.sequences, fresh.sequences)


def test_layers_that_cannot_lack_tokens_are_refused():
    cache = DynamicCache()
    cache.layers.append(DynamicLayer())
    check_cache(cache)
    check_cache(None)
    cache.layers.append(StaticLayer(max_cache_len=4))
    with pytest.raises(vt.TrimError, match=r"layer 1 of the cache is a StaticLayer.*use a DynamicCache"):
        check_cache(cache)
