"""GQA, testdev balanced (arXiv 1902.09506; labels CC BY 4.0): questions about scene graphs, one right word each.

The answer is compared as it stands, in lower case and without full stops at its end; nothing else is normalised.
Validity, plausibility, consistency and grounding of the official tool need files that release 1.2 lacks: left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from visiontrim.evaluate.benchmarks.base import SHORT, Benchmark, Breakdown, Files, save_json, share, shares
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.records import Record, entries, read_lines

LABELS = ("data/testdev_balanced_questions.json", "testdev_balanced_questions.json")
QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
NO_STEP = ("exist", "query: name", "choose name")
"""Operations that the official tool does not count as steps of reasoning."""


class GQA(Benchmark):
    name = "gqa"
    title = "GQA"
    folders = ("gqa",)
    where = (
        f"{QUESTIONS} comes with LLaVA's eval.zip, {LABELS[0]} and data/images with questions1.2.zip and images.zip of "
        "the GQA download page"
    )
    metric = "accuracy"
    papers = "accuracy in % on testdev balanced"
    checked = "by hand; no labelled official file could be had"
    licence = "CC BY 4.0"

    def read(self, files: Files) -> list[Item]:
        folder = files.pictures("data/images", "images")
        asked = files.find(QUESTIONS)
        path = files.need(*LABELS) if asked is None else files.want(*LABELS)
        labels = {} if path is None else dict(entries(path))
        if asked is None:
            return [
                self._item(id, label.text("question"), label.text("imageId"), folder, label)
                for id, label in labels.items()
            ]
        items = []
        for row in read_lines(asked):
            id = row.text("question_id")
            if labels and id not in labels:
                raise row.error(f"question {id} is not in {path}: take both files from the same release")
            image = row.text("image").removesuffix(".jpg")
            items.append(self._item(id, row.text("text").removesuffix(f"\n{SHORT}"), image, folder, labels.get(id)))
        return items

    def prompt(self, question: str) -> str:
        return f"{question}\n{SHORT}"

    def _item(self, id: str, question: str, image: str, folder: Path, label: Record | None) -> Item:
        balanced = label is not None and label.fields.get("isBalanced", True)
        return Item(
            id=id,
            group=image,
            sources=(str(folder / f"{image}.jpg"),),
            question=self.prompt(question),
            bare=question,
            answers=(label.text("answer"),) if label is not None and balanced else (),
            type=label.one("types").text("structural") if label is not None else "question",
            facts={} if label is None else _facts(label),
        )

    def parse(self, item: Item, text: str) -> str:
        return text.rstrip(".").lower()

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        pairs = [(item, self.right(item, text)) for item, text in zip(items, texts, strict=True) if item.answers]
        right = [value for _, value in pairs]

        def by(fact: str) -> dict[str, dict[str, float]]:
            return shares([item.facts[fact] for item, _ in pairs], right)

        kinds = ["open" if item.type == "query" else "binary" for item, _ in pairs]
        numbers = {fact: dict(sorted(by(fact).items(), key=lambda row: int(row[0]))) for fact in ("words", "steps")}
        tables = {
            "all": {"accuracy": share(right)},
            "kind of answer": shares(kinds, right),
            "structural type": shares([item.type for item, _ in pairs], right),
            "semantic type": by("semantic"),
            "words of the question": numbers["words"],
            "steps of reasoning": numbers["steps"],
            "distribution, lower is better": {"distribution": {"value": self._distribution(items, texts)}},
        }
        return Breakdown(
            tables, ("validity, plausibility, consistency and grounding need files that release 1.2 lacks",)
        )

    def _distribution(self, items: Sequence[Item], texts: Sequence[str]) -> float:
        """Chi-square of answers against right answers within each global group, weighted by the group's size, / 100."""
        gold: dict[str, Counter[str]] = defaultdict(Counter)
        said: dict[str, Counter[str]] = defaultdict(Counter)
        for item, text in zip(items, texts, strict=True):
            if item.answers and (group := item.facts["group"]) is not None:
                gold[group][item.answers[0]] += 1
                said[group][self.parse(item, text)] += 1
        total = weights = 0.0
        for group, counts in gold.items():
            chi_square = sum((said[group][answer] - count) ** 2 / count for answer, count in counts.items())
            total += chi_square * counts.total()
            weights += counts.total()
        return total / weights / 100 if weights else 0.0

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        pairs = zip(items, texts, strict=True)
        save_json([{"questionId": item.id, "prediction": self.parse(item, text)} for item, text in pairs], path)
        return ["the official eval.py reads it as testdev_balanced_predictions.json"]


def _facts(label: Record) -> dict[str, object]:
    steps = [f"{step.text('operation')}: {step.text('argument', default='')}" for step in label.many("semantic")]
    group = label.one("groups").fields.get("global")
    return {
        "semantic": label.one("types").text("semantic"),
        "words": len(label.text("question").split()),
        "steps": sum(not any(name in step for name in NO_STEP) for step in steps),
        "group": group if group is None else str(group),
    }
