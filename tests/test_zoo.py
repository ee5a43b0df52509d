"""The bundled model, its scenes and its questions."""

import hashlib
import itertools
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel, LlavaProcessor

from visiontrim.core.errors import TrimError
from visiontrim.zoo import (
    CLIP_DIR,
    HELD_OUT,
    MODEL_DIR,
    PROMPT,
    TYPES,
    Bundle,
    answer,
    ask,
    draw_scene,
    held_out,
    load,
    normalise,
)
from visiontrim.zoo.phrases import phrase_scores
from visiontrim.zoo.questions import CHARACTERS, PRESENCE, WORDS
from visiontrim.zoo.scenes import COLORS, DENSE, GRID, HARD, KINDS, PATCH, STANDARD, WORLDS
from visiontrim.zoo.suite import SPLITS, digest
from visiontrim.zoo.video import MOTION_TYPES, draw_video

WEIGHTS = {
    MODEL_DIR: "4d04201ec4f6d10930c1e9b81ec656626bec87df5d4889d93eb18b70d8df4436",
    CLIP_DIR: "0b3d758a308d4aea60f3cca8d4ba8a8699463a6260adad4b1eeaeebb05e775f9",
}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load()


# --- weights


@pytest.mark.parametrize("directory", WEIGHTS, ids=lambda path: path.name)
def test_weights_are_the_measured_ones(directory):
    assert hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS[directory]


def test_weights_are_small():
    assert sum((directory / "model.safetensors").stat().st_size for directory in WEIGHTS) <= 12e6


@pytest.mark.parametrize(("auto", "directory"), [(AutoModelForImageTextToText, MODEL_DIR), (CLIPModel, CLIP_DIR)])
def test_stock_loading_finds_every_weight(auto, directory):
    _, info = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info


def test_stock_loading_finds_the_processor():
    assert isinstance(AutoProcessor.from_pretrained(MODEL_DIR), LlavaProcessor)


def test_vision_towers_are_identical(bundle):
    ours, theirs = bundle.model.model.vision_tower.state_dict(), bundle.text_tower.model.vision_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- words


def test_tokenizers_have_the_vocabulary(bundle):
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    assert bundle.processor.tokenizer.get_vocab() == vocabulary
    assert bundle.text_tower.tokenizer.get_vocab() == vocabulary


def test_prompt_becomes_the_trained_sequence(bundle):
    question = "what color is the star ?"
    image = draw_scene(0).image
    inputs = bundle.processor(images=image, text=PROMPT.format(question=question), return_tensors="pt")
    words = ["<s>", "USER:", *["<image>"] * GRID**2, *question.split(), "ASSISTANT:"]
    assert inputs["input_ids"].tolist() == [[WORDS.index(word) for word in words]]
    assert inputs["pixel_values"].shape == (1, 3, 192, 192)


def test_chat_template_gives_the_prompt(bundle):
    question = "what color is the star ?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text = bundle.processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == PROMPT.format(question=question)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("What colour is the star?", "what color is the star ?"),
        ("what color is the star ?", "what color is the star ?"),
        ("Where is the Red  Digit", "where is the red digit ?"),
        ("is there a A?", "is there a A ?"),
        ("What color is the K??", "what color is the K ?"),
        ("Is there an orange star?", "is there a orange star ?"),
        ("is the star left of the digit.", "is the star left of the digit ?"),
    ],
)
def test_normalise(typed, expected):
    assert normalise(typed) == expected


@pytest.mark.parametrize(
    "typed", ["What is on the table?", "what is <image> ?", "what color is the k?", "what moved?", "", " ? "]
)
def test_normalise_refuses_what_the_model_cannot_read(typed):
    with pytest.raises(TrimError, match="what color is the star"):
        normalise(typed)


def test_normalise_names_the_unknown_words():
    with pytest.raises(TrimError, match="'on', 'table'"):
        normalise("What is on the table?")


# --- scenes


