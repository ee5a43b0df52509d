"""MM-Vet (arXiv 2308.02490; data CC BY-NC 4.0): open questions, graded by a judge in tenths.

The judge is a language model behind an endpoint; no figure of MM-Vet exists without its grades. Here are the result
file that graders take, and the tables of a file of grades. What can be counted without a judge is called containment:
never MM-Vet's score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import (
    LONG_ANSWER,
    Benchmark,
    Breakdown,
    Files,
    Table,
    save_json,
    share,
    shares,
)
from visiontrim.evaluate.benchmarks.vqa_text import vqa_text
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.records import Record, entries, read_lines

QUESTIONS = "llava-mm-vet.jsonl"
LABELS = "mm-vet.json"
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
VERSION = "v1_"


class MMVet(Benchmark):
    name = "mm-vet"
    title = "MM-Vet"
    folders = ("mm-vet", "mmvet")
    where = (
        f"{QUESTIONS} comes with LLaVA's eval.zip, {LABELS} and images with mm-vet.zip of github.com/yuweihao/MM-Vet"
    )
    metric = "containment (not MM-Vet's score)"
    papers = "mean grade of GPT-4, 0 to 100: from a file of grades"
    checked = "the tables on the grades that LLaVA published for 7B"
    licence = "data CC BY-NC 4.0, code Apache-2.0"
    max_new_tokens = LONG_ANSWER

    def read(self, files: Files) -> list[Item]:
        folder = files.pictures("images", ".")
        asked = files.find(QUESTIONS)
        path = files.need(LABELS) if asked is None else files.want(LABELS)
        labels = {} if path is None else dict(entries(path))
        if asked is None:
            return [
                _item(name, label.text("question"), label.text("imagename"), folder, label)
                for name, label in labels.items()
            ]
        items = []
        for row in read_lines(asked):
            name = f"{VERSION}{row.whole('question_id')}"
            if labels and name not in labels:
                raise row.error(f"question {name} is not in {path}: take both files from the same release")
            items.append(_item(name, row.text("text"), row.text("image"), folder, labels.get(name)))
        return items

    def parse(self, item: Item, text: str) -> str:
        return vqa_text(text)

    def right(self, item: Item, text: str) -> float:
        """The share of the parts of the best alternative that the answer contains."""
        said = f" {self.parse(item, text)} "
        alternatives = [[vqa_text(part) for part in one.split("<AND>")] for one in item.answers[0].split("<OR>")]
        return max(sum(f" {part} " in said for part in parts if part) / len(parts) for parts in alternatives)

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        pairs = [(item, self.right(item, text)) for item, text in zip(items, texts, strict=True) if item.answers]
        return Breakdown({"all": {"containment": share(value for _, value in pairs)}, **_tables(pairs)})

    def grades(self, items: Sequence[Item], grades: Mapping[str, Sequence[float]]) -> Breakdown:
        """The benchmark's own tables from the grades of each question, one for each run of the judge."""
        lacking = [item.facts["name"] for item in items if not grades.get(item.facts["name"])]
        if lacking:
            raise TrimError(
                f"{len(lacking)} of {len(items)} questions have no grade, the first is {lacking[0]}: grade all"
            )
        runs = min(len(grades[item.facts["name"]]) for item in items)
        by_run = [[grades[item.facts["name"]][run] for item in items] for run in range(runs)]
        tables: dict[str, Table] = {
            "all": {"total": _over([100 * float(np.mean(values)) for values in by_run], len(items))}
        }
        for title in ("capability", "combination"):
            each = [_tables(list(zip(items, values, strict=True)))[title] for values in by_run]
            tables[title] = {
                name: _over([table[name]["accuracy"] for table in each], int(each[0][name]["questions"]))
                for name in each[0]
            }
        return Breakdown(tables)

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        save_json({item.facts["name"]: text for item, text in zip(items, texts, strict=True)}, path, indent=2)
        return ["the public grader takes it, and the official notebook"]


def read_grades(path: Path) -> dict[str, list[float]]:
    """The grades of a file that the official script caches, by question and run."""
    found = {}
    for name, entry in entries(path):
        try:
            found[name] = [float(score) for score in entry.texts("score")]
        except ValueError:
            raise entry.error("a grade is no number") from None
        if any(not 0 <= grade <= 1 for grade in found[name]):
            raise entry.error("a grade is not between 0 and 1")
    return found


def _item(name: str, question: str, image: str, folder: Path, label: Record | None) -> Item:
    number = name.removeprefix(VERSION)
    return Item(
        id=int(number) if number.isdecimal() else number,
        group=image,
        sources=(str(folder / image),),
        question=question,
        answers=() if label is None else (label.text("answer"),),
        type="question",
        facts={"name": name, "capability": () if label is None else label.texts("capability")},
    )


def _tables(pairs: Sequence[tuple[Item, float]]) -> dict[str, Table]:
    """By capability, where a question counts under each that it lists, and by the set of them in any order."""
    values = [value for _, value in pairs]
    sets = [item.facts["capability"] for item, _ in pairs]
    known = list(dict.fromkeys((*CAPABILITIES, *(name for names in sets for name in names))))
    titles: dict[frozenset[str], str] = {}
    for names in sets:
        titles.setdefault(frozenset(names), "_".join(names))
    each = {name: share(v for v, names in zip(values, sets, strict=True) if name in names) for name in known}
    return {
        "capability": {name: row for name, row in each.items() if row["questions"]},
        "combination": shares([titles[frozenset(names)] for names in sets], values),
    }


def _over(totals: Sequence[float], questions: int) -> dict[str, float]:
    """Mean and standard deviation over the runs of the judge, to one decimal as the official tool has them."""
    mean, deviation = round(float(np.mean(totals)), 1), round(float(np.std(totals)), 1)
    return {"total": mean, "std": deviation, "runs": float(len(totals)), "questions": float(questions)}
