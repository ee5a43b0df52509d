"""The closed vocabulary of the bundled model and the seven types of questions that it was trained to answer.

Questions are written as the word-level tokenizer wants them, lower case and with the question mark standing alone:
"what color is the star ?". :func:`normalise` brings what a person types into this form.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from visiontrim.core.errors import TrimError
from visiontrim.zoo.scenes import COLORS, DIGITS, KINDS, LETTERS, SHAPES, SIZE, Object

# fmt: off
WORDS = (
    "<pad>", "<s>", "</s>", "<image>", "<eot>", "USER:", "ASSISTANT:",
    "?", "what", "color", "is", "the", "shape", "digit", "letter", "where", "how", "many", "there", "a",
    "left", "right", "top", "bottom", "of", "above", "yes", "no", "objects", "center", "background", "and", "photo",
    *COLORS, *SHAPES, *DIGITS, *LETTERS,
)
# fmt: on
"""The vocabulary; the position of a word is its token id."""

ASKABLE = frozenset(WORDS[WORDS.index("?") + 1 :])
"""The words that a question may hold: all but the markers and the question mark."""

CHARACTERS = DIGITS + LETTERS

PRESENCE = {
    "circle": 0.393,
    "square": 0.393,
    "triangle": 0.388,
    "diamond": 0.386,
    "cross": 0.381,
    "star": 0.388,
    "digit": 0.825,
    "letter": 0.645,
}
"""Share of scenes that hold each kind, over ``draw_scene(seed)`` for seed in range(8000).

Existence questions weigh kinds with it, so that the words of a question do not give its answer away."""

KIND_ONLY = 0.2
"""Share of the existence questions that name a kind without a colour."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its right answer, in words of the vocabulary."""

    type: str
    """One of TYPES."""
    text: str
    answer: str


def ask(rng: random.Random, objects: Sequence[Object], type: str) -> Question | None:
    """A question of this type with exactly one right answer, or None if the scene (or the draw) allows none."""
    pair = _ASK[type](rng, objects)
    return None if pair is None else Question(type, *pair)


def _color(rng: random.Random, objects: Sequence[Object]) -> tuple[str, str] | None:
    """what color is the star ? / what color is the 7 ?"""
    kinds, values = Counter(o.kind for o in objects), Counter(o.value for o in objects)
    by_kind = [o for o in objects if kinds[o.kind] == 1]
    by_value = [o for o in objects if o.value and values[o.value] == 1]
    if by_value and (not by_kind or rng.random() < 0.25):
        o = rng.choice(by_value)
        return f"what color is the {o.value} ?", o.color
    if not by_kind:
        return None
    o = rng.choice(by_kind)
    return f"what color is the {o.kind} ?", o.color


def _shape(rng: random.Random, objects: Sequence[Object]) -> tuple[str, str] | None:
    """what shape is red ?"""
    shapes = [o for o in objects if not o.value]
    colors = Counter(o.color for o in shapes)
    candidates = [o for o in shapes if colors[o.color] == 1]
    if not candidates:
        return None
    o = rng.choice(candidates)
    return f"what shape is {o.color} ?", o.kind


def _read(rng: random.Random, objects: Sequence[Object]) -> tuple[str, str] | None:
    """what is the red digit ? / what is the digit ?"""
    kinds = Counter(o.kind for o in objects)
    candidates = [o for o in _unique(objects) if o.value]
    if not candidates:
        return None
    o = rng.choice(candidates)
    name = o.kind if kinds[o.kind] == 1 and rng.random() < 0.3 else f"{o.color} {o.kind}"
    return f"what is the {name} ?", str(o.value)


def _exist(rng: random.Random, objects: Sequence[Object]) -> tuple[str, str] | None:
    """is there a red star ? / is there a star ? / is there a 7 ?

    Balanced: yes half of the time, and names are weighted such that no question is mostly right or mostly wrong.
    """
    kinds = {o.kind for o in objects}
    yes = rng.random() < 0.5
    answer = "yes" if yes else "no"
    u = rng.random()
    if u < KIND_ONLY:
        names = [kind for kind in KINDS if (kind in kinds) == yes]
        weights = [1 / max(0.02, PRESENCE[kind] if yes else 1 - PRESENCE[kind]) for kind in names]
    elif u < KIND_ONLY + 0.15:
        values = {o.value for o in objects}
        names = [value for value in CHARACTERS if (value in values) == yes]
        weights = [0.75 if yes and value in DIGITS else 1.0 for value in names]  # digits are drawn more often
    elif yes:
        names = [f"{o.color} {o.kind}" for o in objects]
        weights = [1 / max(0.1, PRESENCE[o.kind]) for o in objects]
    else:
        there = {(o.color, o.kind) for o in objects}
        if rng.random() < 0.75:  # hard negative: the colour and the kind are in the scene, but not together
            # In order of appearance: a set of strings is ordered differently in every process.
            pairs = [(c, k) for k in _distinct(o.kind for o in objects) for c in _distinct(o.color for o in objects)]
        else:
            pairs = [(color, kind) for kind in KINDS for color in COLORS]
        names = [f"{color} {kind}" for color, kind in pairs if (color, kind) not in there]
        weights = [1.0] * len(names)
    return (f"is there a {rng.choices(names, weights)[0]} ?", answer) if names else None


