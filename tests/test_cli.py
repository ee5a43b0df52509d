"""The command line: what it prints where, exit codes, and one clear sentence for every mistake."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from PIL import Image

from visiontrim import zoo
from visiontrim.ask import FALLBACK_PROMPT, encode, load
from visiontrim.core.errors import TrimError
from visiontrim.core.registry import list_methods
from visiontrim.zoo import held_out

SAMPLES = list(held_out(2))


@pytest.fixture(autouse=True)
def _restore_verbosity():
    loggers = (transformers.utils.logging, huggingface_hub.utils.logging)
    verbosities = [logging.get_verbosity() for logging in loggers]
    yield
    for logging, verbosity in zip(loggers, verbosities, strict=True):
        logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    SAMPLES[0].image.save(path)
    return str(path)


def command(*arguments: object, **options) -> subprocess.CompletedProcess:
    program = [sys.executable, "-c", "from visiontrim.cli import main; main()"]
    return subprocess.run([*program, *map(str, arguments)], timeout=300, **options)


QUESTION = SAMPLES[0].question


# --- ask -------------------------------------------------------------------------------------------------------------


def test_ask_prints_the_answer_and_the_report(cli, scene):
    code, out, err = cli("ask", scene, QUESTION)
    assert (code, err) == (0, "")
    answer, report = out.splitlines()
    assert answer.strip()
    assert "576 -> 146 vision tokens, mean 64.2 per layer" in report


def test_json_is_one_object(cli, scene):
    code, out, err = cli("ask", scene, QUESTION, "--json", "--keep", "0.25", "--method", "random:seed=3")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert out.count("\n") == 1
    assert told["tokens"] == {"images": 1, "input": 576, "kept": 144, "per_layer": [144] * 8, "mean": 144.0}
    assert told["method"] == {"method": "random", "keep": 0.25, "layer": None, "seed": 3}
    assert told["model"] == "bundled"
    assert told["trace"] == {"vision": {"dominant": 144, "complement": 0}}
    assert told["kv_bytes"] > 0
    parts = told["seconds"]
    assert set(parts) == {"vision", "method", "prefill", "decode", "total"}
    assert sum(parts.values()) - parts["total"] <= parts["total"]
    assert not {"map", "plain"} & set(told)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("1", 1), ("64", 64), ("576", 576), ("1.0", 576), ("0.5", 288), ("600", 576), ("1" + "0" * 30, 0)],
)
def test_keep_is_a_number_or_a_fraction(cli, scene, keep, kept):
    code, out, err = cli("ask", scene, QUESTION, "--keep", keep, "--method", "uniform", "--json")
    if not kept:
        assert (code, out) == (2, "")
        assert "64 bits" in err
        return
    told = json.loads(out)
    assert told["tokens"]["kept"] == kept
    whole = f"the image has no more than keep={keep} tokens and passes whole"
    assert told["notes"] == ([whole] if keep in ("576", "600") else [])


def test_compare(cli, scene, tmp_path):
    picture = tmp_path / "kept.png"
    told = json.loads(cli("ask", scene, QUESTION, "--compare", "--json", "--map", picture)[1])
    plain = told["plain"]
    assert plain["tokens"]["kept"] == 576
    assert plain["answer"] == SAMPLES[0].answer
    assert plain["kv_bytes"] > 5 * told["kv_bytes"]
    assert told["trace"]["vision"] == {"dominant": 110, "complement": 36}
    assert told["map"] == str(picture)
    assert Image.open(picture).width == 768


def test_compare_table(cli, scene):
    code, out, err = cli("ask", scene, QUESTION, "--compare", "--keep", "64")
    assert (code, err) == (0, "")
    cells = {line.split("│")[1].strip(): line.split("│")[2:5] for line in out.splitlines() if line.count("│") > 4}
    assert [cell.strip() for cell in cells["vision tokens in"]] == ["576", "146", "75%"]
    assert cells["answer"][0].strip() == SAMPLES[0].answer
    assert cells["method"][0].strip() == "0.0 ms"


def test_brackets_in_an_answer_are_no_markup(cli, scene, monkeypatch):
    speaker = load()
    monkeypatch.setattr(speaker.processor.tokenizer, "decode", lambda *_, **__: "[/red] [bold]")
    monkeypatch.setattr("visiontrim.ask.load", lambda *_, **__: speaker)
    for arguments in ((), ("--compare",)):
        code, out, _ = cli("ask", scene, QUESTION, *arguments)
        assert code == 0
        assert "[/red] [bold]" in out


def test_everything_kept_answers_like_the_zoo(cli, tmp_path):
    bundle = zoo.load()
    expected = zoo.answer(bundle.model, bundle.processor, SAMPLES[:3])
    SAMPLES[0].image.save(tmp_path / "scene.png")
    for sample, answer in zip(SAMPLES[:3], expected, strict=True):
        told = json.loads(cli("ask", tmp_path / "scene.png", sample.question, "--method", "none", "--json")[1])
        assert told["answer"] == answer


def test_recipe_file(cli, scene, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: random\nkeep: 32\n")
    told = json.loads(cli("ask", scene, QUESTION, "--method", recipe, "--json")[1])
    assert (told["tokens"]["kept"], told["method"]["method"]) == (32, "random")


def test_model_and_text_tower_from_directories(cli, scene):
    common = ("ask", scene, QUESTION, "--json", "--keep", "48")
    bundled = json.loads(cli(*common)[1])
    given = json.loads(cli(*common, "--model", zoo.MODEL_DIR, "--text-tower", zoo.CLIP_DIR)[1])
    assert given.pop("model") == str(zoo.MODEL_DIR)
    assert bundled.pop("model") == "bundled"
    for told in (given, bundled):
        told.pop("seconds")
    assert given == bundled


# --- map, methods, version -------------------------------------------------------------------------------------------


def test_map(cli, scene, tmp_path):
    code, out, err = cli("map", scene, QUESTION, "-o", tmp_path / "kept.jpg")
    assert (code, out, err) == (0, f"{tmp_path / 'kept.jpg'}\n", "")
    with Image.open(tmp_path / "kept.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.width == 768


def test_a_map_names_method_budget_and_question(cli, scene, tmp_path, monkeypatch):
    written: list[str] = []
    monkeypatch.setattr("visiontrim.picture.captioned", lambda image, text: written.append(text) or image)
    assert cli("map", scene, QUESTION, "-o", tmp_path / "a.png", "--keep", "32")[0] == 0
    assert cli("ask", scene, QUESTION, "--map", tmp_path / "b.png", "--method", "random:seed=3")[0] == 0
    assert cli("map", scene, QUESTION, "-o", tmp_path / "c.png", "--methods", "random,uniform")[0] == 0
    assert written == [
        f"visiontrim:keep=32, asked {QUESTION!r}",
        f"random:keep=64,seed=3, asked {QUESTION!r}",
        f"asked {QUESTION!r}",
    ]


def test_methods(cli):
    code, out, err = cli("methods")
    assert (code, err) == (0, "")
    told = {method["name"]: method for method in json.loads(cli("methods", "--json")[1])}
    assert {"none", "random", "uniform", "visiontrim"} <= set(told)
    for name, method in told.items():
        assert name in out
        assert set(method) == {
            "name",
            "kinds",
            "place",
            "stages",
            "text_aware",
            "merges",
            "paper",
            "summary",
            "options",
        }
    assert told["visiontrim"]["stages"] == ["vision", "layer 2"]
    assert told["visiontrim"]["text_aware"]
    assert told["random"]["options"] == {"keep": 64, "layer": None, "seed": 0}


def test_methods_of_a_kind(cli):
    def names(*arguments: str) -> set[str]:
        return {method["name"] for method in json.loads(cli("methods", *arguments, "--json")[1])}

    assert names("--kind", "video") == {name for name, method in list_methods().items() if method.for_videos}
    assert {"evs", "holitom-inner"} <= names("--kind", "video")
    assert {"visiontrim", "fastv", "dycoke", "random"} <= names("--kind", "decoder")
    assert not {"visionzip", "tome", "none"} & names("--kind", "decoder")
    assert {"tome", "visionzip", "luvc", "evs"} <= names("--kind", "encoder")
    assert not {"fastv", "none"} & names("--kind", "encoder")
    aware = {name for name, method in list_methods().items() if method.text_aware}
    assert names("--text-aware") == aware
    assert names("--kind", "decoder", "--text-aware") == names("--kind", "decoder") & aware
    code, out, err = cli("methods", "--kind", "image")
    assert (code, out) == (2, "")
    assert "'video'" in err


def test_places_of_methods(cli):
    places = {method["name"]: method["place"] for method in json.loads(cli("methods", "--json")[1])}
    assert places["visiontrim"] == "vision encoder's output; before decoder layer 2"
    assert places["random"] == "vision encoder's output or a decoder layer"
    assert places["vscan"] == "vision encoder's output; before decoder layer 16 of 32"
    assert places["tome"] == "before every encoder layer from 1 of 23 on"
    assert places["dycoke"] == "vision encoder's output; with an option also in decoding; videos"
    assert (places["fastv"], places["none"]) == ("before decoder layer 2", "nowhere")


def test_version_and_help(cli):
    assert cli("--version")[1].startswith("visiontrim 0.")
    for arguments in ((), ("ask",), ("map",), ("methods",)):
        code, out, _ = cli(*arguments, "--help")
        assert code == 0
        assert "Example" in out


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.png", QUESTION], "no.png does not exist"),
        (["{scene}", "what is on the table?"], "does not know 'on', 'table'"),
        (["{scene}", QUESTION, "--method", "visiontrin"], "did you mean 'visiontrim'"),
        (["{scene}", QUESTION, "--method", "random:sed=1"], "did you mean 'seed'"),
        (["{scene}", QUESTION, "--method", "no.yaml"], "the recipe no.yaml cannot be read"),
        (["{scene}", QUESTION, "--keep", "0"], "keep=0"),
        (["{scene}", QUESTION, "--keep", "1.5"], "keep=1.5"),
        (["{scene}", QUESTION, "--keep", "nan"], "keep=nan"),
        (["{scene}", QUESTION, "--map", "kept.xyz"], "does not end like a picture"),
        (["{scene}", QUESTION, "--map", "no/such/kept.png"], "no/such is no folder"),
        (["{scene}", QUESTION, "--model", "{folder}"], "cannot be loaded"),
        (["{scene}", QUESTION, "--model", "not a name"], "cannot be loaded"),
        (["{scene}", QUESTION, "--text-tower", "{folder}"], "the text tower"),
        (["{scene}", QUESTION, "--device", "abacus"], "no device 'abacus'"),
    ],
)
def test_mistakes_end_in_one_sentence(cli, scene, tmp_path, arguments, message):
    code, out, err = cli("ask", *(argument.format(scene=scene, folder=tmp_path) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("visiontrim: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("arguments", [["--method", "visiontrin"], ["--keep", "0"], ["--map", "kept.xyz"]])
def test_cheap_mistakes_are_told_before_a_model_is_loaded(cli, scene, monkeypatch, arguments):
    monkeypatch.setattr("visiontrim.ask.load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert cli("ask", scene, QUESTION, *arguments)[0] == 2


@pytest.mark.parametrize("arguments", [["--keep", "many"], ["--dtype", "int3"], ["--max-new-tokens", "0"], ["--what"]])
def test_wrong_usage(cli, scene, arguments):
    code, out, err = cli("ask", scene, QUESTION, *arguments)
    assert (code, out) == (2, "")
    assert arguments[0] in err
    assert "Traceback" not in err


# --- the real process ------------------------------------------------------------------------------------------------


def piped(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_pipes(cli, monkeypatch):
    piped(monkeypatch, png(SAMPLES[0].image))
    code, out, err = cli("ask", "-", QUESTION, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["tokens"]["kept"] == 146
    piped(monkeypatch, b"")
    code, out, err = cli("ask", "-", QUESTION)
    assert (code, out) == (2, "")
    assert err.startswith("visiontrim: standard input is empty")


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_progress_is_for_terminals():
    """Of a process of its own, whose input is a pipe."""
    master, slave = os.openpty()
    options = {
        "stdout": subprocess.PIPE,
        "stderr": slave,
        "env": os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"},
    }
    done = command("ask", "-", QUESTION, "--json", input=png(SAMPLES[0].image), **options)
    os.close(slave)
    shown = os.read(master, 65536)
    os.close(master)
    assert done.returncode == 0
    assert json.loads(done.stdout)["answer"]
    assert b"loading the bundled model" in shown


# --- the parts -------------------------------------------------------------------------------------------------------


def test_prompts(monkeypatch):
    speaker = load()
    templated = encode(speaker, [SAMPLES[0].image], QUESTION)
    written = speaker.processor(images=SAMPLES[0].image, text=zoo.PROMPT.format(question=QUESTION), return_tensors="pt")
    assert torch.equal(templated["input_ids"], written["input_ids"])
    assert torch.equal(templated["pixel_values"], written["pixel_values"])
    monkeypatch.setattr(speaker.processor, "chat_template", None)
    bare = encode(speaker, [SAMPLES[0].image], QUESTION)
    prompt = FALLBACK_PROMPT.format(images="<image>\n", question=QUESTION)
    fallback = speaker.processor(images=SAMPLES[0].image, text=prompt, return_tensors="pt")
    assert torch.equal(bare["input_ids"], fallback["input_ids"])
    with pytest.raises(TrimError, match="<image>"):
        encode(speaker, [SAMPLES[0].image], "what is <image> ?")


def test_the_report_of_several_pictures_counts_all_of_them(cli, scene):
    code, out, _ = cli("ask", scene, scene, scene, "what color is the star?", "--keep", "64")
    assert code == 0
    assert "1728 -> 438 vision tokens of 3 images (576 -> 146 vision tokens each), mean 64.2 per layer and image" in out
    assert "the prompt takes 1,737 positions, the model was made for 1,024" in out, "survivors keep their own"
    code, out, _ = cli("ask", scene, scene, "what color is the star?", "--compare", "--method", "random:layer=2")
    assert "the prompt takes 1,161 positions, the model was made for 1,024" in out
    assert "vision tokens in, of each of 2 images" in out
    compact = cli("ask", scene, scene, "what color is the star?", "--keep", "8", "--method", "visionzip")
    assert "positions" not in compact[1], "they fit when cut and moved together"


@pytest.mark.parametrize("name", [None, str(zoo.MODEL_DIR)])
def test_dtype(name):
    speaker = load(name, text_tower=str(zoo.CLIP_DIR), device="cpu", dtype="bfloat16")
    assert speaker.model.dtype == torch.bfloat16
    assert speaker.text_tower is not None
    assert speaker.text_tower.model.dtype == torch.bfloat16
    assert encode(speaker, [SAMPLES[0].image], QUESTION)["pixel_values"].dtype == torch.bfloat16
    assert load(name, device="cpu").model.dtype == torch.float32


def test_the_examples_keep_48_and_16_of_576(cli):
    pictures = sorted((Path(__file__).parent.parent / "examples").glob("*.png"))
    assert pictures
    question = "what color is the star?"
    code, out, _ = cli("ask", *pictures, question, "--method", "visiontrim:keep=64,stages=vision", "--json")
    told = json.loads(out)
    assert code == 0
    text_config = json.loads((zoo.MODEL_DIR / "config.json").read_text())["text_config"]
    layers, heads = text_config["num_hidden_layers"], text_config["num_key_value_heads"]
    per_layer = [64] * layers
    assert told["tokens"] == {"images": len(pictures), "input": 576, "kept": 64, "per_layer": per_layer, "mean": 64.0}
    assert told["trace"] == {"vision": {"dominant": 48, "complement": 16}}
    text = len(["<s>", "USER:", "what", "color", "is", "the", "star", "?", "ASSISTANT:"])
    head_dim, size = text_config["head_dim"], 4
    assert told["kv_bytes"] == 2 * layers * heads * head_dim * size * (text + 64 * len(pictures))
