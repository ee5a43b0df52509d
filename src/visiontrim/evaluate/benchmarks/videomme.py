"""Video-MME (arXiv 2405.21075): three questions of multiple choice about each of 900 videos, subtitles or not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import Benchmark, Breakdown, Files, save_json, share, shares
from visiontrim.evaluate.frames import Frames, find_video
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.records import Record, read_lines, read_text_lines

FRAMES = 8
TABLES = (
    "videomme/test-00000-of-00001.parquet",
    "test-00000-of-00001.parquet",
    "videomme.parquet",
    "videomme.jsonl",
    "videomme.json",
)
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video{}. Respond with only the "
    "letter (A, B, C, or D) of the correct option."
)
CLOSING = "The best answer is:"
LEADS = re.compile(r"(?:the )?(?:best|correct)? ?(?:answer|option)(?: is)?:?", re.IGNORECASE)


class VideoMME(Benchmark):
    folders = ("videomme", "Video-MME")
    where = f"{TABLES[1]}, data/VIDEO.mp4 and subtitle/VIDEO.srt come with the Video-MME data set"
    metric = "accuracy"
    unit = "videos"
    checked = "nothing official"
    licence = "research use only"

    def __init__(self, subtitles: bool = False) -> None:
        self.subtitles = subtitles
        self.name = "videomme-subtitles" if subtitles else "videomme"
        self.title = f"Video-MME {'with' if subtitles else 'without'} subtitles"
        self.papers = f"accuracy in %, the {'second' if subtitles else 'first'} of two (58.2 / 61.5)"

    def read(self, files: Files) -> list[Item]:
        path = files.need(*TABLES)
        folder = files.pictures("data", "videos")
        rows = _parquet(path) if path.suffix == ".parquet" else read_lines(path)
        return [self._item(row, folder, files) for row in rows]

    def _item(self, row: Record, folder: Path, files: Files) -> Item:
        question, options, video = row.text("question"), row.texts("options"), row.text("videoID")
        lines = [INSTRUCTION.format(" and the subtitles" if self.subtitles else ""), question, *options, CLOSING]
        if self.subtitles:
            lines = [f"This video's subtitles are listed below:\n{_spoken(files, video)}", *lines]
        return Item(
            id=row.id("question_id"),
            group=video,
            sources=(Frames(find_video(folder, video), FRAMES),),
            question="\n".join(lines),
            bare=question,
            answers=(row.text("answer"),),
            type=row.text("duration"),
            facts={name: row.text(name, default="") for name in ("domain", "sub_category", "task_type")},
        )

    def parse(self, item: Item, text: str) -> str:
        found = re.search("[ABCD]", LEADS.sub(" ", text))
        return found[0] if found else ""

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        right = [self.right(item, text) for item, text in zip(items, texts, strict=True)]
        tables = {"all": {"accuracy": share(right)}, "duration": shares([item.type for item in items], right)}
        kinds = {"domain": "domain", "sub_category": "sub-category", "task_type": "kind of task"}
        for fact, title in kinds.items():
            tables[title] = shares([item.facts[fact] or None for item in items], right)
        return Breakdown({title: table for title, table in tables.items() if table})

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        rows = [
            {
                "question_id": item.id,
                "videoID": item.group,
                "duration": item.type,
                "response": text,
                "answer": item.answers[0],
            }
            for item, text in zip(items, texts, strict=True)
        ]
        save_json(rows, path)
        return ["no server takes it: Video-MME is scored here"]


def _spoken(files: Files, video: str) -> str:
    """The lines of a .srt file that are neither numbers nor times."""
    path = files.find(f"subtitle/{video}.srt")
    if path is None:
        return "No subtitles available"
    lines = (line.strip() for _, line in read_text_lines(path))
    return "\n".join(
        re.sub(r"<[^>]*>", "", line) for line in lines if line and not line.isdecimal() and "-->" not in line
    )


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TrimError(
            f"{path} needs pyarrow: pip install pyarrow, or save it as {TABLES[3]} in JSON lines"
        ) from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise TrimError(f"{path} cannot be read ({error})") from error
    for number, row in enumerate(rows, 1):
        yield Record(row, f"{path}, row {number}")
