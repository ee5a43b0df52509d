"""The engine's promises, on tiny random models: removal equals masking, whatever generate() is asked to do."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, TextStreamer

import tiny
import visiontrim as vt
from releases import CACHE
from tiny import (
    PLANS,
    ROWS,
    Masked,
    both_attentions,
    close,
    every_batch,
    every_plan,
    generate,
    hidden_places,
    llava,
    prompts,
    sample,
)

pytestmark = pytest.mark.usefixtures("no_grad")


def survivors(inputs: dict[str, Tensor], hidden: dict[int, Tensor]) -> Tensor:
    alive = inputs["attention_mask"].bool()
    for places in hidden.values():
        alive = alive & ~places
    return alive


# ------------------------------------------------------------------------------------------------ the two promises


@every_plan
@every_batch
@both_attentions
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_removal_equals_masking(plan, rows, attention, tower):
    model, inputs = llava(attention, tower=tower), prompts(*rows)
    with vt.trim(model, plan) as run:
        logits = model(**inputs).logits
        ours = generate(model, inputs)
    hidden = hidden_places(inputs, run.trace)
    assert min(int(places.sum()) for places in hidden.values()) > 0
    alive = survivors(inputs, hidden)
    plain = generate(model, inputs)
    with Masked(model, inputs["attention_mask"], hidden):
        close(logits[alive], model(**inputs).logits[alive])
        reference = generate(model, inputs)
    close(torch.stack(ours.logits), torch.stack(reference.logits))
    assert torch.equal(ours.sequences, reference.sequences)
    assert (torch.stack(ours.logits) - torch.stack(plain.logits))[:, 0].abs().max() > 1e-2, "nothing was removed"


@pytest.mark.parametrize("layer", [None, 2])
@every_batch
@both_attentions
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_keeping_everything_is_bit_identical(layer, rows, attention, positions):
    model, inputs = llava(attention), prompts(*rows)
    plain, plain_logits = generate(model, inputs), model(**inputs).logits
    for keep in (1.0, tiny.PATCHES):
        with vt.trim(model, vt.Random(keep=keep, layer=layer), positions=positions) as run:
            ours, logits = generate(model, inputs), model(**inputs).logits
        assert run.trace.widths == (inputs["input_ids"].shape[1],) * tiny.LAYERS
        assert torch.equal(logits, plain_logits)
        assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))


@every_plan
@both_attentions
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_batch_equals_samples_one_by_one(plan, attention, positions):
    model, inputs = llava(attention), prompts(*ROWS["batch"])
    with vt.trim(model, plan, positions=positions):
        batch = torch.stack(generate(model, inputs).logits, 1)
        for row in range(len(batch)):
            close(batch[row], torch.stack(generate(model, sample(inputs, row)).logits, 1)[0])


@dataclass(frozen=True)
class Doubled(vt.Random):
    """Random tokens at twice their value: what merging looks like to the engine."""

    name: ClassVar[str] = "doubled"

    def select(self, view: vt.View) -> vt.Keep:
        index = super().select(view).index
        return vt.Keep(index, 2 * view.features.gather(1, index[..., None].expand(-1, -1, view.features.shape[2])))


@pytest.mark.parametrize("layer", [None, 2])
@every_batch
def test_merged_features_take_the_places_of_the_kept_tokens(layer, rows):
    model, inputs = llava(), prompts(*rows)
    with vt.trim(model, Doubled(keep=6, layer=layer)) as run:
        logits = model(**inputs).logits
    hidden = hidden_places(inputs, run.trace)
    alive = survivors(inputs, hidden)
    (gone,) = hidden.values()
    merged = (inputs["input_ids"] == tiny.IMAGE) & ~gone

    def double(module, args):
        if layer is None:
            kept = torch.zeros(len(args[0]), tiny.PATCHES, dtype=torch.bool)
            kept[:, run.trace.images[0].stages[0].index] = True
            return (args[0] * torch.where(kept, 2, 1)[..., None],)
        return (args[0] * torch.where(merged, 2, 1)[..., None],)

    core = model.model
    module = core.multi_modal_projector if layer is None else core.language_model.layers[layer]
    handle = module.register_forward_pre_hook(double)
    with Masked(model, inputs["attention_mask"], hidden):
        reference = model(**inputs).logits
    handle.remove()
    close(logits[alive], reference[alive])


# ------------------------------------------------------------------------------------------------ cache and report


@every_plan
@every_batch
def test_cache_lengths_are_what_the_report_says(plan, rows):
    model, inputs = llava(), prompts(*rows)
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, plan) as run:
        model(**(inputs | {CACHE: cache}))
    physical = [layer.keys.shape[-2] for layer in cache.layers]
    assert tuple(physical) == run.trace.cache_lengths == run.trace.widths
    text = model.config.text_config
    per_token = 2 * text.num_key_value_heads * text.head_dim * 4
    assert run.report.kv_bytes == len(rows) * sum(physical) * per_token
    assert run.report.kv_bytes_plain == inputs["input_ids"].numel() * tiny.LAYERS * per_token
    assert cache.get_seq_length() == inputs["input_ids"].shape[1], "the cache counts the uncompressed conversation"
    counts = {"vision": [6] * 5, "language": [16, 16, 5, 5, 5], "both": [9, 4, 4, 2, 2]}
    name = next(name for name, known in PLANS.items() if known is plan)
    assert list(run.report.per_layer) == counts[name]
    assert run.report.mean == sum(counts[name]) / 5
    if len(rows) == 1:
        assert physical == [count + 9 for count in counts[name]]


@every_batch
def test_report_flops_are_those_of_the_counter(rows):
    model, inputs = llava("eager"), prompts(*rows)
    counted = {}
    for plan in (PLANS["both"], vt.NoTrim()):
        with vt.trim(model, plan) as run, FlopCounterMode(display=False) as counter:
            model(**inputs)
        layers = re.compile(r"language_model\.layers\.\d+$")
        counted[plan] = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if layers.search(name))
        assert run.report.flops == counted[plan]
    assert run.report.flops_plain == run.report.flops > counted[PLANS["both"]] > 0


# ------------------------------------------------------------------------------------------------ ways to generate


@every_plan
@every_batch
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "temperature": 0.8},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 4, "num_return_sequences": 2},
        {"use_cache": False},
        {"repetition_penalty": 1.3},
    ],
    ids=lambda options: "-".join(options),
)
def test_ways_to_generate_equal_masking(plan, rows, options):
    model, inputs = llava(), prompts(*rows)
    with vt.trim(model, plan) as run:
        torch.manual_seed(7)
        ours = generate(model, inputs, **options)
    with Masked(model, inputs["attention_mask"], hidden_places(inputs, run.trace)):
        torch.manual_seed(7)
        reference = generate(model, inputs, **options)
    assert torch.equal(ours.sequences, reference.sequences)
    close(torch.stack(ours.logits), torch.stack(reference.logits))


@every_plan
def test_prompt_lookup_equals_greedy(plan):
    model, inputs = llava(), prompts((3, "image", 9))
    inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -8:-4]
    with vt.trim(model, plan):
        greedy = generate(model, inputs, max_new_tokens=12).sequences
        assisted = model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, assisted)


def test_streamer_sees_the_generated_tokens():
    class Collect(TextStreamer):
        def __init__(self):
            self.tokens: list[int] = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    model, inputs, streamer = llava(), prompts((3, "image", 5)), Collect()
    with vt.trim(model, PLANS["both"]):
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamer.tokens == out[0].tolist()


@both_attentions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_plan
def test_half_precision_runs(plan, dtype, attention):
    model, inputs = llava(attention, dtype=dtype), prompts(*ROWS["batch"], dtype=dtype)
    with vt.trim(model, plan) as run:
        out = generate(model, inputs)
    assert torch.isfinite(torch.stack(out.logits)).all()
    assert run.trace.cache_bytes == run.report.kv_bytes > 0


@every_plan
@every_batch
def test_eager_equals_sdpa(plan, rows):
    outputs = []
    for attention in ("eager", "sdpa"):
        model = llava(attention)
        with vt.trim(model, plan):
            outputs.append(torch.stack(generate(model, prompts(*rows)).logits))
    close(*outputs)


# ------------------------------------------------------------------------------------------------ cleanliness


def fingerprint(model) -> dict:
    """Everything that attaching could have left behind."""
    return {
        name: (
            sorted(key for key in vars(module) if not key.startswith("_")),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            id(getattr(module, "config", None)),
            dict(vars(module.config)) if hasattr(module, "config") else None,
        )
        for name, module in model.named_modules()
    }


def test_model_is_as_before_after_exit_and_after_an_exception():
    model, inputs = llava(), prompts((3, "image", 5))
    plain = model(**inputs).logits  # transformers itself leaves hooks at the first forward, so they are in the print
    before, weights = fingerprint(model), {name: value.clone() for name, value in model.state_dict().items()}
    plan = vt.VisionTrim(keep=6, stages="both", layer=2)
    with vt.trim(model, plan):
        assert fingerprint(model) != before
        generate(model, inputs)
    assert fingerprint(model) == before
    with pytest.raises(ZeroDivisionError), vt.trim(model, plan):
        generate(model, inputs, stopping_criteria=[lambda *_: 1 / 0])
    with pytest.raises(vt.TrimError, match="layer"), vt.trim(model, vt.Random(layer=99)):
        generate(model, inputs)
    assert fingerprint(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, plain)


def test_an_error_inside_leaves_the_run_usable():
    model, inputs = llava(), prompts((3, "image", 5))
    with vt.trim(model, PLANS["both"]):
        good = generate(model, inputs).sequences
        with pytest.raises(vt.TrimError):
            generate(model, inputs | {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
        assert torch.equal(generate(model, inputs).sequences, good)


def test_attach_and_remove():
    model, inputs = llava(), prompts((3, "image", 5))
    plain = model(**inputs).logits
    run = vt.trim(model, "random", keep=4).attach()
    assert not torch.equal(model(**inputs).logits, plain)
    with pytest.raises(vt.TrimError, match=r"already has an open run \(random:keep=4\)"):
        vt.trim(model, "uniform").attach()
    run.remove()
    run.remove()
    assert torch.equal(model(**inputs).logits, plain)


def test_two_models_and_two_threads_do_not_mix():
    models = [llava(seed=0), llava(seed=1)]
    batches = [prompts((3, "image", 5), seed=4), prompts((1, "image", 2, "image", 7), seed=5)]
    plans = [PLANS["both"], PLANS["language"]]
    alone = []
    for model, plan in zip(models, plans, strict=True):
        with vt.trim(model, plan):
            alone.append([generate(model, inputs).sequences for inputs in batches])

    results: dict[tuple[int, int], list[Tensor]] = {}
    runs = [vt.trim(model, plan).attach() for model, plan in zip(models, plans, strict=True)]

    def work(m: int, b: int):
        with torch.no_grad():
            results[m, b] = [generate(models[m], batches[b]).sequences for _ in range(5)]

    threads = [threading.Thread(target=work, args=(m, b)) for m in (0, 1) for b in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        run.remove()
    for (m, b), sequences in results.items():
        assert all(torch.equal(sequence, alone[m][b]) for sequence in sequences)
    assert len(results) == 4


def test_features_asked_for_directly_are_the_plain_ones():
    model, inputs = llava(), prompts((3, "image", 5))
    plain = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    with vt.trim(model, PLANS["vision"]):
        inside = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    assert torch.equal(inside, plain)


# ------------------------------------------------------------------------------------------------ labels


@every_plan
@every_batch
def test_loss_is_that_of_the_surviving_positions(plan, rows):
    model, inputs = llava(), prompts(*rows)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) <= 1, -100)  # nothing predicts <s>
    given = labels.clone()
    with vt.trim(model, plan) as run:
        loss = model(**inputs, labels=labels).loss
    assert torch.equal(labels, given), "the caller's labels stay as they are"
    hidden = hidden_places(inputs, run.trace)
    alive = survivors(inputs, hidden)
    with Masked(model, inputs["attention_mask"], hidden):
        logits = model(**inputs).logits
    losses = [
        torch.nn.functional.cross_entropy(logits[row, alive[row]][:-1], labels[row, alive[row]][1:], reduction="none")
        for row in range(len(rows))
    ]
    close(loss, torch.cat(losses).mean())


def test_a_forgotten_run_keeps_no_model_alive():
    model = llava()
    gone = weakref.ref(model)
    vt.trim(model, "random", keep=4).attach()
    model(**prompts((3, "image", 5)))
    del model
    gc.collect()
    assert gone() is None
