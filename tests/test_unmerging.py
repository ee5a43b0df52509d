"""Virtual unmerging: attention over every place of merged tokens, against repeated embeddings and loops in float64."""

from __future__ import annotations

import functools
import math
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

import families
import visiontrim as vt
from families import Prompts
from releases import CACHE, cache_of
from tiny import both_attentions, close, generate, llava, prompts
from visiontrim.engine.forward import Prefill
from visiontrim.models import family_of

pytestmark = pytest.mark.usefixtures("no_grad")

model_of = functools.cache(families.build)
ROWS = [(3, "image", 5), (1, "image", 2, "image", 7), (6,)]
MERGING = {
    "llava": vt.DyMU(keep=5, unmerge=True),
    "llava_next": vt.AvgPool(keep=0.25),
    "qwen2_5_vl": vt.AvgPool(keep=0.25),
    "qwen3_vl": vt.AvgPool(keep=0.25),
}
every_family = pytest.mark.parametrize("name", MERGING)


def unmerged(model, method: vt.Method) -> vt.Run:
    return vt.trim(model, method, positions="unmerged")


def logits_of(model, inputs, **options) -> Tensor:
    return torch.stack(generate(model, inputs, **options).logits, 1)


def first_of(model, inputs: dict[str, Tensor]) -> int:
    """Place of the first token of an image in the first row."""
    return int(family_of(model).placeholders(inputs["input_ids"])[0].nonzero()[0])


def owners(inputs: dict[str, Tensor], run: vt.Run) -> Tensor:
    """For every place of an unpadded prompt with one image of one part: the place of the token that covers it."""
    (image,) = run.trace.images
    first = first_of(run.model, inputs)
    owner = torch.arange(inputs["input_ids"].shape[1])
    last = image.stages[-1]
    owner[first : first + image.total] = first + last.index.sort().values[last.assignment]
    return owner


