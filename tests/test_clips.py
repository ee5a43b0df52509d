"""Clips: what they show, how they are asked and scored, the model that watches them, and how it is trained."""

import dataclasses
import hashlib
import random
from collections import Counter

import numpy as np
import pytest
import torch

import visiontrim as vt
from visiontrim import ask
from visiontrim.core.errors import TrimError
from visiontrim.evaluate.asking import Examiner
from visiontrim.evaluate.log import Log
from visiontrim.evaluate.smaller import boundless, shrunk
from visiontrim.evaluate.suites import load_suite
from visiontrim.zoo import CLIP_PROMPT, VIDEO_DIR, held_out_clips
from visiontrim.zoo.canvas import CELL
from visiontrim.zoo.clip_scores import blind_clip_answers
from visiontrim.zoo.clips import CLIP_TYPES, FRAMES, MOVED, ask_clip, draw_clip
from visiontrim.zoo.evaluate import object_patches
from visiontrim.zoo.suite import answer, digest
from visiontrim.zoo.training.loop import train
from visiontrim.zoo.training.packing import IGNORED, pack
from visiontrim.zoo.training.qwen.clips import (
    ClipFacts,
    ClipRun,
    ClipStage,
    can_tell,
    changes,
    everything,
    objects,
    scene_facts,
    squares,
    subset,
    there,
)
from visiontrim.zoo.training.qwen.model import forward
from visiontrim.zoo.training.qwen.tower import patches_of, vision_tokens
from visiontrim.zoo.training.symbolic import WORD_ID, VisionTokens
from visiontrim.zoo.watching import normalise_video

WEIGHTS = "04d2daffc12c2fe8c290abf2069be1de54c9662383aad13be6560596af389f10"
DIGEST = "01d9d23f3fd6c776f69ed6b129eb8cd33d678b06baccde6e78e7b197f94c178b"
"""Of the questions about the first ten held-out clips."""
GRID = (12, 12)
CLIPS = [draw_clip(seed, GRID) for seed in range(12)]


@pytest.fixture(scope="module")
def speaker():
    return ask.load("bundled-video")


# --- clips and questions


