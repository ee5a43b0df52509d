"""Training of the models that ship: packing, symbolic tokens, the scaffold, runs that stop, go on and repeat."""

import dataclasses
import itertools
import json
import random

import pytest
import torch

from visiontrim.zoo.questions import CHARACTERS, TYPES, WORDS, Question
from visiontrim.zoo.scenes import COLORS, KINDS, draw_scene
from visiontrim.zoo.suite import HELD_OUT, held_out
from visiontrim.zoo.training.decoder import DecoderShape, answered, forward, new_decoder
from visiontrim.zoo.training.evaluate import DEVELOPMENT, accuracy_by_depth, as_markdown, questions_about
from visiontrim.zoo.training.loop import train
from visiontrim.zoo.training.packing import IGNORED, NEXT_TURN, TEXT_START, attention_mask, draw_questions, pack
from visiontrim.zoo.training.scaffold import Placement, Scaffold, attention_logits, hops, nouns_of, references
from visiontrim.zoo.training.stages import BASICS, DecoderRun, DecoderStage
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
    placement=Placement(0, 1, 2, 3, 3),
    steps=8,
    peak_rate=2e-3,
    scenes=3,
    fewest=12,
    most=24,
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
    embeddings = word_embeddings(96)
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


def test_packed_conversations_get_the_logits_of_one_at_a_time(model, no_grad):
    """The stock forward on <s> USER: image conversation, no mask of ours, equals the packed row."""
    _, vision, packed = example(6)
    logits = forward(model, vision, packed).logits
    patch_positions = vision.patch + 2
    for row in range(len(logits)):
        for talk in range(packed.conversation[row].max() + 1):
            here = packed.conversation[row] == talk
            ids = torch.cat([torch.tensor([WORD_ID["<s>"], WORD_ID["USER:"]]), packed.ids[row, here]])
            words = model.model.embed_tokens(ids)
            alone = model(
                inputs_embeds=torch.cat([words[:2], vision.features[row], words[2:]])[None],
                position_ids=torch.cat(
                    [torch.arange(2), patch_positions[row], TEXT_START + torch.arange(len(ids) - 2)]
                )[None],
            ).logits[0, 2 + vision.patch.shape[1] :]
            torch.testing.assert_close(logits[row, here], alone, atol=2e-5, rtol=1e-5)


def test_mask_shows_each_conversation_the_image_and_itself():
    conversation = torch.tensor([[0, 0, 1, 1, -1]])
    mask = attention_mask(conversation, 3)[0, 0]
    seen = {row: mask[row].nonzero().flatten().tolist() for row in range(3, 8)}
    assert seen == {3: [0, 1, 2, 3], 4: [0, 1, 2, 3, 4], 5: [0, 1, 2, 5], 6: [0, 1, 2, 5, 6], 7: [0, 1, 2, 7]}
    assert not mask.triu(1).any()


def test_conversations_read_like_the_chat_template():
    first = Question("exist", "is there a star ?", "yes")
    second = Question("pos", "where is the star ?", "top left")
    packed = pack([[[first, second], [second]]])
    turns = "is there a star ? ASSISTANT: yes </s> USER:", "where is the star ? ASSISTANT: top left"
    text, alone = " ".join(turns).split(), turns[1].split()
    assert [WORDS[word] for word in packed.ids[0]] == [*text, *alone]
    assert packed.conversation[0].tolist() == [0] * len(text) + [1] * len(alone)
    assert packed.position[0].tolist() == [TEXT_START + n for n in (*range(len(text)), *range(len(alone)))]
    assert packed.number[0].tolist() == [0] * 7 + [1] * (len(text) - 7) + [2] * len(alone)
    assert packed.starts == [[0, 7 + len(NEXT_TURN), len(text)]]
    said = [(place, WORDS[label]) for place, label in enumerate(packed.labels[0].tolist()) if label != IGNORED]
    wanted = [(5, "yes"), (6, "</s>"), (14, "top"), (15, "left"), (16, "</s>")]
    assert said[:5] == wanted


def test_some_scenes_are_asked_in_conversations():
    scenes = [draw_scene(seed).objects for seed in range(60)]
    drawn = [draw_questions(random.Random(seed), objects, 150) for seed, objects in enumerate(scenes)]
    longest = [max(map(len, conversations)) for conversations in drawn]
    assert 0.1 < sum(length > 1 for length in longest) / 60 < 0.5
    assert max(longest) <= 5


def test_labels_are_the_answers():
    _, _, packed = example(6)
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
        ("what digit is the color of the star ?", [(1, None, None, "digit", None), (7, None, None, "star", None)]),
        (
            "what color is the digit left of the red star ?",
            [(4, None, None, "digit", None), (9, 8, "red", "star", None)],
        ),
    ],
)
def test_nouns(text, expected):
    assert nouns_of(text) == expected


