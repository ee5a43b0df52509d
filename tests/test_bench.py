"""The bench in a small setting: what it counts is checked, what it times is only asked for sense."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import visiontrim as vt
from families import CONFIGS
from releases import cache_of
from visiontrim import zoo
from visiontrim.cli import app
from visiontrim.measure import Clock
from visiontrim.measure.cost import costs
from visiontrim.measure.ideal import Ideal
from visiontrim.measure.memory import peak_bytes
from visiontrim.measure.noise import noise_prompt
from visiontrim.measure.plot import _style
from visiontrim.measure.shapes import Shape
from visiontrim.models.family import Picture, family_of


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("llava", Picture(56, 56)),
        ("llava_next", Picture(112, 112)),
        ("llava_onevision", Picture(112, 56)),
        ("video_llava", Picture(56, 56, 2)),
        ("qwen2_5_vl", Picture(112, 56)),
        ("qwen3_vl", Picture(112, 112)),
        ("internvl", Picture(112, 56)),
    ],
)
@torch.inference_mode()
def test_the_ideal_feeds_so_many_tokens(name, picture):
    model = Shape(name, name, CONFIGS[name](), picture).build("cpu", torch.float32, "sdpa")
    inputs = noise_prompt(family_of(model), picture, 8, 2)
    total = int(family_of(model).placeholders(inputs["input_ids"])[0].sum())
    expected = model(**inputs).logits
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "return_dict_in_generate": True}
    with Ideal(family_of(model), inputs, 3) as ideal:
        cache = cache_of(model.generate(**ideal.inputs, **options))
        assert {layer.keys.shape[-2] for layer in cache.layers} == {8 + 3 + 1}
    with Ideal(family_of(model), inputs, total) as ideal:
        everything = ideal.inputs if name.startswith("qwen") else inputs  # there positions are consecutive
        assert everything["input_ids"].shape == inputs["input_ids"].shape
        logits = model(**everything).logits
    assert logits.shape == expected.shape
    assert name.startswith("qwen") or torch.equal(logits, expected)
    assert torch.equal(model(**inputs).logits, expected)  # and everything is taken off again


def test_peak_memory_by_hand():
    def call():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second + torch.zeros(500).sum()

    assert peak_bytes(call, torch.device("cpu")) // 100 == 80  # two of 4,000 bytes; scalars beside


def test_a_clock_of_ticks_adds_up():
    model, ticks = zoo.load().model, itertools.count()
    inputs = noise_prompt(family_of(model), Picture(192, 192), 8, 1)
    with torch.inference_mode(), Clock(model, lambda: float(next(ticks))) as clock:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    # every border is a tick: encoder and projector, the prefill, two steps, and the whole
    seconds = clock.seconds
    assert seconds.pop("prefill") >= 1  # 3 in releases that encode within the first forward
    assert seconds == {"vision": 2, "method": 0, "decode": 2, "total": 11}


def test_the_command(tmp_path):
    arguments = ["bench", "bundled", "--method", "uniform", "--keep", "64", "--batch", "2", "--text", "12"]
    arguments += ["--answer", "2", "--rounds", "1", "--cpu-time", "--json", "--dtype", "float32", "--device", "cpu"]
    files = tmp_path / "speed.json", tmp_path / "speed.png"
    done = CliRunner().invoke(app, [*arguments, "--out", str(files[0]), "--plot", str(files[1])])
    told = json.loads(files[0].read_text())
    assert json.loads(done.stdout[done.stdout.index("{") :]) == told
    assert told["environment"]["dtype"] == "float32"
    rows = {row["name"]: row for row in told["batches"][0]["rows"]}
    assert {name: (row["kind"], row["tokens"]) for name, row in rows.items()} == {
        "plain": ("plain", 576),
        "uniform:keep=64": ("method", 64),
        "ideal of 64": ("ideal", 64),
    }
    formula = costs(Shape.load("bundled"), [vt.load_method("none"), vt.Uniform(keep=64)], text=12, answer=2, batch=2)
    for name, cost in zip(("plain", "uniform:keep=64"), formula, strict=True):
        assert rows[name]["kv_bytes"] == 2 * cost.kv_answer  # float32 here, float16 there
    assert rows["ideal of 64"]["kv_bytes"] == rows["uniform:keep=64"]["kv_bytes"]
    assert rows["uniform:keep=64"]["peak_bytes"] < rows["plain"]["peak_bytes"]
    for row in rows.values():
        assert row["seconds"]["total"][1] > row["seconds"]["prefill"][1] > 0
    assert rows["plain"]["seconds"]["method"] == [0, 0, 0]
    assert rows["plain"]["of_plain"]["total"] == [1, 1, 1]
    ours = rows["uniform:keep=64"]
    assert set(ours["ideal_of_ours"]) == {"decode", "total", "cpu"}
    assert ours["seconds"]["opening"][1] > 0
    for steps in (ours["step_ideal_of_ours"], rows["ideal of 64"]["step_noise"]):
        for low, middle, high in (steps["wall"], steps["cpu"]):
            assert 0 < low <= middle <= high
    assert Image.open(files[1]).width > 400


@torch.inference_mode()
def test_a_slice_of_a_preset_is_guided_by_noise():
    from visiontrim.measure.bench import noise_tower

    shape = Shape.load("llava-1.5-7b").narrow().sliced(2)
    assert shape.config.text_config.num_hidden_layers == 2
    assert shape.config.vision_config.num_hidden_layers == 2
    model = shape.build("cpu", torch.float32)
    tower, processor = noise_tower(family_of(model))
    inputs = noise_prompt(family_of(model), shape.picture, 8, 1)
    with vt.trim(model, "visiontrim", keep=64, question="a b", text_tower=tower, processor=processor) as run:
        model(**inputs)
    assert run.report.stages[0]["complement"] == 16
    with pytest.raises(vt.TrimError, match="layers=33"):
        Shape.load("llava-1.5-7b").sliced(33)


def test_help_reads_well():
    for command in ("cost", "bench"):
        text = CliRunner().invoke(app, [command, "--help"], terminal_width=120).stdout
        assert "Example" in text
        assert "docs/cost.md" in text or "at no cost" in text


def test_layers_are_for_presets():
    error = CliRunner().invoke(app, ["bench", "bundled", "--layers", "2"]).exception
    assert isinstance(error, vt.TrimError)
    assert "--layers is for presets" in str(error)


def test_lines_of_equal_times_are_told_apart():
    styles = [_style("", number) for number in range(8)]
    for name in ("fmt", "ms"):
        assert len({style[name] for style in styles[:5]}) == 5
    assert len({style["fmt"] for style in styles}) == 8
    widths = [style["lw"] for style in styles]
    assert widths == sorted(widths, reverse=True), "what is drawn over others is thinner"
    assert all(style["mfc"] == "none" for style in styles)
