"""Static caches: allocated at once, and decoded by compiled graphs, also when tokens are missing."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import CompileConfig, StaticCache

import visiontrim as vt
from releases import CACHE, cache_of
from tiny import ANSWER, IMAGE, LAYERS, PATCHES, PLANS, ROWS, close, generate, llava, prompts
from visiontrim.engine.language import LanguageStage

pytestmark = pytest.mark.usefixtures("no_grad")
METHODS = {"random": vt.Random(keep=6), "merging": vt.VisionTrim(keep=6, stages="vision"), "none": vt.Random(keep=1.0)}
ONE, TWO = prompts((3, "image", 5)), prompts((3, "image", 5), (3, "image", 5), seed=4)
PADDED = prompts((3, "image", 9), (1, "image", 2), seed=5)
INPUTS = {"single": ONE, "batch": TWO, "padded": PADDED, "other counts": prompts(*ROWS["batch"])}
"""The last has rows with one image, two and none."""
model_of = functools.cache(llava)


def left(inputs):
    """Tokens of every row once six of the sixteen of every image are."""
    valid, images = inputs["attention_mask"].sum(1), (inputs["input_ids"] == IMAGE).sum(1) // PATCHES
    return (valid - images * (PATCHES - 6)).tolist()


def logits(output):
    return torch.stack(output.logits)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_static_equals_dynamic_and_allocates_what_is_left(method, attention, inputs):
    model = model_of(attention)
    with vt.trim(model, method) as run:
        dynamic = generate(model, inputs)
        static = generate(model, inputs, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)
    close(logits(static), logits(dynamic))
    gone = 0 if method == METHODS["none"] else inputs["input_ids"].shape[1] - max(left(inputs))
    allocated = inputs["input_ids"].shape[1] - gone + ANSWER - 1  # the last answer token is not cached
    assert [layer.keys.shape[2] for layer in cache_of(static).layers] == [allocated] * LAYERS
    assert run.trace.cache_lengths == (allocated,) * LAYERS


@pytest.mark.parametrize("first", [ONE, INPUTS["other counts"]], ids=["single", "other counts"])
def test_further_turns_on_a_static_cache(first):
    model, answers, rows = model_of("sdpa"), {}, len(first["input_ids"])
    more = torch.randint(10, 200, (rows, 4), generator=torch.Generator().manual_seed(3))
    for kind in ("static", "dynamic"):
        cache = StaticCache(config=model.config.text_config, max_cache_len=60) if kind == "static" else None
        given = {} if cache is None else {CACHE: cache}
        with vt.trim(model, METHODS["random"]):
            turn = generate(model, first, **given)
            ids = torch.cat([turn.sequences, more], 1)
            mask = torch.ones_like(ids)
            mask[:, : first["input_ids"].shape[1]] = first["attention_mask"]
            again = {"input_ids": ids, "attention_mask": mask, CACHE: cache_of(turn)}
            answers[kind] = logits(generate(model, again))
    close(answers["static"], answers["dynamic"])


def test_a_static_cache_can_be_used_again():
    model = model_of("sdpa")
    cache = StaticCache(config=model.config.text_config, max_cache_len=60)
    with vt.trim(model, METHODS["random"]):
        first = generate(model, ONE, **{CACHE: cache})
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        again = generate(model, ONE, **{CACHE: cache})
    close(logits(again), logits(first))
    cache.reset()
    plain = generate(model, ONE, **{CACHE: cache})
    close(logits(plain), logits(generate(model, ONE)))


def test_steps_by_hand_on_a_static_cache_know_of_padding():
    """A 2-D mask is the caller's, of the uncompressed rows."""
    model, inputs, steps = model_of("sdpa"), INPUTS["other counts"], {}
    word, length = torch.full((len(inputs["input_ids"]), 1), 30), inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    position = mask.cumsum(1)[:, -1:] - 1
    for kind in ("static", "dynamic"):
        cache = StaticCache(config=model.config.text_config, max_cache_len=60) if kind == "static" else None
        with vt.trim(model, METHODS["random"]):
            cache = cache_of(model(**inputs, **({} if cache is None else {CACHE: cache})))
            assert cache.get_seq_length() == length
            steps[kind] = model(word, attention_mask=mask, position_ids=position, **{CACHE: cache}).logits
    close(steps["static"], steps["dynamic"])


def test_padding_on_a_static_cache_is_not_for_flash_attention(monkeypatch):
    monkeypatch.setattr(LanguageStage, "_flash", True)
    model, message = model_of("sdpa"), "rows of 15, 23, 7 tokens are left of this batch, but with flash attention"
    with vt.trim(model, PLANS["vision"]), pytest.raises(vt.TrimError, match=message):
        generate(model, INPUTS["other counts"], cache_implementation="static")


def test_stages_between_layers_are_refused_a_static_cache():
    model, message = model_of("sdpa"), "use the method's vision stage alone with positions='keep', or a DynamicCache"
    with vt.trim(model, PLANS["language"]), pytest.raises(vt.TrimError, match=message):
        generate(model, ONE, cache_implementation="static")


@pytest.mark.parametrize("inputs", [ONE, PADDED], ids=["single", "padded"])
def test_decoding_compiles_into_one_graph_and_never_again(inputs):
    """transformers' own compilation, on the CPU and without a code generator; counted by what dynamo hands over."""
    torch._dynamo.reset()
    model, graphs = llava(), []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "max_new_tokens": 8}
    with vt.trim(model, METHODS["random"]):
        eager = generate(model, inputs, **options)
        compiled = generate(model, inputs, compile_config=config, **options)
        assert len(graphs) == 1
        close(logits(compiled), logits(eager))
        ids = inputs["input_ids"]
        other = inputs | {"input_ids": ids.where(ids < 10, 209 - ids), "pixel_values": -inputs["pixel_values"]}
        generate(model, other, compile_config=config, **options)
    assert len(graphs) == 1, "nothing was compiled anew for another prompt of that length"
    torch._dynamo.reset()
