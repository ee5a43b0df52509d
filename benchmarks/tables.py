"""The README's tables and the model card's figures, from what `make table` left: python benchmarks/tables.py

It rewrites what stands between two marks of README.md and of the card. Rows of methods without stored scores are left
out, and tables of which nothing is stored stay as they are.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from visiontrim.evaluate.evaluation import CONTROLS
from visiontrim.evaluate.published import averages
from visiontrim.evaluate.validity import MODEL, table, title

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
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


NATURAL = (192, 128, 64)
"""Columns of the model of natural scenes."""
CLIPS = (192, 96)
"""Columns of the model of videos."""
SHOWN = ("visiontrim", "fastervlm", *CONTROLS)
"""Rows of which nothing has to be printed."""


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


def natural(found: dict[str, Any]) -> str:
    """The paragraph and the table of the model of natural scenes, beside published averages of LLaVA-1.5-7B."""
    by = {(score["method"], score["keep"]): score for score in found["scores"]}
    text = (
        f"Right answers of `bundled-natural` in % of its own {found['plain']['score']:.1f} % with all tokens, on "
        f"{found['questions']} held-out questions about {found['groups']} scenes with natural backgrounds, at an equal "
        "mean of vision tokens per decoder layer ([every method, intervals, times, pointing and yes/no]"
        "(docs/results/natural/table.md), `make table-natural`). † does not beat `random`. In the last column, where "
        "it is printed, the mean retention of LLaVA-1.5-7B with 64 tokens, of other questions."
    )
    printed = averages(MODEL)
    rows = []
    for method in dict.fromkeys(score["method"] for score in found["scores"]):
        cells = [cell(by.get((method, keep))) for keep in NATURAL]
        name = method.partition(":")[0]
        seen = printed.get(name, {}).get(64) if "variant" not in method else None
        if cells[-1] != "-" and (seen is not None or name in SHOWN):
            rows.append((by[method, 64]["retention"], method, cells, "" if seen is None else f"{seen:.1f}"))
    rows.sort(key=lambda row: -row[0])
    return "\n".join(
        [
            *textwrap.wrap(text, 128, break_long_words=False, break_on_hyphens=False),
            "",
            "| | 192 of 576 | 128 | 64 | published, 64 |",
            "|---|---|---|---|---|",
            *(f"| `{method}` | {' | '.join(cells)} | {seen} |" for _, method, cells, seen in rows),
            "",
            "![Retention against time and against tokens, on natural scenes](docs/results/natural/frontier.png)",
        ]
    )


def clips(found: dict[str, Any]) -> str:
    """The paragraph and the table of the model of videos: everything, and what moved and what appeared alone."""
    by = {(score["method"], score["keep"]): score for score in found["scores"]}
    motion = found["plain"]["by_type"]
    text = (
        f"Right answers of `bundled-video` in % of its own {found['plain']['score']:.1f} % with all tokens, on "
        f"{found['questions']} held-out questions about {found['groups']} clips of 4 to 8 frames, 576 to 1,152 tokens, "
        "at an equal mean of vision tokens per decoder layer; behind it the right answers in % to two types of "
        f"questions, *what moved?* and *what appeared?* (all tokens: {motion['moved']:.0f} and "
        f"{motion['appeared']:.0f}). [Intervals, times, every type](docs/results/clips/table.md), `make table-clips`; "
        "† does not beat `random`."
    )
    rows = []
    for method in dict.fromkeys(score["method"] for score in found["scores"]):
        scores = [by.get((method, keep)) for keep in CLIPS]
        kinds = [
            "-" if score is None or score["retention"] is None else f"{score['by_type'][type]:.0f}"
            for type in ("moved", "appeared")
            for score in scores
        ]
        cells = [*map(cell, scores), *kinds]
        if method != "none" and set(cells) != {"-"}:
            rows.append((max(s["retention"] or 0 for s in scores[-1:] if s), f"| `{method}` | {' | '.join(cells)} |"))
    rows.sort(key=lambda row: -row[0])
    heads = [f"{type}, {keep}" for type in ("moved", "appeared") for keep in CLIPS]
    return "\n".join(
        [
            *textwrap.wrap(text, 128, break_long_words=False, break_on_hyphens=False),
            "",
            f"| | {CLIPS[0]} tokens | {CLIPS[1]} | {' | '.join(heads)} |",
            "|---" * (3 + len(heads)) + "|",
            *(row for _, row in rows),
        ]
    )


def cell(score: dict[str, Any] | None) -> str:
    if score is None or score["retention"] is None:
        return "-"
    weak = score["beats_reference"] is False and score["method"] != "random"
    return f"{100 * score['retention']:.1f}" + (" †" if weak else "")


def rewritten(text: str, new: str, name: str) -> str:
    """``text`` with ``new`` between the two marks of this name."""
    begin, end = f"<!-- {name}: begin, written by benchmarks/tables.py -->", f"<!-- {name}: end -->"
    head, _, rest = text.partition(begin)
    _, mark, tail = rest.partition(end)
    if not mark:
        raise SystemExit(f"the marks {begin} and {end} are missing")
    return f"{head}{begin}\n{new}\n{end}{tail}"


def write(path: Path, new: str, name: str = "table") -> None:
    path.write_text(rewritten(path.read_text(encoding="utf-8"), new, name), encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {name}")


def here(*names: str) -> bool:
    return all((RESULTS / name).exists() for name in names)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    if here("natural/scores.json"):
        write(readme, natural(stored("natural")), "natural")
    if here("clips/scores.json"):
        write(readme, clips(stored("clips")), "clips")
    if here("table/scores.json", "hard/scores.json", "canvases/scores.json"):
        write(readme, block({name: stored(name) for name in ("table", "hard", "canvases")}))
    if here("table/validity.json"):
        figures = json.loads((RESULTS / "table" / "validity.json").read_text(encoding="utf-8"))
        write(ROOT / "src" / "visiontrim" / "zoo" / "README.md", f"{title(figures)}\n\n{table(figures)}")
