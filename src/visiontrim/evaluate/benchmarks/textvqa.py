"""TextVQA 0.5.1, val (arXiv 1904.08920; CC BY 4.0): questions about text in pictures, ten references each.

LLaVA's prompt lists what an OCR engine read: 58.2 of LLaVA-1.5-7B is with that list, about 46 without it. The question
file numbers questions by picture, so they are joined with their labels by picture and question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from visiontrim.evaluate.benchmarks.base import OCR, SHORT, Benchmark, Files, save_json
from visiontrim.evaluate.benchmarks.vqa_text import accuracy, vqa_text
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.records import Record, read_lines, read_object

QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
LABELS = "TextVQA_0.5.1_val.json"


class TextVQA(Benchmark):
    folders = ("textvqa",)
    where = f"{QUESTIONS} comes with LLaVA's eval.zip, {LABELS} and train_images (val's too) from the TextVQA page"
    checked = "the text rule on 8,000 official pairs; no labelled official file could be had"
    licence = "CC BY 4.0"

    def __init__(self, ocr: bool = True) -> None:
        self.ocr = ocr
        self.name = "textvqa" if ocr else "textvqa-no-ocr"
        self.title = f"TextVQA {'with' if ocr else 'without'} OCR tokens"
        self.metric = f"accuracy {'with' if ocr else 'without'} OCR tokens"
        self.papers = (
            "VQA accuracy in %, with OCR tokens in the prompt"
            if ocr
            else "none prints it: the same model has about 46 instead of 58.2"
        )

    def read(self, files: Files) -> list[Item]:
        folder = files.pictures("train_images", "train_val_images/train_images")
        asked = files.find(QUESTIONS)
        if asked is None and self.ocr:
            asked = files.need(QUESTIONS)
        path = files.need(LABELS) if asked is None else files.want(LABELS)
        labels: dict[tuple[str, str], Record] = {}
        if path is not None:
            for label in Record(read_object(path), str(path)).many("data"):
                labels[label.text("image_id"), label.text("question").lower()] = label
        if asked is None:
            return [
                _item(label.text("image_id"), label.text("question"), None, folder, label) for label in labels.values()
            ]
        items = []
        for row in read_lines(asked):
            lines, image = row.text("text").split("\n"), row.text("question_id")
            label = labels.get((image, lines[0].lower()))
            if labels and label is None:
                raise row.error(f"no question about {image} in {path} reads {lines[0]!r}: take both files from 0.5.1")
            tokens = next((line.removeprefix(OCR) for line in lines[1:] if line.startswith(OCR)), None)
            items.append(_item(image, lines[0], tokens if self.ocr else None, folder, label))
        return items

    def notes(self, items: Sequence[Item]) -> list[str]:
        bare = sum(item.facts["ocr"] == "" for item in items)
        shown = f"{bare} of {len(items)} questions have no OCR tokens" if self.ocr else "asked without OCR tokens"
        return [f"{shown}; papers print the score with OCR tokens"]

    def parse(self, item: Item, text: str) -> str:
        return vqa_text(text)

    def right(self, item: Item, text: str) -> float:
        return accuracy(self.parse(item, text), [vqa_text(answer) for answer in item.answers])

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        pairs = zip(items, texts, strict=True)
        rows = [
            {"question_id": item.facts["id"], "image_id": item.id, "answer": self.parse(item, text)}
            for item, text in pairs
        ]
        save_json(rows, path)
        return (
            []
            if all(item.facts["id"] is not None for item in items)
            else [f"question ids are in {LABELS}, which is missing"]
        )


def _item(image: str, question: str, tokens: str | None, folder: Path, label: Record | None) -> Item:
    lines = [question, SHORT] if tokens is None else [question, OCR + tokens, SHORT]
    return Item(
        id=image,
        group=image,
        sources=(str(folder / f"{image}.jpg"),),
        question="\n".join(lines),
        bare=question,
        answers=() if label is None else label.texts("answers"),
        type="question",
        facts={"ocr": tokens, "id": None if label is None else label.id("question_id")},
    )
