"""Token maps of questions that a method wins against random tokens, and of those that it loses."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from visiontrim.evaluate.asking import PLAIN, Cell, Examiner, answers, encode
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.report import Section
from visiontrim.evaluate.scores import Answers
from visiontrim.picture import side_by_side

NUMBER = 3
"""Pictures of each kind, of different scenes."""


def examples(examiner: Examiner, found: Answers, cell: Cell, control: Cell) -> list[Section]:
    """Wins: worth more than the ``control``'s answer. Losses: worth less than the plain model's."""
    if found.error(cell) or found.error(control):
        return []
    ours, theirs, plain = (found.right(c) for c in (cell, control, Cell(PLAIN, None)))
    sections = []
    for name, which, words in (
        ("Wins", ours > theirs, f"right, where `{control.method}` is wrong"),
        ("Losses", plain > ours, "wrong, where the plain model is right"),
    ):
        picked = _picked(found.items, which.nonzero()[0].tolist())
        if picked:
            texts = found.texts(cell)
            maps = [_map(examiner, found.items[number], cell) for number in picked]
            captions = [_caption(found.items[number], texts[number], bool(ours[number] == 1)) for number in picked]
            title = f"{name} of {cell.method} at {cell.keep} tokens"
            # a map in all colors takes a megabyte; this palette keeps the few bright ones
            sheet = side_by_side(maps, captions).quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            sections.append(Section(title, f"Questions answered {words}.", picture=sheet, file=f"{name.lower()}.png"))
    return sections


def _picked(items: Sequence[Item], numbers: Sequence[int]) -> list[int]:
    """The first question with a picture of each group, spread over the types."""
    picked: dict[str, int] = {}
    types: set[str] = set()
    for number in numbers:
        item = items[number]
        if item.sources and item.group not in picked and item.type not in types:
            picked[item.group] = number
            types.add(item.type)
    return list(picked.values())[:NUMBER]


def _map(examiner: Examiner, item: Item, cell: Cell) -> Image.Image:
    speaker, protocol = examiner.speaker, examiner.protocol
    inputs = encode(speaker, [item], protocol)
    run = answers(speaker, [item], inputs, cell.load(), examiner.max_new_tokens, protocol).run
    pictures = [protocol.shown(picture, speaker.processor) for picture in item.pictures()]
    if getattr(speaker.processor, "makes_videos", False):
        return run.picture(pictures)  # pyright: ignore[reportOptionalMemberAccess]
    return run.picture(pictures[-1], len(pictures) - 1)  # pyright: ignore[reportOptionalMemberAccess]


def _caption(item: Item, answer: str, right: bool) -> str:
    known = f", right is: {item.answers[0]}" if item.answers and not right else ""
    return f"{item.bare or item.question}  {answer}{known}"
