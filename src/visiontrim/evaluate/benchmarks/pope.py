"""POPE (arXiv 2305.10355; MIT, pictures of COCO): is there such an object in the image? In three files of labels.

The labels exist in two versions: random has 2,910 questions at first (commit e3e3926, LLaVA's), 3,000 later. They are
joined with questions by picture and text: by position, answers to one version score as chance against the other. "yes"
is positive. The number in tables is the mean F1 of the three files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import SHORT, Benchmark, Breakdown, Files, Table, save_lines
from visiontrim.evaluate.items import Item, ratio
from visiontrim.evaluate.records import read_lines

QUESTIONS = "llava_pope_test.jsonl"
CATEGORIES: tuple[str, ...] = ("adversarial", "popular", "random")
"""In the order of LLaVA's ids: a category's first id is its place in this list times ``STEP``, plus 1."""
STEP = 10_000_000
COLUMNS = ("true yes", "false yes", "missed yes", "true no")


class POPE(Benchmark):
    name = "pope"
    title = "POPE"
    folders = ("pope", "POPE")
    where = (
        f"{QUESTIONS} comes with LLaVA's eval.zip, coco/coco_pope_CATEGORY.json with output/coco of "
        "github.com/AoiDragon/POPE at commit e3e3926, val2014 is COCO's"
    )
    metric = "mean F1"
    papers = "mean of the three F1 in %; some call it accuracy"
    checked = "every figure on LLaVA-1.5-13B's published answers"
    licence = "MIT, pictures of COCO"
    upload = ".jsonl"

    def read(self, files: Files) -> list[Item]:
        folder = files.pictures("val2014")
        labels: dict[str, dict[tuple[str, str], tuple[int, str]]] = {}
        for category in CATEGORIES:
            path = files.need(f"coco/coco_pope_{category}.json", f"coco_pope_{category}.json")
            rows = list(read_lines(path))
            if wrong := next((row for row in rows if row.text("label") not in ("yes", "no")), None):
                raise wrong.error(f"the label is {wrong.text('label')!r}, where yes or no is expected")
            labels[category] = {
                (row.text("image"), row.text("text")): (row.whole("question_id"), row.text("label")) for row in rows
            }
        asked = files.find(QUESTIONS)
        if asked is None:
            return [
                _item(number * STEP + id, category, image, text, label, folder)
                for number, category in enumerate(CATEGORIES)
                for (image, text), (id, label) in labels[category].items()
            ]
        items, lost = [], dict.fromkeys(labels, 0)
        for row in read_lines(asked):
            category, image = row.text("category"), row.text("image")
            if category not in labels:
                raise row.error(f"the category {category!r} is none of {', '.join(CATEGORIES)}")
            question = row.text("text").removesuffix(f"\n{SHORT}")
            found = labels[category].get((image, question))
            lost[category] += found is None
            items.append(_item(row.whole("question_id"), category, image, question, found and found[1], folder))
        for category, number in lost.items():
            if number:
                total = sum(item.type == category for item in items)
                raise TrimError(
                    f"{number:,} of {total:,} {category} questions of {asked} have no label among the "
                    f"{len(labels[category]):,} of coco_pope_{category}.json: they are of two versions of POPE; take "
                    "the labels of commit e3e3926 (2,910 random ones), which LLaVA's file asks for"
                )
        return items

    def parse(self, item: Item, text: str) -> str:
        words = text.partition(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "no", "not"} & set(words) else "yes"

    def counts(self, items: Sequence[Item], texts: Sequence[str]) -> Float[np.ndarray, "items 12"]:
        found = np.zeros((len(items), len(CATEGORIES), len(COLUMNS)))
        for row, item, text in zip(found, items, texts, strict=True):
            if item.answers:
                said, label = self.parse(item, text) == "yes", item.answers[0] == "yes"
                row[CATEGORIES.index(item.type), _column(said, label)] = 1
        return found.reshape(len(items), -1)

    def value(self, sums: Float[np.ndarray, "*draws 12"]) -> Float[np.ndarray, "*draws"]:
        found = sums.reshape(*sums.shape[:-1], len(CATEGORIES), len(COLUMNS))
        asked = found.sum(-1) > 0
        return self.top * ratio((_f1(found) * asked).sum(-1), asked.sum(-1).astype(float))

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        sums = self.counts(items, texts).sum(0).reshape(len(CATEGORIES), len(COLUMNS))
        table: Table = {}
        for category, row in zip(CATEGORIES, sums, strict=True):
            if row.sum():
                yes, wrong, missed, no = row
                numbers = {
                    "accuracy": ratio(yes + no, row.sum()),
                    "precision": ratio(yes, yes + wrong),
                    "recall": ratio(yes, yes + missed),
                    "F1": _f1(row),
                    "yes ratio": ratio(yes + wrong, row.sum()),
                }
                table[category] = {name: 100 * float(value) for name, value in numbers.items()} | {
                    "questions": float(row.sum())
                }
        names = next(iter(table.values()), {})
        mean = {name: float(np.mean([row[name] for row in table.values()])) for name in names if name != "questions"}
        return Breakdown({"category": table | {"mean": mean | {"questions": float(sums.sum())}}} if table else {})

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        rows = [
            {"question_id": item.id, "category": item.type, "question": item.bare, "answer": text}
            for item, text in zip(items, texts, strict=True)
        ]
        save_lines(rows, path)
        return ["no server takes it: POPE is scored here"]


def _item(id: int, category: str, image: str, question: str, label: str | None, folder: Path) -> Item:
    return Item(
        id=id,
        group=image,
        sources=(str(folder / image),),
        question=f"{question}\n{SHORT}",
        bare=question,
        answers=() if label is None else (label,),
        type=category,
    )


def _column(said: bool, label: bool) -> int:
    return (0 if said else 2) if label else (1 if said else 3)


def _f1(sums: Float[np.ndarray, "*some 4"]) -> Float[np.ndarray, "*some"]:
    """2PR / (P + R), which is 2 TP / (2 TP + FP + FN)."""
    return ratio(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])
