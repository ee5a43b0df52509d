"""What steps of decoding see of the cache: against the plain eager model, with a mask over the whole answer."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import families
import visiontrim as vt
from families import Prompts, hidden_places
from releases import CACHE, cache_of
from tiny import ANSWER, both_attentions, close, generate
from visiontrim.core.method import Decoding
from visiontrim.core.view import Glance
from visiontrim.models import family_of

pytestmark = pytest.mark.usefixtures("no_grad")

model_of = functools.cache(families.build)
ROWS = [(3, "image", 5), (1, "image", 2, "image", 7), (6,)]
LAYER, STEPS = 2, 7
VIEW = vt.DyCoke(keep=1.0, view_layer=LAYER, view_drop=0.7)
every_family = pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
every_variant = pytest.mark.parametrize("variant", ["paper", "release"])


def view(**options) -> vt.DyCoke:
    return vt.load_method(VIEW, **options)


def logits_of(model, inputs, **options) -> Tensor:
    return torch.stack(generate(model, inputs, **options).logits, 1)


# ------------------------------------------------------------------------------------------------ the method alone


def row(*values: float) -> Tensor:
    return torch.tensor([values])


@every_variant
def test_choices_by_hand(variant):
    """Six tokens, int(6 x 0.35) = 2 of them are seen; the third row is like the second."""
    decoding = view(variant=variant, view_drop=0.65).decoding
    assert decoding is not None
    valid = torch.ones(1, 6, dtype=torch.bool)
    first = row(0.1, 0.3, 0.0, 0.3, 0.2, 0.1)
    shown = decoding.select(Glance(first, valid))
    assert shown.tolist() == [[False, True, False, True, False, False]]
    second = row(0.0, 0.1, 0.0, 0.1, 0.5, 0.1)  # cosine (0.03 + 0.03 + 0.1 + 0.01) / sqrt(0.24 x 0.28) = 0.656
    again = decoding.select(Glance(second, valid, first, shown))
    assert again.tolist() == [[False, True, False, False, True, False]]  # of two with 0.1 the first
    third = row(0.0, 0.0, 0.0, 0.1, 0.5, 0.1)  # cosine 0.27 / sqrt(0.27 x 0.28) = 0.982: nothing is chosen
    kept = decoding.select(Glance(third, valid, second, again))
    assert kept.tolist() == (again if variant == "paper" else valid).tolist()


def test_choices_of_rows_with_different_numbers():
    """Each row has a count, a cosine and a choice of its own; int(3 x 0.5), int(4 x 0.5), none."""
    decoding = view(view_drop=0.5).decoding
    assert decoding is not None
    valid = torch.tensor([[False, True, True, True], [True] * 4, [False] * 4])
    attention = torch.tensor([[0.0, 0.1, 0.3, 0.2], [0.4, 0.1, 0.2, 0.3], [0.0] * 4])
    first = decoding.select(Glance(attention, valid))
    assert first.int().tolist() == [[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    later = torch.tensor([[0.0, 0.3, 0.1, 0.0], [0.4, 0.1, 0.25, 0.2], [0.0] * 4])
    second = decoding.select(Glance(later, valid, attention, first))
    assert second.int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("tokens", "drop", "seen"), [(10, 0.9, 1), (10, 0.7, 3), (196, 0.7, 58), (7, 0.0, 7), (3, 1.0, 0)]
)
def test_counts(tokens, drop, seen):
    decoding = view(view_drop=drop).decoding
    assert decoding is not None
    glance = Glance(torch.rand(1, tokens), torch.ones(1, tokens, dtype=torch.bool))
    assert int(decoding.select(glance).sum()) == seen


# ------------------------------------------------------------------------------------------------ in a model


class Whole:
    """A conversation of one row in one forward of the plain eager model, with a mask for every query and layer.

    Args:
        name: the family.
        inputs: the processor's output for the prompt, or prompts.
        ids: [1, tokens], all that was said.
        gone: for decoder layers the places [1, prompt] that the run removed from there on.
    """

    def __init__(self, name: str, inputs: dict[str, Tensor], ids: Tensor, gone: dict[int, Tensor]) -> None:
        self.model, length = model_of(name, "eager"), ids.shape[1]
        self.inputs = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inputs:
            self.inputs["mm_token_type_ids"] = F.pad(
                inputs["mm_token_type_ids"], (0, length - inputs["mm_token_type_ids"].shape[1])
            )
        family = family_of(self.model)
        self.layers = family.language_model.layers
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        self.visible = [causal.clone() for _ in self.layers]
        left = family.placeholders(ids)[0]
        for start, places in gone.items():
            places = F.pad(places[0], (0, length - places.shape[1]))
            left &= ~places
            for visible in self.visible[start:]:
                visible &= ~places | torch.eye(length, dtype=torch.bool)
        self.places = left.nonzero()[:, 0].tolist()
        """Vision tokens that are left."""
        self.choices: list[int] = []
        """Steps of an answer at which a choice was made."""

    def forward(self, **options):
        def hook(visible):
            bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo().min)[None, None]
            return lambda module, args, kwargs: (args, kwargs | {"attention_mask": bias})

        handles = [
            layer.register_forward_pre_hook(hook(visible), with_kwargs=True)
            for layer, visible in zip(self.layers, self.visible, strict=True)
        ]
        output = self.model(**self.inputs, use_cache=False, **options)
        for handle in handles:
            handle.remove()
        return output

    def logits(self, method: vt.DyCoke, *answers: tuple[int, int]) -> Tensor:
        """Logits [tokens, words]; ``answers``: first and last place of the tokens of each that were fed back."""
        assert method.view_layer is not None
        rows = self.forward(output_attentions=True).attentions[method.view_layer - 1][0].double().mean(0)
        for first, last in answers:
            before, shown = None, self.places
            for place in range(first, last + 1):
                places = [p for p in self.places if p < first]
                now = rows[place, places]
                if before is None or float(now @ before / (now.norm() * before.norm())) < 0.9:
                    ranked = sorted(range(len(places)), key=lambda i, now=now: (-float(now[i]), i))
                    shown = [places[i] for i in ranked[: int(len(places) * (1 - method.view_drop) + 1e-9)]]
                    self.choices.append(place - first)
                elif method.variant == "release":
                    shown = places
                for visible in self.visible[method.view_layer :]:
                    visible[place, [p for p in places if p not in shown]] = False
                before = now
        return self.forward().logits[0]


def answered(name: str, method: vt.DyCoke, inputs: dict[str, Tensor], out, gone: dict[int, Tensor]) -> Whole:
    """Check a generate() of one row against the reference, which is returned."""
    whole, start = Whole(name, inputs, out.sequences, gone), inputs["input_ids"].shape[1]
    end = start + len(out.logits)
    close(torch.cat(out.logits), whole.logits(method, (start, end - 2))[start - 1 : end - 1], 2e-5)
    return whole


@every_family
@both_attentions
@every_variant
def test_an_answer_equals_one_forward_with_a_mask_for_every_token(name, attention, variant):
    model, rows, method = model_of(name, attention), Prompts(name, *ROWS), view(variant=variant)
    for number in range(2):
        with vt.trim(model, method):
            ours = generate(model, rows.batch(number), max_new_tokens=STEPS)
        answered(name, method, rows.batch(number), ours, {})
        plain = generate(model, rows.batch(number), max_new_tokens=STEPS)
        assert plain.logits[0].equal(ours.logits[0])
        assert (plain.logits[1] - ours.logits[1]).abs().max() > 0.01


@every_variant
def test_a_choice_that_stays(variant):
    """With queries of nearly nothing attention hardly changes from token to token: one choice, at the first step."""
    rows, method = Prompts("llava", (3, "image", 5)), view(variant=variant)
    queries = [
        model_of("llava", attention).model.language_model.layers[LAYER - 1].self_attn.q_proj.weight
        for attention in ("sdpa", "eager")
    ]
    for weight in queries:
        weight.mul_(2**-4)
    with vt.trim(model_of("llava", "sdpa"), method):
        ours = generate(model_of("llava", "sdpa"), rows.batch(), max_new_tokens=STEPS)
    whole = answered("llava", method, rows.batch(), ours, {})
    for weight in queries:
        weight.mul_(2**4)
    assert whole.choices == [0]


@pytest.mark.parametrize(
    ("name", "kind", "plan"),
    [
        ("llava", "image", view(keep=0.5) | vt.Random(keep=0.5, layer=1)),
        ("llava_next", "image", view() | vt.Random(keep=0.5, layer=1)),
        ("qwen2_5_vl", "video", view(keep=0.7) | vt.FastV(keep=(0.6,), layer=1)),
        ("qwen3_vl", "video", view(keep=0.7)),
    ],
    ids=["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"],
)
def test_of_what_other_steps_left(name, kind, plan):
    model, inputs = model_of(name), Prompts(name, (3, kind, 5)).batch()
    with vt.trim(model, plan, positions="keep") as run:
        ours = generate(model, inputs, max_new_tokens=STEPS)
    assert any(image.per_layer[LAYER] < image.total for image in run.trace.images)
    answered(name, VIEW, inputs, ours, hidden_places(name, inputs, run.trace))


@every_family
@both_attentions
def test_a_batch_equals_its_rows_and_runs_do_not_mix(name, attention):
    """Rows with two images, one and none, twice in one run, and each alone in a run of its own."""
    model, rows = model_of(name, attention), Prompts(name, *ROWS)
    with vt.trim(model, VIEW):
        together = logits_of(model, rows.batch(), max_new_tokens=STEPS)
        assert torch.equal(logits_of(model, rows.batch(), max_new_tokens=STEPS), together)
    for number in range(3):
        with vt.trim(model, VIEW):
            close(together[number], logits_of(model, rows.batch(number), max_new_tokens=STEPS)[0])
    plain = logits_of(model, rows.batch(), max_new_tokens=STEPS)
    assert plain[2].equal(together[2])
    assert not plain[0].equal(together[0])


@every_family
@both_attentions
def test_dropping_nothing_is_bit_identical_and_the_cache_stays_whole(name, attention):
    model, inputs = model_of(name, attention), Prompts(name, *ROWS).batch()
    plain = generate(model, inputs)
    for drop in (0.0, 0.7):
        with vt.trim(model, view(view_drop=drop)) as run:
            ours = generate(model, inputs)
        held = [[layer.keys.shape[2] for layer in cache_of(out).layers] for out in (ours, plain)]
        assert held[0] == held[1]
        assert run.report.kv_bytes == run.report.kv_bytes_plain
        same = [torch.equal(a, b) for a, b in zip(ours.logits, plain.logits, strict=True)]
        assert same[0]
        assert all(same) == (drop == 0.0)
    assert torch.equal(torch.stack(generate(model, inputs).logits), torch.stack(plain.logits))


def test_a_second_turn_with_a_new_image_begins_anew():
    """Both answers on one cache: the second sees part of both images, chosen without a thought of the first answer."""
    model, name = model_of("llava"), "llava"
    first, second = Prompts(name, (3, "image", 5)).batch(), Prompts(name, (2, "image", 4), seed=5).batch()
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, VIEW):
        one = generate(model, first, **{CACHE: cache}, max_new_tokens=STEPS)
        ids = torch.cat([one.sequences, second["input_ids"]], 1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": second["pixel_values"]}
        two = generate(model, more, **{CACHE: cache}, max_new_tokens=STEPS)
    pixels = {"pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]])}
    whole = Whole(name, first | pixels, two.sequences, {})
    starts = first["input_ids"].shape[1], ids.shape[1]
    logits = whole.logits(VIEW, *[(start, start + STEPS - 2) for start in starts])
    for start, out in zip(starts, (one, two), strict=True):
        close(torch.cat(out.logits), logits[start - 1 : start + STEPS - 1], 2e-5)
    assert len(whole.places) == 32


def test_beams_take_their_rows_along():
    """The score of the best beam is that of its tokens, each with the choices of that beam's own past."""
    model, name, inputs = model_of("llava"), "llava", Prompts("llava", (3, "image", 5)).batch()
    with vt.trim(model, VIEW):
        out = generate(model, inputs, max_new_tokens=STEPS, num_beams=4, length_penalty=0.0, output_scores=True)
    assert (out.beam_indices[0, :STEPS].diff() != 0).any()
    start = inputs["input_ids"].shape[1]
    logits = Whole(name, inputs, out.sequences, {}).logits(VIEW, (start, start + STEPS - 2))
    likely = logits.log_softmax(-1)[start - 1 : start + STEPS - 1]
    score = likely.gather(1, out.sequences[0, start:, None]).sum()
    assert float(out.sequences_scores[0]) == pytest.approx(float(score), abs=1e-4)


