"""Token maps of questions that a method wins against random tokens, and of those that it loses."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from visiontrim.evaluate.asking import Cell, Examiner, answers, encode
from visiontrim.evaluate.report import Section
from visiontrim.evaluate.scores import Answers
from visiontrim.evaluate.suites import Item
from visiontrim.picture import side_by_side

NUMBER = 3
"""Pictures of each kind, of different scenes."""


def examples(examiner: Examiner, found: Answers, cell: Cell, control: Cell) -> list[Section]:
    """Wins: right where the ``control`` is wrong. Losses: wrong where the plain model is right."""
    if found.error(cell) or found.error(control):
        return []
    ours, theirs, plain = (found.right(c) for c in (cell, control, next(iter(found.rows))))
    sections = []
    for name, which, words in (
        ("Wins", ours & ~theirs, f"right, where `{control.method}` is wrong"),
        ("Losses", plain & ~ours, "wrong, where the plain model is right"),
    ):
        picked = _picked(found.items, which.nonzero()[0].tolist())
        if picked:
            texts = found.texts(cell)
            maps = [_map(examiner, found.items[number], cell) for number in picked]
            captions = [_caption(found.items[number], texts[number]) for number in picked]
            title = f"{name} of {cell.method} at {cell.keep} tokens"
            # a map in all colors takes a megabyte; this palette keeps the few bright ones
            sheet = side_by_side(maps, captions).quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            sections.append(Section(title, f"Questions answered {words}.", picture=sheet, file=f"{name.lower()}.png"))
    return sections


def _picked(items: Sequence[Item], numbers: Sequence[int]) -> list[int]:
    """The first question of each group, spread over the types."""
    picked: dict[str, int] = {}
    types: set[str] = set()
    for number in numbers:
        item = items[number]
        if item.group not in picked and item.type not in types:
            picked[item.group] = number
            types.add(item.type)
    return list(picked.values())[:NUMBER]


def _map(examiner: Examiner, item: Item, cell: Cell) -> Image.Image:
    inputs = encode(examiner.speaker, [item])
    _, run, _ = answers(examiner.speaker, [item], inputs, cell.load(), examiner.suite.max_new_tokens)
    return run.picture(item.pictures()[-1], len(item.sources) - 1)


def _caption(item: Item, answer: str) -> str:
    right = f", right is: {item.answers[0]}" if item.answers and not item.is_right(answer) else ""
    return f"{item.question}  {answer}{right}"
