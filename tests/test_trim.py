"""The entrance: what it refuses, and how questions, text towers and pictures reach a run."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

import tiny
import visiontrim as vt
from tiny import llava, prompts, sample
from visiontrim.measure import Clock
from visiontrim.models.text import MAX_WINDOWS
from visiontrim.report import scaled

WORDS = ["<pad>", "<s>", "</s>", "what", "is", "the", "color", "shape", "of", "star", "circle", "red"]
CONTEXT = 8


@pytest.fixture(scope="module")
def model():
    return llava()


@pytest.fixture
def inputs():
    return prompts((3, "image", 5))


def tokenizer(special: bool) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


def tower(vision_width: int = 32) -> vt.TextTower:
    torch.manual_seed(3)
    text = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, projection_dim=12, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=vision_width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
        patch_size=14,
    )  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8.0)
    return vt.TextTower(clip, tokenizer(special=True))


def kept(run: vt.Run, number: int = 0) -> list[int]:
    return run.trace.images[number].stages[-1].index.tolist()


def answer(model, inputs, method, **options) -> tuple[torch.Tensor, vt.Run]:
    with torch.no_grad(), vt.trim(model, method, **options) as run:
        return model(**inputs).logits, run


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("keep", [0, -3, float("nan"), 0.0, 1.5, -0.2, True, "many"])
def test_impossible_keep(model, keep):
    with pytest.raises(vt.TrimError, match=r"keep=.*(keeps nothing|not a fraction|not a number).*give"):
        vt.trim(model, "visiontrim", keep=keep)


@pytest.mark.parametrize("method", ["visiontrim", "random", "uniform"])
def test_more_than_the_image_has(model, inputs, method):
    """A number is one at most: the picture passes whole, and the report says so."""
    ours, run = answer(model, inputs, method, keep=17)
    assert torch.equal(ours, answer(model, inputs, "none")[0])
    assert run.report.kept_tokens == 16
    (note,) = run.report.notes
    assert "no more than keep=17 tokens and pass" in note
    assert note in str(run.report)
    assert answer(model, inputs, method, keep=15)[1].report.notes == ()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("visontrim", "unknown method 'visontrim': did you mean 'visiontrim'"),
        ("zzz", "unknown method 'zzz': choose from "),
        ("random:sead=1", "random has no option 'sead': did you mean 'seed'"),
        ("random:keep", "'keep' is no option; write NAME:key=value"),
        ("missing.yaml", "the recipe missing.yaml cannot be read"),
        ("random:layer=9", "acts before decoder layer 9, but the model has 5 layers"),
        ("random:layer=2 | random:keep=3", "order them from the vision encoder"),
        ("random:layer=0", "a language stage stands before decoder layer 1 or a later one"),
    ],
)
def test_methods_that_do_not_exist(model, spec, message):
    with pytest.raises(vt.TrimError) as error:
        vt.trim(model, spec)
    assert message in str(error.value)


def test_keep_is_ambiguous_for_a_plan(model):
    with pytest.raises(vt.TrimError, match="keep is ambiguous for the plan"):
        vt.trim(model, vt.Random(keep=8) | vt.Random(keep=4, layer=2), keep=3)


def test_unknown_positions(model):
    with pytest.raises(vt.TrimError, match="positions='gaps': choose from 'keep', 'compact', 'members'"):
        vt.trim(model, positions="gaps")


def test_unsupported_families():
    bert = BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(
        vt.TrimError,
        match=r"BertModel \(model_type 'bert'\) is not supported.*known are .*gemma3, .*idefics3, internvl, .*llava",
    ):
        vt.trim(bert)


@pytest.mark.parametrize("bare", [True, False], ids=["forward", "generate"])
def test_prompts_that_do_not_fit(model, inputs, bare):
    def run(**changed):
        given = {key: value for key, value in (inputs | changed).items() if value is not None}
        with vt.trim(model, "random", keep=4):
            return model(**given) if bare else model.generate(**given, max_new_tokens=2)

    ids = inputs["input_ids"]
    text = ids.masked_fill(ids == tiny.IMAGE, 11)
    with pytest.raises(vt.TrimError, match=r"15 image placeholders \(15 by row\) but the 1 images give 16"):
        run(input_ids=ids[:, :-6], attention_mask=inputs["attention_mask"][:, :-6])
    with pytest.raises(vt.TrimError, match=r"0 image placeholders .* but the 1 images give 16 vision tokens"):
        run(input_ids=text)
    with pytest.raises(vt.TrimError, match="pass input_ids"):
        run(input_ids=None, inputs_embeds=model.get_input_embeddings()(ids))
    features = model.get_image_features(inputs["pixel_values"])
    with pytest.raises(vt.TrimError, match="pass pixel_values"):
        run(pixel_values=None, mm_encoder_outputs={"image": features})
    if not bare:
        with pytest.raises(vt.TrimError, match="16 image placeholders but no pixel_values"):
            run(pixel_values=None)
    run(input_ids=text, pixel_values=None)  # text alone is answered as ever


def test_no_report_without_an_image(model, inputs):
    text = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, 11)
    with vt.trim(model, "random", keep=4) as run:
        model(input_ids=text)
    with pytest.raises(vt.TrimError, match="no prompt with an image has passed through this run"):
        print(run.report)


def test_what_needs_equal_cache_layers(model, inputs):
    with (
        vt.trim(model, vt.Random(keep=4, layer=2)),
        pytest.raises(vt.TrimError, match=r"prefill_chunk_size=8 .*: use None"),
    ):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)
    with vt.trim(model, "random", keep=4):
        length = inputs["input_ids"].shape[1]
        four_d = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        with pytest.raises(vt.TrimError, match="attention_mask is not 2-D"):
            model(**inputs | {"attention_mask": four_d})


@dataclass(frozen=True)
class Wrong(vt.Random):
    """Answers something that cannot belong to the view."""

    part: str = "index"
    name: ClassVar[str] = "wrong"

    def select(self, view: vt.View) -> vt.Keep:
        keep = super().select(view)
        parts = {"index": keep.index.repeat(1, 5), "assignment": keep.index}
        return dataclasses.replace(keep, **{self.part: parts[self.part]})


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("part", ["index", "assignment"])
def test_answers_that_cannot_belong_to_the_view(model, inputs, part, layer):
    with pytest.raises(vt.TrimError, match=rf"the method wrong:keep=4.* answered {part} of shape \(1, "):
        answer(model, inputs, Wrong(keep=4, layer=layer, part=part))


# ------------------------------------------------------------------------------------------------ questions


@pytest.mark.parametrize("question", ["", "   ", ["what is red", ""], [3]])
def test_empty_questions(model, question):
    with pytest.raises(vt.TrimError, match="give the text of the question"):
        vt.trim(model, question=question, text_tower=tower())


def test_question_that_nothing_can_read(model):
    with pytest.raises(vt.TrimError, match="pass text_tower= or processor="):
        vt.trim(model, question="what is red")
    vt.trim(model, "random", question="what is red")  # not guided by text, so never read


def test_text_towers_that_do_not_fit(model):
    with pytest.raises(vt.TrimError, match="features of width 20, but the vision encoder gives 32"):
        vt.trim(model, question="what is red", text_tower=tower(vision_width=20))
    with pytest.raises(vt.TrimError, match=r"pass TextTower\(model, tokenizer\)"):
        vt.trim(model, question="what is red", text_tower=tower().model)
    with pytest.raises(vt.TrimError, match="is no text tower"):
        vt.TextTower(model, tokenizer(special=True))


@pytest.mark.parametrize(
    "guide", [{"text_tower": tower()}, {"processor": tokenizer(special=False)}], ids=["tower", "lm"]
)
def test_the_question_decides_what_complements(model, inputs, guide):
    method = vt.VisionTrim(keep=8, split=0.5, stages="vision", iterations=0)
    _, silent = answer(model, inputs, method, **guide)
    assert not silent.trace.images[0].stages[0].complement.any()
    chosen = {}
    for question in ("what is red", "shape of the circle"):
        _, run = answer(model, inputs, method, question=question, **guide)
        stage = run.trace.images[0].stages[0]
        assert int(stage.complement.sum()) == 4
        assert run.report.stages == ({"site": "vision", "dominant": 4, "complement": 4},)
        assert int((stage.assignment >= 0).sum()) == 8, "nothing is merged"
        _, merging = answer(model, inputs, dataclasses.replace(method, iterations=1), question=question, **guide)
        merged = merging.trace.images[0].stages[0]
        assert torch.equal(merged.index, stage.index)
        assert (merged.assignment >= 0).all(), "every leftover goes to a centre"
        chosen[question] = kept(run)
    assert len(set(map(tuple, chosen.values()))) == 2


@pytest.mark.parametrize("iterations", [0, 2])
@pytest.mark.parametrize("stages", ["vision", "language", "both"])
def test_every_row_has_its_own_question(model, stages, iterations):
    batch = prompts((3, "image", 5), (6,), (1, "image", 2, "image", 7))
    questions = ["what is red", "shape", "color of the star"]
    method = vt.VisionTrim(keep=10, split=0.5, stages=stages, iterations=iterations)
    together, run = answer(model, batch, method, question=questions, text_tower=tower())
    number = 0
    for row, question in enumerate(questions):
        alone, single = answer(model, sample(batch, row), method, question=question, text_tower=tower())
        torch.testing.assert_close(together[row, -1], alone[0, -1], rtol=0, atol=1e-5)
        for image in range(len(single.trace.images) if row != 1 else 0):
            assert kept(run, number) == kept(single, image)
            assert run.trace.images[number].sample == row
            number += 1
    assert number == len(run.trace.images) == 3


def test_question_can_change_within_a_run(model, inputs):
    method = vt.VisionTrim(keep=8, split=0.5, stages="vision")
    with torch.no_grad(), vt.trim(model, method, text_tower=tower()) as run:
        seen = []
        for question in ("what is red", "shape of the circle", None):
            run.question = question
            model(**inputs)
            seen.append(kept(run))
    assert run.question == ()
    assert len(set(map(tuple, seen))) == 3


def test_number_of_questions_must_fit(model):
    batch = prompts((3, "image", 5), (1, "image"))
    with pytest.raises(vt.TrimError, match="3 questions for a batch of 2"):
        answer(model, batch, "visiontrim:keep=4", question=["red"] * 3, text_tower=tower())


def test_long_questions_are_read_in_windows(model, inputs):
    text = tower()
    words = ["what", "is", "the", "color", "of", "the", "red", "star", "and", "the", "shape", "of", "the", "circle"]
    short, long = " ".join(words[:5]), " ".join(words)
    encoded = text.encode([short, long])
    assert encoded.mask.sum(1).tolist() == [5 + 2, len(words) + 2 * 3]
    torch.testing.assert_close(text.encode([short]).tokens[0], encoded.tokens[0, : 5 + 2])
    assert not encoded.tokens.isnan().any()
    with pytest.raises(vt.TrimError, match=f"over {MAX_WINDOWS} windows of the text tower's {CONTEXT}: shorten it"):
        answer(model, inputs, "visiontrim:keep=4", question="red " * (CONTEXT * MAX_WINDOWS), text_tower=text)


def test_text_tower_from_a_directory(model, inputs, tmp_path):
    made = tower()
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    method = vt.VisionTrim(keep=8, split=0.5, stages="vision")
    direct, _ = answer(model, inputs, method, question="what is red", text_tower=made)
    loaded, _ = answer(model, inputs, method, question="what is red", text_tower=str(tmp_path))
    torch.testing.assert_close(direct, loaded)


def test_text_tower_of_half_precision_reads_in_full(model, inputs, tmp_path):
    made = tower()
    made.tokenizer.save_pretrained(tmp_path)
    made.model.half().save_pretrained(tmp_path)
    made.model.float()
    method = vt.VisionTrim(keep=8, split=0.5, stages="vision")
    direct, _ = answer(model, inputs, method, question="what is red", text_tower=made)
    loaded, _ = answer(model, inputs, method, question="what is red", text_tower=str(tmp_path))
    assert torch.equal(direct, loaded)


# ------------------------------------------------------------------------------------------------ what a run says


def test_report_speaks_in_a_line_a_table_and_json(model, inputs):
    _, run = answer(model, inputs, vt.VisionTrim(keep=(9, 4), stages="both", layer=2), processor=tokenizer(False))
    line = str(run.report)
    assert "16 -> 9 vision tokens, mean 6.0 per layer | KV 32 -> " in line
    assert "\n" not in line
    assert json.loads(json.dumps(run.report.to_dict()))["per_layer"] == [9, 9, 4, 4, 4]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(run.report.table())
    text = console.export_text()
    assert "mean per layer" in text
    assert "100.0%" not in text


def test_recipes_equal_objects(model, inputs, tmp_path):
    plan = vt.VisionTrim(keep=8, fusion="max") | vt.Random(keep=0.5, layer=2, seed=3)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(plan.to_dict()))
    assert vt.load_method(path) == plan
    by_object, _ = answer(model, inputs, plan)
    by_recipe, _ = answer(model, inputs, path)
    by_text, _ = answer(model, inputs, "visiontrim:keep=8,fusion=max | random:keep=0.5,layer=2,seed=3")
    assert torch.equal(by_object, by_recipe)
    assert torch.equal(by_object, by_text)


def test_pictures(model, inputs):
    _, run = answer(model, inputs, "random", keep=4)
    picture = run.picture(Image.new("RGB", (56, 56), "red"))
    assert picture.width >= 56
    with pytest.raises(vt.TrimError, match=r"there is no image 1: the prompt had 1"):
        run.picture(Image.new("RGB", (56, 56)), number=1)


def test_clock_parts_add_up(model, inputs):
    with Clock(model) as clock, vt.trim(model, vt.VisionTrim(keep=4, stages="both"), clock=clock):
        model.generate(**inputs, max_new_tokens=3)
    parts = {name: clock.seconds[name] for name in ("vision", "method", "prefill", "decode")}
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) <= clock.seconds["total"]
    with Clock(model) as plain:
        model.generate(**inputs, max_new_tokens=3)
    assert plain.seconds["method"] == 0
    assert plain.seconds["prefill"] > 0


def test_flash_layers_never_see_gapped_positions(inputs):
    """A stand-in for flash attention, which reads gaps in position_ids as borders of packed sequences."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    seen = []

    def fake_flash(module, query, key, value, mask, **kwargs):
        if getattr(module, "layer_idx", None) is not None:
            seen.append((query.shape[2], kwargs.get("position_ids")))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("fake_flash", fake_flash)
    AttentionMaskInterface.register("fake_flash", sdpa_mask)
    model = llava()
    plain, _ = answer(model, inputs, "random", keep=4)
    for config in (model.config.text_config, model.model.language_model.config):
        config._attn_implementation_internal = "fake_flash"
    ours, _ = answer(model, inputs, "random", keep=4)
    assert torch.equal(ours, plain)
    assert [positions for length, positions in seen if length == 13] == [None] * tiny.LAYERS


