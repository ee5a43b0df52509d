"""MSVD-QA, MSRVTT-QA, TGIF-QA and ActivityNet-QA in the form of Video-ChatGPT: open questions about videos.

Their number in papers is what a judge (a language model behind an endpoint) accepts, and moves by several points with
the judge's version. Without one there are two figures of our own, under their own names: exact match and containment,
both after the VQA text rule. Questions and answers are joined by their id; the released script pairs them by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import LONG_ANSWER, Benchmark, Breakdown, Files, save_lines, share
from visiontrim.evaluate.benchmarks.vqa_text import vqa_text
from visiontrim.evaluate.frames import Frames, find_video
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.records import read_list

FRAMES = 8
NAMES = {
    "msvd-qa": ("MSVD-QA", "MSVD_Zero_Shot_QA", ("videos",)),
    "msrvtt-qa": ("MSRVTT-QA", "MSRVTT_Zero_Shot_QA", ("videos/all", "videos")),
    "tgif-qa": ("TGIF-QA", "TGIF_Zero_Shot_QA", ("mp4", "gifs")),
    "activitynet-qa": ("ActivityNet-QA", "Activitynet_Zero_Shot_QA", ("all_test", "videos")),
}
"""Title, folder, and folders of the videos in it."""


class VideoQA(Benchmark):
    where = "test_q.json, test_a.json and the videos come with GPT_Zero_Shot_QA of github.com/PKU-YuanGroup/Video-LLaVA"
    metric = "exact match (not the judge's accuracy)"
    unit = "videos"
    papers = "accuracy in % and score of 5 by GPT-3.5: from a file of grades"
    checked = "by hand; no official grades could be had"
    licence = "of each data set; none is shipped"
    max_new_tokens = LONG_ANSWER
    upload = ".jsonl"

    def __init__(self, name: str) -> None:
        self.name = name
        self.title, folder, self._videos = NAMES[name]
        self.folders = (f"GPT_Zero_Shot_QA/{folder}", folder)

    def read(self, files: Files) -> list[Item]:
        folder = files.pictures(*self._videos)
        asked, path = files.need("test_q.json"), files.want("test_a.json")
        answers = {} if path is None else {row.text("question_id"): row.text("answer") for row in read_list(path)}
        items = []
        for row in read_list(asked):
            id = row.id("question_id")
            if answers and str(id) not in answers:
                raise row.error(f"question {id} has no answer in {path}: take both files from one release")
            items.append(_item(id, row.text("video_name"), row.text("question"), answers.get(str(id)), folder))
        return items

    def parse(self, item: Item, text: str) -> str:
        return vqa_text(text)

    def right(self, item: Item, text: str) -> float:
        return float(self.parse(item, text) == vqa_text(item.answers[0]))

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        pairs = [(item, text) for item, text in zip(items, texts, strict=True) if item.answers]
        held = [f" {vqa_text(item.answers[0])} " in f" {self.parse(item, text)} " for item, text in pairs]
        exact = [self.right(item, text) for item, text in pairs]
        return Breakdown({"all": {"exact match": share(exact), "containment": share(map(float, held))}})

    def grades(self, items: Sequence[Item], grades: Mapping[str, tuple[bool, float]]) -> Breakdown:
        """What the judge accepted, and its mean score of 5."""
        lacking = [item.id for item in items if str(item.id) not in grades]
        if lacking:
            raise TrimError(
                f"{len(lacking)} of {len(items)} questions have no grade, the first is {lacking[0]}: grade all"
            )
        found = [grades[str(item.id)] for item in items]
        row = {
            "accuracy": 100 * float(np.mean([yes for yes, _ in found])),
            "score": float(np.mean([s for _, s in found])),
        }
        return Breakdown({"judged": {"all": row | {"questions": float(len(found))}}})

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        rows = (
            {"id": item.id, "question": item.question, "answer": (item.answers or ("",))[0], "pred": text}
            for item, text in zip(items, texts, strict=True)
        )
        save_lines(rows, path)
        return ["Video-ChatGPT's graders read it"]


def _item(id: str | int, video: str, question: str, answer: str | None, folder: Path) -> Item:
    return Item(
        id=id,
        group=video,
        sources=(Frames(find_video(folder, video), FRAMES),),
        question=question,
        answers=() if answer is None else (answer,),
        type="question",
    )
