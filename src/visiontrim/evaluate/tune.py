"""The cheapest setting that keeps the answers: a plain grid of methods and budgets on the user's own questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visiontrim.core.budget import Amount
from visiontrim.core.registry import load_method
from visiontrim.evaluate.asking import PLAIN, Cell
from visiontrim.evaluate.bootstrap import FEWEST_GROUPS
from visiontrim.evaluate.scores import Answers, Score


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a grid showed."""

    target: float
    """Retention that was asked for, 1 is the plain model."""
    scores: tuple[Score, ...]
    """Settings that work, the cheapest first."""
    questions: int
    groups: int
    """Groups of questions about the same pictures."""

    @property
    def frontier(self) -> list[Score]:
        """Settings that no cheaper one, and none as cheap, does better than."""
        best, found = -1.0, []
        for score in sorted(self.scores, key=lambda score: (score.mean or 0.0, -(score.retention or 0.0))):
            if (score.retention or 0.0) > best:
                best = score.retention or 0.0
                found.append(score)
        return found

    @property
    def chosen(self) -> Score | None:
        """The cheapest setting that reaches the target; None where only the plain model does, or questions are few."""
        if self.groups < FEWEST_GROUPS:
            return None
        return next((score for score in self.frontier if (score.retention or 0.0) >= self.target), None)

    @property
    def sure(self) -> Score | None:
        """The cheapest setting whose interval reaches the target too."""
        return next((score for score in self.scores if self.is_sure(score)), None)

    def is_sure(self, score: Score) -> bool:
        """Whether the lower end of the 95 % interval of the retention reaches the target."""
        return score.retention_interval is not None and score.retention_interval[0] >= self.target

    @property
    def advice(self) -> str:
        """What to make of the choice, in a sentence."""
        asked = f"{self.questions} questions about {self.groups} picture{'s' * (self.groups != 1)}"
        if self.groups < FEWEST_GROUPS:
            return (
                f"{asked} are too few to recommend anything: take at least {FEWEST_GROUPS} pictures, better a hundred, "
                "with questions of your own"
            )
        if self.chosen is None:
            return f"no setting keeps {100 * self.target:g} % on {asked}: give more tokens"
        low = (self.chosen.retention_interval or (0.0, 0.0))[0]
        if self.is_sure(self.chosen):
            return f"its 95 % interval stays above the target on {asked}"
        other = "no setting of the grid is" if self.sure is None else f"{spelled(self.sure.method, self.sure.keep)} is"
        return f"its 95 % interval reaches down to {100 * low:.1f} % on {asked}; sure of the target {other}"


def tune(answers: Answers, cells: Sequence[Cell], target: float) -> Tuned:
    """``answers`` hold those of the plain model and of all ``cells``."""
    scores = [answers.score(cell, Cell(PLAIN, None)) for cell in cells]
    working = [score for score in scores if not score.error]
    ordered = tuple(sorted(working, key=lambda score: score.mean or 0.0))
    return Tuned(target, ordered, len(answers.items), answers.groups)


def spelled(method: str, keep: Amount | None) -> str:
    """The setting as ``--method`` takes it."""
    return str(load_method(method, keep=keep))


def draw(tuned: Tuned, file: Path) -> None:
    """Retention against tokens, a line for each method, the frontier and the target. Needs matplotlib."""
    from visiontrim.plotting import pyplot

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.4, 4), layout="constrained")
    edge = [(score.mean, 100 * (score.retention or 0.0)) for score in tuned.frontier]
    axis.step(*zip(*edge, strict=True), where="post", color="black", lw=6, alpha=0.15, label="frontier", zorder=0)
    for number, method in enumerate(dict.fromkeys(score.method for score in tuned.scores)):
        points = [(score.mean, 100 * (score.retention or 0.0)) for score in tuned.scores if score.method == method]
        mark, line = "os^Dv<>P"[number % 8], ("-", "--", "-.", ":")[number % 4]
        axis.plot(*zip(*points, strict=True), marker=mark, ms=5, mfc="none", lw=1.2, ls=line, label=method)
    axis.axhline(100 * tuned.target, color="crimson", ls="--", lw=1, label=f"target {100 * tuned.target:g} %")
    if (best := tuned.chosen) is not None:
        axis.plot(best.mean, 100 * (best.retention or 0.0), marker="*", ms=14, color="crimson", ls="")
    axis.set(xscale="log", xlabel="vision tokens per decoder layer, mean", ylabel="retention in % of the plain model")
    means = sorted({round(score.mean or 0.0) for score in tuned.scores})
    apart = [mean for number, mean in enumerate(means) if not number or mean > 1.12 * means[number - 1]]
    axis.set_xticks(apart, map(str, apart))
    axis.set_xticks([], minor=True)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(file, dpi=130)
    plt.close(figure)
