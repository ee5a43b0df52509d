"""VizWiz (arXiv 1802.08218; CC BY 4.0): questions of blind people; test, which only a server scores, and val."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from visiontrim.evaluate.benchmarks.base import (
    SHORT,
    UNANSWERABLE,
    Benchmark,
    Breakdown,
    Files,
    save_json,
    share,
    shares,
)
from visiontrim.evaluate.benchmarks.vqa_text import accuracy, vqa_text
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.records import Record, read_lines, read_list

QUESTIONS = "llava_test.jsonl"
SUFFIX = f"\n{UNANSWERABLE}\n{SHORT}"


class VizWiz(Benchmark):
    folders = ("vizwiz",)
    metric = "accuracy"
    licence = "CC BY 4.0"

    def __init__(self, val: bool = False) -> None:
        self.val = val
        self.name = "vizwiz-val" if val else "vizwiz"
        self.title = "VizWiz val" if val else "VizWiz test"
        self.metric = "val accuracy" if val else "accuracy"
        self.papers = (
            "none prints val: tables have test" if val else "VQA accuracy in % from the server (eval.ai challenge 1911)"
        )
        self.where = (
            "val.json and val are on the VizWiz VQA download page"
            if val
            else f"{QUESTIONS} comes with LLaVA's eval.zip, test is on the VizWiz VQA download page"
        )
        self.checked = (
            "by hand; no labelled official file could be had"
            if val
            else "8,000 of 8,000 upload answers of LLaVA-1.5-13B's published answers"
        )

    def read(self, files: Files) -> list[Item]:
        if self.val:
            folder = files.pictures("val")
            rows = read_list(files.need("val.json", "Annotations/val.json"))
            return [
                _item(number, row.text("image"), row.text("question"), folder, row) for number, row in enumerate(rows)
            ]
        folder = files.pictures("test")
        return [
            _item(row.id("question_id"), row.text("image"), row.text("text").removesuffix(SUFFIX), folder)
            for row in read_lines(files.need(QUESTIONS))
        ]

    def parse(self, item: Item, text: str) -> str:
        return vqa_text(text)

    def right(self, item: Item, text: str) -> float:
        return accuracy(self.parse(item, text), [vqa_text(answer) for answer in item.answers])

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        if not self.val:
            return Breakdown({})
        right = [self.right(item, text) for item, text in zip(items, texts, strict=True)]
        return Breakdown(
            {"all": {"accuracy": share(right)}, "answer type": shares([item.type for item in items], right)}
        )

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        names = [Path(str(item.sources[0])).name for item in items]
        answers = [self.parse(item, text) for item, text in zip(items, texts, strict=True)]
        save_json([{"image": name, "answer": answer} for name, answer in zip(names, answers, strict=True)], path)
        return [f"{len(items):,} answers; the server wants one to every question of the file"]


def _item(id: str | int, image: str, question: str, folder: Path, label: Record | None = None) -> Item:
    return Item(
        id=id,
        group=image,
        sources=(str(folder / image),),
        question=f"{question}{SUFFIX}",
        bare=question,
        answers=() if label is None else tuple(answer.text("answer") for answer in label.many("answers")),
        type="question" if label is None else label.text("answer_type", default="question"),
        facts={"name": image},
    )