def test_scene_is_deterministic():
    image = draw_scene(7).image
    assert image.mode == "RGB"
    assert image.size == (192, 192)
    digest = "99b4bf80befc1894f31f03f606145b6f75f2d4784a94baf2c48e39611bc262f9"
    assert hashlib.sha256(image.tobytes()).hexdigest() == digest
    assert draw_scene(8).image.tobytes() != image.tobytes()


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
@pytest.mark.parametrize("seed", range(20))
def test_patch_owner_agrees_with_objects(seed, world):
    scene = draw_scene(seed, world)
    assert scene.patch_owner.shape == (GRID**2,)
    assert np.issubdtype(scene.patch_owner.dtype, np.integer)
    assert set(scene.patch_owner) == set(range(len(scene.objects) + 1))
    for number, obj in enumerate(scene.objects, 1):
        assert scene.patch_owner[obj.patch] == number
        assert obj.patch == int(obj.y // PATCH) * GRID + int(obj.x // PATCH)
        rows, columns = np.divmod(np.flatnonzero(scene.patch_owner == number), GRID)
        reach = obj.radius * 1.1 + PATCH  # tips of stars, then half a patch in each direction
        assert np.hypot((columns + 0.5) * PATCH - obj.x, (rows + 0.5) * PATCH - obj.y).max() < reach


def test_objects_come_from_the_closed_sets():
    for seed in range(20):
        for obj in draw_scene(seed).objects:
            assert obj.kind in KINDS
            assert obj.color in COLORS
            assert (obj.value is not None) == (obj.kind in ("digit", "letter"))
            assert obj.value is None or obj.value in CHARACTERS


@pytest.mark.parametrize(("world", "number", "radius"), [(HARD, 9, 7.5), (DENSE, 16, 6)], ids=["hard", "dense"])
def test_hard_scenes_hold_more_and_smaller_objects(world, number, radius):
    easy, hard = ([draw_scene(seed, drawn).objects for seed in range(40)] for drawn in (STANDARD, world))
    assert max(map(len, easy)) <= 9 <= number <= np.mean([len(objects) for objects in hard])
    assert max(obj.radius for objects in hard for obj in objects) <= radius
    alike = [
        any(a.kind == b.kind and a.color != b.color for a in objects for b in objects)
        and any(a.kind != b.kind and a.color == b.color for a in objects for b in objects)
        for objects in hard
    ]
    assert np.mean(alike) > 0.95


# --- videos


def test_one_object_moves_and_one_appears():
    for seed in range(12):
        video = draw_video(seed)
        assert len(video.frames) == 4
        first, last = ({(o.phrase, o.x, o.y) for o in video.frames[n].objects} for n in (0, -1))
        moved = [phrase for phrase, _, _ in first - last]
        assert moved == [video.moved.phrase]
        assert {phrase for phrase, _, _ in last - first} == {video.moved.phrase, video.appeared.phrase}
        there = [video.appeared in frame.objects for frame in video.frames]
        assert there == sorted(there)
        places = [o.patch for frame in video.frames for o in frame.objects if o.phrase == video.moved.phrase]
        steps = np.abs(np.diff(np.stack(np.divmod(places, GRID)), axis=1)).max(axis=0)
        assert all(2 <= step <= 4 for step in steps)
        for frame in video.frames:
            assert all(frame.patch_owner[o.patch] == number for number, o in enumerate(frame.objects, 1))


def test_motion_is_named_without_doubt():
    for sample in SPLITS["video"].samples(10):
        assert len(sample.images) == 4
        assert sample.prompt.startswith("USER: <image> <image> <image> <image> ")
        assert sample.patch_owner.shape == (4 * GRID**2,)
        if sample.type in MOTION_TYPES:
            color, kind = sample.answer.split()
            objects = draw_video(sample.scene_seed).frames[-1].objects
            assert sum((o.color, o.kind) == (color, kind) for o in objects) == 1


# --- questions


def test_questions_use_the_vocabulary():
    for seed in range(50):
        objects = draw_scene(seed).objects
        for type in TYPES:
            question = ask(random.Random(seed), objects, type)
            if question is not None:
                assert question.type == type
                assert set((question.text + " " + question.answer).split()) <= set(WORDS)
                assert question.text == normalise(question.text)


def questions_of(type, world=STANDARD, scenes=150):
    drawn = [draw_scene(seed, world).objects for seed in range(scenes)]
    asked = [(objects, ask(random.Random(seed), objects, type)) for seed, objects in enumerate(drawn)]
    return [(objects, question) for objects, question in asked if question is not None]


SIDE = {"left of": (-1, "x"), "right of": (1, "x"), "above": (-1, "y"), "below": (1, "y")}


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_side_questions_have_one_answer(world):
    asked = questions_of("side", world)
    assert len(asked) > 80
    for objects, question in asked:
        rest = question.text.removeprefix("what color is the ").removesuffix(" ?")
        relation = next(words for words in SIDE if f" {words} the " in rest)
        kind, name = rest.split(f" {relation} the ")
        (reference,) = [o for o in objects if name in (o.kind, f"{o.color} {o.kind}")]
        sign, axis = SIDE[relation]
        there = [o for o in objects if o.kind == kind and sign * (getattr(o, axis) - getattr(reference, axis)) > 0]
        assert [o.color for o in there] == [question.answer]
        assert len({o.color for o in objects if o.kind == kind}) > 1
        assert question.found == there[0]
    relations = [next(words for words in SIDE if words in question.text) for _, question in asked]
    assert set(relations) == set(SIDE)


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_hop_questions_have_one_answer(world):
    asked = questions_of("hop", world)
    assert len(asked) > 80
    for objects, question in asked:
        noun, name = question.text.removeprefix("what ").removesuffix(" ?").split(" is the color of the ")
        (reference,) = [o for o in objects if name in (o.kind, o.value)]
        there = [
            o
            for o in objects
            if o is not reference
            and o.color == reference.color
            and (o.kind == noun if noun != "shape" else o.value is None)
        ]
        assert [o.value or o.kind for o in there] == [question.answer]


def test_existence_is_balanced():
    scenes = [draw_scene(seed).objects for seed in range(100)]
    questions = [ask(random.Random(seed), scenes[seed % 100], "exist") for seed in range(1000)]
    yes = [question.answer == "yes" for question in questions if question is not None]
    assert 0.45 < np.mean(yes) < 0.55


def test_presence_is_that_of_the_scenes():
    scenes = [{obj.kind for obj in draw_scene(seed).objects} for seed in range(300)]
    for kind, share in PRESENCE.items():
        assert abs(np.mean([kind in kinds for kinds in scenes]) - share) < 0.12  # four standard errors


def test_suite_is_deterministic():
    def facts(samples):
        return [(s.scene_seed, s.type, s.question, s.answer) for s in samples]

    first = facts(held_out(5))
    assert first == facts(held_out(5))
    assert first[0] == (HELD_OUT, "color", "what color is the digit ?", "pink")
    assert first != facts(held_out(5, seed=HELD_OUT + 5))
    assert set(facts(held_out(5, per_scene=2))) < set(first)


def test_suite_asks_each_type_once():
    types = [sample.type for sample in held_out(1)]
    assert types == [type for type in TYPES if type in types]
    assert [sample.type for sample in held_out(3, per_scene=1)] == list(TYPES[:3])


@pytest.mark.parametrize("per_scene", [0, 10])
def test_suite_refuses_more_questions_than_types(per_scene):
    with pytest.raises(TrimError, match=f"per_scene={per_scene}"):
        next(held_out(1, per_scene=per_scene))


@pytest.mark.parametrize("split", SPLITS.values(), ids=lambda split: split.name)
def test_splits_are_the_measured_ones(split):
    assert digest(split.samples(20)) == split.digest


def test_conversations_repeat_the_right_answers():
    samples = list(SPLITS["turns"].samples(3))
    assert [len(sample.earlier) for sample in samples] == [0, 1, 2, 3, 4] * 3
    first, second = samples[:2]
    assert second.earlier == ((first.question, first.answer),)
    assert second.prompt == f"{first.prompt} {first.answer} </s> USER: {second.question} ASSISTANT:"
    for start in (0, 5, 10):
        assert len({sample.question for sample in samples[start : start + 5]}) == 5


# --- what the model can do


def test_model_answers(bundle):
    """All scores, with intervals, are in docs/results/llava."""
    samples = list(itertools.islice(SPLITS["standard"].samples(), 96))
    answers = answer(bundle.model, bundle.processor, samples)
    right = [given == sample.answer for given, sample in zip(answers, samples, strict=True)]
    assert np.mean(right) >= 0.94


def test_phrases_find_their_patches(bundle):
    """In CLIP's joint space the name of an object ranks its patches above the others."""
    found = phrase_scores(bundle, scenes=20)
    assert found.phrases > 100
    assert found.area >= 0.9
    assert found.hits >= 0.9
