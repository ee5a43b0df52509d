"""Training of the models that ship: packing, symbolic tokens, the scaffold, runs that stop, go on and repeat."""

import dataclasses
import itertools
import json
import random

import pytest
import torch

from visiontrim.zoo.questions import CHARACTERS, TYPES, WORDS
from visiontrim.zoo.scenes import COLORS, KINDS, draw_scene
from visiontrim.zoo.suite import HELD_OUT, held_out
from visiontrim.zoo.training.decoder import DecoderShape, answered, forward, new_decoder
from visiontrim.zoo.training.evaluate import accuracy_by_depth, as_markdown, questions_about
from visiontrim.zoo.training.packing import IGNORED, TEXT_START, attention_mask, draw_questions, pack
from visiontrim.zoo.training.scaffold import Placement, Scaffold, attention_logits, nouns_of, references
from visiontrim.zoo.training.stages import DecoderStage, Run, train
from visiontrim.zoo.training.symbolic import (
    WORD_ID,
    SceneFacts,
    VisionTokens,
    choose_patches,
    symbolic_tokens,
    word_embeddings,
)

SMALL = DecoderStage(
    shape=DecoderShape(layers=4, hidden=96, mlp=64),
    placement=Placement(0, 1, 2, 3),
    steps=8,
    scenes=2,
    vision_tokens=12,
    text_tokens=60,
    warmup=2,
    log_every=2,
)


