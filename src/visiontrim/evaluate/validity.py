"""Does a small model predict large ones? Four figures of a bundled model beside what is known of LLaVA-1.5-7B.

Papers agree that a large model loses little when [CLS] chooses a ninth of its tokens, reads means of tokens, and is
hurt by random ones; and they print averages whose order a test bed should give. Half of the methods is named beforehand
and held out from whatever is tuned (``published.yaml``). The figures are printed whatever they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from visiontrim.ask import Speaker
from visiontrim.core.view import Keep, View
from visiontrim.evaluate.asking import Cell, Examiner
from visiontrim.evaluate.evaluation import CONTROLS, SEEDS, SHALLOW, Block, evaluate
from visiontrim.evaluate.published import USUAL, averages, call, held_out
from visiontrim.evaluate.scores import Answers
from visiontrim.ops.select import even_stride, gather
from visiontrim.zoo.evaluate import KeepPatches, object_patches, score
from visiontrim.zoo.suite import Sample

MODEL = "llava-1.5-7b"
"""Whose averages are predicted."""
WHOLE = 576
"""Its vision tokens: a bundled model keeps the same shares of its own."""
BY_CLS = ("fastervlm", "visionzip")
"""Methods that choose by [CLS]."""
AIMS = {"cls": "90 and more", "means": "3 at most", "controls": "below both", "rank": "0.70 and more"}


@dataclass(frozen=True, eq=False)
class Clustered(KeepPatches):
    """Keeps given patches, and beside them the means of clusters of all others.

    The middle of a cluster is a patch of an even stride over the others; each of them goes to the middle that is most
    like it by cosine.
    """

    means: int = 16

    name: ClassVar[str] = "clustered"
    summary: ClassVar[str] = "keeps given patches and the means of clusters of the others"

    def select(self, view: View) -> Keep:
        batch, tokens = view.features.shape[:2]
        kept = self.index.to(view.features.device)
        others = torch.ones(batch, tokens, dtype=torch.bool, device=kept.device).scatter(1, kept, False)
        rest = others.nonzero()[:, 1].view(batch, -1)
        middle = rest[:, even_stride(rest.shape[1], self.means).to(rest.device)]
        alike = F.normalize(view.features.float(), dim=-1)
        nearest = (gather(alike, rest) @ gather(alike, middle).mT).argmax(-1)
        content = gather(view.content, rest).float()
        total = content.new_zeros(batch, self.means, content.shape[-1])
        total.scatter_add_(1, nearest[..., None].expand_as(content), content)
        number = total.new_zeros(batch, self.means).scatter_add_(1, nearest, torch.ones_like(content[..., 0]))
        means = (total / number.clamp(min=1)[..., None]).to(view.content.dtype)
        index, order = torch.cat([kept, middle], 1).sort(1)
        features = torch.cat([gather(view.content, kept), means], 1)
        return Keep(index, gather(features, order), complement=order >= kept.shape[1])


@dataclass(frozen=True, slots=True)
class Rank:
    """Spearman's correlation of our retentions with published averages."""

    tokens: int | None
    """Of LLaVA-1.5-7B; None: all budgets, each ranked by itself, in the mean."""
    half: str
    """"all", "seen" or "held out"."""
    methods: int
    rho: float | None
    """None for fewer than three methods."""
    interval: tuple[float, float] | None
    """95 %, of questions alone: scenes are drawn anew, methods are not."""

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("tokens", "half", "methods", "rho", "interval")}


def budgets(tokens: int) -> dict[int, int]:
    """For 192, 128 and 64 of 576 tokens as large a share of ``tokens``."""
    return {number: round(number * tokens / WHOLE) for number in USUAL}


