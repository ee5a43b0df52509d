"""Sound as a third kind of token, beside images and videos: ``keep_audio`` on tiny thinkers of omni models."""

from __future__ import annotations

import functools
import itertools
import warnings

import pytest
import torch

import sound
import visiontrim as vt
from fed import fed
from releases import CACHE, cache_of
from shrunk import IMAGE, VIDEO
from sound import AUDIO, THINKERS, Prompts, gone
from tiny import Masked, close, generate, llava, prompts

pytestmark = pytest.mark.usefixtures("no_grad")

PICTURES = vt.Random(keep=0.5) | vt.Random(keep=0.5, layer=3)
STAGES = vt.Random(keep=0.5) | vt.FastV(keep=(0.5,), layer=2)
ALONE = ((3, ("audio", 10), 4), (2, ("audio", 6), 1, ("audio", 17), 5))
BESIDE = ((3, ("audio", 10), 4, ("image",), 3), (2, ("image",), 1, ("audio", 7), 2, ("audio", 9), 2))
BETWEEN = ((3, ("both", 10), 4), (2, ("both", 17), 9))
CASES = {
    "alone": (ALONE, IMAGE, STAGES, (16, 7)),
    "beside an image": (BESIDE, IMAGE, vt.DivPrune(keep=0.5), (13, 13)),
    "between the frames of a video": (BETWEEN, VIDEO, 4, (8, 8)),
}
"""Rows, the placeholder of pictures, what is kept of sounds, and their tokens that enter and that leave."""

every_thinker = pytest.mark.parametrize("name", THINKERS)


