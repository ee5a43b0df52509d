"""Scores as Markdown and as one HTML page, both from the same tables."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from visiontrim.core.budget import Amount
from visiontrim.evaluate.bootstrap import FEWEST_GROUPS, Interval
from visiontrim.evaluate.evaluation import CONTROLS, Block
from visiontrim.evaluate.scores import Answers, Score

MARK = "†"
Cells = Mapping[tuple[str, Amount | None], Score]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with text, a table or a picture, each where it is not empty."""

    title: str
    text: str = ""
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    picture: Image.Image | None = None
    file: str = ""
    """Name of the picture beside the Markdown."""
    controls: frozenset[int] = frozenset()
    """Rows of controls, which a method has to beat."""
    best: frozenset[tuple[int, int]] = frozenset()
    """Row and column of the best value of a column, controls left aside."""


def sections(block: Block, answers: Answers, scores: Sequence[Score]) -> list[Section]:
    """The tables of a block."""
    by = {(score.method, score.keep): score for score in scores}
    found = [_overview(block, answers, by)]
    if block.compares:
        found += [_details(block, answers, keep, by) for keep in block.keeps]
    kinds = tuple(answers.whole.by_type)
    if len(kinds) > 1 and answers.labelled:
        found += [_types(block, keep, by, answers, kinds) for keep in block.keeps[-2:]]
    reasons: dict[str, list[str]] = {}
    for score in scores:
        if score.error:
            reasons.setdefault(score.error, []).append(f"`{score.method}` at {score.keep}")
    if reasons:
        rows = tuple((", ".join(cells), reason) for reason, cells in reasons.items())
        found.append(Section("Cells without a number", "", ("cell", "reason"), rows))
    return found


def _overview(block: Block, answers: Answers, by: Cells) -> Section:
    first = block.methods[0]
    grid = [[by[method, keep] for keep in block.keeps] for method in block.methods]
    rows = [
        (f"`{method}`", *(_brief(cell, block.compares, method == first) for cell in cells))
        for method, cells in zip(block.methods, grid, strict=True)
    ]
    few = f"Fewer than {FEWEST_GROUPS} groups of questions: no intervals, so nothing is said to beat `{first}`."
    if block.compares:
        marks = (
            f"{MARK} marks what does not beat `{first}`: the 95 % interval of the paired difference reaches 0."
            if answers.groups >= FEWEST_GROUPS
            else few
        )
        title, text = "Retention", f"In % of the plain model's {answers.metric.metric}. {marks} Best of a column: bold."
    else:
        inside = "; in brackets the difference to the first row, paired, with its 95 % interval"
        title, text = block.title, f"{answers.metric.metric.capitalize()}{inside}."
    best = _best([[cell.score for cell in cells] for cells in grid], block)
    header = ("method", *(f"{keep} tokens" for keep in block.keeps))
    return Section(title, text, header, tuple(rows), controls=_controls(block), best=best)


def _brief(score: Score, compares: bool, first: bool) -> str:
    if score.score is None:
        return "-"
    if compares:
        shown = "-" if score.retention is None else f"{100 * score.retention:.1f}"
        return shown if first or score.beats_reference is not False else f"{shown} {MARK}"
    return f"{score.score:.1f}" + ("" if score.gain is None else f" ({_gain(score)})")


def _details(block: Block, answers: Answers, keep: Amount, by: Cells) -> Section:
    header = (
        "method",
        answers.metric.metric,
        "retention",
        "over random",
        "agrees with plain",
        "tokens per layer",
        "answer length",
        "time",
        "method time",
    )
    rows = []
    for method in block.methods:
        score = by[method, keep]
        if score.score is None or score.agreement is None or score.method_time is None or score.length is None:
            rows.append((f"`{method}`", *["-"] * 8))
            continue
        retention = (
            "-" if score.retention is None else f"{100 * score.retention:.1f}{_ends(score.retention_interval, 100)}"
        )
        mean = "-" if score.mean is None else f"{score.mean:.1f}"
        numbers = (f"{score.score:.1f}", retention, "" if score.gain is None else _gain(score))
        taken = "-" if score.time is None else f"{score.time:.2f}"
        rest = (f"{100 * score.agreement:.1f}", mean, f"{score.length:.1f}", taken, f"{100 * score.method_time:.1f} %")
        rows.append((f"`{method}`", *numbers, *rest))
    text = (
        "Retention and agreement in %, with 95 % intervals; the difference to random is of the same questions; "
        "length in tokens; time of a question as a share of the plain model's, median over batches; the method's own "
        "work in % of the plain model's prefill."
    )
    best = _best([[by[method, keep].score] for method in block.methods], block)
    return Section(f"At {keep} tokens per layer", text, header, tuple(rows), controls=_controls(block), best=best)


def _types(block: Block, keep: Amount, by: Cells, answers: Answers, kinds: tuple[str, ...]) -> Section:
    plain = answers.whole.by_type
    rows = [("plain", *(f"{plain[kind]:.0f}" for kind in kinds))]
    for method in block.methods:
        types = by[method, keep].by_type
        rows.append((f"`{method}`", *(f"{types[kind]:.0f}" if types else "-" for kind in kinds)))
    grid = [[by[method, keep].by_type.get(kind) for kind in kinds] for method in block.methods]
    best = frozenset((row + 1, column) for row, column in _best(grid, block))
    controls = frozenset(row + 1 for row in _controls(block)) | {0}
    title = f"{answers.metric.metric.capitalize()} by type, {keep} tokens"
    return Section(title, "", ("method", *kinds), tuple(rows), controls=controls, best=best)


