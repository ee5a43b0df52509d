"""What a table of retentions does not say: against a smaller picture, over seeds, skill by skill, yes and no, pointing.

The control of a smaller picture divides the questions: those that it answers rightly need no method, the others show
what a method keeps. Knows scores and answers, no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from visiontrim.core.budget import Amount
from visiontrim.evaluate.asking import PLAIN, Cell
from visiontrim.evaluate.bootstrap import FEWEST_GROUPS, Interval
from visiontrim.evaluate.evaluation import CONTROLS, Block
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.report import Section
from visiontrim.evaluate.scores import Answers
from visiontrim.evaluate.smaller import DOWNSAMPLED
from visiontrim.zoo.natural_questions import CELLS, POINT, overlap, parse_cell

YES_NO = {"yes", "no"}
WHOLE = Cell(PLAIN, None)


def evidence(block: Block, answers: Answers) -> list[Section]:
    """The tables of a block of methods beside controls; [] for an ablation."""
    if not block.compares:
        return []
    found = [_smaller(block, answers, keep) for keep in block.keeps[-2:]]
    found += [_seeds(block, answers), _skills(block, answers), *(_yes_no(block, answers, k) for k in block.keeps[-1:])]
    found += [_pointing(block, answers, keep) for keep in block.keeps[-1:]]
    return [section for section in found if section is not None]


def _smaller(block: Block, answers: Answers, keep: Amount) -> Section | None:
    control = Cell(DOWNSAMPLED, keep)
    if answers.error(control):
        return None
    right = answers.right(control) >= 0.5
    known = np.array([bool(item.answers) or not answers.labelled for item in answers.items])
    sides = [answers.where((known & side).tolist()) for side in (right, ~right)]
    counts = [len(side.items) for side in sides]
    rows = []
    for cell in (WHOLE, *(Cell(method, keep) for method in block.methods)):
        name = "plain" if cell == WHOLE else f"`{cell.method}`"
        if answers.error(cell):
            rows.append((name, "-", "-", ""))
            continue
        shares = [100 * float(side.right(cell).mean()) if side.items else None for side in sides]
        gain, ends = answers.sample(cell).over(answers.sample(control))
        over = "" if cell == control else f"{gain:+.1f}{_ends(ends)}"
        rows.append((name, *("-" if share is None else f"{share:.1f}" for share in shares), over))
    text = (
        f"`{DOWNSAMPLED}` is the control of a smaller picture of at most as many tokens: the picture itself where a "
        "model takes pictures of any size, else the mean of its patches in even cells. Right answers in % of the "
        "questions that the control answers rightly, for which nothing clever is needed, and of the others; and the "
        "score over the control's, paired, with its 95 % interval."
    )
    header = (
        "method",
        f"right when downsampled ({counts[0]})",
        f"wrong when downsampled ({counts[1]})",
        f"over {DOWNSAMPLED}",
    )
    controls = frozenset({0} | {row + 1 for row, method in enumerate(block.methods) if method in CONTROLS})
    return Section(f"Against a smaller picture, {keep} tokens", text, header, tuple(rows), controls=controls)


def _seeds(block: Block, answers: Answers) -> Section | None:
    rows = []
    for keep in block.keeps:
        draws = [cell for cell in block.draws(keep) if not answers.error(cell)]
        if len(draws) < 2:
            continue
        values = [100 * (answers.score(cell).retention or 0.0) for cell in draws]
        rows.append(
            (
                f"{keep}",
                f"{np.mean(values):.1f}",
                f"{np.std(values, ddof=1):.2f}",
                f"{min(values):.1f}",
                f"{max(values):.1f}",
            )
        )
    if not rows:
        return None
    text = (
        f"Retention in % of `{CONTROLS[0]}` over {block.seeds} seeds; each draws anew for every batch. The tables have "
        "the first one."
    )
    header = ("tokens", "mean", "standard deviation", "lowest", "highest")
    return Section("Spread of random", text, header, tuple(rows))


def _skills(block: Block, answers: Answers) -> Section | None:
    kinds = tuple(answers.whole.by_type)
    if len(kinds) < 2 or not answers.labelled:
        return None
    rows = []
    for kind in kinds:
        part = answers.where([item.type == kind for item in answers.items])
        whole = part.sample(WHOLE)
        cells = []
        for keep in block.keeps:
            cell = Cell(block.main, keep)
            if part.error(cell):
                cells.append("-")
                continue
            loss, ends = part.sample(cell).over(whole)
            cells.append(f"{loss:+.1f}{_ends(ends)}")
        rows.append((kind, f"{len(part.items)}", f"{whole.value:.1f}", *cells))
    text = (
        f"{answers.metric.metric.capitalize()} of the plain model, and what `{block.main}` adds to it or takes from "
        f"it, paired, with its 95 % interval (from {FEWEST_GROUPS} groups on)."
    )
    header = ("skill", "questions", "plain", *(f"{keep} tokens" for keep in block.keeps))
    return Section(f"`{block.main}`, skill by skill", text, header, tuple(rows))


def _yes_no(block: Block, answers: Answers, keep: Amount) -> Section | None:
    kinds = [kind for kind in dict.fromkeys(item.type for item in answers.items) if _balanced(answers.items, kind)]
    if not kinds:
        return None
    parts = [answers.where([item.type == kind for item in answers.items]) for kind in kinds]
    rows = []
    for cell in (WHOLE, *(Cell(method, keep) for method in block.methods)):
        name = "plain" if cell == WHOLE else f"`{cell.method}`"
        if answers.error(cell):
            rows.append((name, *["-"] * (4 * len(kinds))))
            continue
        numbers = [f"{number:.1f}" for part in parts for number in _as_pope(part.items, part.texts(cell))]
        rows.append((name, *numbers))
    names = ("accuracy", "F1", "missed", "yes ratio")
    header = ("method", *(f"{kind}: {name}" for kind in kinds for name in names))
    text = (
        "Questions with the answers yes and no, scored as POPE does, in %: F1 of yes, the share of yes that was "
        "missed, and how often yes was said. A method that loses objects says no more often."
    )
    controls = frozenset({0} | {row + 1 for row, method in enumerate(block.methods) if method in CONTROLS})
    return Section(f"Yes or no, {keep} tokens", text, header, tuple(rows), controls=controls)


def _pointing(block: Block, answers: Answers, keep: Amount) -> Section | None:
    asked = answers.where([item.type == POINT and bool(item.answers) for item in answers.items])
    if not asked.items:
        return None
    rows = []
    for cell in (WHOLE, *(Cell(method, keep) for method in block.methods)):
        name = "plain" if cell == WHOLE else f"`{cell.method}`"
        if asked.error(cell):
            rows.append((name, "-", "-"))
            continue
        pairs = list(zip(asked.texts(cell), (item.answers[0] for item in asked.items), strict=True))
        hits = 100 * float(np.mean([parse_cell(said) == parse_cell(right) for said, right in pairs]))
        near = 100 * float(np.mean([overlap(said, right) for said, right in pairs]))
        rows.append((name, f"{hits:.1f}", f"{near:.1f}"))
    text = (
        f"Pointing at what a question names, by row and column of {CELLS} x {CELLS} cells, in % of {len(asked.items)} "
        "questions: the right cell, and the mean overlap (intersection over union) of boxes of 3 x 3 cells around the "
        "cell that was said and the right one, which tells a near miss from a far one."
    )
    controls = frozenset({0} | {row + 1 for row, method in enumerate(block.methods) if method in CONTROLS})
    return Section(f"Pointing, {keep} tokens", text, ("method", "hits", "overlap"), tuple(rows), controls=controls)


def _balanced(items: Sequence[Item], kind: str) -> bool:
    """Whether the answers to a type's questions are yes and no, both of them."""
    return {answer.lower() for item in items if item.type == kind for answer in item.answers} == YES_NO


def _as_pope(items: Sequence[Item], texts: Sequence[str]) -> tuple[float, float, float, float]:
    """Accuracy, F1 of yes, missed yes and the share of yes, in %; an answer says yes that begins with it."""
    pairs = [(text, item.answers[0]) for item, text in zip(items, texts, strict=True) if item.answers]
    said = np.array([text.strip().lower().startswith("yes") for text, _ in pairs])
    true = np.array([answer.lower() == "yes" for _, answer in pairs])
    hit = int((said & true).sum())
    f1 = 2 * hit / max(int(said.sum() + true.sum()), 1)
    return 100 * float((said == true).mean()), 100 * f1, 100 * (1 - hit / int(true.sum())), 100 * float(said.mean())


def _ends(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})"