@functools.cache
def thinker(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sound.thinker(name)


@every_thinker
@pytest.mark.parametrize(("rows", "picture", "keep_audio", "left"), CASES.values(), ids=CASES)
def test_what_is_removed_is_unseen_and_a_batch_is_its_rows(name, rows, picture, keep_audio, left):
    model, written = thinker(name), Prompts(name, *rows)
    inputs = written.batch()
    plain = generate(model, inputs, max_new_tokens=1)
    with vt.trim(model, PICTURES, keep_audio=keep_audio) as run:
        ours = generate(model, inputs, max_new_tokens=2)
        trace, report = run.trace, run.report
        alone = [generate(model, written.batch(row), max_new_tokens=2) for row in (0, 1)]
    with Masked(model, inputs["attention_mask"].bool(), gone(inputs["input_ids"], trace, picture)):
        reference = generate(model, inputs, max_new_tokens=2)
    assert (ours.logits[0] - plain.logits[0]).abs().max() > 0.01
    for step, (a, b) in enumerate(zip(ours.logits, reference.logits, strict=True)):
        close(a, b)
        for row, single in enumerate(alone):
            close(a[row], single.logits[step][0])
    heard = int((inputs["input_ids"] == AUDIO).sum())
    assert sum(part.total for part in trace.sounds) == heard
    assert (sum(p.per_layer[0] for p in trace.sounds), sum(p.per_layer[-1] for p in trace.sounds)) == left
    assert [part.number for part in trace.sounds] == list(range(len(trace.sounds)))
    assert [part.number for part in trace.images] == list(range(len(trace.images)))
    assert f"{heard} -> {left[0]} audio tokens of {len(trace.sounds)} sounds" in str(report)
    assert report.images == len(trace.images) == (0 if picture == IMAGE and rows is ALONE else 2)
    assert sum(ours.sequences.shape) == sum(plain.sequences.shape) + 1
    held = [int(mask.sum()) for mask in inputs["attention_mask"]]
    assert trace.widths[0] == max(
        length - sum(part.total - part.per_layer[0] for part in (*trace.images, *trace.sounds) if part.sample == row)
        for row, length in enumerate(held)
    )


@every_thinker
def test_sound_kept_whole_is_sound_left_alone(name):
    """Neither its tokens nor its being looked at changes what the method for pictures does."""
    model, inputs = thinker(name), Prompts(name, *BETWEEN).batch()
    for pictures in ("fastv:keep=[0.5],layer=2", "sparsevlm:keep=0.6")[THINKERS.index(name) :]:
        with vt.trim(model, pictures) as run:
            reference = generate(model, inputs, max_new_tokens=1)
            assert run.trace.sounds == ()
            assert "audio" not in str(run.report)
        for keep_audio in (1.0, "none"):
            with vt.trim(model, pictures, keep_audio=keep_audio) as run:
                ours = generate(model, inputs, max_new_tokens=1)
            assert all(a.equal(b) for a, b in zip(ours.logits, reference.logits, strict=True))
            assert [part.per_layer[-1] for part in run.trace.sounds] == [10, 17]
    plain = generate(model, inputs, max_new_tokens=2)
    with vt.trim(model, "none", keep_audio=1.0):
        ours = generate(model, inputs, max_new_tokens=2)
    assert all(a.equal(b) for a, b in zip(ours.logits, plain.logits, strict=True))


def test_it_is_the_model_fed_the_tokens_that_are_left():
    """At their own positions, in the order of time; and what merges would be another sum."""
    name = THINKERS[0]
    model, inputs = thinker(name), Prompts(name, BETWEEN[0]).batch()
    with vt.trim(model, "none", keep_audio=STAGES) as run:
        ours = generate(model, inputs, max_new_tokens=2)
    hidden = {layer: places[0] for layer, places in gone(inputs["input_ids"], run.trace, VIDEO).items()}
    for a, b in zip(ours.logits, fed(model, inputs, hidden, ours.sequences[0, -2:]), strict=True):
        close(a[0], b)


@every_thinker
def test_a_second_turn_goes_on(name):
    model, written = thinker(name), Prompts(name, BESIDE[1])
    inputs = written.batch()
    with vt.trim(model, PICTURES, keep_audio=STAGES) as run:
        first = generate(model, inputs, max_new_tokens=2)
        hidden = gone(inputs["input_ids"], run.trace)
        asked = torch.cat([first.sequences, torch.tensor([[50, 51, 52]])], 1)
        whole = inputs | {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
        later = {key: whole[key] for key in ("input_ids", "attention_mask")}
        second = generate(model, later | {CACHE: cache_of(first)}, max_new_tokens=2)
    with Masked(model, torch.ones_like(inputs["input_ids"]), hidden):
        reference = generate(model, whole, max_new_tokens=2)
    for a, b in zip(second.logits, reference.logits, strict=True):
        close(a, b)


@every_thinker
def test_beams_have_copies_of_pictures_and_sounds(name):
    """generate() encodes pictures before it repeats the rows, a forward its sounds afterwards."""
    rows = ((3, ("audio", 10), 4, ("image",), 3), (2, ("image",), 1, ("audio", 7), 2))
    model, inputs = thinker(name), Prompts(name, *rows).batch()
    with vt.trim(model, PICTURES, keep_audio=STAGES) as run:
        ours = generate(model, inputs, num_beams=2, max_new_tokens=3)
    assert [part.sample for part in run.trace.sounds] == [0, 1]
    with Masked(model, inputs["attention_mask"].bool(), gone(inputs["input_ids"], run.trace)):
        reference = generate(model, inputs, num_beams=2, max_new_tokens=3)
    assert ours.sequences.equal(reference.sequences)
    close(ours.sequences_scores, reference.sequences_scores)


def test_a_bare_forward_numbers_pictures_and_sounds_apart():
    name = THINKERS[0]
    model, inputs = thinker(name), Prompts(name, *BESIDE).batch()
    with vt.trim(model, PICTURES, keep_audio=0.5) as run:
        ours = model(**inputs)
        trace = run.trace
        reference = generate(model, inputs, max_new_tokens=1)
    assert [part.number for part in trace.images] == [0, 1]
    assert [part.number for part in trace.sounds] == [0, 1, 2]
    close(ours.logits[:, -1], reference.logits[0])


def test_what_was_heard_is_remembered():
    name, calls = THINKERS[1], []
    model, inputs = thinker(name), Prompts(name, *BESIDE).batch()
    handle = model.model.audio_tower.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with vt.trim(model, "random", keep=3, keep_audio="divprune:keep=0.5", remember=2):
        first, again = (generate(model, inputs, max_new_tokens=1) for _ in range(2))
    handle.remove()
    assert len(calls) == 1
    assert first.logits[0].equal(again.logits[0])


def test_every_method_runs_on_sound_or_says_why_not():
    """Those that read nothing of an encoder but its features see a sound as a video of one place."""
    name = THINKERS[0]
    model, inputs = thinker(name), Prompts(name, ALONE[0]).batch()
    ran, refused = set(), {}
    for method in sorted(vt.list_methods()):
        try:
            with vt.trim(model, "none", keep_audio=method) as run:
                ours = generate(model, inputs, max_new_tokens=1)
        except vt.TrimError as error:
            refused[method] = str(error)
            continue
        assert ours.logits[0].isfinite().all(), method
        assert run.trace.sounds[0].total == 10
        ran.add(method)
    assert {"random", "uniform", "divprune", "evs", "fastv", "pyramiddrop", "none"} <= ran
    reasons = (
        *("which there is none of in sound", "acts inside the audio encoder", "what its last stage left"),
        *("a rule for the whole prompt", "but the model has 5 layers", "drops 14 of 10 tokens"),
    )
    assert {name: why for name, why in refused.items() if not any(reason in why for reason in reasons)} == {}


def test_uniform_goes_along_time_and_evs_by_change():
    name = THINKERS[0]
    model, written = thinker(name), Prompts(name, ALONE[0])
    inputs = written.batch()
    with vt.trim(model, "none", keep_audio=5) as run:
        generate(model, inputs, max_new_tokens=1)
        steps = run.trace.sounds[0].stages[0].index.diff().tolist()
    assert set(steps) == {2}
    features = model.model.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"])
    tokens = features.last_hidden_state
    change = 1 - torch.cosine_similarity(tokens[1:], tokens[:-1], dim=-1)
    with vt.trim(model, "none", keep_audio="evs:keep=4") as run:
        generate(model, inputs, max_new_tokens=1)
    assert run.trace.sounds[0].stages[0].index.tolist() == [0, *sorted((change.topk(3).indices + 1).tolist())]
    assert [list(axis) for axis in itertools.pairwise(run.trace.sounds[0].grid)] == [[10, 1], [1, 1]]


def test_a_frame_of_a_video_is_no_part_of_a_sound():
    """``per="frame"`` means pictures."""
    name = THINKERS[0]
    model, inputs = thinker(name), Prompts(name, BETWEEN[0]).batch()
    with vt.trim(model, "random", keep=2, keep_audio=4, per="frame") as run:
        generate(model, inputs, max_new_tokens=1)
    assert [part.per_layer[0] for part in run.trace.images] == [2, 2, 2]
    assert [part.per_layer[0] for part in run.trace.sounds] == [4]


def test_numbers_of_the_report_are_for_machines_too():
    name = THINKERS[1]
    model, inputs = thinker(name), Prompts(name, BESIDE[0]).batch()
    with vt.trim(model, "random", keep=3, keep_audio=0.5) as run:
        generate(model, inputs, max_new_tokens=1)
    told = run.report.to_dict()
    assert (told["input_tokens"], told["kept_tokens"], told["images"]) == (6, 3, 1)
    assert (told["sounds"], told["audio_input"], told["audio_kept"]) == (1, 10, 5)
    assert told["audio_per_layer"] == (5,) * 5
    assert "6 -> 3 vision tokens, mean 3.0 per layer | 10 -> 5 audio tokens, mean 5.0 per layer by uniform" in str(
        run.report
    )
    assert [str(cell) for cell in run.report.table().columns[0].cells][2:4] == ["audio tokens in", "audio per layer"]


@pytest.mark.parametrize(
    ("keep_audio", "message"),
    [
        (0, r"keep_audio=0 keeps nothing"),
        (1.5, r"keep_audio=1.5 is not a fraction"),
        (True, r"keep_audio=True is not a number"),
        ("visiontrim", r"reads encoder.*none of in sound: choose random, uniform"),
        ("tome", r"acts inside the audio encoder"),
        ("dycoke:view_layer=2", r"chooses what the answer sees of the vision tokens, not of sound"),
        ("ivc-prune", r"leaves to the cache only what its last stage left"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing_behind(keep_audio, message):
    model = thinker(THINKERS[0])
    hooks = len(model._forward_hooks)
    with pytest.raises(vt.TrimError, match=message):
        vt.trim(model, "random", keep_audio=keep_audio)
    assert len(model._forward_hooks) == hooks
    assert "get_audio_features" not in vars(model.model)


def test_models_without_sound_have_none_to_keep():
    with pytest.raises(vt.TrimError, match=r"LlavaForConditionalGeneration takes no sound.*leave keep_audio out"):
        vt.trim(llava(), "random", keep_audio=0.5)
    with vt.trim(llava(), "random", keep=4) as run:
        generate(run.model, prompts((3, "image", 2)), max_new_tokens=1)
    assert run.report.sounds == 0


def test_sound_that_does_not_come_is_missed():
    model, inputs = thinker(THINKERS[0]), Prompts(THINKERS[0], *ALONE).batch()
    del inputs["input_features"]
    with vt.trim(model, "random", keep_audio=0.5), pytest.raises(vt.TrimError, match=r"33 .*placeholders but no"):
        generate(model, inputs)
