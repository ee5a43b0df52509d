"""Every command line that cannot work ends in one sentence and exit code 2, and none in a traceback."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import official
from visiontrim import zoo
from visiontrim.cli import main
from visiontrim.core.errors import TrimError
from visiontrim.images import load_image
from visiontrim.models import checkpoints

SCENE = str(Path(__file__).parent.parent / "examples" / "shapes.png")
QUESTION = "what shape is blue ?"
ASK = ("ask", SCENE, QUESTION, "--device", "cpu")


def one_sentence(told: tuple[int, str, str]) -> str:
    code, out, err = told
    assert (code, out) == (2, ""), err
    assert err.startswith("visiontrim: "), err
    assert err.count("\n") == 1, err
    return err


# --- checkpoints -----------------------------------------------------------------------------------------------------


def config(**values: object) -> Callable[[Path], None]:
    """Changes the configuration: ``text_config__hidden_size=48``."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        for path, value in values.items():
            *parents, last = path.split("__")
            inner = content
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        (folder / "config.json").write_text(json.dumps(content))

    return change


def file(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Another content of a file; None takes it away."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def torn(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[: len(content) // 2])


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "torn weights": (torn, "cannot be loaded (Error while deserializing header"),
    "no weights in the file": (file("model.safetensors", b""), "cannot be loaded"),
    "noise for weights": (file("model.safetensors", bytes(range(256)) * 9), "cannot be loaded"),
    "weights gone": (file("model.safetensors", None), "cannot be loaded"),
    "no configuration": (file("config.json", None), "cannot be loaded"),
    "half a configuration": (file("config.json", b'{"model_type": "llava",'), "cannot be loaded"),
    "a list for a configuration": (file("config.json", b"[]"), "cannot be loaded"),
    "UTF-16": (file("config.json", "{}".encode("utf-16")), "cannot be loaded"),
    "other sizes": (
        config(text_config__hidden_size=48),
        "have another size, as lm_head.weight: [66, 192], where [66, 4",
    ),
    "more layers": (config(text_config__num_hidden_layers=10), "18 tensors lack, as model.language_model.layers.8"),
    "fewer layers": (
        config(text_config__num_hidden_layers=5),
        "tensors of further layers have no place, as model.lang",
    ),
    "text for a number": (config(text_config__hidden_size="big"), "expected int, got str"),
    "an unknown type": (config(model_type="nope"), "model type `nope`"),
    "a text model": (config(model_type="llama"), "cannot be loaded"),
    "no patches": (config(vision_config__patch_size=0), "ZeroDivisionError"),
    "an unknown dtype": (config(dtype="float3"), "float3"),
    "an unknown activation": (config(text_config__hidden_act="xx"), "KeyError 'xx'"),
    "a layer that is not there": (
        config(vision_feature_layer=99),
        "vision_feature_layer=99, but the encoder has 6 layers",
    ),
    "no placeholder": (config(image_token_index=10**6), "image placeholders"),
    "half a tokenizer": (file("tokenizer.json", b"{}"), "the processor of"),
    "half a processor": (file("processor_config.json", b"{"), "the processor of"),
}