class Seen:
    """What the language model was given, and what entered the output projection of its first attention."""

    def __init__(self, model) -> None:
        language = model.model.language_model
        self.embeds: list[Tensor] = []
        self.attended: list[Tensor] = []
        self.handles = [
            language.layers[0].register_forward_pre_hook(lambda m, args: self.embeds.append(args[0])),
            # behind the engine's own hook, which stands there already
            language.layers[0].self_attn.o_proj.register_forward_pre_hook(
                lambda m, args: self.attended.append(args[0])
            ),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("keep", [{"keep": 1.0}, {"keep": None, "thresholds": (math.inf, math.inf)}], ids=str)
def test_nothing_merged_is_the_plain_model(keep):
    model, inputs = llava(), prompts((3, "image", 5))
    plain = logits_of(model, inputs)
    with vt.trim(model, vt.DyMU(unmerge=True, **keep)) as run:
        assert torch.equal(logits_of(model, inputs), plain)
        assert run.report.kept_tokens == 16
    assert torch.equal(logits_of(model, inputs), plain)


@every_family
@both_attentions
def test_without_merging_it_is_removal(name, attention):
    """Tokens that were dropped are nowhere, and the others stand at one place each: the rule "keep"."""
    model, inputs = model_of(name, attention), Prompts(name, *ROWS).batch()
    outputs, lengths = [], []
    for positions in ("keep", "unmerged"):
        with vt.trim(model, vt.Random(keep=0.5), positions=positions) as run:
            outputs.append(logits_of(model, inputs))
            lengths.append((run.trace.widths, run.trace.attended, run.trace.cache_lengths))
    close(*outputs)
    assert lengths[0] == lengths[1]
    assert (outputs[0] - logits_of(model, inputs)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@both_attentions
def test_first_attention_is_that_of_the_plain_model_on_repeated_embeddings(name, attention):
    model, inputs = model_of(name, attention), Prompts(name, (3, "image", 5)).batch()
    with unmerged(model, MERGING[name]) as run, Seen(model) as ours:
        model(**inputs)
    owner = owners(inputs, run)
    left = owner.unique()
    assert len(left) == run.trace.widths[0] < len(owner)
    repeated = ours.embeds[0][:, torch.searchsorted(left, owner)]

    def instead(module, args, kwargs):
        return args, kwargs | {"inputs_embeds": repeated}

    handle = model.model.language_model.register_forward_pre_hook(instead, with_kwargs=True)
    with Seen(model) as plain:
        model(**inputs)
    handle.remove()
    means = torch.stack([plain.attended[0][:, owner == place].mean(1) for place in left], 1)
    close(ours.attended[0], means)


def rms(x: Tensor, norm: nn.Module) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


class Reference:
    """A Llama in float64, token by token: ``owner[p]`` is the token whose vectors stand at position ``p``."""

    def __init__(self, model) -> None:
        self.model = model
        self.language = model.model.language_model
        self.heads, self.kv_heads = 4, 2
        self.caches: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.language.layers]

    def turned(self, vector: Tensor, position: int) -> Tensor:
        """The vector of one head at a position: pairs (i, i + half) turn by 10000^(-2i/dim) each."""
        half = len(vector) // 2
        angles = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = vector[:half], vector[half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    def step(self, x: Tensor, owner: list[int]) -> Tensor:
        """Logits after the last of the tokens ``x`` [tokens, dim]."""
        start = len(self.caches[0])
        for layer, cache in zip(self.language.layers, self.caches, strict=True):
            attention, normed = layer.self_attn, rms(x, layer.input_layernorm)
            q, k, v = (normed @ getattr(attention, f"{part}_proj").weight.T for part in "qkv")
            sums, counts = torch.zeros_like(q), [0] * len(x)
            for place, token in enumerate(owner):
                head = k[token].view(self.kv_heads, -1)
                turned = torch.stack([self.turned(row, start + place) for row in head])
                cache.append((turned, v[token].view(self.kv_heads, -1)))
                outputs = []
                for number, query in enumerate(q[token].view(self.heads, -1)):
                    query, shared = self.turned(query, start + place), number // (self.heads // self.kv_heads)
                    scores = torch.stack([query @ key[shared] for key, _ in cache]) / len(query) ** 0.5
                    weights = (scores - scores.max()).exp()
                    weights = weights / weights.sum()
                    outputs.append(sum(w * value[shared] for w, (_, value) in zip(weights, cache, strict=True)))
                sums[token] += torch.cat(cast(list[Tensor], outputs))
                counts[token] += 1
            x = x + sums / torch.tensor(counts)[:, None] @ attention.o_proj.weight.T
            normed = rms(x, layer.post_attention_layernorm)
            mlp = layer.mlp
            gate, up = normed @ mlp.gate_proj.weight.T, normed @ mlp.up_proj.weight.T
            x = x + (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T
        return rms(x[-1], self.language.norm) @ self.model.lm_head.weight.T


def test_all_layers_and_decoding_equal_loops_in_float64():
    model, inputs = llava(dtype=torch.float64), prompts((3, "image", 5), dtype=torch.float64)
    with vt.trim(model, vt.DyMU(keep=5, unmerge=True)) as run, Seen(model) as seen:
        out = generate(model, inputs, max_new_tokens=3)
    owner = owners(inputs, run)
    left = owner.unique()
    reference = Reference(model)
    expected = [reference.step(seen.embeds[0][0], torch.searchsorted(left, owner).tolist())]
    for token in out.sequences[0, inputs["input_ids"].shape[1] :][:2]:
        expected.append(reference.step(model.get_input_embeddings()(token[None]), [0]))
    close(torch.cat(out.logits).double(), torch.stack(expected), 5e-6)
    with vt.trim(model, vt.DyMU(keep=5)):
        assert (generate(model, inputs).logits[0][0] - expected[0]).abs().max() > 0.01


@every_family
@both_attentions
def test_a_batch_equals_its_rows(name, attention):
    model, rows = model_of(name, attention), Prompts(name, *ROWS)
    with unmerged(model, MERGING[name]):
        together = logits_of(model, rows.batch())
        for row in range(3):
            close(together[row], logits_of(model, rows.batch(row))[0])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_generate_equals_forwards_one_by_one(name):
    """With and without a cache, beams, guesses, and forwards of our own on a cache."""
    model, inputs = model_of(name), Prompts(name, (3, "image", 9), (1, "image", 2)).batch()
    with unmerged(model, MERGING[name]):
        out = generate(model, inputs)
        ours = torch.stack(out.logits, 1)
        close(logits_of(model, inputs, use_cache=False), ours)
        beams = [generate(model, inputs, num_beams=3, use_cache=cached).sequences for cached in (True, False)]
        assert torch.equal(*beams)
        cache, prompt = DynamicCache(config=model.config.get_text_config()), inputs["input_ids"].shape[1]
        if name == "qwen2_5_vl":
            return  # without generate() it takes its positions from the whole of the prompt's ids alone
        mask = inputs["attention_mask"]
        step = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp_min(0), **{CACHE: cache})
        for number, expected in enumerate(out.logits):
            close(step.logits[:, -1], expected)
            mask = F.pad(mask, (0, 1), value=1)
            step = model(
                input_ids=out.sequences[:, prompt + number, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                **{CACHE: cache},
            )


def test_prompt_lookup_equals_greedy():
    model, inputs = model_of("llava"), Prompts("llava", (3, "image", 9)).batch()
    inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -8:-4]
    with unmerged(model, MERGING["llava"]):
        greedy = generate(model, inputs, max_new_tokens=10).sequences
        assisted = model.generate(**inputs, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, assisted)


def test_a_second_turn_with_a_new_image():
    """On the cache of the first turn, and all at once without a cache."""
    model, first, second = llava(), prompts((3, "image", 5)), prompts((2, "image", 4), seed=5)
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    mask, cache = torch.ones_like(ids), DynamicCache(config=model.config.text_config)
    with vt.trim(model, vt.DyMU(keep=5, unmerge=True)):
        model(**first, **{CACHE: cache})
        positions = torch.arange(first["input_ids"].shape[1], ids.shape[1])[None]
        later = model(**(second | {"attention_mask": mask}), position_ids=positions, **{CACHE: cache}).logits
        pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
        whole = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits
    close(later[:, -4:], whole[:, -4:])


def test_counts_are_those_of_what_is_held_and_computed():
    model, inputs = llava(), prompts((3, "image", 5))
    with vt.trim(model, vt.DyMU(keep=5, unmerge=True)) as run:
        cache = cache_of(generate(model, inputs, max_new_tokens=1))
    length = inputs["input_ids"].shape[1]
    assert [layer.keys.shape[2] for layer in cache.layers] == [length] * 5
    assert run.trace.cache_lengths == run.trace.attended == (length,) * 5
    assert run.trace.widths == (length - 11,) * 5
    report = run.report
    assert report.kv_bytes == report.kv_bytes_plain == 2 * 5 * 2 * 16 * length * 4
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.ndim > 1)
    assert report.flops == 2 * weights * (length - 11) + 5 * 4 * 64 * length**2


class Rows:
    """How many rows every linear map of the language model works on."""

    def __init__(self, model) -> None:
        self.counts: dict[str, int] = {}
        self.handles = [
            module.register_forward_hook(lambda m, a, output, name=name: self.counts.update({name: output.shape[1]}))
            for name, module in model.model.language_model.layers.named_modules()
            if isinstance(module, nn.Linear)
        ]


def test_weights_meet_the_merged_tokens_alone():
    """Projections of the attention included: what they give is repeated, and averaged before the output projection."""
    model, inputs = llava(), prompts((3, "image", 5))
    rows = Rows(model)  # hooks before the engine's, so they see what the maps themselves give
    with vt.trim(model, vt.DyMU(keep=5, unmerge=True)) as run:
        model(**inputs)
        assert set(rows.counts.values()) == {run.trace.widths[0]}
        assert len(rows.counts) == 5 * 7
    for handle in rows.handles:
        handle.remove()


def test_tokens_of_a_group_are_found_by_their_assignment():
    """VisionZip drops nobody but lists its outputs out of order."""
    model, inputs = llava(), prompts((3, "image", 5))
    kept = {}

    def note(module, args, kwargs):
        forward = run._session.context.forward
        assert isinstance(forward, Prefill)
        assert forward.repeated is not None
        kept["places"] = forward.repeated.places[0]

    with unmerged(model, vt.VisionZip(keep=6)) as run:
        handle = model.model.language_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
        model(**inputs)
        handle.remove()
    (image,) = run.trace.images
    covered = image.stages[-1].assignment >= 0
    first = first_of(model, inputs)
    expected = first + image.stages[-1].assignment[covered]
    assert torch.equal(kept["places"][first : first + int(covered.sum())], expected)
    assert kept["places"][first + int(covered.sum()) :].tolist() == list(range(first + 6, first + 6 + 5))


def test_the_rule_of_the_method():
    assert vt.DyMU(unmerge=True).positions == "unmerged"
    assert vt.DyMU().positions == "keep"
    assert (vt.DyMU(unmerge=True) | vt.PPE()).positions == "unmerged"
    assert (vt.PPE() | vt.FastV()).positions == "members"
    method = vt.DyMU(keep=None, thresholds=(0.5, 0.25), unmerge=True)
    assert vt.load_method(str(method)) == method


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("llava", vt.DyMU(unmerge=True) | vt.FastV(layer=2, keep=(0.5,)), "no step can stand before layer 2"),
        ("gemma3", vt.AvgPool(keep=0.5), "in both directions by a mask of its own"),
        ("aya_vision", vt.Random(keep=0.5), "attends in sliding windows"),
    ],
)
def test_what_cannot_work_is_refused(name, method, message):
    model = model_of(name)
    with pytest.raises(vt.TrimError, match=message):
        unmerged(model, method)


def test_an_attention_without_output_projection_is_refused(monkeypatch):
    model = llava()
    monkeypatch.setattr(model.model.language_model.layers[1].self_attn, "o_proj", None)
    with pytest.raises(vt.TrimError, match="no output projection o_proj"):
        vt.trim(model, vt.DyMU(unmerge=True))
