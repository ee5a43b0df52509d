"""VQAv2 (arXiv 1612.00837; CC BY 4.0): test-dev, which only a server scores, and val, whose labels are public.

The score of val is another number than that of test-dev, and no table prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from visiontrim.evaluate.benchmarks.base import SHORT, Benchmark, Breakdown, Files, save_json, share, shares
from visiontrim.evaluate.benchmarks.vqa_text import accuracy, vqa_script_text, vqa_text
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.records import Record, read_lines, read_object

ASKED = "llava_vqav2_mscoco_test-dev2015.jsonl"
WHOLE = "llava_vqav2_mscoco_test2015.jsonl"
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_LABELS = "v2_mscoco_val2014_annotations.json"


class VQAv2(Benchmark):
    name = "vqav2"
    title = "VQAv2 test-dev"
    folders = ("vqav2",)
    where = f"{ASKED} and {WHOLE} come with LLaVA's eval.zip, test2015 is COCO's"
    metric = "accuracy"
    papers = "VQA accuracy in % on test-dev, from the server (eval.ai challenge 830)"
    checked = "the text rule on 8,000 official pairs"
    licence = "CC BY 4.0, pictures of COCO"

    def read(self, files: Files) -> list[Item]:
        folder = files.pictures("test2015")
        path = files.need(ASKED)
        whole = files.find(WHOLE)
        self._ids = [] if whole is None else [row.whole("question_id") for row in read_lines(whole)]
        return [
            _item(row.whole("question_id"), row.text("text").removesuffix(f"\n{SHORT}"), folder / row.text("image"))
            for row in read_lines(path)
        ]

    def parse(self, item: Item, text: str) -> str:
        return vqa_text(text)

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        said = {item.id: self.parse(item, text) for item, text in zip(items, texts, strict=True)}
        every = self._ids or list(said)
        save_json([{"question_id": id, "answer": said.get(id, "")} for id in every], path)
        lacking = "" if self._ids else f"; {WHOLE} is missing, so it holds too few questions for the server"
        return [f"{len(said):,} answers, {len(every) - len(said):,} empty ones{lacking}"]


class VQAv2Val(Benchmark):
    name = "vqav2-val"
    title = "VQAv2 val"
    folders = ("vqav2",)
    where = f"{VAL_QUESTIONS}, {VAL_LABELS} and val2014 are on visualqa.org/download"
    metric = "val accuracy"
    papers = "none prints val: tables have test-dev"
    checked = "by hand; no labelled official file could be had"
    licence = "CC BY 4.0, pictures of COCO"

    def read(self, files: Files) -> list[Item]:
        folder = files.pictures("val2014")
        path, asked = files.want(VAL_LABELS), files.need(VAL_QUESTIONS)
        labels = {}
        if path is not None:
            labels = {
                label.whole("question_id"): label for label in Record(read_object(path), str(path)).many("annotations")
            }
        items = []
        for row in Record(read_object(asked), str(asked)).many("questions"):
            id, image = row.whole("question_id"), row.whole("image_id")
            if labels and id not in labels:
                raise row.error(f"question {id} has no annotation in {path}: take both files from one release")
            items.append(_item(id, row.text("question"), folder / f"COCO_val2014_{image:012d}.jpg", labels.get(id)))
        return items

    def parse(self, item: Item, text: str) -> str:
        text = _line(text)
        return vqa_script_text(text) if len(set(map(_line, item.answers))) > 1 else text

    def right(self, item: Item, text: str) -> float:
        return accuracy(self.parse(item, text), [self.parse(item, answer) for answer in item.answers])

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        pairs = [(item, self.right(item, text)) for item, text in zip(items, texts, strict=True) if item.answers]
        right = [value for _, value in pairs]
        return Breakdown(
            {
                "all": {"accuracy": share(right)},
                "answer type": shares([item.type for item, _ in pairs], right),
                "question type": shares([item.facts["question type"] for item, _ in pairs], right),
            }
        )

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        save_json([{"question_id": item.id, "answer": text} for item, text in zip(items, texts, strict=True)], path)
        return ["the official script of val reads it"]


def _item(id: int, question: str, picture: Path, label: Record | None = None) -> Item:
    return Item(
        id=id,
        group=picture.name,
        sources=(str(picture),),
        question=f"{question}\n{SHORT}",
        bare=question,
        answers=() if label is None else tuple(answer.text("answer") for answer in label.many("answers")),
        type="question" if label is None else label.text("answer_type"),
        facts={} if label is None else {"question type": label.text("question_type")},
    )


def _line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
