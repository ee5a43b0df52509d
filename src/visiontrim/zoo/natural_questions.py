"""Questions about natural scenes: the nine types, pairs about what is there and what is not, pointing, and strings.

Pointing is answered by a cell of a 6 x 6 grid in words, "row 2 column 5", counted from the top left. A pair is a second
question of type ``exist`` with the other answer, so that yes and no are balanced scene by scene.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from visiontrim.zoo.natural_scenes import STRING
from visiontrim.zoo.questions import ASKABLE, CHARACTERS, TYPES, WORDS, Question, ask, normalise
from visiontrim.zoo.scenes import SIZE, Object

POINT = "point"
"""The type of question that is answered by a cell."""
MORE_WORDS = (STRING, "row", "column")
NATURAL_WORDS = (*WORDS, *MORE_WORDS)
"""The vocabulary of the model of natural scenes: that of the bundled one, and three words at its end."""

LONGEST = 5
"""Words of the longest answers, "row 2 column 5" and strings of four, with the token that ends them."""

CELLS = 6
"""Rows and columns of the grid that pointing counts in; a cell has 32 x 32 pixels, 4 x 4 patches."""
CELL = SIZE // CELLS
CLEAR = 3
"""Pixels between a centre that is asked for and the border of its cell, at least."""


def normalise_natural(question: str) -> str:
    """As :func:`visiontrim.zoo.normalise`, with the words for strings and pointing."""
    return normalise(question, ASKABLE | set(MORE_WORDS))


def ask_natural(rng: random.Random, objects: Sequence[Object], type: str) -> Question | None:
    """A question of one of NATURAL_TYPES with exactly one right answer, or None if the scene (or the draw) has none."""
    if type in _MORE:
        return _MORE[type](rng, objects)
    plain = [obj for obj in objects if obj.kind != STRING]
    # a string is an object of its colour; of the other types only counting could mean it
    question = ask(rng, objects if type == "count" else plain, type) if plain else None
    inside = {character for obj in objects if obj.kind == STRING for character in obj.value or ""}
    if question is None or inside & (set(question.text.split()) & set(CHARACTERS)):
        return None  # "is there a 7 ?", where a string holds one
    return question


def ask_pair(rng: random.Random, objects: Sequence[Object]) -> tuple[Question, Question] | None:
    """Two questions about existence, one with the answer yes and one with no, in random order."""
    found: dict[str, Question] = {}
    for _ in range(40):
        question = ask_natural(rng, objects, "exist")
        if question is not None:
            found.setdefault(question.answer, question)
        if len(found) == 2:
            first, second = found.values()
            return first, second
    return None


def _point(rng: random.Random, objects: Sequence[Object]) -> Question | None:
    """what row and column is the red star ?"""
    names = Counter((o.color, o.kind) for o in objects)
    clear = [
        o
        for o in objects
        if names[o.color, o.kind] == 1 and all(CLEAR <= place % CELL <= CELL - CLEAR for place in (o.x, o.y))
    ]
    if not clear:
        return None
    o = rng.choice(clear)
    row, column = cell_of(o.x, o.y)
    return Question(POINT, f"what row and column is the {o.color} {o.kind} ?", f"row {row} column {column}")


def cell_of(x: float, y: float) -> tuple[int, int]:
    """Row and column of a place in pixels, from 1."""
    return int(y // CELL) + 1, int(x // CELL) + 1


def parse_cell(answer: str) -> tuple[int, int] | None:
    """Row and column of an answer; None if it names no cell."""
    words = answer.split()
    if len(words) != 4 or words[0] != "row" or words[2] != "column":
        return None
    numbers = words[1], words[3]
    if not all(word.isdecimal() and 1 <= int(word) <= CELLS for word in numbers):
        return None
    return int(numbers[0]), int(numbers[1])


def overlap(said: str, right: str) -> float:
    """Intersection over union of the boxes of two cells, each of 3 x 3 cells around the one that is named.

    Cells themselves do not overlap: their neighbourhoods tell a near miss (0.5) from a far one (0).
    """
    first, second = parse_cell(said), parse_cell(right)
    if first is None or second is None:
        return 0.0
    common = 1
    for one, other in zip(first, second, strict=True):
        common *= max(0, 3 - abs(one - other))
    return common / (18 - common)


def _string(rng: random.Random, objects: Sequence[Object]) -> Question | None:
    """what is the red string ? / what is the string ?"""
    strings = [o for o in objects if o.kind == STRING]
    if len(strings) != 1:
        return None
    name = STRING if rng.random() < 0.5 else f"{strings[0].color} {STRING}"
    return Question(STRING, f"what is the {name} ?", " ".join(strings[0].value or ""))


_MORE: dict[str, Callable[[random.Random, Sequence[Object]], Question | None]] = {POINT: _point, STRING: _string}
MORE_TYPES = tuple(_MORE)
NATURAL_TYPES = (*TYPES, *MORE_TYPES)
