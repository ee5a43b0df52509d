"""The example of Ray Data with the plug-in: every row has its own question and budget, and a bad one is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import LLAVA

EXAMPLE = Path(__file__).parents[3] / "examples" / "ray_llm.py"


def test_the_example(tmp_path):
    samples, rows = [*LLAVA[:11], LLAVA[0]], []
    for number, sample in enumerate(samples):
        sample.image.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": sample.question})
    rows[11]["keep"] = 32
    rows[7]["keep"] = 0
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = [sys.executable, EXAMPLE, tmp_path / "rows.jsonl", tmp_path / "out"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    parts = sorted((tmp_path / "out").glob("*.json"))
    said = {row["image"]: row for part in parts for row in map(json.loads, part.read_text().splitlines())}
    assert set(said) == {row["image"] for row in rows}
    bad = said.pop("7.png")
    assert "keep=0 keeps nothing" in bad["__inference_error__"]
    assert not [row for row in said.values() if row["__inference_error__"]]
    right = [said[f"{n}.png"]["answer"] == sample.answer for n, sample in enumerate(samples) if n != 7]
    assert sum(right) >= 9
    assert said["11.png"]["prompt_tokens"] == said["0.png"]["prompt_tokens"] - 32
