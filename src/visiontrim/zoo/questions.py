"""The closed vocabulary of the bundled model and the types of questions that it was trained to answer.

Questions are written as the word-level tokenizer wants them, lower case and with the question mark standing alone:
"what color is the star ?". :func:`normalise` brings what a person types into this form.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from visiontrim.core.errors import TrimError
from visiontrim.zoo.scenes import COLORS, DIGITS, KINDS, LETTERS, SHAPES, SIZE, Object

# fmt: off
WORDS = (
    "<pad>", "<s>", "</s>", "<image>", "<eot>", "USER:", "ASSISTANT:",
    "?", "what", "color", "is", "the", "shape", "digit", "letter", "where", "how", "many", "there", "a",
    "left", "right", "top", "bottom", "of", "above", "yes", "no", "objects", "center", "background", "and", "photo",
    *COLORS, *SHAPES, *DIGITS, *LETTERS,
    "below", "moved", "appeared",
)
# fmt: on
"""The vocabulary; the position of a word is its token id, so new words come last."""

ASKABLE = frozenset(WORDS[WORDS.index("?") + 1 : WORDS.index("moved")])
"""The words that a question to the bundled model may hold: no markers, no question mark, nothing of videos."""

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
    found: Object | None = None
    """The object that a question of several steps leads to; the question does not name it."""


def ask(rng: random.Random, objects: Sequence[Object], type: str) -> Question | None:
    """A question of this type with exactly one right answer, or None if the scene (or the draw) allows none."""
    parts = _ASK[type](rng, objects)
    if parts is None:
        return None
    text, answer, found = parts if len(parts) == 3 else (*parts, None)
    return Question(type, text, answer, found)


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


def _side(rng: random.Random, objects: Sequence[Object]) -> tuple[str, str, Object] | None:
    """what color is the digit left of the star ?  Several digits, one of them there by at least 12 pixels.

    The others are on the other side by as much, and at least one of them has another colour.
    """
    kinds = Counter(o.kind for o in objects)
    choices = []
    for reference in _unique(objects):
        for kind in _distinct(o.kind for o in objects):
            group = [o for o in objects if o.kind == kind]
            if kind == reference.kind or len(group) < 2:
                continue
            for relation, sign, axis in _SIDES:
                far = [sign * (getattr(o, axis) - getattr(reference, axis)) for o in group]
                there = [o for o, distance in zip(group, far, strict=True) if distance > 0]
                clear = min(map(abs, far)) >= 12
                if clear and len(there) == 1 and any(o.color != there[0].color for o in group):
                    choices.append((kind, relation, reference, there[0]))
    if not choices:
        return None
    kind, relation, reference, found = rng.choice(choices)
    short = kinds[reference.kind] == 1 and rng.random() < 0.4
    name = reference.kind if short else f"{reference.color} {reference.kind}"
    return f"what color is the {kind} {relation} the {name} ?", found.color, found


_SIDES = (("left of", -1, "x"), ("right of", 1, "x"), ("above", -1, "y"), ("below", 1, "y"))


def _hop(rng: random.Random, objects: Sequence[Object]) -> tuple[str, str, Object] | None:
    """what digit is the color of the star ? / what shape is the color of the 7 ?  One other object has that colour."""
    kinds, values = Counter(o.kind for o in objects), Counter(o.value for o in objects)
    choices = []
    for reference in objects:
        names = [reference.kind] if kinds[reference.kind] == 1 else []
        names += [reference.value] if reference.value and values[reference.value] == 1 else []
        for noun in ("digit", "letter", "shape") if names else ():
            same = [o for o in objects if o is not reference and o.color == reference.color and _is(o, noun)]
            if len(same) == 1 and not _is(reference, noun):
                choices.append((noun, rng.choice(names), same[0]))
    if not choices:
        return None
    noun, name, found = rng.choice(choices)
    return f"what {noun} is the color of the {name} ?", found.value or found.kind, found


def _is(obj: Object, noun: str) -> bool:
    return obj.kind == noun or (noun == "shape" and not obj.value)


def _unique(objects: Sequence[Object]) -> list[Object]:
    """The objects that colour and kind name without doubt."""
    names = Counter((o.color, o.kind) for o in objects)
    return [o for o in objects if names[o.color, o.kind] == 1]


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


_Parts = tuple[str, str] | tuple[str, str, Object]
_ASK: dict[str, Callable[[random.Random, Sequence[Object]], _Parts | None]] = {
    "color": _color,
    "shape": _shape,
    "read": _read,
    "exist": _exist,
    "count": _count,
    "pos": _pos,
    "rel": _rel,
    "side": _side,
    "hop": _hop,
}
TYPES = tuple(_ASK)
"""The last two need several steps: to find one object, and from it another one."""

_SPELLINGS = {"colour": "color", "an": "a", "centre": "center"}


def normalise(question: str, askable: Collection[str] = ASKABLE) -> str:
    """The question as the word-level tokenizer wants it: "What colour is the star?" -> "what color is the star ?".

    Its unknown token is the padding token, so a foreign word would silently vanish: raises :class:`TrimError` instead,
    naming the unknown words and what can be asked. ``askable`` are the words that a question may hold.
    """
    words = [word.strip(".,!") for word in question.replace("?", " ").split()]
    words = [word if word in LETTERS else word.lower() for word in words if word]
    words = [_SPELLINGS.get(word, word) for word in words]
    unknown = _distinct(word for word in words if word not in askable)
    if unknown or not words:
        problem = f"the bundled model does not know {', '.join(map(repr, unknown))}" if unknown else "an empty question"
        raise TrimError(
            f"{problem}: ask 'what color is the star?', 'what shape is red?', 'what is the red digit?', "
            "'is there a red star?', 'how many red objects?', 'where is the red star?', "
            "'is the star above the digit?', 'what color is the digit left of the star?' or "
            f"'what digit is the color of the star?'; colors: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)}; "
            f"digits 0-9; letters {' '.join(LETTERS)}"
        )
    return " ".join([*words, "?"])
