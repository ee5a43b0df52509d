"""The promises as checks: kept on tiny models, told when one is broken, and how ``visiontrim doctor`` shows them."""

from __future__ import annotations

import functools
import json
import sys
from contextlib import contextmanager

import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig, logging

import families
import visiontrim as vt
from families import CONFIGS, Prompts, hidden_places
from visiontrim import doctor, promises
from visiontrim.cli import main
from visiontrim.core.errors import TrimError
from visiontrim.engine import tracing
from visiontrim.models.llava import Llava
from visiontrim.promises import PromiseError, left_padded

PLAN = vt.Random(keep=0.5) | vt.Random(keep=0.5, layer=1)
WATCHED = ("llava", "llava_next", "video_llava", "qwen3_vl", "internvl", "idefics3", "mistral3", "gemma3")
TRIED = ("llava", "llava_next", "qwen3_vl", "idefics3", "mistral3", "paligemma", "gemma3", "deepseek_vl", "aya_vision")

pytestmark = pytest.mark.usefixtures("no_grad")
model_of = functools.cache(families.build)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command; gives (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["visiontrim", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    verbosity = logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.mark.parametrize("name", WATCHED)
def test_what_is_gone_is_seen_in_what_layers_are_called_with(name):
    plan = vt.Random(keep=0.5) if name in families.BIDIRECTIONAL else PLAN
    inputs = Prompts(name, (3, "image", 5), (1, "image", 2, 7), (6,)).batch()
    run, _, gone = promises.watched(model_of(name), inputs, plan)
    by_hand = hidden_places(name, inputs, run.trace)
    assert list(gone) == list(by_hand)
    earlier = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for layer, places in by_hand.items():  # places by hand are of all that is gone, seen ones of what goes
        assert gone[layer].equal(places & ~earlier)
        earlier |= places


@pytest.mark.parametrize("name", TRIED)
def test_a_copy_of_a_configuration_keeps_every_promise(name, tmp_path):
    config = (CONFIGS | families.GENERIC)[name]()
    config.save_pretrained(tmp_path)
    found = doctor.diagnose(str(tmp_path))
    assert found.sound, [result for result in found.promises if not result.kept]
    assert len(found.promises) == (5 if name == "paligemma" else 6)  # which has no second turn
    assert found.tried.endswith("random weights, float32")
    assert found.family.startswith("generic facts") == (name in families.GENERIC)
    between = next(one for one in found.possible if one.what == "a stage between decoder layers")
    assert between.possible == (name not in families.BIDIRECTIONAL)


@contextmanager
def restless(trim, model, *args, **kwargs):
    """A run in which no logit is the same twice."""
    with trim(model, *args, **kwargs) as run:
        handle = model.lm_head.register_forward_hook(lambda _, __, logits: logits + 1e-3 * torch.rand_like(logits))
        yield run
        handle.remove()


def test_broken_promises_are_told(monkeypatch):
    model, rows = model_of("llava"), [Prompts("llava", (3, "image", 5), seed=seed).batch() for seed in (1, 2)]
    together = left_padded(rows, 0)
    question = torch.tensor([[20, 21]])
    monkeypatch.setattr(promises, "trim", functools.partial(restless, promises.trim))
    with pytest.raises(PromiseError, match=r"random:keep=1.0.* keeps everything, but logits differ by 0.00"):
        promises.everything_is_bit_identical(model, together, [vt.Random(keep=1.0)])
    with pytest.raises(PromiseError, match=r"logits differ by 0.00.*would be rounding"):
        promises.removal_equals_masking(model, together, PLAN)
    with pytest.raises(PromiseError, match=r"logits differ by 0.00"):
        promises.removal_equals_feeding(model, rows[0], vt.Random(keep=0.5))
    with pytest.raises(PromiseError, match=r"logits differ by 0.00"):
        promises.batch_equals_rows(model, rows, together, PLAN)
    with pytest.raises(PromiseError, match=r"logits differ by 0.00"):
        promises.turn_equals_one_shot(model, rows[0], question, PLAN)


def test_a_run_that_leaves_something_behind_is_told(monkeypatch):
    model, handles = families.build("llava"), []

    @contextmanager
    def leaving(*_, **__):
        yield
        handles.append(model.lm_head.register_forward_hook(lambda _, __, logits: logits + 1e-3))

    monkeypatch.setattr(promises, "trim", leaving)
    with pytest.raises(PromiseError, match="once the runs are closed, the model answers otherwise"):
        promises.everything_is_bit_identical(model, Prompts("llava", (3, "image", 5)).batch(), [vt.Random(keep=1.0)])


def test_a_wrong_report_is_told(monkeypatch):
    model, inputs = model_of("llava"), Prompts("llava", (3, "image", 5)).batch()
    right = tracing.physical_length
    with monkeypatch.context() as patched:
        patched.setattr(tracing, "physical_length", lambda cache, index: right(cache, index) + 1)
        with pytest.raises(PromiseError, match=r"holds 17, 13, .* but the report says 18, 14,"):
            promises.cache_is_as_reported(model, inputs, PLAN)
    monkeypatch.setattr(tracing, "cache_bytes", lambda cache: 1)
    with pytest.raises(PromiseError, match=r"has [\d,]+ bytes, but the report says 1"):
        promises.cache_is_as_reported(model, inputs, PLAN)


def test_equality_that_proves_nothing_is_told():
    model, inputs = model_of("llava"), Prompts("llava", (3, "image", 5)).batch()
    with pytest.raises(PromiseError, match="nothing was removed"):
        promises.removal_equals_masking(model, inputs, vt.Random(keep=1.0))


def test_a_check_that_cannot_run_is_a_broken_promise():
    result = promises.checked("is", lambda: {}["cache"])  # type: ignore[index]
    assert (result.kept, result.said) == (False, "KeyError: 'cache'")


def test_the_bundled_model_by_the_command(cli):
    code, out, _ = cli("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["sound"] is True
    assert found["tried"] == "the model itself, in float32"
    assert found["versions"].keys() == {"python", "visiontrim", "torch", "transformers"}
    assert all(promise["kept"] for promise in found["promises"])
    assert len(found["promises"]) == 6


def test_a_broken_promise_is_exit_code_1(cli, monkeypatch, tmp_path):
    CONFIGS["llava"]().save_pretrained(tmp_path)
    monkeypatch.setattr(promises, "trim", functools.partial(restless, promises.trim))
    code, out, _ = cli("doctor", "--model", str(tmp_path))
    assert code == 1
    assert "4 of 6 promises broken" in out
    assert "✗" in out


def test_pictures_come_from_the_processor_where_no_facts_give_them(monkeypatch):
    def unknown(self, picture):
        raise TypeError("a missing argument")

    monkeypatch.setattr(Llava, "noise", unknown)
    model, shape, _ = doctor._patient("bundled", doctor._shape("bundled"), torch.device("cpu"))
    rows = doctor._prompts(Llava(model), shape, "bundled")
    assert [int((row["input_ids"] == model.config.image_token_id).sum()) for row in rows] == [576, 576]
    assert rows[0]["input_ids"].shape[1] - rows[1]["input_ids"].shape[1] == 7
    with pytest.raises(TrimError, match=r"how Llava.* is given pictures is not known \(a missing argument\)"):
        doctor._prompts(Llava(model), shape, "no/such")


def test_text_only_models_names_of_nothing_and_damage_are_one_sentence(cli, monkeypatch, tmp_path):
    def never(*_, **__):
        raise AssertionError("the hub was asked")

    def absent(*_, **__):
        raise OSError("404 Client Error.\nEntry not found")

    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "text")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"model_type": "lla')
    CONFIGS["llava"]().save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", never)
    for name, said in (
        (tmp_path / "text", "is a llama, which has no vision encoder"),
        (tmp_path / "torn", "is not a valid JSON file"),
        (tmp_path / "damaged", "cannot be loaded"),
        ("llava-1.5-7bb", "did you mean llava-1.5-7b?"),
        ("./no/such", "there is no directory, file or preset './no/such': presets are"),
    ):
        code, out, err = cli("doctor", "--model", str(name))
        assert (code, out) == (2, ""), name
        assert said in err
        assert err.count("\n") == 1
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", absent)
    code, _, err = cli("doctor", "--model", "llava-hf/llava-1.5-7bb")
    assert code == 2
    assert "the hub does not give it (404 Client Error): did you mean llava-1.5-7b?" in err


def test_a_plain_model_whose_batch_is_not_its_rows_is_told():
    model, rows = families.build("llava"), [Prompts("llava", (3, "image", 5), seed=seed).batch() for seed in (1, 2)]
    together = left_padded(rows, 0)
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + 0.01 * (len(logits) - 1))
    with pytest.raises(PromiseError, match=r"would be rounding; the plain model's own batch differs by 0.01 from"):
        promises.batch_equals_rows(model, rows, together, PLAN)
