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
    figure, panels = plt.subplots(1, len(batches), figsize=(4.8 * len(batches), 3.8), squeeze=False, dpi=120)
    for panel, batch in zip(panels[0], batches, strict=True):
        for label, rows in _lines(batch["rows"]).items():
            rows = sorted(rows, key=lambda row: row["tokens"])
            low, middle, high = zip(*(row["seconds"]["total"] for row in rows), strict=True)
            spread = [
                [b - a for a, b in zip(low, middle, strict=True)],
                [b - a for a, b in zip(middle, high, strict=True)],
            ]
            style = {"plain": "s", "ideal": "k:"}.get(label, "o-")
            panel.errorbar(
                [row["tokens"] for row in rows], middle, yerr=spread, fmt=style, label=label, capsize=3, ms=4
            )
        panel.set_title(f"batch {batch['batch']}", fontsize=10)
        panel.set_xlabel("mean vision tokens per decoder layer")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    seconds = "CPU seconds" if told["cpu_time"] else "seconds"
    panels[0][0].set_ylabel(f"{seconds} of a call, {told['answer']} tokens answered")
    panels[0][-1].legend(fontsize=8)
    figure.suptitle(
        f"{told['model']}, {told['environment']['device_name']}, {told['environment']['dtype']}", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by what is joined with a line: one method with several budgets, and all ideals."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        label = row["method"] if row["kind"] == "method" else row["kind"]
        lines.setdefault(label, []).append(row)
    return lines
