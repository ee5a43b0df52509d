"""The program for a GPU, tried on the CPU: it must not fail for a silly reason the one time that a GPU is there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))  # as for a script, whose neighbours it imports
    try:
        spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
        module = sys.modules["gpu"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.modules.pop("gpu", None)
        sys.path.remove(str(BENCHMARKS))


def test_the_dry_run(gpu, tmp_path):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--small", "--out", str(out)]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == ["kept_promises", "half_precision", "local_score", "speed"]
    assert parts["local_score"]["loop_of_ours"] > 1
    for name in gpu.MODELS:
        measured = parts["speed"][name]
        rows = {row["name"]: row for row in measured["batch 2"]}
        ways = {row["kind"] for row in rows.values()}
        assert ways == {"plain", "method", "ideal"}
        assert sum(row["kind"] == "method" for row in rows.values()) == len(gpu.METHODS)
        assert all(row["tokens"] < rows["plain"]["tokens"] for row in rows.values() if row["kind"] != "plain")
        assert {(row["way"], row["cache"]) for row in measured["static"]} == {
            (way, cache) for way in ("plain", gpu.METHODS[1]) for cache in ("dynamic", "static")
        }
        assert {"sdpa", "eager"} <= parts["half_precision"][name].keys()
    said = out.with_suffix(".md").read_text()
    assert all(f"{name}, batch 2" in said for name in gpu.MODELS)


def test_a_part_that_fails_is_told_and_the_others_run(gpu, tmp_path, monkeypatch):
    def broken(size):
        raise RuntimeError("no such kernel")

    def fine(size):
        return {"found": 1}

    monkeypatch.setattr(gpu, "PARTS", (broken, fine))
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--small", "--out", str(out)]) == 1
    parts = json.loads(out.read_text())["parts"]
    assert parts == {"broken": {"error": "RuntimeError: no such kernel"}, "fine": {"found": 1}}


def test_without_a_gpu_it_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "--device cpu --small" in capsys.readouterr().err
