"""The example of Ray Data with the plug-in: every row has its own question and budget, and a bad one is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import LLAVA, offline

EXAMPLE = Path(__file__).parents[3] / "examples" / "ray_llm.py"
VISION = "visiontrim:stages=vision"
"""Of VisionTrim's two stages vLLM has the first one."""


def test_the_example(tmp_path):
    samples, rows = [*LLAVA[:11], LLAVA[0]], []
    for number, sample in enumerate(samples):
        sample.image.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": sample.question})
    rows[11]["keep"] = 32
    rows[7]["keep"] = 0
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = [sys.executable, EXAMPLE, tmp_path / "rows.jsonl", tmp_path / "out"]
    # Ray's workers let everything else on a machine go first, unless told otherwise
    env = os.environ | {"RAY_worker_niceness": "0"}
    done = subprocess.run(run, capture_output=True, text=True, timeout=1800, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    parts = sorted((tmp_path / "out").glob("*.json"))
    said = {row["image"]: row for part in parts for row in map(json.loads, part.read_text().splitlines())}
    assert set(said) == {row["image"] for row in rows}
    bad = said.pop("7.png")
    assert "keep=0 keeps nothing" in bad["__inference_error__"]
    assert not [row for row in said.values() if row["__inference_error__"]]
    pairs = [(row, sample) for row, sample in zip(rows, samples, strict=True) if row["image"] != "7.png"]
    expected = {row["image"]: offline(sample, VISION, row.get("keep", 64)) for row, sample in pairs}
    assert {name: row["answer"] for name, row in said.items()} == expected
    assert said["11.png"]["prompt_tokens"] == said["0.png"]["prompt_tokens"] - 32