def test_references_point_at_words_and_objects():
    scenes, _, packed = example(8)
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
        elif question.found is None:
            assert len(named) == 1


def test_hops_lead_to_what_the_answer_says():
    scenes, _, packed = example(10)
    jumps = hops(packed, [scene.objects for scene in scenes])
    assert len(jumps.scene) == sum(question.found is not None for asked in packed.questions for question in asked) > 5
    for scene, ask, found in zip(*(column.tolist() for column in jumps), strict=True):
        assert WORDS[packed.ids[scene, ask]] == "ASSISTANT:"
        obj = scenes[scene].objects[found - 1]
        assert WORDS[packed.labels[scene, ask]] in (obj.color, obj.kind, obj.value)


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
    objects = [scene.objects for scene in scenes]
    refs, jumps = references(packed, objects), hops(packed, objects)
    loss = Scaffold(SMALL.placement, 96)(model.model.layers, run.states, run.mask, run.rotary, vision, refs, jumps)
    assert loss.isfinite()


# --- runs


def test_loss_falls(tmp_path):
    stage = dataclasses.replace(SMALL, steps=24, log_every=6)
    lines = list(train(DecoderRun(stage), tmp_path))
    assert [line["step"] for line in lines] == [6, 12, 18, 24]
    assert lines[2]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[2]["scaffold"] < 0.8 * lines[0]["scaffold"]
    assert "scaffold" not in lines[3]  # the last quarter goes without


def test_basics_are_single_questions_of_one_step(tmp_path):
    for seed in range(20):
        drawn = draw_questions(random.Random(seed), draw_scene(seed).objects, 148, basic=True)
        assert all(len(conversation) == 1 and conversation[0].found is None for conversation in drawn)
    assert BASICS.guidance(BASICS.steps - 1) == BASICS.scaffold
    assert {BASICS.vision_tokens(step, random.Random(step)) for step in range(BASICS.steps)} == {32}


def test_a_run_starts_from_an_earlier_one(tmp_path):
    first = DecoderRun(dataclasses.replace(SMALL, seed=5))
    first.save(tmp_path / "checkpoint.pt")
    second = DecoderRun(SMALL, tmp_path / "checkpoint.pt")
    assert second.step == 0
    assert torch.equal(second.model.lm_head.weight, first.model.lm_head.weight)
    assert torch.equal(second.scaffold.probe.weight, first.scaffold.probe.weight)
    assert torch.equal(second.model.model.layers[0].mlp.up_proj.weight, first.model.model.layers[0].mlp.up_proj.weight)


def test_stopped_and_repeated_runs_end_with_the_same_bits(tmp_path):
    def weights(directory):
        run = DecoderRun(SMALL)
        run.restore(directory / "checkpoint.pt")
        return {**run.model.state_dict(), **{f"probe {k}": v for k, v in run.scaffold.state_dict().items()}}

    def facts(directory):
        lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    whole, stopped, other = (tmp_path / name for name in ("whole", "stopped", "other"))
    list(train(DecoderRun(SMALL), whole))
    for _ in range(4):
        assert len(list(train(DecoderRun(SMALL), stopped, minutes=1e-9))) == 1
    with (stopped / "log.jsonl").open("a") as log:  # as if killed after a line of the log, before its checkpoint
        log.write('{"step": 99}\n')
    assert list(train(DecoderRun(SMALL), stopped)) == []
    list(train(DecoderRun(dataclasses.replace(SMALL, seed=1)), other))

    assert facts(whole) == facts(stopped)
    first, second, third = weights(whole), weights(stopped), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)
    with pytest.raises(ValueError, match="other settings"):
        next(train(DecoderRun(dataclasses.replace(SMALL, steps=9)), whole))


# --- evaluation


def test_questions_are_those_of_the_held_out_suite():
    suite = [(sample.question, sample.answer) for sample in held_out(3)]
    seeds = range(HELD_OUT, HELD_OUT + 3)
    ours = [(q.text, q.answer) for seed in seeds for q in questions_about(seed, draw_scene(seed))]
    assert ours == suite


def test_accuracy_by_depth_counts_every_question(model):
    rows, questions = accuracy_by_depth(model, 5, 12, batch_size=2)
    assert len(rows) == 5
    assert sum(questions.values()) == len(list(held_out(5, seed=DEVELOPMENT)))
    assert list(questions) == list(rows[0]) == list(TYPES)
    table = as_markdown(rows, questions).splitlines()
    assert len(table) == 2 + 5 + 1
    assert len({line.count("|") for line in table}) == 1
