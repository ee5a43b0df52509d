"""Published beside measured: which cells are comparable, by how much they differ, and what retention both have.

Protocols shift the plain and the compressed model alike, so retention compares better than the score. A difference is
printed only where both numbers are of the same thing; else the reason stands there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visiontrim.ask import OWN, Speaker
from visiontrim.evaluate.asking import PLAIN, Examiner
from visiontrim.evaluate.asking import Cell as Asked
from visiontrim.evaluate.bootstrap import Interval, to_json
from visiontrim.evaluate.evaluation import Progress, evaluate
from visiontrim.evaluate.protocol import PROTOCOLS, Protocol
from visiontrim.evaluate.published import Cell, Setting, budgets, cells, known_models, model_of
from visiontrim.evaluate.scores import Answers

NEAR = {
    "seed-image": "seed",
    "mme-perception": "mme",
    "mme": "mme-perception",
    "textvqa-no-ocr": "textvqa",
    "scienceqa": "scienceqa-img",
    "vqav2-val": "vqav2",
    "vizwiz-val": "vizwiz",
}
"""Benchmarks whose published number is often taken for another's."""
SCIENCEQA = (66.8, 69.5)
"""What the plain LLaVA-1.5-7B scores on ScienceQA-IMG, in two families of papers."""
POINT = 1.0
PUBLISHED = "llava-1.5"
"""Protocol of the published numbers."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A benchmark that was asked."""

    answers: Answers
    total: int
    """Questions of the whole benchmark."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A published number beside a measured one, as far as there are both."""

    benchmark: str
    setting: Setting
    published: float | None
    source: str
    published_retention: float | None
    measured: float | None
    interval: Interval | None
    difference: float | None
    """None where the two are not comparable."""
    retention: float | None
    retention_interval: Interval | None
    reason: str
    """Why the two are not comparable, or why one is missing, else ""."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "method": self.setting.method,
            "call": self.setting.call,
            "tokens": self.setting.tokens,
            "published": self.published,
            "source": self.source,
            "published_retention": self.published_retention,
            "measured": self.measured,
            "interval": to_json(self.interval),
            "difference": self.difference,
            "retention": self.retention,
            "retention_interval": to_json(self.retention_interval),
            "reason": self.reason,
        }


def standing(speaker: Speaker, protocol: Protocol) -> tuple[str, str]:
    """The model of the tables to compare with, and why nothing is comparable, else ""."""
    model = None if speaker.name in OWN else model_of(speaker.model.config)
    if model is None:
        what = "the bundled model" if speaker.name in OWN else speaker.name
        return known_models()[0], f"{what} is none of the published models ({', '.join(known_models())})"
    if protocol != PROTOCOLS[PUBLISHED]:
        return model, f"protocol {protocol.name} is not {PUBLISHED}, that of the published numbers"
    return model, ""


def ask(
    examiners: Mapping[str, Examiner],
    settings: Sequence[Setting],
    announce: Callable[[int, int, float], None],
    progress: Progress,
) -> dict[str, Answers]:
    """Answers of the plain model and of all settings to every benchmark.

    ``announce`` is told, after one batch, how many answers there will be, how many were timed, and the seconds of one.
    """
    asked = [Asked(setting.call, None, setting.per) for setting in settings]
    number = 1 + len(asked)
    total = sum(len(examiner.batches) for examiner in examiners.values()) * number
    questions = sum(len(examiner.suite.items) for examiner in examiners.values())
    first, start = next(iter(examiners.values())), time.monotonic()
    fresh = [first.ask(cell, 0)[1] for cell in (Asked(PLAIN, None), *asked)]
    if any(fresh):
        timed = sum(fresh) * len(first.batches[0])
        announce(questions * number, timed, (time.monotonic() - start) / timed)
    found: dict[str, Answers] = {}
    before = 0
    for name, examiner in examiners.items():
        begun = before
        found[name] = evaluate(
            examiner, asked, progress=lambda done, _, new, begun=begun: progress(begun + done, total, new)
        )
        before += len(examiner.batches) * number
    return found


def compare(
    model: str, settings: Sequence[Setting], measured: Mapping[str, Measured | str], excuse: str = ""
) -> list[Compared]:
    """A row for each setting and benchmark, the plain model first.

    ``measured`` holds, by benchmark, its answers or why there are none. ``excuse`` is why nothing is comparable, such
    as another model or protocol.
    """
    plain = Setting(PLAIN, settings[0].tokens, PLAIN, "image", "")
    found = []
    for setting in (plain, *settings):
        for name, one in measured.items():
            found.append(_compared(model, setting, name, one, excuse))
    return found


def _compared(model: str, setting: Setting, name: str, one: Measured | str, excuse: str) -> Compared:
    cell, reason = _published(model, setting, name)
    value = retention = None
    spread = wide = None
    if isinstance(one, str):
        reason = one
    else:
        asked = Asked(PLAIN, None) if setting.method == PLAIN else Asked(setting.call, None, setting.per)
        score = one.answers.score(asked)
        if score.error:
            reason = score.error
        elif not one.answers.labelled:
            needs = {"server": "only a server scores it", "judge": "only a judge scores it"}
            reason = needs.get((cell and cell.needs) or "server", "") + ": the upload file is written"
        elif cell is not None and cell.needs == "judge":
            reason = "only a judge scores it: the result file is written"
        else:
            value, spread = score.score, score.interval
            retention, wide = score.retention, score.retention_interval
            reason = reason or excuse or _different(name, one) or _partial(one)
    exact = cell is not None and value is not None and not reason
    share = None if cell is None or not cell.plain else cell.value / cell.plain
    return Compared(
        benchmark=name,
        setting=setting,
        published=None if cell is None else cell.value,
        source="" if cell is None else f"{cell.source}, {cell.column}",
        published_retention=share,
        measured=value,
        interval=spread,
        difference=value - cell.value if exact and cell is not None and value is not None else None,
        retention=retention,
        retention_interval=wide,
        reason=reason,
    )


def _published(model: str, setting: Setting, name: str) -> tuple[Cell | None, str]:
    """The first printed number, and why it is no number of this benchmark, else ""."""
    whole = budgets(model, PLAIN)
    known = cells(model, setting.method, whole[0] if setting.method == PLAIN and whole else setting.tokens)
    exact = next((cell for cell in known if cell.benchmark == name), None)
    if exact is not None:
        return exact, ""
    near = next((cell for cell in known if cell.benchmark is not None and cell.benchmark == NEAR.get(name)), None)
    if near is not None:
        return near, f"the published number is of {near.subset}"
    return None, "nothing is published"


def _different(name: str, one: Measured) -> str:
    """ScienceQA is printed with two numbers of one checkpoint: a plain model that has neither is run otherwise."""
    plain = one.answers.whole.score
    if name != "scienceqa-img" or plain is None or any(abs(plain - known) <= POINT for known in SCIENCEQA):
        return ""
    return f"the plain model has {plain:.1f}, which is neither {SCIENCEQA[0]} nor {SCIENCEQA[1]}"


def _partial(one: Measured) -> str:
    asked = len(one.answers.items)
    return "" if asked == one.total else f"{asked:,} of {one.total:,} questions"


def average(rows: Sequence[Compared]) -> dict[tuple[str, int], tuple[float | None, float | None, int]]:
    """For each setting the mean retention published and measured, over the benchmarks that have both, and how many."""
    found: dict[tuple[str, int], tuple[float | None, float | None, int]] = {}
    for key in dict.fromkeys((row.setting.method, row.setting.tokens) for row in rows if row.setting.method != PLAIN):
        both = [
            (row.published_retention, row.retention)
            for row in rows
            if (row.setting.method, row.setting.tokens) == key
            and row.published_retention is not None
            and row.retention is not None
        ]
        if both:
            printed, ours = (sum(pair[side] or 0.0 for pair in both) / len(both) for side in (0, 1))
            found[key] = printed, ours, len(both)
        else:
            found[key] = None, None, 0
    return found


def markdown(title: str, text: Sequence[str], rows: Sequence[Compared], excuse: str = "") -> str:
    """A table for each budget, with what is not comparable and why, and the averages; ``excuse`` stands in ``text``."""
    lines = [f"# {title}", *(line for paragraph in text for line in ("", paragraph))]
    means = average(rows)
    for setting in dict.fromkeys(row.setting for row in rows):
        some = [row for row in rows if row.setting == setting]
        name = "The plain model" if setting.method == PLAIN else f"{setting.method}, {setting.tokens} tokens"
        lines += ["", f"## {name}", ""]
        if setting.method != PLAIN:
            per = "" if setting.per == "image" else f" per {setting.per}"
            lines += [f"`{setting.call}`{per}" + (f". Note: {setting.note}." if setting.note else ""), ""]
        lines += [
            "| benchmark | published | measured | difference | retention published | retention measured | remark | "
            "source |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(_cells(row, excuse))} |" for row in some]
        if (setting.method, setting.tokens) in means:
            printed, ours, number = means[setting.method, setting.tokens]
            shown = (_percent(printed), _percent(ours))
            lines.append(f"| **mean of {number}** | | | | {shown[0]} | {shown[1]} | of those that have both | |")
    return "\n".join(lines) + "\n"


def _cells(row: Compared, excuse: str) -> tuple[str, ...]:
    measured = "-" if row.measured is None else f"{row.measured:.1f}{_ends(row.interval)}"
    difference = "not comparable" if row.difference is None else f"{row.difference:+.1f}"
    if row.measured is None or row.published is None:
        difference = "-"
    return (
        row.benchmark,
        "-" if row.published is None else f"{row.published:g}",
        measured,
        difference,
        _percent(row.published_retention),
        _percent(row.retention) + _ends(row.retention_interval, 100),
        "see above" if row.reason and row.reason == excuse else row.reason,
        row.source,
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _ends(interval: Interval | None, scale: float = 1.0) -> str:
    return "" if interval is None else f" ({scale * interval[0]:.1f} to {scale * interval[1]:.1f})"