def test_clips_repeat_and_one_object_moves_one_appears_and_the_others_stay():
    lengths, vanished = Counter(), 0
    for seed, clip in enumerate(CLIPS):
        again = draw_clip(seed, GRID)
        assert [image.tobytes() for image in clip.images] == [image.tobytes() for image in again.images]
        frames = len(clip.images)
        assert FRAMES[0] <= frames <= FRAMES[1]
        assert clip.owner.shape == (frames, 144)
        assert clip.middle.shape == (frames, len(clip.objects))
        lengths[frames] += 1
        assert len({(obj.color, obj.kind) for obj in clip.objects}) == len(clip.objects) >= 4
        for number, obj in enumerate(clip.objects):
            cells = clip.middle[:, number]
            assert cells[cells >= 0][-1] == obj.patch == int(obj.y // CELL) * 12 + int(obj.x // CELL)
            for frame in range(frames):
                shown = (clip.owner[frame] == number + 1).any()
                assert shown == (cells[frame] >= 0)
                assert not shown or clip.owner[frame, cells[frame]] == number + 1
            away = np.abs(np.array(divmod(cells[-1], 12)) - np.array(divmod(cells[0], 12))).max()
            if number == clip.moved:
                assert (cells >= 0).all()
                assert away >= MOVED
            elif number == clip.appeared:
                assert cells[0] < 0 <= cells[-1]
            else:
                assert cells[0] >= 0
                assert len(set(cells[cells >= 0])) == 1
                vanished += cells[-1] < 0
    assert len(lengths) > 2
    assert 2 <= vanished <= 10


def test_only_noise_tells_still_places_apart():
    clip = CLIPS[0]
    first, second = (np.asarray(image, float).reshape(12, CELL, 12, CELL, 3) for image in clip.images[:2])
    away = np.abs(first - second).mean((1, 3, 4)).flatten()
    still = (clip.owner[0] == 0) & (clip.owner[1] == 0)
    new = (clip.owner[0] == 0) & (clip.owner[1] > 0)
    assert 1 < away[still].mean() < 12
    assert away[new].mean() > 3 * away[still].mean()


def test_questions_about_motion_name_the_object_and_the_held_out_ones_are_the_measured_ones():
    for seed, clip in enumerate(CLIPS):
        for type, which in (("moved", clip.moved), ("appeared", clip.appeared)):
            question = ask_clip(random.Random(seed), clip, type)
            assert question.text == f"what {type} ?"
            assert question.answer == f"{clip.objects[which].color} {clip.objects[which].kind}"
    samples = list(held_out_clips(GRID, 10))
    assert digest(samples) == DIGEST
    assert {sample.type for sample in samples} == set(CLIP_TYPES)
    blind = blind_clip_answers(samples, GRID, clips=60)
    right = [guess == sample.answer for guess, sample in zip(blind, samples, strict=True)]
    assert 0.05 < np.mean(right) < 0.5


def test_words_of_motion_are_asked_of_this_model_alone():
    assert normalise_video("What moved?") == "what moved ?"
    with pytest.raises(TrimError, match="does not know 'moved'"):
        vt.zoo.normalise("What moved?")


# --- the model that ships


def test_weights_are_the_measured_ones():
    assert hashlib.sha256((VIDEO_DIR / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS


def test_frames_become_one_video(speaker):
    model, processor = speaker.model, speaker.processor
    samples = [s for s in held_out_clips(GRID, 3) if s.type == "moved"]
    inputs = processor(
        images=[image for s in samples for image in s.images],
        text=[s.prompt for s in samples],
        padding=True,
        return_tensors="pt",
    )
    assert inputs["video_grid_thw"].tolist() == [[len(s.images), 24, 24] for s in samples]
    places = (inputs["input_ids"] == model.config.video_token_id).sum(1)
    assert places.tolist() == [144 * len(s.images) for s in samples]
    assert (inputs["mm_token_type_ids"] == 2).sum(1).tolist() == places.tolist()
    # what a still picture doubles, a frame doubles too: the tokens are those that training makes of the frames
    one = len(samples[0].images)
    with torch.inference_mode():
        stock = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output[0]
        ours = vision_tokens(model.model.visual, patches_of(samples[0].images, GRID), GRID)
    torch.testing.assert_close(stock, ours.flatten(0, 1)[: 144 * one], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("frames", "places"), [(3, 4), (5, 4)])
def test_frames_and_places_agree(speaker, frames, places):
    with pytest.raises(TrimError, match=f"places for {places} frames and there are {frames}"):
        speaker.processor(images=list(CLIPS[0].images)[:1] * frames, text="<image>" * places, return_tensors="pt")


def test_a_path_is_no_frame(speaker):
    with pytest.raises(TrimError, match="a frame is a str: give pictures"):
        speaker.processor(images=["a.png"], text="<image>", return_tensors="pt")


def test_frames_have_one_size(speaker):
    other = draw_clip(0, (12, 14)).images[0]
    with pytest.raises(TrimError, match="have 2 sizes"):
        speaker.processor(images=[CLIPS[0].images[0], other], text="<image><image>", return_tensors="pt")


def test_training_forward_is_the_stock_forward_on_a_clip(speaker):
    clip, grid = draw_clip(3, (10, 12), 4), (10, 12)
    question = ask_clip(random.Random(0), clip, "moved")
    packed = pack([[[question]]])
    prompt = CLIP_PROMPT.format(question=f"{question.text}").replace("<image>", "<image>" * 4) + f" {question.answer}"
    inputs = speaker.processor(images=list(clip.images), text=prompt, return_tensors="pt")
    with torch.inference_mode():
        stock = speaker.model(**inputs).logits[0]
        tokens = vision_tokens(speaker.model.model.visual, patches_of(clip.images, grid), grid).flatten(0, 1)[None]
        place = everything(1, tokens.shape[1]).place
        nothing = torch.zeros_like(place)
        ours = forward(speaker.model, VisionTokens(tokens, place, nothing, nothing.bool()), grid, packed).logits[0]
    torch.testing.assert_close(ours, stock[-len(ours) :], atol=2e-3, rtol=1e-3)


def test_it_tells_what_moved_and_what_appeared(speaker):
    samples = [s for s in held_out_clips(GRID, 4) if s.type in ("moved", "appeared")]
    right = [a == s.answer for a, s in zip(answer(speaker.model, speaker.processor, samples), samples, strict=True)]
    assert np.mean(right) >= 0.8


def test_ask_takes_the_frames_and_a_method_for_videos(speaker):
    clip = CLIPS[1]
    said = ask.answer(speaker, clip.images, "What moved?", "evs", 96, max_new_tokens=4)
    assert said.run.report.images == 1
    assert said.run.report.mean == 96
    sheet = said.run.picture(clip.images)
    assert sheet.width > 4 * 300  # four frames in a row


def test_a_smaller_picture_shares_the_budget_among_frames(speaker):
    item = load_suite("clips", scenes=1).items[0]
    small = shrunk([item], 144, boundless(speaker).processor)[0]
    cells = [image.width * image.height / CELL**2 for image in small.pictures()]
    assert len(cells) == len(item.sources)
    assert 0.5 * 144 < sum(cells) <= 144


def test_a_model_without_the_words_is_not_asked(tmp_path):
    for suite in ("clips", "canvases"):
        with pytest.raises(TrimError, match=r"bundled does not know \d+ words"):
            Examiner(ask.load("bundled"), load_suite(suite, scenes=1), Log(tmp_path / "log.jsonl"), 8)


def test_an_oracle_sees_the_objects_of_a_video():
    samples = [s for s in held_out_clips(GRID, 2) if s.type == "moved"]
    kept = object_patches(samples, 100)
    assert kept.shape == (2, 100)
    for row, sample in zip(kept.numpy(), samples, strict=True):
        shown = (sample.patch_owner > 0).sum()
        assert (sample.patch_owner[row] > 0).sum() == min(100, shown)


# --- what a step of training sees


@pytest.fixture(scope="module")
def facts():
    return ClipFacts.of([draw_clip(seed, GRID, 5) for seed in range(4)])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_symbolic_tokens_stand_where_the_objects_are(facts):
    clips = [draw_clip(seed, GRID, 5) for seed in range(4)]
    scene = scene_facts(clips, facts)
    reduced = objects(facts, seeded())
    shown = reduced.shown(facts.owner.flatten(1))
    size = torch.stack([torch.bincount(row, minlength=shown.shape[1]) for row in facts.owner.flatten(1)])
    assert (shown[:, 1:] >= 0.5 * size[:, 1:]).all()
    assert (shown[:, 0] < 0.5 * size[:, 0]).all()
    for row, clip in enumerate(clips):
        for number, obj in enumerate(clip.objects, 1):
            assert scene.words[row, number, 0] == WORD_ID[obj.color]
        assert scene.center[row].sum() == (clip.middle >= 0).sum()


def test_changes_stay_and_still_places_go_to_where_they_last_looked_the_same(facts):
    alone, averaged = changes(facts, 200, False, seeded()), changes(facts, 200, True, seeded())
    assert torch.equal(alone.place, averaged.place)
    owner = facts.owner.flatten(1)
    later = torch.arange(owner.shape[1]) >= 144
    changed = ~facts.still.flatten(1) & later
    assert (alone.goes_to[changed] >= 0).all()
    assert ((alone.goes_to >= 0).sum(1) == 200).all()
    for row in range(4):
        joined = averaged.goes_to[row] >= 0
        target = averaged.place[row][averaged.goes_to[row][joined]]
        source = joined.nonzero().squeeze(1)
        assert (source % 144 == target % 144).all()
        assert (source >= target).all()
        assert torch.equal(owner[row][source], owner[row][target])


def test_squares_and_subsets_hold_what_they_say(facts):
    pooled = squares(4, 5, GRID)
    assert pooled.place.shape == (4, 5 * 36)
    assert (torch.bincount(pooled.goes_to[0]) == 4).all()
    few = subset(facts, 90, seeded())
    assert few.place.shape == (4, 90)
    assert ((few.goes_to >= 0).sum(1) == 90).all()


def test_what_cannot_be_told_is_not_asked():
    clip = draw_clip(0, GRID, 5)
    every = np.arange(5 * 144).reshape(5, 144)
    assert can_tell(clip, there(clip, torch.from_numpy(every)), "moved")
    assert can_tell(clip, there(clip, torch.from_numpy(every)), "appeared")
    blind = every.copy()
    blind[:-1][clip.owner[:-1] == clip.moved + 1] = -1  # it is seen once
    assert not can_tell(clip, there(clip, torch.from_numpy(blind)), "moved")
    blind = every.copy()
    blind[0] = -1  # nobody knows what was there before
    assert not can_tell(clip, there(clip, torch.from_numpy(blind)), "appeared")


# --- training

STAGE = ClipStage(
    steps=4, scenes=2, whole_scenes=1, pool=2, grids=((8, 10),), text_tokens=30, log_every=1, symbolic=0.5
)


def test_training_goes_on_where_it_stopped(tmp_path):
    lines = list(train(ClipRun(STAGE), tmp_path / "whole"))
    assert lines[-1]["step"] == 4
    next(iter(train(ClipRun(STAGE), tmp_path / "parts")))
    list(train(ClipRun(STAGE), tmp_path / "parts"))
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    for name in ("text", "head", "probes"):
        for key, value in whole[name].items():
            assert torch.equal(value, parts[name][key]), (name, key)
    with pytest.raises(ValueError, match="other settings"):
        next(iter(train(ClipRun(dataclasses.replace(STAGE, motion=2.0)), tmp_path / "whole")))


def test_only_the_decoder_learns_and_motion_weighs_more():
    run = ClipRun(dataclasses.replace(STAGE, steps=1))
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.advance()
    moved = {name for name, weight in run.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved
    assert not any("visual" in name or "embed_tokens" in name for name in moved)
    questions = [ask_clip(random.Random(0), CLIPS[0], type) for type in ("moved", "exist")]
    packed = pack([[[question] for question in questions]])
    logits = torch.zeros(*packed.labels.shape, 69)
    logits[packed.number == 0] = torch.randn(69, generator=seeded())
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), packed.labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    weight = torch.where(packed.number == 0, 3.0, 1.0).flatten() * (packed.labels.flatten() != IGNORED)
    torch.testing.assert_close(run.answers(logits, packed), (each * weight).sum() / weight.sum())
