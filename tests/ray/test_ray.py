"""A batch run over Ray's actors: killed twice, it ends with the file that a run in one process writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest

from visiontrim.zoo import held_out

SAMPLES = list(held_out(6))[:45]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 rows, three of them bad, as JSON lines and, with the bytes of the pictures, as a parquet table."""
    path = tmp_path_factory.mktemp("rows")
    rows = []
    for number, sample in enumerate(SAMPLES):
        sample.image.save(path / f"{number}.png")
        rows.append({"id": f"r{number}", "image": f"{number}.png", "question": sample.question})
    (path / "broken.png").write_bytes(b"not a png")
    rows.insert(5, {"id": "broken", "image": "broken.png", "question": "what color is the C?"})
    rows.insert(15, {"id": "missing", "image": "nowhere.png", "question": "what color is the C?"})
    rows.insert(30, {"id": "words", "image": "0.png", "question": "what is this, a zebra?"})
    (path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    there = [row for row in rows if row["id"] != "missing"]
    table = [row | {"image": {"bytes": (path / row["image"]).read_bytes(), "path": None}} for row in there]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path / "in.parquet", row_group_size=20)
    return path


def start(folder, name, out, *options) -> subprocess.Popen:
    program = [sys.executable, "-c", "from visiontrim.cli import main; main()", "batch", folder / name]
    options = ("--out", folder / out, "--max-new-tokens", 3, "--batch-size", 4, "--device", "cpu", *options)
    options = ("--method", "visiontrim:variant=lean", *options)  # which is nearly always right
    return subprocess.Popen([*map(str, (*program, *options))])


@pytest.fixture(scope="module")
def expected(folder):
    assert start(folder, "in.jsonl", "local.jsonl").wait(600) == 1
    return (folder / "local.jsonl").read_bytes()


def test_killed_twice_it_writes_the_same_file(folder, expected):
    partial = folder / "ray.jsonl.partial"
    for lines in (3, 6):
        process = start(folder, "in.jsonl", "ray.jsonl", "--runner", "ray", "--workers", 2)
        until = time.monotonic() + 600
        while not partial.exists() or partial.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        process.kill()
        process.wait()
    process = start(folder, "in.jsonl", "ray.jsonl", "--runner", "ray", "--workers", 2, "--fewest", 1)
    assert process.wait(600) == 1
    assert (folder / "ray.jsonl").read_bytes() == expected
    rows = [json.loads(line) for line in expected.splitlines()]
    assert [row["id"] for row in rows if row["error"]] == ["broken", "missing", "words"]
    good = [row["answer"] for row in rows if not row["error"]]
    right = [said == sample.answer for said, sample in zip(good, SAMPLES, strict=True)]
    assert sum(right) >= 40


def test_pictures_in_a_table(folder, expected):
    assert start(folder, "in.parquet", "table.jsonl", "--workers", 2).wait(600) == 1
    rows = [json.loads(line) for line in (folder / "table.jsonl").read_bytes().splitlines()]
    good = [row for row in rows if not row["error"]]
    assert [row["id"] for row in rows if row["error"]] == ["broken", "words"]
    assert good == [row for row in map(json.loads, expected.splitlines()) if not row["error"]]
