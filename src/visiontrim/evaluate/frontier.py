"""Accuracy against what it costs: the settings that no cheaper one beats, by time and by tokens, and equal times.

A method that spends long on its choice has to be compared at equal time, not at equal tokens. Times are those of the
evaluation itself: vision, the method's own work, prefill and answer, each batch beside the plain model's. Knows scores,
no model.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.evaluation import CONTROLS, Block
from visiontrim.evaluate.report import Section
from visiontrim.evaluate.scores import Score

FILE = "frontier.png"
LEVEL = CONTROLS[1]
"""The control whose times are the levels of "equal time": its choice costs nothing."""
SLACK = 1.05
"""Times that differ by less are equal: two runs of the same setting do."""

Cost = Callable[[Score], float]


def by_time(score: Score) -> float:
    """As a share of the plain model's."""
    return score.time or 0.0


def by_tokens(score: Score) -> float:
    """Mean per decoder layer."""
    return score.mean or 0.0


def edge(scores: Sequence[Score], cost: Cost) -> list[Score]:
    """The scores that none as cheap or cheaper reaches, the cheapest first."""
    found: list[Score] = []
    for score in sorted(scores, key=lambda score: (cost(score), -(score.retention or 0.0))):
        if not found or (score.retention or 0.0) > (found[-1].retention or 0.0):
            found.append(score)
    return found


def at(scores: Sequence[Score], level: float) -> tuple[float, float] | None:
    """Retention and tokens of one method in ``level`` of the plain model's time, between its two nearest budgets.

    ``scores`` are of one method at its budgets. None where even the fastest takes longer; where the slowest is faster,
    that one's.
    """
    points = sorted((by_time(score), score.retention or 0.0, by_tokens(score)) for score in scores)
    below = [point for point in points if point[0] <= level]
    above = [point for point in points if point[0] > level]
    if not below:
        return None
    if not above:
        return below[-1][1:]
    (t0, r0, n0), (t1, r1, n1) = below[-1], above[0]
    part = (level - t0) / (t1 - t0)
    return r0 + part * (r1 - r0), n0 + part * (n1 - n0)


def frontier(block: Block, scores: Sequence[Score]) -> list[Section]:
    """The tables of a block and, where matplotlib is, their picture; [] where no time is known."""
    known = [score for score in scores if score.retention is not None and score.time and score.mean is not None]
    if not block.compares or not known:
        return []
    ends = {cost: edge(known, cost) for cost in (by_time, by_tokens)}
    chosen = sorted({id(score): score for end in ends.values() for score in end}.values(), key=by_time)
    rows = tuple(
        (
            f"`{score.method}` at {score.keep}",
            f"{100 * (score.retention or 0.0):.1f}",
            f"{by_time(score):.2f}",
            f"{by_tokens(score):.1f}",
            " and ".join(name for name, cost in (("time", by_time), ("tokens", by_tokens)) if score in ends[cost]),
        )
        for score in chosen
    )
    text = (
        "Settings, controls among them, that none as cheap or cheaper beats: by time (of a question, as a share of the "
        "plain model's in the same batch, median over batches) or by tokens per decoder layer. Retention in %."
    )
    header = ("setting", "retention", "time", "tokens per layer", "on the frontier of")
    controls = frozenset(row for row, score in enumerate(chosen) if score.method in CONTROLS)
    found = [Section("Frontier", text, header, rows, controls=controls), *_equal(block, known)]
    picture = draw(block, known)
    return found if picture is None else [*found, Section("Frontier, drawn", "", picture=picture, file=FILE)]


def _equal(block: Block, known: Sequence[Score]) -> list[Section]:
    levels = sorted((by_time(score) for score in known if score.method == LEVEL), reverse=True)
    if not levels:
        return []
    rows = []
    for method in block.methods:
        own = [score for score in known if score.method == method]
        cells = [at(own, SLACK * level) for level in levels]
        rows.append(
            (f"`{method}`", *("-" if cell is None else f"{100 * cell[0]:.1f} ({cell[1]:.0f})" for cell in cells))
        )
    text = (
        f"Retention in % in the time that `{LEVEL}` takes at each budget and {SLACK - 1:.0%} more, as a share of the "
        "plain model's; between two budgets of a method on the line that joins them, in brackets the tokens that it "
        "can afford. `-`: its smallest budget takes longer."
    )
    header = ("method", *(f"{level:.2f}" for level in levels))
    controls = frozenset(row for row, method in enumerate(block.methods) if method in CONTROLS)
    return [Section("At equal time", text, header, tuple(rows), controls=controls)]


def draw(block: Block, known: Sequence[Score]) -> Image.Image | None:
    """Retention against time and against tokens; None without matplotlib.

    What stands on a frontier, the controls and the main method have colours, the others are grey.
    """
    from visiontrim.plotting import pyplot

    try:
        plt = pyplot()
    except TrimError:
        return None
    named = dict.fromkeys([block.main, *CONTROLS])
    named |= dict.fromkeys(score.method for cost in (by_time, by_tokens) for score in edge(known, cost))
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), sharey=True, layout="constrained")
    panels: list[tuple[Any, Cost, str]] = [
        (axes[0], by_time, "time of a question, share of the plain model's"),
        (axes[1], by_tokens, "vision tokens per decoder layer, mean"),
    ]
    for axis, cost, label in panels:
        for method in block.methods:
            if method not in named:
                _line(axis, [score for score in known if score.method == method], cost, color="0.82", lw=0.8, zorder=1)
        for number, method in enumerate(named):
            own = [score for score in known if score.method == method]
            style = {"ls": ":", "mfc": "none"} if method in CONTROLS else {"ls": "-"}
            mark = "os^Dv<>Pph"[number % 10]
            _line(axis, own, cost, label=method, marker=mark, ms=4.5, lw=1.2, color=f"C{number % 10}", **style)
        steps = [(cost(score), 100 * (score.retention or 0.0)) for score in edge(known, cost)]
        axis.step(*zip(*steps, strict=True), where="post", color="black", lw=6, alpha=0.13, zorder=0)
        axis.set_xlabel(label)
    tokens = sorted({round(by_tokens(score)) for score in known})
    apart = [count for number, count in enumerate(tokens) if not number or count > 1.15 * tokens[number - 1]]
    axes[1].set_xscale("log")
    axes[1].set_xticks(apart, map(str, apart))
    axes[1].set_xticks([], minor=True)
    axes[0].set_ylabel("retention in % of the plain model")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    plt.close(figure)
    return Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)


def _line(axis: Any, scores: Sequence[Score], cost: Cost, **style: Any) -> None:
    points = sorted((cost(score), 100 * (score.retention or 0.0)) for score in scores)
    if points:
        axis.plot(*zip(*points, strict=True), **style)
