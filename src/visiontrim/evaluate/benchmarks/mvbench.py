"""MVBench (arXiv 2311.17005; MIT): twenty tasks of multiple choice about videos; the score is the mean of the tasks."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import Benchmark, Breakdown, Files, save_lines, share, shares
from visiontrim.evaluate.frames import Frames
from visiontrim.evaluate.items import Item, ratio
from visiontrim.evaluate.records import Record, read_list

FRAMES = 8
CLOSING = "Only give the best option."
TASKS = {
    "action_antonym": "ssv2_video",
    "action_count": "perception",
    "action_localization": "sta",
    "action_prediction": "star",
    "action_sequence": "star",
    "character_order": "perception",
    "counterfactual_inference": "clevrer",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa",
    "fine_grained_action": "Moments_in_Time_Raw",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer",
    "moving_count": "clevrer",
    "moving_direction": "clevrer",
    "object_existence": "clevrer",
    "object_interaction": "star",
    "object_shuffle": "perception",
    "scene_transition": "scene_qa",
    "state_change": "perception",
    "unexpected_action": "FunQA_test",
}
"""Files of questions, and a part of the path of their videos: names of videos occur in several folders."""


class MVBench(Benchmark):
    name = "mvbench"
    title = "MVBench"
    folders = ("mvbench", "MVBench")
    where = "json/TASK.json and video/ come with the MVBench data set of OpenGVLab"
    metric = "mean of tasks"
    unit = "videos"
    papers = "mean accuracy of 20 tasks in %"
    checked = "nothing official"
    licence = "MIT; videos of eleven data sets"
    upload = ".jsonl"

    def read(self, files: Files) -> list[Item]:
        paths = {task: files.find(f"json/{task}.json", f"{task}.json") for task in TASKS}
        if not any(paths.values()):
            files.need(*(f"json/{task}.json" for task in list(TASKS)[:2]))
        if absent := [task for task, path in paths.items() if path is None]:
            files.lacking.append(f"MVBench lacks {', '.join(f'json/{task}.json' for task in absent)}: {self.where}")
        videos = _index(files.pictures("video", "videos"))
        items = []
        for task, path in paths.items():
            rows = [] if path is None else read_list(path)
            items += [_item(f"{task}/{number}", task, row, videos) for number, row in enumerate(rows)]
        return items

    def parse(self, item: Item, text: str) -> str:
        """The first letter of an option that stands alone, in brackets or not."""
        letters = "".join(item.facts["options"])
        found = re.search(rf"\b([{letters}])\b", text) or re.search(rf"\(([{letters.lower()}])\)", text)
        return found[1].upper() if found else ""

    def counts(self, items: Sequence[Item], texts: Sequence[str]) -> Float[np.ndarray, "items 40"]:
        found = np.zeros((len(items), len(TASKS), 2))
        places = {task: place for place, task in enumerate(TASKS)}
        for row, item, text in zip(found, items, texts, strict=True):
            row[places[item.type]] = self.right(item, text), 1
        return found.reshape(len(items), -1)

    def value(self, sums: Float[np.ndarray, "*draws 40"]) -> Float[np.ndarray, "*draws"]:
        found = sums.reshape(*sums.shape[:-1], len(TASKS), 2)
        means = ratio(found[..., 0], found[..., 1])
        return self.top * ratio(means.sum(-1), (found[..., 1] > 0).sum(-1).astype(float))

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        right = [self.right(item, text) for item, text in zip(items, texts, strict=True)]
        return Breakdown({"all": {"questions": share(right)}, "task": shares([item.type for item in items], right)})

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        pairs = zip(items, texts, strict=True)
        save_lines(({"id": item.id, "prediction": self.parse(item, text)} for item, text in pairs), path)
        return ["no server takes it: MVBench is scored here"]


def _item(id: str, task: str, row: Record, videos: dict[str, list[Path]]) -> Item:
    options, answer = row.texts("candidates"), row.text("answer")
    if answer not in options:
        raise row.error(f"the answer {answer!r} is none of its candidates")
    letters = "ABCDEFGH"[: len(options)]
    lines = [f"({letter}) {option}" for letter, option in zip(letters, options, strict=True)]
    question, video = row.text("question"), row.text("video")
    start, end = (float(row.text(name)) if name in row else None for name in ("start", "end"))
    found = videos.get(Path(video).name, [])
    path = next((path for path in found if TASKS[task] in str(path)), found[0] if found else Path(video))
    return Item(
        id=id,
        group=f"{task}/{video}",
        sources=(Frames(path, FRAMES, start, end),),
        question="\n".join([f"Question:{question}", "Option:", *lines, CLOSING]),
        bare=question,
        answers=(letters[options.index(answer)],),
        type=task,
        facts={"options": tuple(letters)},
    )


def _index(folder: Path) -> dict[str, list[Path]]:
    """Where the videos of each name are, also those that are folders of frames."""
    found: dict[str, list[Path]] = defaultdict(list)
    try:
        for home, folders, names in os.walk(folder):
            for name in (*folders, *names):
                found[name].append(Path(home) / name)
    except OSError as error:
        raise TrimError(f"{folder} cannot be read ({error.strerror or error})") from error
    return found