def test_forwards_of_the_caller_are_steps_too():
    model, inputs = model_of("llava"), Prompts("llava", (3, "image", 5)).batch()
    with vt.trim(model, VIEW):
        out = generate(model, inputs)
        cache, start = DynamicCache(config=model.config.text_config), inputs["input_ids"].shape[1]
        step = model(**(inputs | {CACHE: cache}))
        for number, logits in enumerate(out.logits):
            close(step.logits[:, -1], logits)
            step = model(input_ids=out.sequences[:, start + number, None], **{CACHE: cache})


def test_flash_attention_gets_a_padding_mask_with_gaps():
    """A stand-in for flash attention with the mask that transformers gives it: [batch, keys], or None."""
    seen = []

    def flash_with_gaps(module, query, key, value, mask, **kwargs):
        groups, keys = query.shape[1] // key.shape[1], key.shape[2]
        if mask is not None:
            assert mask.shape == (len(query), keys)
            seen.append((module.layer_idx, query.shape[2], int((~mask.bool()).sum())))
        allowed = torch.ones(query.shape[2], keys, dtype=torch.bool).tril(keys - query.shape[2])
        if mask is not None:
            allowed = allowed & mask[:, None, None].bool()
        allowed = allowed | (torch.eye(keys, dtype=torch.bool)[-query.shape[2] :] & ~allowed.any(-1, keepdim=True))
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(query, key, value, allowed).transpose(1, 2), None

    AttentionInterface.register("flash_with_gaps", flash_with_gaps)
    AttentionMaskInterface.register("flash_with_gaps", flash_attention_mask)
    inputs = Prompts("llava", (3, "image", 5), (1, "image", 2)).batch()
    with vt.trim(model_of("llava"), VIEW):
        reference = logits_of(model_of("llava"), inputs)
    model = families.build("llava")
    for module in model.model.language_model.modules():
        if getattr(module, "config", None) is not None:
            module.config._attn_implementation_internal = "flash_with_gaps"
    with vt.trim(model, VIEW):
        close(logits_of(model, inputs), reference, 2e-5)
    hidden = {(layer, count) for layer, queries, count in seen if queries == 1}
    assert hidden == {(layer, 5 if layer < LAYER else 5 + 2 * 12) for layer in range(families.LAYERS)}


