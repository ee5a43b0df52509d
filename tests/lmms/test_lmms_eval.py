"""The package as a model of lmms-eval, which finds it by itself: ``make matrix`` runs this where lmms-eval is."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

import official
from visiontrim.ask import answer, load
from visiontrim.evaluate.frames import Frames
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


def lmms_eval(task: Path, arguments: str, name: str = "shapes") -> subprocess.CompletedProcess[str]:
    program = [Path(sys.executable).parent / "lmms-eval", "--include_path", ".", "--tasks", name]
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


def test_a_stock_task_reads_a_local_folder_and_no_hub(tmp_path):
    """POPE's official files as lmms-eval's data set; its suffix is off, which the bundled model has no words for."""
    official.pope(tmp_path / "data")  # of a folder "pope" beside it lmms-eval would take tasks
    program = [sys.executable, EXAMPLE / "local_pope.py", tmp_path / "data" / "pope"]
    subprocess.run(program, cwd=tmp_path, check=True)
    done = lmms_eval(tmp_path, "method=visiontrim,keep=64", "pope_bare")
    (results,) = (tmp_path / "out").rglob("*_results.json")
    found = json.loads(results.read_text())["results"]["pope_bare"]
    assert found["pope_f1_score,none"] == 1.0, done.stderr[-2000:]
    told = lmms_eval(tmp_path, "method=visiontrim,keep=64", "pope")  # stock: the model refuses the suffix
    assert "the bundled model does not know" in told.stdout + told.stderr


def test_videos_and_answers_to_rank_reach_the_model(tmp_path):
    """A task of a video, whose frames transformers decodes, and one of multiple choice by likelihood."""
    sample = next(SPLITS["standard"].samples(1))
    frames = np.stack([np.asarray(sample.image)] * 4)
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 192, 192, "yuv420p", 20_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": sample.question, "answer": sample.answer}) + "\n")
    (tmp_path / "tools.py").write_text(TOOLS)
    (tmp_path / "film.yaml").write_text(TASK.format(name="film", kind="generate_until") + FILM)
    (tmp_path / "rank.yaml").write_text(TASK.format(name="rank", kind="multiple_choice") + RANK)
    speaker = load(None, device="cpu")
    frame = Frames(tmp_path / "v.mp4", 1).load()
    assert [picture.size for picture in frame] == [(192, 192)]
    said = answer(speaker, frame, sample.question, "visiontrim", 64, max_new_tokens=3).text
    for name, metric, expected in (("film", "right,none", said == sample.answer), ("rank", "acc,none", True)):
        done = lmms_eval(tmp_path, "method=visiontrim,keep=64,frames=1", name)
        assert list((tmp_path / "out").rglob("*_results.json")), (done.stdout + done.stderr)[-3000:]
        (path,) = (tmp_path / "out").rglob("*_results.json")
        assert json.loads(path.read_text())["results"][name][metric] == expected
        shutil.rmtree(tmp_path / "out")


TOOLS = """from visiontrim.zoo import SPLITS
def film(doc):
    return ["v.mp4"]
def picture(doc):
    return [next(SPLITS["standard"].samples(1)).image]
def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
def choices(doc):
    return [doc["answer"], "star"]
def score(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: q.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: !function tools.question
"""
FILM = """doc_to_visual: !function tools.film
doc_to_target: answer
generation_kwargs: {max_new_tokens: 3, temperature: 0, do_sample: false}
process_results: !function tools.score
metric_list:
  - {metric: right, aggregation: mean, higher_is_better: true}
"""
RANK = """doc_to_visual: !function tools.picture
doc_to_target: 0
doc_to_choice: !function tools.choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
