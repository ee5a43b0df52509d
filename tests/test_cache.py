"""Cache layers that lack tokens: what they count, and what happens to their masks when rows move."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer

import tiny
import visiontrim as vt
from releases import CACHE
from tiny import close, generate, llava, prompts
from visiontrim.engine.cache import Trimmed, TrimmedLayer, cache_bytes, check_cache, physical_length

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
    check_cache(cache, even=False)
    check_cache(None, even=False)
    cache.layers.append(StaticLayer(max_cache_len=4))
    check_cache(cache, even=True)
    with pytest.raises(vt.TrimError, match=r"layer 1 of the cache is a StaticLayer.*or a DynamicCache"):
        check_cache(cache, even=False)
    cache.layers.append(StaticSlidingWindowLayer(max_cache_len=4, sliding_window=2))
    with pytest.raises(vt.TrimError, match=r"layer 2 of the cache is a StaticSlidingWindowLayer.*use a DynamicCache"):
        check_cache(cache, even=True)


def test_a_layer_keeps_its_home():
    """An offloaded cache keeps its tensors on the host between steps; the layer's device says where they belong."""
    layer = DynamicLayer()
    layer.update(torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8))
    keys = layer.keys
    layer.device = torch.device("meta")
    trimmed = Trimmed.take_over(layer)
    assert trimmed.device == torch.device("meta")
    assert trimmed.keys is keys


quantized = pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="transformers 5.22 and older")


@quantized
def test_a_quantized_cache_holds_what_is_left():
    model, inputs = llava(), prompts((3, "image", 5))
    text, given = model.model.language_model, []

    def note(module, args, kwargs):
        given.append((args[0], kwargs["position_ids"]))

    hook = text.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    cache = fp8_cache()
    with vt.trim(model, vt.Random(keep=9) | vt.Random(keep=4, layer=2)) as run:
        out = generate(model, inputs, **{CACHE: cache}, max_new_tokens=4)
        exact = generate(model, inputs, max_new_tokens=1)
    hook.remove()
    text_tokens = inputs["input_ids"].shape[1] - tiny.PATCHES
    held = [text_tokens + count for count in (9, 9, 4, 4, 4)]
    assert run.trace.cache_lengths == tuple(held)
    assert [physical_length(cache, index) for index in range(tiny.LAYERS)] == [length + 3 for length in held]
    assert torch.equal(out.logits[0], exact.logits[0]), "the prefill is in full precision"
    again = fp8_cache()
    text(inputs_embeds=given[0][0], position_ids=given[0][1], **{CACHE: again})
    for ours, theirs in zip(cache.layers[:2], again.layers[:2], strict=True):
        codes, scale = ours._quantized_keys
        expected, expected_scale = theirs._quantized_keys
        assert torch.equal(codes[:, :, : held[0]].float(), expected.float())
        assert scale == expected_scale
    stored = sum(2 * 2 * 16 * (length + 3) for length in held)  # a byte for each entry
    assert cache_bytes(cache) == stored + 2 * 4 * tiny.LAYERS  # and two scales a layer


def fp8_cache():
    cache = DynamicCache()
    cache.layers = [cache_utils.Fp8QuantizedLayer() for _ in range(tiny.LAYERS)]
    return cache


@quantized
def test_what_narrows_the_cache_does_not_take_a_quantized_one():
    model, inputs = llava(), prompts((3, "image", 5))
    with vt.trim(model, "mustdrop:keep=8"), pytest.raises(vt.TrimError, match="Fp8QuantizedLayer cannot give up"):
        model(**inputs, **{CACHE: fp8_cache()})
