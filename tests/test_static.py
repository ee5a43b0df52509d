"""Static caches: allocated at once, and decoded by compiled graphs, also when tokens are missing."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import CompileConfig, StaticCache

import visiontrim as vt
from releases import CACHE, cache_of
from tiny import LAYERS, PLANS, ROWS, close, generate, llava, prompts

pytestmark = pytest.mark.usefixtures("no_grad")
METHODS = {"random": vt.Random(keep=6), "merging": vt.VisionTrim(keep=6, stages="vision"), "none": vt.Random(keep=1.0)}
ONE, TWO = prompts((3, "image", 5)), prompts((3, "image", 5), (3, "image", 5), seed=4)
model_of = functools.cache(llava)


def logits(output):
    return torch.stack(output.logits)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("inputs", [ONE, TWO], ids=["single", "batch"])
def test_static_equals_dynamic_and_allocates_what_is_left(method, attention, inputs):
    model = model_of(attention)
    with vt.trim(model, method) as run:
        dynamic = generate(model, inputs)
        static = generate(model, inputs, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)
    close(logits(static), logits(dynamic))
    gone = 0 if method == METHODS["none"] else 16 - 6
    allocated = inputs["input_ids"].shape[1] - gone + 6 - 1  # the last answer token is not cached
    assert [layer.keys.shape[2] for layer in cache_of(static).layers] == [allocated] * LAYERS
    assert run.trace.cache_lengths == (allocated,) * LAYERS


def test_further_turns_on_a_static_cache():
    model = model_of("sdpa")
    first, answers = ONE, {}
    more = torch.randint(10, 200, (1, 4), generator=torch.Generator().manual_seed(3))
    for kind in ("static", "dynamic"):
        cache = StaticCache(config=model.config.text_config, max_cache_len=60) if kind == "static" else None
        given = {} if cache is None else {CACHE: cache}
        with vt.trim(model, METHODS["random"]):
            turn = generate(model, first, **given)
            ids = torch.cat([turn.sequences, more], 1)
            again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache_of(turn)}
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


@pytest.mark.parametrize(
    ("plan", "rows", "message"),
    [
        (PLANS["language"], "single", "use the method's vision stage alone with positions='keep', or a DynamicCache"),
        (PLANS["vision"], "batch", "rows of 15, 23, 7 tokens are left of this batch, but a static cache"),
    ],
    ids=["stages between layers", "padding"],
)
def test_what_a_static_cache_cannot_hold_is_refused(plan, rows, message):
    model, inputs = model_of("sdpa"), prompts(*ROWS[rows])
    with vt.trim(model, plan), pytest.raises(vt.TrimError, match=message):
        generate(model, inputs, cache_implementation="static")


def test_decoding_compiles_into_one_graph_and_never_again():
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
        eager = generate(model, ONE, **options)
        compiled = generate(model, ONE, compile_config=config, **options)
        assert len(graphs) == 1
        close(logits(compiled), logits(eager))
        generate(model, prompts((3, "image", 5), seed=7), compile_config=config, **options)
    assert len(graphs) == 1, "nothing was compiled anew for another prompt of that length"
    torch._dynamo.reset()
