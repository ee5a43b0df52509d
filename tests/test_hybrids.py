"""Models whose decoder has linear attention: they equal the plain model that is fed only the tokens that are left."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

import families
import visiontrim as vt
from families import IMAGE, Prompts, hidden_places
from fed import fed
from releases import CACHE
from tiny import Masked, close, generate
from visiontrim import zoo
from visiontrim.ask import encode, load
from visiontrim.cli import main
from visiontrim.core.method import EncoderLayer
from visiontrim.models import family_of

pytestmark = pytest.mark.usefixtures("no_grad")

PLANS = {
    "vision": vt.VisionTrim(keep=0.5),
    "language": vt.FastV(layer=3),
    "both": vt.Random(keep=0.5) | vt.Random(keep=0.5, layer=1) | vt.Random(keep=1, layer=3),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
model_of = functools.cache(families.build)


def check(model, inputs, hidden: dict[int, Tensor], answer: Tensor, logits: list[Tensor]) -> None:
    """``logits`` [vocabulary] of one row are those of the model that is fed only what is left."""
    of_row = {layer: places[0] for layer, places in hidden.items()}
    for mine, reference in zip(logits, fed(model, inputs, of_row, answer), strict=True):
        close(mine, reference, 2e-5)


def test_a_mask_with_holes_is_another_function():
    model, inputs = model_of("qwen3_5"), Prompts("qwen3_5", (3, "image", 5)).batch()
    with vt.trim(model, PLANS["vision"]) as run:
        ours = generate(model, inputs, max_new_tokens=1)
    hidden = hidden_places("qwen3_5", inputs, run.trace)
    attending = dict.fromkeys((1, 3), hidden[0])
    layers = family_of(model).language_model.layers
    with Masked(model, inputs["attention_mask"], attending) as masked:
        for handle, index in zip(masked.handles, range(len(layers)), strict=True):
            if index in family_of(model).recurrent:
                handle.remove()
        reference = generate(model, inputs, max_new_tokens=1)
    assert (ours.logits[0] - reference.logits[0]).abs().max() > 0.01


@every_plan
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}], ids=["beams", "no cache"])
def test_ways_to_generate(plan, options):
    model, prompts = model_of("qwen3_5"), Prompts("qwen3_5", (3, "image", 5), (1, "image", 2))
    inputs = prompts.batch()
    with vt.trim(model, plan) as run:
        ours = generate(model, inputs, max_new_tokens=4, output_scores=True, **options)
    hidden, mask = hidden_places("qwen3_5", inputs, run.trace), inputs["attention_mask"].bool()
    for row in range(2):
        answer = ours.sequences[row, mask.shape[1] :]
        of_row = {layer: places[row, mask[row]] for layer, places in hidden.items()}
        reference = torch.stack(fed(model, prompts.batch(row), of_row, answer))
        if "num_beams" in options:
            likelihood = reference.log_softmax(-1).gather(1, answer[:, None]).mean()
            close(ours.sequences_scores[row], likelihood, 2e-5)
        else:
            close(torch.stack(ours.logits)[:, row], reference, 2e-5)


@every_plan
def test_three_turns_on_one_cache(plan):
    model, inputs = model_of("qwen3_5"), Prompts("qwen3_5", (3, "image", 5)).batch()
    cache = DynamicCache(config=model.config.text_config)
    told = {key: value for key, value in inputs.items() if key != "pixel_values"}
    options = {CACHE: cache, "max_new_tokens": 3, "suppress_tokens": [IMAGE]}  # the oracle would look for its pixels
    with vt.trim(model, plan) as run:
        said = generate(model, inputs, **options)
        trace = run.trace
        for seed in (2, 3):
            question = torch.randint(10, 200, (1, 4), generator=torch.Generator().manual_seed(seed))
            told["input_ids"] = torch.cat([said.sequences, question], 1)
            told["attention_mask"] = torch.ones_like(told["input_ids"])
            told["mm_token_type_ids"] = (told["input_ids"] == IMAGE).long()
            said = generate(model, told, **options)
    answer = said.sequences[0, told["input_ids"].shape[1] :]
    whole = told | {"pixel_values": inputs["pixel_values"]}
    check(model, whole, hidden_places("qwen3_5", inputs, trace), answer, [step[0] for step in said.logits])
    assert cache.get_seq_length() == said.sequences.shape[1] - 1
    layers = [layer.keys.shape[-2] for layer in cache.layers if hasattr(layer, "keys")]
    gone = [trace.length - length for length in trace.cache_lengths if length]
    assert layers == [cache.get_seq_length() - count for count in gone]


def test_a_forward_with_labels():
    """The loss is that of the tokens that are left, each predicted by what is left before it."""
    model, inputs = model_of("qwen3_5"), Prompts("qwen3_5", (3, "image", 5)).batch()
    labels = inputs["input_ids"].clone()
    labels[labels == IMAGE] = -100
    with vt.trim(model, vt.Random(keep=0.5)) as run:
        ours = model(**inputs, labels=labels)
    text = (inputs["input_ids"][0] != IMAGE).nonzero()[:, 0]
    after = text[text > 10]
    hidden = {layer: places[0] for layer, places in hidden_places("qwen3_5", inputs, run.trace).items()}
    answer = inputs["input_ids"][0, after[1:]]
    short = {
        key: value[:, : int(after[0]) + 1] if value.ndim == 2 and len(value) == 1 else value
        for key, value in inputs.items()
    }
    short |= {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
    short_hidden = {layer: places[: int(after[0]) + 1] for layer, places in hidden.items()}
    reference = fed(model, short, short_hidden, answer)
    for place, expected in zip(after[:-1], reference, strict=True):
        close(ours.logits[0, place], expected, 2e-5)


@dataclass(frozen=True)
class Columns(vt.Step):
    """Merges columns 0 and 1, 2 and 3, ... of the grid, inside the encoder."""

    name: ClassVar[str] = "columns"

    @property
    def site(self) -> EncoderLayer:
        return EncoderLayer(1)

    def select(self, view: vt.View) -> vt.Keep:
        frames, rows, columns = view.encoder.lattice
        mean = view.features.view(len(view.features), -1, 2, view.features.shape[-1]).mean(2)
        pairs = torch.arange(frames * rows * columns // 2).expand(len(mean), -1)
        return vt.Keep(2 * pairs, mean, pairs.repeat_interleave(2, 1), lattice=(frames, rows, columns // 2))


def test_what_merged_in_the_encoder_is_that_of_a_hand_run_tower():
    """One picture of 4 x 4 units: after block 0 the means of neighbouring units, at the means of their places."""
    model, inputs = model_of("qwen3_5"), Prompts("qwen3_5", (3, "image", 5)).batch()
    tower, seen = model.model.visual, {}
    hook = tower.blocks[0].register_forward_hook(
        lambda m, args, kwargs, output: seen.update(kwargs, out=output), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    hidden = seen["out"].view(8, 2, 4, -1).mean(1).flatten(0, 1)
    corners = torch.cartesian_prod(torch.arange(0, 8, 2), torch.arange(1, 8, 4))[:, None]
    places = (corners + torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])).flatten(0, 1).float()
    rotary = tower.rotary_pos_emb(hidden, places)
    for block in tower.blocks[1:]:
        hidden = block(
            hidden, cu_seqlens=torch.tensor([0, 32], dtype=torch.int32), max_seqlen=32, position_embeddings=rotary
        )
    got = {}
    with vt.trim(model, Columns()):
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, args: got.update(states=args[0])
        )
        model(**inputs)
        hook.remove()
    close(got["states"][0, 5:13], tower.merger(hidden), 1e-4)


def test_patches_dropped_before_the_encoder_leave_a_batch_equal_to_its_rows():
    model, rows = model_of("qwen3_5"), Prompts("qwen3_5", (3, "image", 5), (1, "image", 2, "image", 7), (6,))
    with vt.trim(model, vt.LUVC(stages="vision", calls=1, spectrum="tokens")):
        together = generate(model, rows.batch(), max_new_tokens=3)
        for row in range(3):
            alone = generate(model, rows.batch(row), max_new_tokens=3)
            for a, b in zip(together.logits, alone.logits, strict=True):
                close(a[row], b[0], 2e-5)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (vt.FastV(), {}, r"decoder layer 2 has linear attention or a convolution.* full attention, 1, 3"),
        (vt.DyCoke(view_layer=3), {}, r"would see a part of the vision tokens, but layers with linear attention"),
        (vt.AvgPool(keep=0.25), {"positions": "unmerged"}, r"has a recurrence instead, which takes every token once"),
        (vt.Random(keep=0.5), {"positions": "compact"}, r"needs one position per token"),
    ],
    ids=["before linear attention", "decoding", "unmerged", "compact"],
)
def test_what_cannot_work_says_why(method, options, message):
    model = model_of("qwen3_5")
    with pytest.raises(vt.TrimError, match=message), vt.trim(model, method, **options):
        model(**Prompts("qwen3_5", (3, "image", 5)).batch())


def test_padding_inside_a_conversation_is_refused():
    """Convolutions would see it between the turns."""
    model = model_of("qwen3_5")
    first = Prompts("qwen3_5", (3, "image", 5), (3, "image", 5)).batch()
    second = Prompts("qwen3_5", (3, "image", 1), (3, "image", 1), seed=2).batch()
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, vt.Random(keep=0.5)):
        model(**first, **{CACHE: cache})
        length = second["input_ids"].shape[1]
        positions = torch.arange(length).expand(3, 2, length) + cache.get_seq_length()
        del second["attention_mask"]
        with pytest.raises(vt.TrimError, match=r"rows of a further turn.*one conversation at a time"):
            model(**second, **{CACHE: cache}, position_ids=positions)


# ------------------------------------------------------------------------------------------------ a saved checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny Qwen3.5 with the bundled Qwen's processor, saved as checkpoints are."""
    bundled, processor = zoo.load_qwen()
    model = families.build("qwen3_5")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = model.config.to_dict() | {name: getattr(bundled.config, name) for name in names}
    config["vision_config"] |= {"patch_size": bundled.config.vision_config.patch_size}
    config["text_config"] |= {"vocab_size": bundled.config.text_config.vocab_size}
    folder = tmp_path_factory.mktemp("qwen3_5")
    torch.manual_seed(0)
    type(model)(type(model.config).from_dict(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_ask(checkpoint, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").convert("RGB").resize((240, 120)).save(picture)
    arguments = ["ask", picture, "what is left?", "--model", checkpoint, "--keep", "0.3", "--compare", "--json"]
    monkeypatch.setattr(sys, "argv", ["visiontrim", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = json.loads(capsys.readouterr().out)
    assert not stopped.value.code
    assert told["tokens"]["input"] == 200
    assert told["tokens"]["kept"] == 60
    assert told["plain"]["tokens"]["kept"] == 200
    assert told["kv_bytes"] < 0.5 * told["plain"]["kv_bytes"]


def test_two_turns_of_a_checkpoint(checkpoint):
    """The second turn, on the cache of the first, is as the model's that is fed only what is left."""
    speaker = load(checkpoint)
    model: Any = speaker.model
    inputs = dict(encode(speaker, [Image.linear_gradient("L").convert("RGB").resize((96, 120))], "what is left?"))
    cache = DynamicCache(config=model.config.text_config)
    image = model.config.image_token_id
    options = {CACHE: cache, "max_new_tokens": 4, "suppress_tokens": [image], "eos_token_id": None}
    with vt.trim(
        model, "visiontrim:variant=lean", keep=0.3, processor=speaker.processor, question="what is left?"
    ) as run:
        first = generate(model, inputs, **options)
        trace = run.trace
        told = {"input_ids": torch.cat([first.sequences, torch.tensor([[20, 21, 22]])], 1)}
        told["attention_mask"] = torch.ones_like(told["input_ids"])
        told["mm_token_type_ids"] = (told["input_ids"] == image).long()
        told["image_grid_thw"] = inputs["image_grid_thw"]
        second = generate(model, told, **options)
    (part,) = trace.images
    assert len(part.stages[0].index) == round(0.3 * part.total)
    gone = torch.ones(part.total, dtype=torch.bool)
    gone[part.stages[0].index] = False
    hidden = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    hidden[0, (inputs["input_ids"] == image)[0]] = gone
    answer = second.sequences[0, told["input_ids"].shape[1] :]
    check(
        model, told | {"pixel_values": inputs["pixel_values"]}, {0: hidden}, answer, [step[0] for step in second.logits]
    )
