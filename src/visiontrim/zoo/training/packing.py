"""Many questions about a scene in one sequence: <s> USER: and the image once, then question after question.

Each question sees the image and itself and stands at the positions that it would have alone, so a packed sequence
gives the logits of the stock forward on one question at a time, at a fraction of the cost.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from visiontrim.zoo.questions import Question, ask
from visiontrim.zoo.scenes import GRID, Object
from visiontrim.zoo.training.symbolic import PAD, WORD_ID

PREFIX = ("<s>", "USER:")
IMAGE_START = len(PREFIX)
TEXT_START = IMAGE_START + GRID * GRID
"""Position of the first word of a question, whichever vision tokens are there."""
IGNORED = -100
"""Label of tokens that nothing is learned from."""

SHARES = {"color": 1.2, "shape": 1.5, "read": 2.2, "exist": 3.5, "count": 4.0, "pos": 1.6}
"""How often the types are asked in training; two questions of type rel come first."""


@dataclass(frozen=True, eq=False, slots=True)
class Packed:
    """Questions with their answers, packed behind the images of their scenes; short rows end in padding."""

    questions: list[list[Question]]
    """The questions of each scene, in order."""
    ids: Int[Tensor, "scenes text"]
    labels: Int[Tensor, "scenes text"]
    """The word that follows where it belongs to an answer, else IGNORED."""
    number: Int[Tensor, "scenes text"]
    """Which of the questions a word belongs to, from 0; -1 for padding."""
    position: Int[Tensor, "scenes text"]


def words_of(question: Question) -> tuple[list[str], list[str]]:
    """What the decoder reads of a question, and the words that it must say; it never reads the last of them, </s>."""
    said = [*question.answer.split(), "</s>"]
    return [*question.text.split(), "ASSISTANT:", *said[:-1]], said


def draw_questions(rng: random.Random, objects: Sequence[Object], length: int) -> list[Question]:
    """Questions of all types, as many as fit into ``length`` words with their answers."""
    questions: list[Question] = []
    planned = ["rel", "rel"]
    types, shares = list(SHARES), list(SHARES.values())
    while True:
        question = ask(rng, objects, planned.pop() if planned else rng.choices(types, shares)[0])
        if question is not None:
            length -= len(words_of(question)[0])
            if length < 0:
                return questions
            questions.append(question)


def pack(questions: Sequence[Sequence[Question]]) -> Packed:
    """Lay the questions of each scene one behind the other."""
    rows: list[list[tuple[int, int, int, int]]] = []  # a word as its id, label, number and position
    for asked in questions:
        row = []
        for number, question in enumerate(asked):
            read, said = words_of(question)
            labels = [IGNORED] * (len(read) - len(said)) + [WORD_ID[word] for word in said]
            for offset, (word, label) in enumerate(zip(read, labels, strict=True)):
                row.append((WORD_ID[word], label, number, TEXT_START + offset))
        rows.append(row)
    longest = max(map(len, rows))
    padding = (PAD, IGNORED, -1, TEXT_START)
    table = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    return Packed([list(asked) for asked in questions], *table.unbind(dim=2))


def attention_mask(number: Int[Tensor, "scenes text"], prefix: int) -> Bool[Tensor, "scenes 1 all all"]:
    """True where a token may look: back into the ``prefix``, which is <s> USER: and image, and its own question."""
    part = torch.cat([number.new_full((len(number), prefix), -2), number], dim=1)
    mask = part[:, :, None] == part[:, None, :]
    mask[:, :, :prefix] = True
    return mask.tril()[:, None]
