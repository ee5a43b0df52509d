"""The official score of answers that are there already: of one file, or of several beside the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import Benchmark, Breakdown, Files
from visiontrim.evaluate.benchmarks.mmbench import MMBench
from visiontrim.evaluate.benchmarks.sheets import read_sheet
from visiontrim.evaluate.bootstrap import Sample, numbered, resample, to_json
from visiontrim.evaluate.given import SHEETS, Joined, join, read_given
from visiontrim.evaluate.items import Item


@dataclass(frozen=True, eq=False, slots=True)
class Scored:
    """A file of answers and what it is worth."""

    joined: Joined
    sample: Sample
    breakdown: Breakdown

    @property
    def groups(self) -> int:
        return len({item.group for item in self.joined.items})

    def to_dict(self, benchmark: Benchmark, reference: Scored | None = None) -> dict[str, Any]:
        """Ready for JSON, in the units that tables print; beside ``reference`` where there is one."""
        found: dict[str, Any] = {
            "answers": str(self.joined.path),
            "metric": benchmark.metric,
            "score": self.sample.value,
            "interval": to_json(self.sample.interval),
            "questions": len(self.joined.items),
            "groups": self.groups,
            "breakdown": self.breakdown.tables,
            "notes": [*self.joined.notes, *self.breakdown.notes],
        }
        if reference is not None:
            gain, ends = self.sample.over(reference.sample)
            share, spread = self.sample.of(reference.sample)
            found |= {"difference": gain, "difference_interval": to_json(ends)}
            found |= {"retention": share, "retention_interval": to_json(spread)}
        return found


def read_questions(benchmark: Benchmark, files: Files, answers: Sequence[Path]) -> list[Item]:
    """The official questions; where MMBench's table is missing, those of an upload file, which holds enough."""
    if isinstance(benchmark, MMBench) and files.find(*benchmark.tables) is None:
        sheet = next((path for path in answers if path.suffix in SHEETS), None)
        if sheet is not None:
            return benchmark.from_upload(read_sheet(sheet))[0]
    return benchmark.read(files)


def joined(benchmark: Benchmark, items: Sequence[Item], path: Path, partial: bool = False) -> Joined:
    """The questions with the answers in ``path``."""
    return join(benchmark, items, read_given(path), path, partial)


def score(benchmark: Benchmark, files: Files, found: Joined) -> Scored:
    """The score of answers. Raises :class:`TrimError` where no label is known."""
    if not any(item.answers for item in found.items):
        lacking = files.lacking[0] if files.lacking else f"the labels of {benchmark.title} are not public"
        raise TrimError(f"{found.path} cannot be scored here: {lacking}; --upload FILE writes what a server takes")
    counts = benchmark.counts(found.items, found.texts)
    return Scored(
        found, resample(benchmark, counts, numbered(found.items)), benchmark.breakdown(found.items, found.texts)
    )
