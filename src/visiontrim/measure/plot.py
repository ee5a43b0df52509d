"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visiontrim.plotting import pyplot


def time_against_tokens(told: Mapping[str, Any], path: Path) -> None:
    """Draw what ``visiontrim bench`` told: seconds of a call against tokens, one panel a batch size, with quartiles.

    Raises :class:`TrimError` without matplotlib.
    """
    plt = pyplot()
    batches = told["batches"]
    size = (4.8 * len(batches) + 1.6, 3.8)
    figure, panels = plt.subplots(1, len(batches), figsize=size, squeeze=False, dpi=120, layout="constrained")
    for panel, batch in zip(panels[0], batches, strict=True):
        for number, (label, rows) in enumerate(_lines(batch["rows"]).items()):
            rows = sorted(rows, key=lambda row: row["tokens"])
            low, middle, high = zip(*(row["seconds"]["total"] for row in rows), strict=True)
            spread = [
                [b - a for a, b in zip(low, middle, strict=True)],
                [b - a for a, b in zip(middle, high, strict=True)],
            ]
            panel.errorbar([row["tokens"] for row in rows], middle, yerr=spread, label=label, **_style(label, number))
        panel.set_title(f"batch {batch['batch']}", fontsize=10)
        panel.set_xlabel("mean vision tokens per decoder layer")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    seconds = "CPU seconds" if told["cpu_time"] else "seconds"
    panels[0][0].set_ylabel(f"{seconds} of a call, {told['answer']} tokens answered")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    about = f"{told['model']}, {told['environment']['device_name']}, {told['environment']['dtype']}"
    figure.suptitle(about, fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    plt.close(figure)


def _style(label: str, number: int) -> dict[str, Any]:
    """Lines at the same times are still told apart: hollow marks of falling size, thin dashes over wide lines."""
    if label == "ideal":
        return {"fmt": "k:", "capsize": 3, "zorder": 9}
    mark, dash = "os^Dv<>P"[number % 8], ("-", "-", "--", "-.", ":")[min(number, 4)]
    wide = max(1.0, 3.2 - 0.55 * number)
    return {"fmt": mark, "ls": dash, "lw": wide, "ms": 3 + 2 * wide, "mfc": "none", "capsize": 3, "elinewidth": 1}


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by what is joined with a line: one method with several budgets, and all ideals."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        label = row["method"] if row["kind"] == "method" else row["kind"]
        lines.setdefault(label, []).append(row)
    return lines
