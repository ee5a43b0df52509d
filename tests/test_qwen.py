"""The small Qwen2.5-VL that ships: its files, stock loading, what it answers, and how it is scored."""

import hashlib
import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from visiontrim import trim
from visiontrim.core.errors import TrimError
from visiontrim.zoo import QWEN_DIR, answer, held_out_canvases, load_qwen
from visiontrim.zoo.canvas_scores import blind_canvas_answers, parse_grid, pooled
from visiontrim.zoo.dynamic import QWEN_TYPES
from visiontrim.zoo.evaluate import Scores

WEIGHTS = "203d73471a9cba1767551e775f81cba1e20b8391b8efe82024a7824ecea409c0"


@pytest.fixture(scope="module")
def bundle():
    return load_qwen()


def test_weights_are_the_measured_ones():
    file = QWEN_DIR / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == WEIGHTS
    assert file.stat().st_size <= 12e6


def test_stock_loading_finds_everything(bundle):
    model, info = AutoModelForImageTextToText.from_pretrained(QWEN_DIR, output_loading_info=True)
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(QWEN_DIR)
    assert processor.tokenizer.get_vocab() == bundle.processor.tokenizer.get_vocab()
    assert processor.image_processor.patch_size * processor.image_processor.merge_size == 12


@pytest.mark.parametrize("size", [(192, 144), (140, 100), (500, 250)])
def test_any_picture_becomes_cells(bundle, size):
    """Width and height are rounded to cells of 12 pixels; large pictures shrink to at most 400 cells."""
    picture = next(held_out_canvases((8, 8), 1)).image.resize(size)
    inputs = bundle.processor(images=picture, text="USER: <image> where is the star ? ASSISTANT:", return_tensors="pt")
    _, rows, cols = inputs["image_grid_thw"][0].tolist()
    cells = rows // 2 * (cols // 2)
    assert (inputs["input_ids"] == bundle.model.config.image_token_id).sum() == cells
    assert 64 <= cells <= 400
    assert cols / rows == pytest.approx(size[0] / size[1], rel=0.1)
    if size == (192, 144):
        assert (rows, cols) == (24, 32)


def test_chat_template_gives_the_prompt(bundle):
    sample = next(held_out_canvases((8, 8), 1))
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    chat = [{"role": "user", "content": content}]
    assert bundle.processor.apply_chat_template(chat, add_generation_prompt=True).split() == sample.prompt.split()


def test_answers_about_canvases_of_three_sizes(bundle):
    """A hundred questions; every type is well above guessing."""
    torch.set_num_threads(1)
    right, total = Counter(), Counter()
    for grid in ((12, 12), (12, 16), (16, 10)):
        samples = list(held_out_canvases(grid, 6))
        for sample, said in zip(samples, answer(bundle.model, bundle.processor, samples), strict=True):
            right[sample.type] += said == sample.answer
            total[sample.type] += 1
    assert total.total() >= 100
    assert right.total() >= 0.9 * total.total(), (right, total)
    assert all(right[type] >= 0.7 * total[type] for type in QWEN_TYPES), (right, total)


def test_samples_repeat_and_know_their_objects():
    first, second = (list(held_out_canvases((10, 14), 3)) for _ in range(2))
    assert [(s.question, s.answer) for s in first] == [(s.question, s.answer) for s in second]
    assert {sample.type for sample in first} <= set(QWEN_TYPES)
    assert all(sample.patch_owner.shape == (140,) for sample in first)
    assert all("<|vision_start|><image><|vision_end|>" in sample.prompt for sample in first)


def test_blind_answers_depend_on_the_question_alone(monkeypatch):
    monkeypatch.setattr("visiontrim.zoo.canvas_scores.BLIND_SCENES", 40)
    samples = list(held_out_canvases((8, 8), 6))
    guesses = blind_canvas_answers(samples, (8, 8))
    by_text = {}
    for sample, guess in zip(samples, guesses, strict=True):
        assert by_text.setdefault(sample.question, guess) == guess
    assert all(guess in ("yes", "no") for sample, guess in zip(samples, guesses, strict=True) if sample.type == "exist")


def test_sizes_are_pooled():
    one = Scores(2, {"all": {"color": (1, 2), "rel": (1, 1), "all": (2, 3)}, "blind": {"color": (0, 2), "all": (0, 3)}})
    two = Scores(3, {"all": {"count": (2, 2), "all": (2, 2)}, "blind": {"color": (1, 1), "all": (1, 2)}})
    both = pooled([one, two])
    assert both.scenes == 5
    assert list(both.tallies["all"]) == ["color", "count", "rel", "all"]
    assert both.tallies == {
        "all": {"color": (1, 2), "count": (2, 2), "rel": (1, 1), "all": (4, 5)},
        "blind": {"color": (1, 3), "all": (1, 5)},
    }


def test_grid_of_a_text():
    assert parse_grid("16x12") == (16, 12)
    for text in ("16", "16x", "4x16", "axb", "16x12x1"):
        with pytest.raises(TrimError, match="rows and columns"):
            parse_grid(text)


def test_config_is_the_one_of_training():
    config = json.loads((QWEN_DIR / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [2, 8, 22]
    assert config["vision_config"]["fullatt_block_indexes"] == [2, 5]


@pytest.mark.parametrize("method", ["none", "visiontrim:keep=8", "random:keep=8,layer=2"])
def test_the_report_counts_positions_as_mrope_does(bundle, monkeypatch, method):
    """A picture takes as many positions as its longer side has cells; the note comes with the first one too many."""
    sample = next(held_out_canvases((8, 12), 1))
    inputs = bundle.processor(images=list(sample.images), text=sample.prompt, return_tensors="pt")
    cells = int((inputs["input_ids"] == bundle.model.config.image_token_id).sum())
    assert cells == 96
    length = inputs["input_ids"].shape[1] - cells + 12
    positions, _ = bundle.model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    assert int(positions.max()) + 1 == length
    notes = []
    for limit in (length, length - 1):
        monkeypatch.setattr(bundle.model.config.text_config, "max_position_embeddings", limit)
        with trim(bundle.model, method, question=sample.question, processor=bundle.processor) as run:
            bundle.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        notes.append(run.report.notes)
    told = f"the prompt takes {length} positions, the model was made for {length - 1}: its answers may be of no use"
    assert notes == [(), (told,)]
