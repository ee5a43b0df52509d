"""The package as a model of lmms-eval, which finds it by itself: ``make matrix`` runs this where lmms-eval is."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from visiontrim.ask import answer, load
from visiontrim.zoo import SPLITS, draw_scene

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "lmms_eval"
LIMIT = 24


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """The example's task with its questions written."""
    directory = tmp_path_factory.mktemp("lmms") / "shapes"
    shutil.copytree(EXAMPLE, directory)
    subprocess.run([sys.executable, "shapes.py"], cwd=directory, check=True)
    return directory


def lmms_eval(task: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    program = [Path(sys.executable).parent / "lmms-eval", "--include_path", ".", "--tasks", "shapes"]
    options = ["--limit", str(LIMIT), "--batch_size", "8", "--output_path", "out"]
    return subprocess.run(
        [*program, "--model", "visiontrim", "--model_args", arguments, *options],
        cwd=task,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("setting", [{"method": "none"}, {"method": "visiontrim", "keep": 32}])
def test_it_scores_what_the_package_answers(task, setting):
    shutil.rmtree(task / "out", ignore_errors=True)
    done = lmms_eval(task, ",".join(f"{name}={value}" for name, value in setting.items()))
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (task / "out").rglob("*_results.json")
    told = json.loads(results.read_text())["results"]["shapes"]["right,none"]

    speaker, right = load(None, device="cpu"), 0
    for sample in itertools.islice(SPLITS["standard"].samples(20), LIMIT):
        picture = draw_scene(sample.scene_seed).image
        said = answer(speaker, [picture], sample.question, **setting, max_new_tokens=3)
        right += said.text.strip() == sample.answer
    assert told == pytest.approx(right / LIMIT)


def test_mistakes_are_told(task):
    shutil.rmtree(task / "out", ignore_errors=True)
    done = lmms_eval(task, "method=nothing")  # lmms-eval itself ends with 0
    assert "unknown method 'nothing'" in done.stdout + done.stderr
    assert not list((task / "out").rglob("*_results.json"))
