"""Training of the small Qwen2.5-VL: canvases, positions, packing and tower against stock, runs that stop and go on."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from visiontrim.zoo.canvas import CELL, draw_canvas, in_square
from visiontrim.zoo.dynamic import held_out_canvases
from visiontrim.zoo.questions import Question
from visiontrim.zoo.scenes import SIZE
from visiontrim.zoo.training.loop import train
from visiontrim.zoo.training.packing import draw_questions, pack
from visiontrim.zoo.training.qwen.decoder import DecoderRun, DecoderStage
from visiontrim.zoo.training.qwen.joint import JointRun, JointStage
from visiontrim.zoo.training.qwen.model import (
    AFTER_IMAGE,
    IMAGE_START,
    TOKEN_ID,
    QwenShape,
    config_of,
    forward,
    new_model,
    positions,
)
from visiontrim.zoo.training.qwen.ship import assemble, ship
from visiontrim.zoo.training.qwen.tower import patches_of, start_tower, vision_tokens
from visiontrim.zoo.training.qwen.vision import VisionRun, VisionStage, token_loss
from visiontrim.zoo.training.scaffold import Placement, Scaffold, attention_logits, hops, references
from visiontrim.zoo.training.symbolic import WORD_ID, SceneFacts, VisionTokens, symbolic_tokens

SMALL = QwenShape(layers=3, mlp=32, tower_layers=3, tower_hidden=32, tower_heads=2, tower_mlp=32, full_attention=(1,))
GRIDS = ((8, 12), (10, 14))  # windows of 4 x 4 cells fill the first


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    model = new_model(SMALL, generator())
    start_tower(model.model.visual, SMALL, generator(1))
    return model.eval()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A new model as ``ship`` writes it, loaded by stock classes."""
    directory = tmp_path_factory.mktemp("qwen")
    untrained = new_model(SMALL, generator())
    start_tower(untrained.model.visual, SMALL, generator(1))
    ship(untrained, directory)
    model, info = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval(), AutoProcessor.from_pretrained(directory)


# --- canvases