def test_one_number_has_one_unit():
    assert scaled(999, "B") == "999 B"
    assert scaled(885_000, "B") == "885 kB"
    assert scaled(885_000, "B", 7_180_000) == "0.885 MB"
    assert scaled(7_180_000, "B", 7_180_000) == "7.18 MB"
    assert scaled(5e16, "FLOP") == "5e+04 TFLOP"


def test_a_tower_reads_a_question_once_over_all_runs():
    reader, model = tower(), llava()
    read = []
    reader.model.text_model.register_forward_hook(lambda *_: read.append(1))
    inputs = prompts((3, "image", 5))

    def asked(question):
        with vt.trim(model, vt.VisionTrim(keep=6), question=question, text_tower=reader) as run:
            model(**inputs)
        return torch.tensor(kept(run))

    with torch.inference_mode():
        first = asked("a b")
    assert torch.equal(asked("a b"), first)
    assert len(read) == 1
    asked("b c")
    asked("a b")
    assert len(read) == 2
    with torch.no_grad():  # other weights read something else
        reader.model.text_projection.weight.neg_()
    text = reader.encode(["a b"])
    assert len(read) == 3
    assert torch.equal(text.tokens, vt.TextTower(reader.model, reader.tokenizer).encode(["a b"]).tokens)
    reader.forget()
    asked("a b")
    assert len(read) == 5
    assert not text.tokens.is_inference()