def _controls(block: Block) -> frozenset[int]:
    return frozenset(row for row, method in enumerate(block.methods) if block.compares and method in CONTROLS)


def _best(grid: Sequence[Sequence[float | None]], block: Block) -> frozenset[tuple[int, int]]:
    """Places in the table, behind its first column, of the highest values of each column."""
    aside = _controls(block)
    found = set()
    for column in range(len(grid[0])):
        values = {row: cells[column] for row, cells in enumerate(grid) if row not in aside}
        known = [value for value in values.values() if value is not None]
        if len(known) > 1:
            found |= {(row, column + 1) for row, value in values.items() if value == max(known)}
    return frozenset(found)


def _gain(score: Score) -> str:
    gain, ends = score.gain or 0.0, score.gain_interval
    return f"{gain:+.1f}" + ("" if ends is None else f"; {ends[0]:+.1f} to {ends[1]:+.1f}")


def _ends(interval: Interval | None, scale: float) -> str:
    return "" if interval is None else f" ({scale * interval[0]:.1f} to {scale * interval[1]:.1f})"


def markdown(title: str, text: Sequence[str], found: Sequence[Section]) -> str:
    lines = [f"# {title}"]
    for paragraph in text:
        lines += ["", paragraph]
    for section in found:
        lines += ["", f"## {section.title}"]
        lines += ["", section.text] if section.text else []
        if section.rows:
            lines += ["", f"| {' | '.join(section.header)} |", "|---" * len(section.header) + "|"]
            lines += [f"| {' | '.join(_cells(section, row))} |" for row in range(len(section.rows))]
        if section.picture is not None:
            lines += ["", f"![{section.title}]({section.file})"]
    return "\n".join(lines) + "\n"


def _cells(section: Section, row: int) -> list[str]:
    """A row for Markdown: the best in bold, controls named."""
    found = []
    for column, cell in enumerate(section.rows[row]):
        text = " ".join(cell.replace("|", "\\|").split())
        text = f"**{text}**" if (row, column) in section.best else text
        found.append(f"{text} (control)" if column == 0 and row in section.controls and text != "plain" else text)
    return found


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1f2430 }
.wide { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #dde1e8; text-align: right; vertical-align: bottom }
td { white-space: nowrap }
td { font-variant-numeric: tabular-nums } .words td, .words th { white-space: normal; text-align: left }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: #fff; min-width: 6rem }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: 0; cursor: pointer; color: inherit }
th button::after { content: "\\a0\\2195"; color: #9aa5b1 }
th[aria-sort=ascending] button::after { content: "\\a0\\2191"; color: inherit }
th[aria-sort=descending] button::after { content: "\\a0\\2193"; color: inherit }
tr.control td { color: #6b7482; font-style: italic } small { white-space: nowrap }
td.best { font-weight: 700; color: #11692f }
code { font-size: 13px; overflow-wrap: anywhere } h2 code { font-size: inherit } img { max-width: 100%; height: auto }
@media (max-width: 40rem) { body { margin: 1rem auto } h1 { font-size: 1.4rem } th, td { padding: .25rem .45rem }
td:first-child, th:first-child { max-width: 45vw; white-space: normal } .wide img { max-width: none; width: 46rem } }
"""
_SCRIPT = """
for (const head of document.querySelectorAll("th")) head.querySelector("button").onclick = () => {
  const table = head.closest("table"), column = head.cellIndex, body = table.tBodies[0];
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => row.cells[column].dataset.value;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? -order : order;
  });
  body.append(...rows);
};
"""


def page(title: str, text: Sequence[str], found: Sequence[Section]) -> str:
    """One HTML file without anything to load; a click on the head of a column sorts by it."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{_inline(paragraph)}</p>" for paragraph in text),
    ]
    for section in found:
        parts.append(f"<h2>{_inline(section.title)}</h2>" + (f"<p>{_inline(section.text)}</p>" if section.text else ""))
        if section.rows:
            parts.append(_table(section))
        if section.picture is not None:
            buffer = io.BytesIO()
            section.picture.save(buffer, "PNG")
            source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            words = html.escape(f"{section.title}. {section.text}".replace("`", ""))
            size = f"width={section.picture.width} height={section.picture.height}"
            parts.append(f'<div class="wide"><img src="{source}" alt="{words}" {size}></div>')
    parts.append(f"<script>{_SCRIPT}</script></html>")
    return "\n".join(parts) + "\n"


def _table(section: Section) -> str:
    head = "".join(f"<th><button type=button>{html.escape(cell)}</button></th>" for cell in section.header)
    body = []
    for number, row in enumerate(section.rows):
        kind = ' class="control"' if number in section.controls else ""
        cells = "".join(
            f'<td data-value="{html.escape(_value(cell))}"{" class=best" if (number, column) in section.best else ""}>'
            f"{_inline(cell)}{' <small>(control)</small>' if column == 0 and kind and cell != 'plain' else ''}</td>"
            for column, cell in enumerate(row)
        )
        body.append(f"<tr{kind}>{cells}</tr>")
    kind = " words" if len(section.header) == 2 and section.header[1] == "reason" else ""
    return f'<div class="wide{kind}"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _value(cell: str) -> str:
    """What a cell is sorted by: its first number, its text where there is none, "" where it is empty."""
    if cell in ("", "-"):
        return ""
    found = re.match(r"[+-]?\d+(\.\d+)?", cell)
    return found[0].lstrip("+") if found else cell.strip("`")


def _inline(text: str) -> str:
    """Escaped, with `code` and **strong**."""
    parts = html.escape(text).split("`")
    coded = "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
    strong = coded.split("**")
    return "".join(f"<b>{part}</b>" if number % 2 else part for number, part in enumerate(strong))