@dataclass(frozen=True)
class Noting(Decoding):
    """Sees what its list says, and notes what it is shown."""

    answer: object
    seen: list[Glance]

    def select(self, glance: Glance) -> Tensor:
        self.seen.append(glance)
        return glance.valid if self.answer is None else self.answer  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Noted(vt.DyMU):
    """DyMU with a step of decoding of its own."""

    step: Decoding | None = None
    name: ClassVar[str] = "noted"

    @property
    def decoding(self) -> Decoding | None:
        return self.step


def test_a_method_sees_every_entry_of_the_cache_and_what_was_before():
    """With virtual unmerging these are all places of merged tokens; attention is that of the plain probe, to 1."""
    model, inputs, seen = model_of("llava"), Prompts("llava", (3, "image", 5), (6,)).batch(), []
    for unmerge, entries in ((False, 5), (True, 16)):
        seen.clear()
        with vt.trim(model, Noted(keep=5, unmerge=unmerge, step=Noting(1, None, seen))):
            generate(model, inputs, max_new_tokens=4)
        assert [glance.attention.shape for glance in seen] == [(2, entries)] * 3
        assert seen[0].before is None
        assert seen[0].shown is None
        for earlier, later in itertools.pairwise(seen):
            assert later.before is not None
            assert later.before.equal(earlier.attention)
            assert later.shown is not None
            assert later.shown.equal(later.valid)
        assert seen[0].valid.sum(1).tolist() == [entries, 0]
        assert 0 < float(seen[0].attention[0].sum()) < 1
        assert not seen[0].attention[1].any()


