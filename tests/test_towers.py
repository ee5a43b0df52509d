"""Stages B and C of training, shipping, and the scores of what was shipped; everything tiny but the vision tower."""

import dataclasses
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import visiontrim as vt
from visiontrim.cli import main
from visiontrim.zoo import HELD_OUT, TYPES, draw_scene, held_out
from visiontrim.zoo.evaluate import KeepPatches, Scores, blind_answers, mean_of_types, object_patches, tally, wilson
from visiontrim.zoo.loading import load
from visiontrim.zoo.questions import Question
from visiontrim.zoo.scenes import STANDARD
from visiontrim.zoo.suite import conversations
from visiontrim.zoo.training.decoder import DecoderShape, forward
from visiontrim.zoo.training.joint import Eyes, JointRun, JointStage
from visiontrim.zoo.training.joint_space import PHRASES, caption, questions_that_name
from visiontrim.zoo.training.loop import train
from visiontrim.zoo.training.packing import IMAGE_START, pack
from visiontrim.zoo.training.ship import load_decoder, ship
from visiontrim.zoo.training.stages import DecoderRun, DecoderStage
from visiontrim.zoo.training.symbolic import WORD_ID, SceneFacts
from visiontrim.zoo.training.tower import TEXT_LENGTH, look, new_clip, patchify, read_texts
from visiontrim.zoo.training.vision import VisionRun, VisionStage

