"""Questions with pictures: the bundled suite, or a user's file."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from visiontrim.core.errors import TrimError
from visiontrim.images import load_image
from visiontrim.zoo import SPLITS, held_out_canvases
from visiontrim.zoo.canvas_scores import CANVASES as SIZES
from visiontrim.zoo.canvas_scores import SCENES as NUM_CANVASES
from visiontrim.zoo.canvas_scores import parse_grid
from visiontrim.zoo.suite import Sample

SHAPES = "shapes"
"""Name of the suite that the bundled LLaVA answers."""
CANVASES = "canvases"
"""Name of the suite that the bundled Qwen2.5-VL answers."""
SHAPES_TOKENS = 3
"""Answers of both have at most two words, and an end token."""
FREE_TOKENS = 32
"""Longest answer to the questions of a file."""


@dataclass(frozen=True, eq=False, slots=True)
class Item:
    """One question."""

    id: str
    group: str
    """Questions of one group are about the same pictures, so they are no independent evidence."""
    sources: tuple[Image.Image | str, ...]
    """The pictures in order, or where they are."""
    question: str
    answers: tuple[str, ...]
    """Any of these is right; () if nobody knows."""
    type: str
    prompt: str | None = None
    """What the model reads; None: its chat template around pictures and question."""

    def pictures(self) -> list[Image.Image]:
        """The pictures, read now. Raises :class:`TrimError` for what is no picture."""
        return [load_image(source) if isinstance(source, str) else source for source in self.sources]

    def is_right(self, answer: str) -> bool:
        """Whether ``answer`` is one of :attr:`answers`, whatever its case, spaces and final full stop."""
        return _plain(answer) in map(_plain, self.answers)


@dataclass(frozen=True, slots=True)
class Suite:
    """Questions that are asked together."""

    name: str
    items: tuple[Item, ...]
    max_new_tokens: int

    @property
    def labelled(self) -> bool:
        """Whether the right answers are known."""
        return all(item.answers for item in self.items)

    def batches(self, size: int) -> list[tuple[Item, ...]]:
        """The items in order: whole groups that follow each other, up to ``size`` items or one group."""
        batches: list[tuple[Item, ...]] = []
        for _, group in itertools.groupby(self.items, key=lambda item: item.group):
            for part in _batched(group, size):
                if batches and len(batches[-1]) + len(part) <= size:
                    batches[-1] += part
                else:
                    batches.append(part)
        return batches


def digest(items: Iterable[Item]) -> str:
    """Eight digits that tell questions and right answers apart."""
    total = hashlib.sha256()
    for item in items:
        total.update(f"{item.id}|{item.prompt}|{item.question}|{item.answers}\n".encode())
    return total.hexdigest()[:8]


def load_suite(suite: str, split: str | None = None, scenes: int | None = None) -> Suite:
    """The bundled suite ``"shapes"`` in one of its splits, ``"canvases"`` of one size, or a file (:func:`read_items`).

    ``scenes`` takes only the questions about the first so many scenes or, of a file, about the first so many pictures.
    Raises :class:`TrimError` for unknown names and for files that hold no questions.
    """
    if suite == CANVASES:
        split = split or SIZES[0]
        drawn = held_out_canvases(parse_grid(split), scenes or NUM_CANVASES)
        return Suite(f"{CANVASES}/{split}", tuple(map(_drawn, drawn)), SHAPES_TOKENS)
    if suite == SHAPES:
        split = split or "standard"
        if split not in SPLITS:
            raise TrimError(f"there is no split {split!r}: choose {', '.join(SPLITS)}")
        return Suite(f"{SHAPES}/{split}", tuple(shapes(split, scenes)), SHAPES_TOKENS)
    if not suite.endswith((".jsonl", ".json")):
        raise TrimError(
            f"there is no suite {suite!r}: choose {SHAPES} or {CANVASES}, or give a file FILE.jsonl of questions"
        )
    groups = itertools.groupby(read_items(Path(suite)), key=lambda item: item.group)
    items = tuple(item for _, group in itertools.islice(groups, scenes) for item in group)
    if not items:
        raise TrimError(f"{suite} holds no questions about pictures")
    return Suite(Path(suite).name, items, FREE_TOKENS)


def read_items(path: Path) -> Iterator[Item]:
    """The questions of a file, one JSON object a line (or one JSON list), read as they are needed.

    A line is ``{"image": "a.png", "question": "...", "answer": "..."}``, where ``image`` and ``answer`` may be lists,
    ``answer`` may be missing and ``id`` and ``type`` may be given; or one in LLaVA's format of conversations, of which
    the first turn is taken. Paths are relative to the file. Lines without a picture are passed over. Raises
    :class:`TrimError` with the number of a line that cannot be read.
    """
    try:
        text = path.open(encoding="utf-8")
    except OSError as error:
        raise TrimError(f"the questions {path} cannot be read: {error.strerror}") from error
    with text:
        rows = enumerate(json.load(text), 1) if path.suffix == ".json" else _lines(path, text)
        for number, row in rows:
            if item := _item(path, number, row):
                yield item


def _lines(path: Path, text: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise TrimError(f"{path}, line {number} is not valid JSON: {error}") from error


def _item(path: Path, number: int, row: Any) -> Item | None:
    if not isinstance(row, dict) or not ("question" in row or row.get("conversations")):
        raise TrimError(f"{path}, line {number} asks nothing: write 'image', 'question' and, if known, 'answer'")
    turns = [turn["value"].replace("<image>", "").strip() for turn in row.get("conversations", ())[:2]]
    question, answer = row.get("question", turns and turns[0]), row.get("answer", turns[1:])
    images = _listed(row.get("image", []))
    sources = tuple(name if "://" in name else str(path.parent / name) for name in images)
    if not sources:
        return None
    answers, id = tuple(map(str, _listed(answer))), str(row.get("id", number))
    return Item(id, "|".join(sources), sources, question, answers, row.get("type", "question"))


def shapes(split: str, scenes: int | None = None) -> Iterator[Item]:
    """The questions of a split of the bundled suite, drawn as they are needed."""
    return map(_drawn, SPLITS[split].samples(scenes))


def _drawn(sample: Sample) -> Item:
    name, group = f"{sample.scene_seed}/{sample.type}/{len(sample.earlier)}", str(sample.scene_seed)
    return Item(name, group, sample.images, sample.question, (sample.answer,), sample.type, sample.prompt)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _plain(answer: str) -> str:
    return " ".join(answer.lower().split()).removesuffix(".")


def _batched(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    rest = iter(items)
    while part := tuple(itertools.islice(rest, size)):
        yield part
