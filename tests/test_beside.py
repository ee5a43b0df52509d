"""The comparison with what one would pick instead: the half that runs here, tried on a narrow model; what is stored."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ["plain", "`visionzip`", "`visiontrim`", "`fastv`", "ideal", "a smaller picture", "prefill, then evict"]


@pytest.fixture(scope="module")
def program():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script, whose neighbours it imports
    before = set(sys.modules)
    try:
        # not under its own name, which is that of a module of tests
        spec = importlib.util.spec_from_file_location("beside", ROOT / "benchmarks" / "peers.py")
        module = sys.modules["beside"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in {"beside", "turns", "counting", "memory"} - before:
            sys.modules.pop(name, None)
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_dry_run(program):
    told = program.ours(program.slice_of(True), 1, True)
    rows = {row["name"]: row for row in told["rows"]}
    assert list(rows) == NAMES
    plain, of = rows["plain"], {name: row["of_plain"] for name, row in rows.items()}
    assert set(of["plain"]) == {"kernels", "flops", "peak_bytes", "cache_bytes", "cpu"}
    assert of["plain"]["cpu"] == [1, 1, 1]
    assert plain["cache_bytes"] == 4 * 2 * 4 * 32 * (100 + program.WORDS)  # layers, keys and values, float32, width
    kept = (program.KEEP + program.WORDS) / (100 + program.WORDS)
    for name in set(NAMES) - {"plain", "`fastv`"}:
        assert of[name]["cache_bytes"] == pytest.approx(kept)
    assert of["`fastv`"]["cache_bytes"] == pytest.approx((1 + kept) / 2)
    assert of["prefill, then evict"]["flops"] == 1
    assert of["a smaller picture"]["flops"] < of["ideal"]["flops"] < of["`fastv`"]["flops"] < 1
    assert rows["ideal"]["stops"] == rows["prefill, then evict"]["stops"] == plain["stops"]
    assert rows["`visionzip`"]["stops"] == plain["stops"] + 1
    assert all(row["cpu_seconds"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    page = program.between("\n\n".join(["before", *program.MARKS, "after"]), program.table({"environments": [told]}))
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in NAMES]
    assert page.startswith("before") and page.endswith("after")  # noqa: PT018


def test_both_halves_speak_of_the_same_task(program):
    """The other environment has neither this package nor its transformers, so that only the text is looked at."""
    tree = ast.parse((ROOT / "benchmarks" / "official_style.py").read_text(encoding="utf-8"))
    (task,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Task")
    fields = [node.target.id for node in task.body if isinstance(node, ast.AnnAssign)]
    assert list(json.loads(json.dumps(program.task_of(program.slice_of(False), 3)))) == fields


def test_the_page_has_what_is_stored_and_nothing_else(program):
    path, page = ROOT / "benchmarks" / "results" / "peers-cpu.json", program.PAGE.read_text(encoding="utf-8")
    stored = program.table(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ""
    assert program.between(page, stored) == page