def validity(
    examiner: Examiner,
    samples: Sequence[Sample],
    tokens: int,
    progress: Callable[[int, int, bool], None] = lambda done, total, fresh: None,
    told: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """All figures, ready for JSON.

    ``samples`` are the questions of the examiner's suite, about pictures of ``tokens`` vision tokens. ``progress`` is
    that of :func:`visiontrim.evaluate.evaluation.evaluate`; ``told`` hears what is done behind it.
    """
    counts, published = budgets(tokens), averages(MODEL)
    smallest = counts[min(counts)]
    blocks = {
        number: Block.comparison(
            [_named(method) for method in published if number in published[method]],
            [count],
            SEEDS if count == smallest else 1,
        )
        for number, count in counts.items()
    }
    cells = [cell for block in blocks.values() for cell in block.asked] + [Cell(name, smallest) for name in BY_CLS]
    answers = evaluate(examiner, list(dict.fromkeys(cells)), None, progress)
    told("means of clusters instead of tokens")
    means = replaced(examiner.speaker, samples, smallest)
    return {
        "model": examiner.speaker.name,
        "weights": examiner.weights,
        "suite": examiner.suite.name,
        "questions": len(answers.items),
        "groups": answers.groups,
        "plain": answers.whole.score,
        "tokens": tokens,
        "budgets": counts,
        "cls": {name: _retention(answers, Cell(name, smallest)) for name in BY_CLS},
        "means": means | {"of": smallest, "clusters": smallest // 4},
        "controls": _controls(answers, blocks[min(counts)], smallest),
        "ranks": [rank.to_dict() for rank in ranks(answers, counts, published)],
        "held_out": held_out(),
        "methods": {
            method: {
                number: {"published": value, **_retention(answers, Cell(_named(method), counts[number]))}
                for number, value in by.items()
                if number in counts
            }
            for method, by in published.items()
        },
    }


def replaced(speaker: Speaker, samples: Sequence[Sample], keep: int) -> dict[str, float]:
    """Right answers in % with the ``keep`` tokens of an oracle, and with a quarter of them as means of clusters.

    The oracle takes the patches of objects and fills up with others, so that the means stand for what is needed least.
    """
    few = keep // 4
    ways = {
        "tokens": lambda batch: KeepPatches(object_patches(batch, keep)),
        "means": lambda batch: Clustered(object_patches(batch, keep - few), few),
    }
    return {name: 100 * float(np.mean(score(speaker, samples, way))) for name, way in ways.items()}


def ranks(answers: Answers, counts: Mapping[int, int], published: Mapping[str, Mapping[int, float]]) -> list[Rank]:
    """At each budget, and over all, for all methods and both halves."""
    apart, found = held_out(), []
    for half in ("all", "seen", "held out"):
        parts = []
        for number, count in counts.items():
            names = [
                name
                for name, by in published.items()
                if number in by and (half == "all" or (name in apart) == (half == "held out"))
            ]
            cells = {name: Cell(_named(name), count) for name in names}
            cells = {name: cell for name, cell in cells.items() if not answers.error(cell)}
            truth = np.array([published[name][number] for name in cells])
            samples = [answers.sample(cell) for cell in cells.values()]
            drawn = None
            if len(cells) > 2:
                draws = [sample.draws for sample in samples]
                known = [draw for draw in draws if draw is not None]
                drawn = np.stack(known, 1) if len(known) == len(draws) else None
                rho = spearman(np.array([sample.value for sample in samples]), truth)
                spread = None if drawn is None else np.array([spearman(row, truth) for row in drawn])
                parts.append((len(cells), rho, spread))
            else:
                rho, spread = None, None
            found.append(Rank(number, half, len(cells), rho, _ends(spread)))
        if parts:
            spreads = [spread for _, _, spread in parts if spread is not None]
            whole = np.mean(spreads, axis=0) if len(spreads) == len(parts) else None
            mean = float(np.mean([rho for _, rho, _ in parts]))
            found.append(Rank(None, half, sum(number for number, _, _ in parts), mean, _ends(whole)))
    return found


def spearman(ours: Float[np.ndarray, " n"], theirs: Float[np.ndarray, " n"]) -> float:
    """Correlation of ranks, ties with their mean rank; 0 where all of one side are equal."""
    first, second = (_ranks(values) for values in (ours, theirs))
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / size if size else 0.0


def _ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    less = (values[:, None] > values).sum(1)
    return less + (values[:, None] == values).sum(1) / 2


def _ends(draws: Float[np.ndarray, " draws"] | None) -> tuple[float, float] | None:
    if draws is None:
        return None
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _named(method: str) -> str:
    """The call of the paper, at depths that a small model has."""
    return SHALLOW.get(method, call(method))


def _retention(answers: Answers, cell: Cell) -> dict[str, Any]:
    found = answers.score(cell)
    if found.error or found.retention is None:
        return {"retention": None, "interval": None, "why": found.error}
    ends = found.retention_interval
    return {
        "retention": 100 * found.retention,
        "interval": None if ends is None else [100 * end for end in ends],
        "why": "",
    }


def _controls(answers: Answers, block: Block, keep: int) -> dict[str, Any]:
    draws = [answers.score(cell).retention or 0.0 for cell in block.draws(keep)]
    random = {"retention": 100 * float(np.mean(draws)), "spread": [100 * min(draws), 100 * max(draws)]}
    return {CONTROLS[0]: random} | {name: _retention(answers, Cell(name, keep)) for name in CONTROLS[1:]}


def table(found: Mapping[str, Any]) -> str:
    """The figures as Markdown, of what :func:`validity` gave or of its JSON."""
    keep, whole = found["means"]["of"], found["tokens"]
    lines = [f"| figure | aim | {found['model']} |", "|---|---|---|"]
    for name, one in found["cls"].items():
        lines.append(f"| `{name}`, {keep} of {whole} tokens: retention in % | {AIMS['cls']} | {_shown(one)} |")
    means = found["means"]
    lost = 100 * (means["tokens"] - means["means"]) / found["plain"]
    what = f"{means['clusters']} of {keep} tokens of an oracle as means of clusters: loss in points of retention"
    lines.append(f"| {what} | {AIMS['means']} | {lost:.1f} ({means['tokens']:.1f} to {means['means']:.1f} % right) |")
    for name, one in found["controls"].items():
        shown = f"{one['retention']:.1f} ({_span(one['spread'])} over seeds)" if "spread" in one else _shown(one)
        lines.append(f"| `{name}`, {keep} tokens: retention in % | {AIMS['controls']} | {shown} |")
    for rank in found["ranks"]:
        budget = "all budgets" if rank["tokens"] is None else f"{rank['tokens']} of {WHOLE}"
        aim = AIMS["rank"] if rank["half"] == "held out" else ""
        rho = "-" if rank["rho"] is None else f"{rank['rho']:.2f}"
        ends = "" if rank["interval"] is None else f" ({rank['interval'][0]:.2f} to {rank['interval'][1]:.2f})"
        number = f"{rank['methods']} {'pairs' if rank['tokens'] is None else 'methods'}"
        lines.append(
            f"| rank correlation with published averages, {rank['half']}, {budget} | {aim} | {rho}{ends}, {number} |"
        )
    lines += ["", "| method | " + " | ".join(f"published, {n} | here" for n in USUAL) + " |"]
    lines += ["|---" * (1 + 2 * len(USUAL)) + "|"]
    for method, by in sorted(found["methods"].items()):
        known = {int(number): one for number, one in by.items()}
        name = f"`{method}`" + (", held out" if method in found["held_out"] else "")
        pairs = [(f"{known[n]['published']:.1f}", _shown(known[n])) if n in known else ("", "") for n in USUAL]
        lines.append(f"| {name} | {' | '.join(itertools.chain.from_iterable(pairs))} |")
    return "\n".join(lines)


def title(found: Mapping[str, Any]) -> str:
    plain = f"the plain model answers {found['plain']:.1f} % rightly"
    return f"{found['suite']}: {found['questions']} questions about {found['groups']} scenes, {plain}"


def _shown(one: Mapping[str, Any]) -> str:
    if one["retention"] is None:
        return "-"
    return f"{one['retention']:.1f}" + ("" if one["interval"] is None else f" ({_span(one['interval'])})")


def _span(ends: Sequence[float]) -> str:
    return f"{ends[0]:.1f} to {ends[1]:.1f}"