@pytest.mark.parametrize("answer", [torch.ones(1, 15, dtype=torch.bool), torch.ones(1, 16)], ids=["shape", "dtype"])
def test_an_answer_that_does_not_fit_is_refused(answer):
    model, inputs = model_of("llava"), Prompts("llava", (3, "image", 5)).batch()
    method = Noted(keep=1.0, step=Noting(1, answer, []))
    with vt.trim(model, method), pytest.raises(vt.TrimError, match=r"for the attention to \(1, 16\) vision tokens"):
        generate(model, inputs)
    assert len(generate(model, inputs).logits) == ANSWER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "of the answer came in one pass"),
        ({"use_cache": False}, "generate with a cache"),
    ],
    ids=["guesses", "no cache"],
)
def test_steps_of_several_tokens_are_refused(options, message):
    model, inputs = model_of("llava"), Prompts("llava", (3, "image", 9)).batch()
    inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -8:-4]
    with vt.trim(model, VIEW) as run:
        with pytest.raises(vt.TrimError, match=message):
            model.generate(**inputs, max_new_tokens=10, do_sample=False, **options)
        assert run._session.context.forward is None


@pytest.mark.parametrize(
    ("name", "build", "message"),
    [
        ("llava", lambda: view(view_layer=0), "view_layer=0: give a decoder layer"),
        ("llava", lambda: view(view_layer=2.5), "view_layer=2.5: give a whole number"),
        ("llava", lambda: view(view_drop=1.5), "view_drop=1.5: give a share"),
        (
            "llava",
            lambda: view(view_layer=5),
            "from decoder layer 5 on, but the model has 5 layers: give one of 1 to 4",
        ),
        ("llava", lambda: view() | vt.Random(keep=0.5, layer=2), "let it do so from layer 3 on"),
        ("llava", lambda: Noted(step=Noting(1, None, [])) | view(), "leave it to one"),
        ("gemma3", lambda: view(), "so none can be removed or hidden between decoder layers"),
    ],
)
def test_what_cannot_work_is_refused(name, build, message):
    model = model_of(name)
    with pytest.raises(vt.TrimError, match=message):
        vt.trim(model, build())


def test_options_are_read_from_a_call():
    assert vt.load_method("dycoke:view_layer=3") == vt.DyCoke(view_layer=3, view_drop=0.7)
    assert vt.load_method(str(view(view_layer=3))) == view(view_layer=3)
    assert vt.DyCoke().decoding is None
    plan = view() | vt.Random(keep=0.5, layer=1)
    assert plan.decoding == view().decoding