@pytest.fixture(scope="module")
def model():
    return new_decoder(SMALL.shape, torch.Generator().manual_seed(0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def example(num_scenes=2, tokens=12, hidden=96):
    scenes = [draw_scene(seed) for seed in range(num_scenes)]
    facts = SceneFacts.of(scenes)
    patches = choose_patches(facts, tokens, generator())
    vision = symbolic_tokens(facts, patches, word_embeddings(hidden), noise=generator(1))
    rng = random.Random(0)
    return scenes, vision, pack([draw_questions(rng, scene.objects, 60) for scene in scenes])


# --- symbolic tokens


def test_word_embeddings_are_orthonormal():
    embeddings = word_embeddings(64)
    torch.testing.assert_close(embeddings @ embeddings.T, torch.eye(len(WORDS)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="hidden=32"):
        word_embeddings(32)


def test_tokens_of_an_object_decode_to_its_attributes():
    scenes = [draw_scene(seed) for seed in range(6)]
    embeddings = word_embeddings(96)
    every_patch = torch.arange(576).expand(len(scenes), -1)
    heard = symbolic_tokens(SceneFacts.of(scenes), every_patch, embeddings).features @ embeddings.T

    def loudest(words, where):
        return words[heard[where][[WORD_ID[word] for word in words]].argmax()]

    for row, scene in enumerate(scenes):
        for number, obj in enumerate(scene.objects, 1):
            for patch in (scene.patch_owner == number).nonzero()[0]:
                where = row, int(patch)
                assert loudest(tuple(COLORS), where) == obj.color
                assert loudest(KINDS, where) == obj.kind
                assert obj.value is None or loudest(CHARACTERS, where) == obj.value
                assert loudest(("left", "right"), where) == ("left" if patch % 24 < 12 else "right")
                assert loudest(("top", "bottom"), where) == ("top" if patch // 24 < 12 else "bottom")
                assert (heard[where][WORD_ID["center"]] > 0.5) == (patch == obj.patch)
        background = torch.from_numpy(scene.patch_owner == 0)
        torch.testing.assert_close(heard[row, :, WORD_ID["background"]], background.float(), atol=1e-5, rtol=0)


def test_chosen_patches_hold_the_centres():
    scenes = [draw_scene(seed) for seed in range(40)]
    facts = SceneFacts.of(scenes)
    patches = choose_patches(facts, 32, generator())
    assert patches.shape == (40, 32)
    assert (patches.diff(dim=1) > 0).all()
    assert facts.center.gather(1, patches).sum() / facts.center.sum() > 0.95


def test_noise_repeats_from_its_seed_and_spares_most_centres():
    scenes = [draw_scene(seed) for seed in range(20)]
    facts, embeddings = SceneFacts.of(scenes), word_embeddings(96)
    patches = choose_patches(facts, 32, generator())
    clean = symbolic_tokens(facts, patches, embeddings)
    first, second = (symbolic_tokens(facts, patches, embeddings, noise=generator(3)) for _ in range(2))
    assert torch.equal(first.features, second.features)
    said = clean.features @ embeddings.T - first.features @ embeddings.T
    attributes = said[..., WORD_ID["red"] :].abs().amax(dim=-1)
    assert (attributes[clean.center] < 0.2).float().mean() > 0.8


# --- packing


def test_packed_questions_get_the_logits_of_one_at_a_time(model, no_grad):
    """The stock forward on <s> USER: image question, no mask of ours, equals the packed row."""
    _, vision, packed = example()
    logits = forward(model, vision, packed).logits
    patch_positions = vision.patch + 2
    for row, asked in enumerate(packed.questions):
        for number in range(len(asked)):
            here = packed.number[row] == number
            ids = torch.cat([torch.tensor([WORD_ID["<s>"], WORD_ID["USER:"]]), packed.ids[row, here]])
            words = model.model.embed_tokens(ids)
            alone = model(
                inputs_embeds=torch.cat([words[:2], vision.features[row], words[2:]])[None],
                position_ids=torch.cat(
                    [torch.arange(2), patch_positions[row], TEXT_START + torch.arange(len(ids) - 2)]
                )[None],
            ).logits[0, 2 + vision.patch.shape[1] :]
            torch.testing.assert_close(logits[row, here], alone, atol=2e-5, rtol=1e-5)


def test_mask_shows_each_question_the_image_and_itself():
    number = torch.tensor([[0, 0, 1, 1, -1]])
    mask = attention_mask(number, 3)[0, 0]
    seen = {row: mask[row].nonzero().flatten().tolist() for row in range(3, 8)}
    assert seen == {3: [0, 1, 2, 3], 4: [0, 1, 2, 3, 4], 5: [0, 1, 2, 5], 6: [0, 1, 2, 5, 6], 7: [0, 1, 2, 7]}
    assert not mask.triu(1).any()


def test_labels_are_the_answers():
    _, _, packed = example()
    for row, asked in enumerate(packed.questions):
        for number, question in enumerate(asked):
            labels = packed.labels[row][packed.number[row] == number]
            words = [WORDS[label] for label in labels if label != IGNORED]
            assert words == [*question.answer.split(), "</s>"]
    right = torch.nn.functional.one_hot(packed.labels.clamp(min=0), len(WORDS)).float()
    assert all(itertools.chain(*answered(right, packed)))
    assert not any(itertools.chain(*answered(-right, packed)))


def test_dropped_vision_tokens_change_nothing(model, no_grad):
    _, vision, packed = example()
    other = VisionTokens(torch.randn(vision.features.shape), vision.patch, vision.owner, vision.center)
    blind = forward(model, vision, packed, seen_by=0).logits
    assert torch.equal(blind, forward(model, other, packed, seen_by=0).logits)
    assert not torch.allclose(blind, forward(model, vision, packed, seen_by=1).logits)
    assert torch.equal(forward(model, vision, packed, seen_by=4).logits, forward(model, vision, packed).logits)


# --- the scaffold


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("what color is the star ?", [(4, None, None, "star", None)]),
        ("what shape is red ?", [(3, None, "red", None, None)]),
        ("what is the red digit ?", [(4, 3, "red", "digit", None)]),
        ("is there a A ?", [(3, None, None, None, "A")]),
        ("how many red objects ?", [(2, None, "red", None, None)]),
        (
            "is the red star left of the digit ?",
            [(3, 2, "red", "star", None), (7, None, None, "digit", None)],
        ),
    ],
)
def test_nouns(text, expected):
    assert nouns_of(text) == expected


def test_references_point_at_words_and_objects():
    scenes, _, packed = example(4)
    refs = references(packed, [scene.objects for scene in scenes])
    for row in range(len(refs.scene)):
        scene = int(refs.scene[row])
        assert WORDS[packed.ids[scene, refs.ask[row]]] == "ASSISTANT:"
        noun = WORDS[packed.ids[scene, refs.noun[row]]]
        assert refs.color[row] < 0 or WORDS[packed.ids[scene, refs.color[row]]] in COLORS
        question = packed.questions[scene][int(packed.number[scene, refs.noun[row]])]
        assert WORDS[packed.labels[scene, refs.speak[row]]] == question.answer.split()[-1]
        named = [obj for obj, yes in zip(scenes[scene].objects, refs.objects[row, 1:].tolist(), strict=False) if yes]
        assert all(noun in (obj.kind, obj.color, obj.value) for obj in named)
        if question.type == "count":
            assert len(named) == int(question.answer)
        elif question.type == "exist":
            assert bool(named) == (question.answer == "yes")
        else:
            assert len(named) == 1


def test_scaffold_reads_the_attention_of_the_model(no_grad):
    scenes, vision, packed = example()
    model = new_decoder(SMALL.shape, generator())
    model.set_attn_implementation("eager")
    run = forward(model, vision, packed)
    additive = torch.where(run.mask, 0.0, -1e9)
    layer = model.model.layers[1]
    theirs = layer.self_attn(layer.input_layernorm(run.states[1]), run.rotary, additive)[1]
    for head in range(3):
        ours = attention_logits(layer, run.states[1], run.rotary, head, run.mask[:, 0]).softmax(dim=-1)
        torch.testing.assert_close(ours, theirs[:, head], atol=1e-5, rtol=1e-4)
    refs = references(packed, [scene.objects for scene in scenes])
    loss = Scaffold(SMALL.placement, 96)(model.model.layers, run.states, run.mask, run.rotary, vision, refs)
    assert loss.isfinite()


# --- runs


def test_loss_falls(tmp_path):
    stage = dataclasses.replace(SMALL, steps=21, scenes=2, log_every=7)
    lines = list(train(stage, tmp_path))
    assert [line["step"] for line in lines] == [7, 14, 21]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["scaffold"] < 0.8 * lines[0]["scaffold"]


def test_stopped_and_repeated_runs_end_with_the_same_bits(tmp_path):
    def weights(directory):
        run = Run(SMALL)
        run.restore(directory / "checkpoint.pt")
        return {**run.model.state_dict(), **{f"probe {k}": v for k, v in run.scaffold.state_dict().items()}}

    def facts(directory):
        lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    whole, stopped, other = (tmp_path / name for name in ("whole", "stopped", "other"))
    list(train(SMALL, whole))
    for _ in range(4):
        assert len(list(train(SMALL, stopped, minutes=1e-9))) == 1
    with (stopped / "log.jsonl").open("a") as log:  # as if killed after a line of the log, before its checkpoint
        log.write('{"step": 99}\n')
    assert list(train(SMALL, stopped)) == []
    list(train(dataclasses.replace(SMALL, seed=1), other))

    assert facts(whole) == facts(stopped)
    first, second, third = weights(whole), weights(stopped), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)
    with pytest.raises(ValueError, match="other settings"):
        next(train(dataclasses.replace(SMALL, steps=9), whole))


# --- evaluation


def test_questions_are_those_of_the_held_out_suite():
    suite = [(sample.question, sample.answer) for sample in held_out(3)]
    seeds = range(HELD_OUT, HELD_OUT + 3)
    ours = [(q.text, q.answer) for seed in seeds for q in questions_about(seed, draw_scene(seed))]
    assert ours == suite


def test_accuracy_by_depth_counts_every_question(model):
    rows, questions = accuracy_by_depth(model, 5, 12, batch_size=2)
    assert len(rows) == 5
    assert sum(questions.values()) == len(list(held_out(5)))
    assert set(questions) == set(TYPES)
    table = as_markdown(rows, questions).splitlines()
    assert len(table) == 2 + 5 + 1
    assert len({line.count("|") for line in table}) == 1
