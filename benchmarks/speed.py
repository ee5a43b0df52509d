"""What ``visiontrim bench --out`` stored, as Markdown: ``python benchmarks/speed.py FILE ...``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def shares(rows: list[dict[str, Any]]) -> list[str]:
    """A table of what ``bench`` measured of one batch, medians: shares of the plain model, and the ideal's of ours."""
    lines = ["| | tokens | vision | prefill | step | total | peak | ideal / ours | its step |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    peak = rows[0]["peak_bytes"]
    for row in rows:
        of = [f"{row['of_plain'][part][1]:.3f}" for part in ("vision", "prefill", "decode", "total")]
        ideal = f"{row['ideal_of_ours']['total'][1]:.3f}" if "ideal_of_ours" in row else ""
        step = f"{row['step_ideal_of_ours']['wall'][1]:.4f}" if "step_ideal_of_ours" in row else ""
        shown = [row["name"], f"{row['tokens']:g}", *of, f"{row['peak_bytes'] / peak:.3f}", ideal, step]
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def markdown(told: dict[str, Any]) -> str:
    """All batches of one stored result."""
    about = told["environment"]
    where = f"{about['device_name']}, {about['threads']} threads, transformers {about['transformers']}"
    lines = [f"## {told['model']}", "", f"{where}, {told['when']}."]
    for one in told["batches"]:
        lines += ["", f"Batch {one['batch']}: shares of the plain model, medians.", "", *shares(one["rows"])]
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(markdown(json.loads(Path(name).read_text(encoding="utf-8"))) for name in sys.argv[1:]))