def changed(source: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a checkpoint with one fault; files are linked, so that nothing is copied in vain."""
    shutil.copytree(source, folder, copy_function=os.link)
    config_of = folder / "config.json"
    content = config_of.read_bytes()
    config_of.unlink()  # the link, not the original
    config_of.write_bytes(content)
    change(folder)
    return folder


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_with_a_fault(cli, tmp_path, name):
    change, words = CHECKPOINTS[name]
    folder = changed(zoo.MODEL_DIR, tmp_path / "model", change)
    assert words in one_sentence(cli(*ASK, "--model", folder))


def test_text_towers_with_a_fault(cli, tmp_path):
    for number, (change, words) in enumerate(
        [
            (torn, "cannot be loaded"),
            (config(text_config__num_hidden_layers=9), "tensors lack"),
            (file("tokenizer.json", b"{"), "tokenizer"),
        ]
    ):
        folder = changed(zoo.CLIP_DIR, tmp_path / str(number), change)
        assert words in one_sentence(cli(*ASK, "--text-tower", folder))
    told = one_sentence(cli(*ASK, "--text-tower", zoo.MODEL_DIR))
    assert "is a llava, which is no text tower: give a CLIP checkpoint" in told


NAMES = [
    ("llava-1.5-7b", "did you mean 'llava-hf/llava-1.5-7b-hf'?"),
    ("bundeld", "did you mean 'bundled'?"),
    ("not a name", "it is neither a folder nor a name"),
    ("/no/such/folder", "there is no such folder"),
    ("./folder", "there is no such folder"),
    ("a/b/c", "there is no such folder"),
    ("x" * 5000, "cannot be loaded"),
    ("a\x00b", "cannot be loaded"),
    ("a/..b", "cannot be loaded"),
    ("", "cannot be loaded"),
]


@pytest.mark.parametrize("name", NAMES, ids=[name[:20] for name, _ in NAMES])
def test_names_that_no_hub_needs_to_be_asked_about(cli, monkeypatch, name):
    monkeypatch.setattr(checkpoints.HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    given, words = name
    start = time.process_time()
    assert words in one_sentence(cli(*ASK, "--model", given))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (ConnectionError("no route"), "the hub cannot be reached (no route): did you mean 'llava-hf/llava-1.5-7b-hf'?"),
        (None, "is not on the hub, or not for you: did you mean 'llava-hf/llava-1.5-7b-hf'?"),
    ],
)
def test_the_hub_is_asked_once_and_not_for_long(cli, monkeypatch, raised, words):
    asked = []

    def info(self, name: str, timeout: float) -> None:
        asked.append((name, timeout))
        if raised is not None:
            raise raised
        raise checkpoints.RepositoryNotFoundError.__new__(checkpoints.RepositoryNotFoundError)

    monkeypatch.setattr(checkpoints.HfApi, "model_info", info)
    monkeypatch.setattr(checkpoints.constants, "HF_HUB_OFFLINE", False)
    for command in ((*ASK, "--model"), ("cost",), ("bench",)):
        assert words in one_sentence(cli(*command, "llava-hf/llava-1.5-7b-hff"))
    assert asked == [("llava-hf/llava-1.5-7b-hff", checkpoints.PATIENCE)] * 3
    assert "openai/clip-vit-large-patch14-336" in one_sentence(
        cli(*ASK, "--text-tower", "openai/clip-vit-large-patch14-33")
    )


# --- options ---------------------------------------------------------------------------------------------------------

OPTIONS = [
    ((*ASK[:3], "--device", "meta"), "there is no device 'meta'"),
    ((*ASK[:3], "--device", "abacus"), "there is no device 'abacus'"),
    ((*ASK[:3], "--device", ""), "there is no device ''"),
    ((*ASK, "--method", "visiontrim:keep=[1"), "is not valid YAML"),
    ((*ASK, "--method", "random:seed=100000000000000000000"), "does not fit into 64 bits"),
    ((*ASK, "--method", "random:layer=10000000"), "layer"),
    ((*ASK, "--method", "fastv:layer=100"), "layer"),
    (("bench", "--attention", "abacus"), "the attention implementation 'abacus' cannot be loaded"),
    (("bench", "--attention", "flash_attention_2", "--device", "cpu"), "choose sdpa or eager"),
    (("bench", "qwen2.5-vl-3b", "--layers", "1", "--attention", "abacus", "--device", "cpu"), "choose sdpa or eager"),
    (("bench", "--text", "100000000"), "more than the 1,024 positions"),
    (("bench", "--batch", "1000000000000"), "takes at least"),
    (("bench", "llava-1.5-13b", "--batch", "1000000", "--device", "cpu"), "lower --batch, --layers or --text"),
    (("cost", "qwen2.5-vl-7b", "--size", "1000000x1000000"), "1,000,000,000,000 pixels: give at most"),
    (("cost", "video-llava-7b", "--size", "224x224x100000000"), "pixels: give at most"),
    (("cost", str(zoo.CLIP_DIR / "tokenizer.json")), "cannot be loaded"),
]


@pytest.mark.parametrize(("arguments", "words"), OPTIONS, ids=[" ".join(given)[-40:] for given, _ in OPTIONS])
def test_options_that_cannot_work(cli, arguments, words):
    assert words in one_sentence(cli(*arguments))


def test_outputs_of_every_command_are_checked_before_the_work(cli, tmp_path, monkeypatch):
    official.pope(tmp_path)
    official.mme(tmp_path)
    (tmp_path / "file").write_text("[]")
    monkeypatch.setattr("visiontrim.ask.load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("visiontrim.zoo.loading.load", lambda *_, **__: pytest.fail("a model was loaded"))
    answers = tmp_path / "none.jsonl"
    for arguments, words in (
        ((*ASK, "--map", tmp_path / "no" / "k.png"), "is no folder"),
        (("score", f"pope:{tmp_path}", answers, "--upload", tmp_path / "no" / "u.jsonl"), "is no folder"),
        (("score", f"mme:{tmp_path}", answers, "--upload", tmp_path / "file"), "is a file: give the name of a folder"),
        (("zoo", "eval", "--out", tmp_path / "no" / "z.json"), "is no folder"),
        (("zoo", "eval", "--out", tmp_path / "file"), "holds no scores, but a list"),
        (("zoo", "card", tmp_path / "file"), "holds no scores, but a list"),
    ):
        assert words in one_sentence(cli(*arguments))


def test_bench_keeps_every_batch_and_tells_how_far_it_is(cli, tmp_path, monkeypatch):
    """Stopped in the second of two, it has written the first."""
    steps = []

    def measured(subject: object, methods: object, load: object, progress: Callable[[int, int], None]) -> list:
        if load.batch == 2:  # pyright: ignore[reportAttributeAccessIssue]
            raise KeyboardInterrupt
        progress(1, 2)
        steps.append(load)
        return []

    monkeypatch.setattr("visiontrim.measure.bench.bench", measured)
    out = tmp_path / "bench.json"
    code, _, err = cli("bench", "--batch", "1", "--batch", "2", "--out", out, "--device", "cpu")
    assert code == 130
    assert err.count("\n") == 2
    assert [batch["batch"] for batch in json.loads(out.read_text())["batches"]] == [1]
    assert len(steps) == 1


def test_a_text_model_costs_nothing_here(cli, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "is a llama, which has no vision encoder" in one_sentence(cli("cost", tmp_path))


@pytest.mark.parametrize("arguments", [("--text", "3"), ("--text", "9" * 5000), ("--batch", "0"), ("--answer", "1e9")])
def test_numbers_out_of_range(cli, arguments):
    code, out, err = cli("cost", "bundled", *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert arguments[0] in err


def test_ctrl_c_is_one_line_in_every_command(cli, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("visiontrim.ask.load", stopped)
    monkeypatch.setattr("visiontrim.measure.cost.costs", stopped)
    monkeypatch.setattr("visiontrim.core.registry.list_methods", stopped)
    for command in (ASK, ("cost", "bundled"), ("methods",)):
        assert cli(*command) == (130, "", "\nvisiontrim: stopped; nothing was kept, and the same command starts anew\n")


def test_a_fault_of_the_program_says_so_in_one_line(cli, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise IndexError("list index\nout of range")

    monkeypatch.setattr("visiontrim.measure.cost.costs", broken)
    code, out, err = cli("cost", "bundled")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "(IndexError: list index)" in err
    assert "`visiontrim --traceback cost bundled`" in err
    monkeypatch.setattr(sys, "argv", ["visiontrim", "--traceback", "cost", "bundled"])
    with pytest.raises(IndexError):
        main()


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of Pillow, about the same faults
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    noise=st.binary(max_size=30),
)
def test_any_bytes_are_a_picture_or_one_sentence(tmp_path, kind, cut, changes, noise):
    path = tmp_path / "picture"
    Image.linear_gradient("L").resize((9, 7)).convert("RGB").save(path, kind)
    content = bytearray(path.read_bytes())
    content = content[: int(cut * len(content))] if cut < 0.9 else content
    for place, value in changes:
        if place < len(content):
            content[place] = value
    path.write_bytes(bytes(content) + noise)
    try:
        picture = load_image(str(path))
    except TrimError as error:
        told = str(error)
    else:
        assert picture.mode == "RGB"
        return
    assert "\n" not in told


def test_a_wrong_call_leaves_the_model_as_it_was():
    import visiontrim as vt

    bundle = zoo.load()
    inputs = bundle.processor(images=Image.open(SCENE), text=zoo.PROMPT.format(question=QUESTION), return_tensors="pt")
    with torch.inference_mode():
        before = bundle.model(**inputs).logits
        attributes = set(vars(bundle.model))
        for method, options in (
            ("random:layer=100", {}),
            ("visiontrim", {"keep": 0}),
            ("visiontrim:keep=[1", {}),
            ("random:sed=1", {}),
            ("mustdrop:thresholds=[a,b]", {}),
        ):
            with pytest.raises(TrimError), vt.trim(bundle.model, method, **options):
                bundle.model(**inputs)
        assert set(vars(bundle.model)) == attributes
        assert torch.equal(bundle.model(**inputs).logits, before)