def _count(rng: random.Random, objects: Sequence[Object]) -> tuple[str, str]:
    """how many red objects ? / how many star objects ?  The answer, 0 to 5, is drawn first, to balance answers."""
    counts = Counter([o.kind for o in objects] + [o.color for o in objects])
    names = [name for name in (*KINDS, *COLORS) if counts[name] <= 5]
    numbers = sorted({counts[name] for name in names})
    number = rng.choices(numbers, [0.6 if n == 0 else 1.0 for n in numbers])[0]
    return f"how many {rng.choice([name for name in names if counts[name] == number])} objects ?", str(number)


def _pos(rng: random.Random, objects: Sequence[Object]) -> tuple[str, str] | None:
    """where is the red star ? / where is the star ?  In which quarter, that is; never close to its border."""
    kinds = Counter(o.kind for o in objects)
    middle = SIZE / 2
    candidates = [o for o in _unique(objects) if abs(o.x - middle) > 8 and abs(o.y - middle) > 8]
    if not candidates:
        return None
    o = rng.choice(candidates)
    name = o.kind if kinds[o.kind] == 1 and rng.random() < 0.4 else f"{o.color} {o.kind}"
    vertical, horizontal = "top" if o.y < middle else "bottom", "left" if o.x < middle else "right"
    return f"where is the {name} ?", f"{vertical} {horizontal}"


def _rel(rng: random.Random, objects: Sequence[Object]) -> tuple[str, str] | None:
    """is the red star left of the blue digit ? / is the red star above the digit ?  At least 20 pixels apart."""
    kinds = Counter(o.kind for o in objects)
    candidates = _unique(objects)
    if len(candidates) < 2:
        return None
    for _ in range(6):
        a, b = rng.sample(candidates, 2)
        horizontal = rng.choice((True, False))
        distance = b.x - a.x if horizontal else b.y - a.y
        if abs(distance) <= 20:
            continue
        short = rng.random() < 0.3
        first, second = (o.kind if short and kinds[o.kind] == 1 else f"{o.color} {o.kind}" for o in (a, b))
        relation = "left of" if horizontal else "above"
        return f"is the {first} {relation} the {second} ?", "yes" if distance > 0 else "no"
    return None


def _unique(objects: Sequence[Object]) -> list[Object]:
    """The objects that colour and kind name without doubt."""
    names = Counter((o.color, o.kind) for o in objects)
    return [o for o in objects if names[o.color, o.kind] == 1]


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


_ASK: dict[str, Callable[[random.Random, Sequence[Object]], tuple[str, str] | None]] = {
    "color": _color,
    "shape": _shape,
    "read": _read,
    "exist": _exist,
    "count": _count,
    "pos": _pos,
    "rel": _rel,
}
TYPES = tuple(_ASK)

_SPELLINGS = {"colour": "color", "an": "a", "centre": "center"}


def normalise(question: str) -> str:
    """The question as the word-level tokenizer wants it: "What colour is the star?" -> "what color is the star ?".

    Its unknown token is the padding token, so a foreign word would silently vanish: raises :class:`TrimError` instead,
    naming the unknown words and what can be asked.
    """
    words = [word.strip(".,!") for word in question.replace("?", " ").split()]
    words = [word if word in LETTERS else word.lower() for word in words if word]
    words = [_SPELLINGS.get(word, word) for word in words]
    unknown = _distinct(word for word in words if word not in ASKABLE)
    if unknown or not words:
        problem = f"the bundled model does not know {', '.join(map(repr, unknown))}" if unknown else "an empty question"
        raise TrimError(
            f"{problem}: ask 'what color is the star?', 'what shape is red?', 'what is the red digit?', "
            "'is there a red star?', 'how many red objects?', 'where is the red star?' or "
            f"'is the star above the digit?'; colors: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)}; "
            f"digits 0-9; letters {' '.join(LETTERS)}"
        )
    return " ".join([*words, "?"])
