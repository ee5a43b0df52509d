"""An evaluation from beginning to end: which cells, which questions, what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from visiontrim.core.budget import Amount
from visiontrim.core.errors import TrimError
from visiontrim.core.registry import list_methods
from visiontrim.evaluate.asking import PLAIN, Cell, Examiner
from visiontrim.evaluate.bootstrap import FEWEST_GROUPS
from visiontrim.evaluate.log import Row
from visiontrim.evaluate.scores import Answers, Score
from visiontrim.evaluate.smaller import DOWNSAMPLED, POOLED

CONTROLS = ("random", "uniform", DOWNSAMPLED)
"""In every table, beside the plain model; gains are measured against the first one."""
ABLATIONS = Path(__file__).parent / "ablations.yaml"
SHALLOW = {"hiprune": "hiprune:middle=2", "vscan": "vscan:shallow=1,layer=4"}
"""Methods whose layers are fixed numbers, meant for models of 24 encoder and 32 decoder layers: what "all" takes for
them, so that they run on the small bundled model too. About the same share of the depth."""
LEFT_OUT = {
    PLAIN,
    *CONTROLS,
    POOLED,
    "dycoke",
    "evs",
    "fastvid",
    "holitom",
    "st-gridpool",
    "vidcom2",
    "v-cast",
    "flashvid",
    "aot",
}
"""Not in "all": controls, which are there anyway, and methods that compare the frames of a video."""
SEEDS = 5
"""Draws of ``random`` over a whole suite, whose spread is told."""
SEED_STEP = 1_000
"""Between their seeds, to which the number of the batch is added."""

Progress = Callable[[int, int, bool], None]
"""Is told how many steps are done, of how many, and whether the last one was work or came from the log."""


@dataclass(frozen=True, slots=True)
class Block:
    """Methods that are compared with each other at some budgets."""

    title: str
    methods: tuple[str, ...]
    """The first one is what the others are compared with."""
    keeps: tuple[Amount, ...]
    compares: bool = False
    """Whether the block is methods beside controls, and no ablation."""
    seeds: int = 1
    """Draws of the random control over the whole suite."""

    @classmethod
    def comparison(cls, methods: Sequence[str], keeps: Sequence[Amount], seeds: int = 1) -> Block:
        """``methods`` beside the controls."""
        together = dict.fromkeys((*CONTROLS, *methods))
        return cls("Methods beside controls", tuple(together), tuple(keeps), compares=True, seeds=seeds)

    @property
    def cells(self) -> list[Cell]:
        return [Cell(method, keep) for keep in self.keeps for method in self.methods]

    @property
    def asked(self) -> list[Cell]:
        """All cells, and the further draws of the random control."""
        return [*self.cells, *(cell for keep in self.keeps for cell in self.draws(keep)[1:])]

    def draws(self, keep: Amount) -> list[Cell]:
        """The random control with each of its seeds, the first of which is in the tables; [] where there are none."""
        if not self.compares:
            return []
        later = (f"{CONTROLS[0]}:seed={SEED_STEP * number}" for number in range(1, self.seeds))
        return [Cell(name, keep) for name in (CONTROLS[0], *later)]

    @property
    def main(self) -> str:
        """The method that is looked at closely: VisionTrim, without it the first that is no control."""
        named = [method for method in self.methods if method not in CONTROLS]
        ours = [method for method in named if method.partition(":")[0] == "visiontrim"]
        return (*ours, *named, self.methods[0])[0]

    def scores(self, answers: Answers) -> list[Score]:
        """One for each cell, against the first method at the same budget."""
        return [answers.score(cell, Cell(self.methods[0], cell.keep)) for cell in self.cells]


def all_methods() -> list[str]:
    """What "all" means: every method for single images."""
    return [SHALLOW.get(name, name) for name in list_methods() if name not in LEFT_OUT]


def ablations() -> list[str]:
    """Names of the ablations that ship."""
    return list(yaml.safe_load(ABLATIONS.read_text(encoding="utf-8")))


def ablation(name: str) -> Block:
    """A block of ``ablations.yaml`` by its name, or ``FILE.yaml:NAME`` of a file of the same form."""
    path, _, key = name.rpartition(":")
    source = Path(path) if path else ABLATIONS
    try:
        known = yaml.safe_load(source.read_text(encoding="utf-8"))
        if key not in known:
            raise TrimError(f"there is no ablation {key!r} in {source.name}: choose {', '.join(map(str, known))}")
        block = known[key]
        return Block(block["title"], tuple(block["methods"]), tuple(block["keep"]))
    except TrimError:
        raise
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:  # ValueError: it is no UTF-8
        reason = " ".join(str(error).split())
        raise TrimError(f"{source} holds no ablations (NAME: title, keep, methods): {reason}") from error


def evaluate(
    examiner: Examiner,
    cells: Sequence[Cell],
    minutes: float | None = None,
    progress: Progress = lambda done, total, fresh: None,
) -> Answers:
    """Ask the plain model and all ``cells``, batch by batch, until the suite or the time is over.

    All cells answer the same questions: a batch after the first one is begun only if the one before says that it will
    be over within ``minutes``. ``progress`` is told after every cell of every batch.
    """
    cells = list(dict.fromkeys((Cell(PLAIN, None), *cells)))
    rows: dict[Cell, list[Row]] = {cell: [] for cell in cells}
    start, batches = time.monotonic(), len(examiner.batches)
    for number in range(batches):
        begun = time.monotonic()
        for done, cell in enumerate(cells, 1):
            fresh = False
            if not (rows[cell] and rows[cell][-1].error):  # what cannot work will not
                row, fresh = examiner.ask(cell, number)
                rows[cell].append(row)
            progress(number * len(cells) + done, batches * len(cells), fresh)
        now = time.monotonic()
        if minutes is not None and now - start + now - begun > 60 * minutes:
            break
    return Answers(examiner.suite, examiner.batches, rows)


def preamble(answers: Answers, examiner: Examiner, command: str) -> list[str]:
    """What a report says about where it comes from, in paragraphs."""
    plain, suite = answers.whole, examiner.suite
    shown = f" The plain model: **{plain.score:.2f}** of {answers.metric.top:g} ({answers.metric.metric})."
    if not answers.labelled:
        shown = " Nobody knows the right answers: what counts is that of the plain model."
    elif answers.labelled < len(answers.items):
        shown += f" {answers.labelled} of {len(answers.items)} questions have a label; scores are of these."
    how = "The suite's own prompts" if suite.prompted else f"Protocol {examiner.protocol}"
    dtype = str(examiner.speaker.model.dtype).removeprefix("torch.")
    few = answers.groups < FEWEST_GROUPS
    spread = (
        f"{answers.groups} {suite.unit} are fewer than {FEWEST_GROUPS}, so there are no intervals and nothing is said "
        "to beat anything"
        if few
        else f"intervals are 95 %, bootstraps over {suite.unit} (2,000 draws, seed 0)"
    )
    return [
        f"`{command}`: {len(answers.items)} questions about {answers.groups} {suite.unit}, each answered by every "
        f"method; weights {examiner.weights}.{shown} Budgets are the mean of vision tokens per decoder layer, for "
        "stages between layers too. Methods that draw at random draw anew for every batch (seeds 0, 1, ...); "
        f"{spread}. Times are of this machine, while others may have used it.",
        f"{how}; at most {examiner.max_new_tokens} new tokens, greedy, {dtype}.",
        *suite.notes,
    ]