SHAPE = DecoderShape(layers=4, hidden=96, mlp=32)
VISION = VisionStage(steps=4, hidden=96, scenes=2, whole_scenes=1, patches=(40, 48), pool=6, log_every=2)
JOINT = JointStage(steps=4, shape=SHAPE, scenes=2, whole_scenes=1, pool=3, text_tokens=40, log_every=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directory with the checkpoints of all stages, after a few steps."""
    out = tmp_path_factory.mktemp("runs")
    decoder = DecoderRun(DecoderStage(shape=SHAPE))
    (out / "decoder").mkdir()
    decoder.save(out / "decoder/checkpoint.pt")
    list(train(VisionRun(VISION), out / "vision"))
    list(train(JointRun(JOINT, out / "decoder/checkpoint.pt", out / "vision/checkpoint.pt"), out / "joint"))
    return out


@pytest.fixture(scope="module")
def parts(trained):
    state = torch.load(trained / "joint/checkpoint.pt", weights_only=True)
    eyes = Eyes.load(trained / "vision/checkpoint.pt", SHAPE.hidden)
    eyes.projector.load_state_dict(state["projector"])
    for weight in (*eyes.projector.parameters(), *eyes.clip.parameters()):
        weight.data = weight.data.half().float()
    model = load_decoder(SHAPE, {name: weight.half().float() for name, weight in state["model"].items()})
    return model, eyes


@pytest.fixture(scope="module")
def shipped(trained, parts):
    ship(*parts, trained)
    parts[1].clip.float()
    return load(trained)


# --- stage B


@torch.inference_mode()
def test_looking_at_all_patches_is_the_stock_forward():
    clip = new_clip(generator()).eval()
    image = draw_scene(3).image
    pixels = torch.from_numpy(patchify(image).copy())[None]
    ours = look(clip.vision_model, pixels, torch.arange(576)[None])
    stock = (torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() - 127.5) / 64
    theirs = clip.vision_model(pixel_values=stock, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 7
    torch.testing.assert_close(ours[-2], theirs[-2], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_texts_are_read_as_clip_reads_them():
    clip = new_clip(generator()).eval()
    texts = ["a red star", "what color is the digit left of the red star ?"]
    ours, ends = read_texts(clip, [text.split() for text in texts])
    assert ends.tolist() == [4, 12]
    ids = torch.tensor([[WORD_ID[word] for word in ("<s>", "a", "red", "star", "<eot>")]])
    theirs = torch.nn.functional.normalize(clip.get_text_features(input_ids=ids).pooler_output, dim=-1)
    torch.testing.assert_close(ours[:1, 4], theirs, atol=1e-5, rtol=1e-5)


def test_vision_runs_stop_and_go_on(trained, tmp_path):
    for _ in range(2):
        assert len(list(train(VisionRun(VISION), tmp_path, minutes=1e-9))) == 1
    first, second = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (trained / "vision", tmp_path))
    assert second["step"] == 4
    for part in ("clip", "projector"):
        assert all(torch.equal(first[part][name], weight) for name, weight in second[part].items())


def test_vision_learns():
    run = VisionRun(dataclasses.replace(VISION, steps=40, warmup=5, whole=0.0, scenes=4, pool=4))
    errors = [run.advance().values["error"] for _ in range(16)]
    assert np.mean(errors[-3:]) < 0.75 * errors[0]


def test_captions_fit_and_name_what_is_there():
    for seed in range(10):
        objects = draw_scene(seed).objects
        words = caption(random.Random(seed), objects)
        assert len(words) + 2 <= TEXT_LENGTH
        names = " ".join(words).split(" and ")
        assert set(names) <= {obj.phrase for obj in objects}
        assert set(names) <= set(PHRASES)


def test_questions_name_objects_of_their_scene():
    scenes = [draw_scene(seed) for seed in range(20)]
    texts, spoken = questions_that_name(random.Random(0), scenes)
    assert len(texts) > 12
    for (scene, text, place), meant in spoken:
        words = ["<s>", *texts[text].split(), "<eot>"]
        there = [o for o, yes in zip(scenes[scene].objects, meant, strict=True) if yes]
        assert there
        assert words[place] == "<eot>" or all(words[place] in (o.color, o.kind, o.value) for o in there)


# --- stage C


def test_joint_training_leaves_the_tower_alone(trained):
    before = torch.load(trained / "vision/checkpoint.pt", weights_only=True)
    start = torch.load(trained / "decoder/checkpoint.pt", weights_only=True)["model"]
    after = torch.load(trained / "joint/checkpoint.pt", weights_only=True)
    assert set(after) == {"step", "optimizer", "model", "projector"}
    assert torch.equal(start["model.embed_tokens.weight"], after["model"]["model.embed_tokens.weight"])
    assert not torch.equal(start["lm_head.weight"], after["model"]["lm_head.weight"])
    assert not torch.equal(before["projector"]["linear_1.weight"], after["projector"]["linear_1.weight"])


@torch.inference_mode()
def test_features_are_those_of_the_tower(parts):
    _, eyes = parts
    scene = draw_scene(5)
    features = eyes.features([scene])
    pixels = torch.from_numpy(np.asarray(scene.image).copy()).permute(2, 0, 1)[None].float()
    out = eyes.clip.vision_model(pixel_values=(pixels - 127.5) / 64, output_hidden_states=True)
    torch.testing.assert_close(features, out.hidden_states[-2][:, 1:], atol=1e-4, rtol=1e-4)


# --- shipping


@torch.inference_mode()
def test_shipped_model_computes_what_was_trained(shipped, parts):
    model, eyes = parts
    samples = list(conversations(1, 3))
    scene = draw_scene(HELD_OUT)
    facts = SceneFacts.of([scene])
    vision = eyes.see([scene], facts, torch.arange(576)[None])
    packed = pack([[[Question(s.type, s.question, s.answer) for s in samples]]])
    ours = forward(model, vision, packed).logits[0]
    inputs = shipped.processor(images=scene.image, text=samples[-1].prompt, return_tensors="pt")
    theirs = shipped.model(**inputs).logits[0, IMAGE_START + 576 :]
    torch.testing.assert_close(ours[: len(theirs)], theirs, atol=2e-3, rtol=2e-3)


def test_chat_template_writes_the_prompts(shipped):
    for sample in conversations(1, 3):
        turns = [*sample.earlier, (sample.question, None)]
        chat = []
        for number, (question, answer) in enumerate(turns):
            image = [] if number else [{"type": "image"}]
            chat.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            if answer is not None:
                chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        assert shipped.processor.apply_chat_template(chat, add_generation_prompt=True) == sample.prompt


# --- scores


def test_object_patches_hold_the_objects():
    samples = list(held_out(3))
    index = object_patches(samples, 64)
    assert index.shape == (len(samples), 64)
    assert (index.diff(dim=1) > 0).all()
    for sample, row in zip(samples, index.numpy(), strict=True):
        assert set(np.flatnonzero(sample.patch_owner)) <= set(row)
    assert (samples[0].patch_owner[object_patches(samples[:1], 8)[0].numpy()] > 0).all()


@torch.inference_mode()
def test_given_patches_are_kept(shipped):
    sample = next(held_out(1))
    inputs = shipped.processor(images=sample.image, text=sample.prompt, return_tensors="pt")
    with vt.trim(shipped.model, KeepPatches(torch.tensor([[3, 5, 9]]))) as run:
        shipped.model(**inputs)
    assert run.report.kept_tokens == 3
    assert run.report.method == "patches:3"


def test_wilson_interval():
    low, high = wilson(8, 10)  # Wilson 1927, by hand: 0.4902 and 0.9433
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


def test_blind_answers_know_only_the_question():
    samples = list(held_out(40))
    blind = blind_answers(samples, STANDARD, scenes=150)
    right = [guess == sample.answer for guess, sample in zip(blind, samples, strict=True)]
    table = tally(samples, right)
    assert list(table) == [*TYPES, "all"]
    assert sum(total for type, (_, total) in table.items() if type != "all") == table["all"][1] == len(samples)
    assert mean_of_types(table) < 0.5


def test_scores_survive_being_stored():
    scores = Scores(2, {"all": {"color": (3, 4), "all": (3, 4)}, "blind": {"color": (1, 4), "all": (1, 4)}})
    again = Scores.from_dict(json.loads(json.dumps(scores.to_dict())))
    assert again == scores
    assert "| color | 4 | 75.0% | 30.1% to 95.4% | 25.0% |" in scores.table()


# --- the command line


@pytest.fixture
def zoo_cli(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["visiontrim", "zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr()

    return run


def test_scores_become_a_card(zoo_cli, shipped, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("visiontrim.zoo.evaluate.BLIND_SCENES", 100)
    file = tmp_path / "scores.json"
    code, printed = zoo_cli("eval", "--split", "turns", "--scenes", 1, "--keep", 16, "--model", trained, "--out", file)
    assert code == 0
    title, _, header, _, *rows = printed.out.strip().splitlines()
    assert title == "### turns: 5 questions about 1 scenes"
    ways = ["all, as the controls", "random 16", "oracle 16", "1 from layer 2"]
    assert header.startswith(f"| type | questions | accuracy | 95 % interval | {' | '.join(ways)} |")
    assert rows[-2].startswith("| all | 5 | ")
    code, card = zoo_cli("card", file)
    assert code == 0
    assert card.out == printed.out


def test_mistakes_are_told(zoo_cli, tmp_path):
    code, printed = zoo_cli("eval", "--split", "easy")
    assert (code, printed.err) == (
        2,
        "visiontrim: there is no split 'easy' of llava: choose standard, hard, turns, video\n",
    )
    code, printed = zoo_cli("card", tmp_path / "none.json")
    assert code == 2
    assert "visiontrim zoo eval --out" in printed.err


def test_the_command_line_does_not_wait_for_torch():
    code = "import sys, visiontrim.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
