"""Scores as Markdown and as one HTML page, both from the same tables."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from visiontrim.evaluate.evaluation import Block
from visiontrim.evaluate.scores import Answers, Score

MARK = "†"


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


def sections(block: Block, answers: Answers, scores: Sequence[Score]) -> list[Section]:
    """The tables of a block."""
    by = {(score.method, score.keep): score for score in scores}
    found = [_overview(block, answers, by)]
    if block.compares:
        found += [_details(block, keep, by) for keep in block.keeps]
    kinds = dict.fromkeys(item.type for item in answers.items)
    if len(kinds) > 1 and answers.labelled:
        found += [_types(block, keep, by, answers, tuple(kinds)) for keep in block.keeps[-2:]]
    reasons: dict[str, list[str]] = {}
    for score in scores:
        if score.error:
            reasons.setdefault(score.error, []).append(f"`{score.method}` at {score.keep}")
    if reasons:
        rows = tuple((", ".join(cells), reason) for reason, cells in reasons.items())
        found.append(Section("Cells without a number", "", ("cell", "reason"), rows))
    return found


def _overview(block: Block, answers: Answers, by: dict) -> Section:
    first = block.methods[0]
    rows = []
    for method in block.methods:
        cells = [by[method, keep] for keep in block.keeps]
        rows.append((f"`{method}`", *(_brief(cell, block.compares, method == first) for cell in cells)))
    if block.compares:
        text = (
            f"In % of the plain model's right answers; {MARK} marks what does not beat `{first}`: the 95 % interval of "
            "the paired difference reaches 0."
        )
        return Section("Retention", text, ("method", *(f"{keep} tokens" for keep in block.keeps)), tuple(rows))
    text = (
        "Right answers in %; in brackets the difference to the first row in points, paired, with its 95 % interval."
        if answers.labelled
        else "Answers like the plain model's in %; in brackets the difference to the first row."
    )
    return Section(block.title, text, ("method", *(f"{keep} tokens" for keep in block.keeps)), tuple(rows))


def _brief(score: Score, compares: bool, first: bool) -> str:
    if score.right is None:
        return "-"
    if compares:
        shown = "-" if score.retention is None else f"{100 * score.retention:.1f}"
        return shown if first or score.beats_reference else f"{shown} {MARK}"
    return f"{100 * score.right:.1f}" + ("" if score.gain is None else f" ({_gain(score)})")


def _details(block: Block, keep: object, by: dict) -> Section:
    header = ("method", "right", "retention", "over random", "agrees with plain", "mean per layer", "method time")
    rows = []
    for method in block.methods:
        score = by[method, keep]
        if score.right is None or score.mean is None or score.agreement is None or score.method_time is None:
            rows.append((f"`{method}`", *["-"] * 6))
            continue
        retention = "-" if score.retention is None else f"{100 * score.retention:.1f}"
        numbers = (f"{100 * score.right:.1f}", retention, "" if score.gain is None else _gain(score))
        rest = (f"{100 * score.agreement:.1f}", f"{score.mean:.1f}", f"{100 * score.method_time:.1f} %")
        rows.append((f"`{method}`", *numbers, *rest))
    text = (
        "Right answers, retention and agreement in %; difference to random in points with its 95 % interval; time of "
        "the method's own work in % of the plain model's prefill."
    )
    return Section(f"At {keep} tokens per layer", text, header, tuple(rows))


def _types(block: Block, keep: object, by: dict, answers: Answers, kinds: tuple[str, ...]) -> Section:
    plain = answers.whole.by_type
    rows = [("plain", *(f"{100 * plain[kind]:.0f}" for kind in kinds))]
    for method in block.methods:
        types = by[method, keep].by_type
        rows.append((f"`{method}`", *(f"{100 * types[kind]:.0f}" if types else "-" for kind in kinds)))
    return Section(f"Right answers in % by type, {keep} tokens", "", ("method", *kinds), tuple(rows))


def _gain(score: Score) -> str:
    gain, low, high = score.gain or (0.0, 0.0, 0.0)
    return f"{100 * gain:+.1f}; {100 * low:+.1f} to {100 * high:+.1f}"


def markdown(title: str, text: str, found: Sequence[Section]) -> str:
    lines = [f"# {title}", "", text]
    for section in found:
        lines += ["", f"## {section.title}"]
        lines += ["", section.text] if section.text else []
        if section.rows:
            lines += ["", f"| {' | '.join(section.header)} |", "|---" * len(section.header) + "|"]
            lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in section.rows]
        if section.picture is not None:
            lines += ["", f"![{section.title}]({section.file})"]
    return "\n".join(lines) + "\n"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1f2430 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .7rem; border-bottom: 1px solid #dde1e8 }
td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
code { font-size: 13px } img { max-width: 100% } th { text-align: right }
"""


def page(title: str, text: str, found: Sequence[Section]) -> str:
    """One HTML file without anything to load."""
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"]
    parts += [f"<h1>{html.escape(title)}</h1><p>{_inline(text)}</p>"]
    for section in found:
        parts.append(f"<h2>{html.escape(section.title)}</h2><p>{_inline(section.text)}</p>")
        if section.rows:
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.header)
            body = "".join("<tr>" + "".join(f"<td>{_inline(c)}</td>" for c in row) + "</tr>" for row in section.rows)
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
        if section.picture is not None:
            buffer = io.BytesIO()
            section.picture.save(buffer, "PNG")
            parts.append(f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">')
    return "\n".join(parts) + "\n"


def _inline(text: str) -> str:
    """Escaped, with `code` and **strong**."""
    parts = html.escape(text).split("`")
    coded = "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
    strong = coded.split("**")
    return "".join(f"<b>{part}</b>" if number % 2 else part for number, part in enumerate(strong))
