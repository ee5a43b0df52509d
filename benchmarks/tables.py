"""The README's table and the model card's figures, from what `make table` left: python benchmarks/tables.py

It rewrites what stands between two marks of README.md and of the card. Rows of methods without stored scores are left
out.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from visiontrim.evaluate.validity import table, title

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
BEGIN, END = "<!-- table: begin, written by benchmarks/tables.py -->", "<!-- table: end -->"
NOTES = {
    "visiontrim": "",
    "visiontrim:variant=lean": "",
    "visiontrim:variant=release": "",
    "ppe": "",
    "crossget": ", merging inside the encoder",
    "tome": ", merging inside the encoder",
    "luvc": ", both halves",
    "fastv": ", before decoder layer 2",
    "pixelprune": ", before the encoder",
    "divprune": "",
    "mmtok": "",
    "vispruner": "",
    "visionzip": "",
    "uniform": "",
    "downsampled": ", a smaller picture at equal tokens",
    "random": "",
}
"""The rows, and what is said behind their names."""
COLUMNS = (
    ("192 of 576", "table", 192),
    ("128", "table", 128),
    ("64", "table", 64),
    ("32", "table", 32),
    ("64, hard", "hard", 64),
    ("Qwen, 64 of 256", "canvases", 64),
)


def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name / "scores.json").read_text(encoding="utf-8"))


def block(found: dict[str, dict[str, Any]]) -> str:
    """The paragraph and the table, of the scores of ``table``, ``hard`` and ``canvases``."""
    by = {name: {(score["method"], score["keep"]): score for score in one["scores"]} for name, one in found.items()}
    about = {name: f"{one['questions']} questions about {one['groups']}" for name, one in found.items()}
    plain = {name: f"{one['plain']['score']:.1f} %" for name, one in found.items()}
    text = (
        f"Right answers in % of the plain model's {plain['table']}, on {about['table']} held-out scenes, at an equal "
        "mean of vision tokens per decoder layer (`make table`; [all methods, intervals, times]"
        "(docs/results/table/table.md)). † does not beat `random`: the 95 % interval of the paired difference reaches "
        f"0. Then the hard split, where the plain model has {plain['hard']} ([table](docs/results/hard/table.md)), and "
        "the bundled Qwen2.5-VL, which has neither [CLS] nor text tower, "
        f"{plain['canvases']} on {about['canvases']} canvases ([table](docs/results/canvases/table.md))."
    )
    lines = [
        *textwrap.wrap(text, 128, break_long_words=False, break_on_hyphens=False),
        "",
        "| | " + " | ".join(name for name, _, _ in COLUMNS) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for method, note in NOTES.items():
        cells = [cell(by[source].get((method, keep))) for _, source, keep in COLUMNS]
        if set(cells) != {"-"}:
            lines.append(f"| `{method}`{note} | {' | '.join(cells)} |")
    if (RESULTS / "table" / "frontier.png").exists():
        lines += ["", "![Retention against time and against tokens](docs/results/table/frontier.png)"]
    return "\n".join(lines)


def cell(score: dict[str, Any] | None) -> str:
    if score is None or score["retention"] is None:
        return "-"
    weak = score["beats_reference"] is False and score["method"] != "random"
    return f"{100 * score['retention']:.1f}" + (" †" if weak else "")


def rewritten(text: str, new: str) -> str:
    """``text`` with ``new`` between the marks."""
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise SystemExit(f"the marks {BEGIN} and {END} are missing")
    return f"{head}{BEGIN}\n{new}\n{END}{tail}"


def write(path: Path, new: str) -> None:
    path.write_text(rewritten(path.read_text(encoding="utf-8"), new), encoding="utf-8")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    write(ROOT / "README.md", block({name: stored(name) for name in ("table", "hard", "canvases")}))
    figures = json.loads((RESULTS / "table" / "validity.json").read_text(encoding="utf-8"))
    write(ROOT / "src" / "visiontrim" / "zoo" / "README.md", f"{title(figures)}\n\n{table(figures)}")