def test_canvas_repeats_and_its_cells_hold_what_it_says():
    for grid in GRIDS:
        scene, again = draw_canvas(7, grid), draw_canvas(7, grid)
        assert scene.image.size == (grid[1] * CELL, grid[0] * CELL)
        assert scene.image.tobytes() == again.image.tobytes()
        assert scene.objects == again.objects
        assert scene.patch_owner.shape == (grid[0] * grid[1],)
        for number, obj in enumerate(scene.objects, 1):
            assert obj.patch == int(obj.y // CELL) * grid[1] + int(obj.x // CELL)
            assert scene.patch_owner[obj.patch] == number
            assert 3 <= obj.x % CELL <= 9
            assert 3 <= obj.y % CELL <= 9
        assert len({obj.patch for obj in scene.objects}) == len(scene.objects) >= 3


def test_in_square_stretches_to_a_scene():
    scene = draw_canvas(3, (8, 12))
    for before, after in zip(scene.objects, in_square(scene.objects, (8, 12)), strict=True):
        assert after.x == pytest.approx(before.x * SIZE / 144)
        assert after.y == pytest.approx(before.y * SIZE / 96)
        assert after.phrase == before.phrase


# --- against the stock model


def packed_canvas(model, samples, grid):
    """The packed forward on the first picture of ``samples`` and all their questions."""
    patches = patches_of([samples[0].image], grid)
    cells = torch.arange(grid[0] * grid[1])[None]
    features = vision_tokens(model.model.visual, patches, grid)
    vision = VisionTokens(features, cells, torch.zeros_like(cells), torch.zeros_like(cells, dtype=torch.bool))
    packed = pack([[[Question(s.type, s.question, s.answer)] for s in samples]])
    return vision, packed, forward(model, vision, grid, packed)


@pytest.mark.parametrize("grid", GRIDS)
def test_packed_forward_equals_the_stock_path(shipped, grid, no_grad):
    """Processor, vision tower, positions and decoder: logits of ``generate()``, of a left-padded batch."""
    model, processor = shipped
    samples = list(held_out_canvases(grid, 1))
    inputs = processor(
        images=[sample.image for sample in samples],
        text=[sample.prompt for sample in samples],
        padding=True,
        return_tensors="pt",
    )
    patches = patches_of([samples[0].image], grid)
    frames = inputs["pixel_values"][: patches.shape[1]].view(-1, 3, 2, 36)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    torch.testing.assert_close(frames[:, :, 0].flatten(1), patches[0])

    vision, packed, run = packed_canvas(model, samples, grid)
    stock = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    torch.testing.assert_close(vision.features[0], stock[0], atol=1e-5, rtol=1e-5)

    ids, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    ours = positions(vision.patch, grid, packed)[:, 0]
    generated = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    text = IMAGE_START + vision.patch.shape[1] + AFTER_IMAGE
    for number, sample in enumerate(samples):
        theirs = ids[:, number, inputs["attention_mask"][number].bool()]
        words = (packed.number[0] == number).nonzero().flatten()[: len(sample.question.split()) + 1]
        assert torch.equal(theirs, torch.cat([ours[:, :text], ours[:, text + words]], dim=1))
        torch.testing.assert_close(run.logits[0, words[-1]], generated.logits[0][number], atol=1e-4, rtol=0)


def test_dropped_vision_tokens_change_nothing(model, no_grad):
    samples = list(held_out_canvases((8, 12), 1))
    vision, packed, run = packed_canvas(model, samples, (8, 12))
    other = dataclasses.replace(vision, features=torch.randn(vision.features.shape, generator=generator()))
    blind = forward(model, vision, (8, 12), packed, seen_by=0).logits
    assert torch.equal(blind, forward(model, other, (8, 12), packed, seen_by=0).logits)
    assert not torch.allclose(blind, run.logits)
    assert torch.equal(forward(model, vision, (8, 12), packed, seen_by=3).logits, run.logits)


def test_attention_logits_with_shared_keys_and_biases(no_grad):
    model = new_model(SMALL, generator())
    model.set_attn_implementation("eager")
    for layer in model.model.language_model.layers:
        for name in ("q_proj", "k_proj"):
            torch.nn.init.normal_(getattr(layer.self_attn, name).bias, generator=generator())
    start_tower(model.model.visual, SMALL, generator(1))
    _, _, run = packed_canvas(model, list(held_out_canvases((8, 8), 1)), (8, 8))
    layer = model.model.language_model.layers[1]
    additive = torch.where(run.mask, 0.0, -1e9)
    normed = layer.input_layernorm(run.states[1])
    theirs = layer.self_attn(normed, attention_mask=additive, position_embeddings=run.rotary)[1]
    for head in range(SMALL.heads):
        ours = attention_logits(layer, run.states[1], run.rotary, head, run.mask[:, 0]).softmax(dim=-1)
        torch.testing.assert_close(ours, theirs[:, head], atol=1e-5, rtol=1e-4)


# --- where training begins


def test_first_layer_measures_where_a_token_lies(no_grad):
    """The words right and bottom grow along columns and rows, whatever the tokens show."""
    grid = (12, 16)
    model = new_model(QwenShape(), generator())
    scenes = [draw_canvas(0, grid)]
    cells = torch.arange(12 * 16)[None]
    words = model.model.language_model.embed_tokens.weight[: len(WORD_ID)]
    vision = symbolic_tokens(SceneFacts.of(scenes), cells, words, placed=False)
    packed = pack([draw_questions(random.Random(0), in_square(scenes[0].objects, grid), 30)])
    written = forward(model, vision, grid, packed).states[1][0, IMAGE_START : IMAGE_START + 192]
    for axis, (more, less) in enumerate((("bottom", "top"), ("right", "left"))):
        place = (written @ (words[WORD_ID[more]] - words[WORD_ID[less]])).view(grid).mean(dim=1 - axis)
        assert (place.diff() > 0).all()
        assert place[-1] - place[0] > 1.5


def test_symbolic_tokens_without_places_show_objects_alone():
    scenes = [draw_canvas(0, (8, 8))]
    words = new_model(SMALL, generator()).model.language_model.embed_tokens.weight[: len(WORD_ID)].detach()
    tokens = symbolic_tokens(SceneFacts.of(scenes), torch.arange(64)[None], words, placed=False)
    background = tokens.features[tokens.owner == 0]
    torch.testing.assert_close(background, words[WORD_ID["background"]].expand_as(background))
    loss, shares = token_loss(tokens.features, SceneFacts.of(scenes), words)
    assert shares == {"distance": 0, "color": 1, "kind": 1, "character": 1, "center_errors": 0}
    assert loss < token_loss(tokens.features.roll(1, dims=1), SceneFacts.of(scenes), words)[0]


# --- runs

SCHEDULE = {"steps": 4, "peak_rate": 1e-3, "final_rate": 1e-4, "warmup": 2, "log_every": 2}
DECODER = DecoderStage(
    shape=SMALL,
    placement=Placement(0, 0, 1, 2, 2),
    grids=GRIDS,
    scenes=2,
    vision_tokens=12,
    text_tokens=40,
    **SCHEDULE,
)
VISION = VisionStage(shape=SMALL, dense=((4, 4),), full=((8, 8),), dense_share=0.5, cells=32, **SCHEDULE)
JOINT = JointStage(**{**vars(DECODER), "first_seed": 99})


def new_run(kind, directory):
    if kind == "decoder":
        return DecoderRun(DECODER)
    if kind == "vision":
        return VisionRun(VISION)
    return JointRun(JOINT, directory / "decoder" / "checkpoint.pt", directory / "vision" / "checkpoint.pt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One run of each stage, not interrupted."""
    directory = tmp_path_factory.mktemp("runs")
    for kind in ("decoder", "vision", "joint"):
        list(train(new_run(kind, directory), directory / kind))
    return directory


@pytest.mark.parametrize("kind", ["decoder", "vision", "joint"])
def test_stopped_runs_end_with_the_same_bits(finished, kind, tmp_path):
    for _ in range(2):
        assert len(list(train(new_run(kind, finished), tmp_path, minutes=1e-9))) == 1
    assert list(train(new_run(kind, finished), tmp_path)) == []
    whole, stopped = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (finished / kind, tmp_path))
    for name in whole.keys() - {"step", "optimizer"}:
        assert all(torch.equal(whole[name][key], stopped[name][key]) for key in whole[name])
    logs = [(path / "log.jsonl").read_text().splitlines() for path in (finished / kind, tmp_path)]
    first, second = ([{**json.loads(line), "seconds": 0} for line in lines] for lines in logs)
    assert first == second


def test_joint_stage_trains_decoder_and_merger_alone(finished):
    run = new_run("joint", finished)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.restore(finished / "joint" / "checkpoint.pt")
    moved = {name for name, weight in run.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert any("language_model.layers.2" in name for name in moved)
    assert any("visual.merger" in name for name in moved)
    assert not any("visual.blocks" in name or "patch_embed" in name or "embed_tokens" in name for name in moved)


def test_what_ships_is_what_was_trained(finished):
    run = new_run("joint", finished)
    run.restore(finished / "joint" / "checkpoint.pt")
    model = assemble(SMALL, finished / "vision" / "checkpoint.pt", finished / "joint" / "checkpoint.pt")
    expected = run.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_joint_stage_sees_all_cells_or_all_centres():
    scenes = [draw_canvas(seed, (12, 12)) for seed in range(4)]
    facts = SceneFacts.of(scenes)
    chosen = [JointRun.choose(facts, generator(seed)) for seed in range(40)]
    counts = {cells.shape[1] for cells in chosen}
    assert max(counts) == 144
    assert 24 <= min(counts) < 60
    missed = [facts.center.sum() - facts.center.gather(1, cells).sum() for cells in chosen]
    assert sum(missed) <= 0.02 * len(chosen) * facts.center.sum()  # MISSED_CENTERS is 0.005


def test_scaffold_fades(finished):
    stage = DecoderStage()
    steps = stage.steps
    assert stage.guidance(0) == stage.guidance(int(0.6 * steps)) == stage.scaffold
    assert 0 < stage.guidance(int(0.8 * steps)) < stage.scaffold
    assert stage.guidance(int(0.9 * steps)) == stage.guidance(steps) == 0
    lines = [json.loads(line) for line in (finished / "decoder" / "log.jsonl").read_text().splitlines()]
    assert all({"scaffold", "ruler", "places", "asked"} < line.keys() for line in lines)


def test_scaffold_reads_nouns_behind_the_end_of_the_image(model, no_grad):
    """A scaffold that is told of <|vision_end|> supervises the words that ``references`` names."""
    grid = (8, 12)
    scene = draw_canvas(0, grid)
    objects = in_square(scene.objects, grid)
    packed = pack([draw_questions(random.Random(0), objects, 40)])
    facts = SceneFacts.of([scene])
    words = model.model.language_model.embed_tokens.weight[: len(WORD_ID)]
    vision = symbolic_tokens(facts, torch.arange(96)[None], words, placed=False)
    run = forward(model, vision, grid, packed)
    refs, jumps = references(packed, [objects]), hops(packed, [objects])
    scaffold = Scaffold(Placement(0, 0, 1, 2, 2), SMALL.hidden, IMAGE_START, AFTER_IMAGE)
    layers = model.model.language_model.layers
    told = scaffold(layers, run.states, run.mask, run.rotary, vision, refs, jumps)
    text = IMAGE_START + 96 + AFTER_IMAGE
    for noun in refs.noun.tolist():
        assert torch.equal(run.states[0][0, text + noun], words[packed.ids[0, noun]])
    scaffold.after_image = 0
    assert not torch.allclose(told, scaffold(layers, run.states, run.mask, run.rotary, vision, refs, jumps))


def test_config_has_the_tokens_of_the_vocabulary():
    config = config_of(QwenShape())
    assert config.image_token_id == TOKEN_ID["<image>"]
    assert config.vision_end_token_id == TOKEN_ID["<|vision_end|>"]
    assert config.text_config.vocab_size == len(TOKEN_ID)
