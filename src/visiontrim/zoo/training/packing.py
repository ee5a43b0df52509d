"""Many questions about a scene in one sequence: <s> USER: and the image once, then conversation after conversation.

Each conversation, mostly a single question, sees the image and itself and stands at the positions that it would have
alone, so a packed sequence gives the logits of the stock forward on one conversation at a time, at a fraction of the
cost.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
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

NEXT_TURN = ("</s>", "USER:")
"""What stands between an answer and the next question of a conversation."""

SHARES = {"color": 1.2, "shape": 1.5, "read": 2.2, "exist": 3.5, "count": 4.0, "pos": 1.6, "side": 0.8, "hop": 0.8}
"""How often the types are asked in training."""
FIRST = ("hop", "side", "rel", "rel")
"""Types that are asked about every scene that allows them."""
HARD_TYPES = ("side", "hop")
"""Types that need several steps."""
CONVERSATIONS = 0.3
"""Share of the scenes that are asked in conversations of two to five turns."""


@dataclass(frozen=True, eq=False, slots=True)
class Packed:
    """Questions with their answers, packed behind the images of their scenes; short rows end in padding."""

    questions: list[list[Question]]
    """The questions of each scene, in order."""
    starts: list[list[int]]
    """Where the words of each question begin."""
    ids: Int[Tensor, "scenes text"]
    labels: Int[Tensor, "scenes text"]
    """The word that follows where it belongs to an answer, else IGNORED."""
    number: Int[Tensor, "scenes text"]
    """Which of the questions a word belongs to, from 0; -1 for padding."""
    conversation: Int[Tensor, "scenes text"]
    """Which of the conversations a word belongs to, from 0; -1 for padding."""
    position: Int[Tensor, "scenes text"]


def words_of(question: Question) -> tuple[list[str], list[str]]:
    """What the decoder reads of a question, and the words that it must say; it never reads the last of them, </s>."""
    said = [*question.answer.split(), "</s>"]
    return [*question.text.split(), "ASSISTANT:", *said[:-1]], said


def fitting(questions: Iterable[Question], length: int) -> list[list[Question]]:
    """Single questions, up to the first that does not fit into what is left of ``length`` words with its answer."""
    asked: list[list[Question]] = []
    for question in questions:
        length -= len(words_of(question)[0])
        if length < 0:
            break
        asked.append([question])
    return asked


def draw_questions(
    rng: random.Random,
    objects: Sequence[Object],
    length: int,
    basic: bool = False,
    shares: Mapping[str, float] = SHARES,
) -> list[list[Question]]:
    """Conversations with questions of all types in ``shares``, as many as fit into ``length`` words with their answers.

    ``basic`` ones are single questions of one step.
    """
    conversations: list[list[Question]] = []
    shares = {type: share for type, share in shares.items() if not (basic and type in HARD_TYPES)}
    planned = [type for type in FIRST if type in shares or type == "rel"]
    talk = not basic and rng.random() < CONVERSATIONS
    room = 0  # for further turns in the last conversation
    while True:
        question = ask(rng, objects, planned.pop() if planned else rng.choices(list(shares), list(shares.values()))[0])
        if question is None:
            continue
        length -= len(words_of(question)[0]) + (len(NEXT_TURN) if room else 0)
        if length < 0:
            break
        if room:
            conversations[-1].append(question)
            room -= 1
        else:
            conversations.append([question])
            room = rng.randint(1, 4) if talk else 0
    for conversation in conversations:
        rng.shuffle(conversation)
    return conversations


def pack(scenes: Sequence[Sequence[Sequence[Question]]]) -> Packed:
    """Lay the conversations about each scene one behind the other."""
    rows: list[list[tuple[int, ...]]] = []  # a word as its id, label, question, conversation and position
    starts: list[list[int]] = []
    for conversations in scenes:
        row: list[tuple[int, ...]] = []
        begins: list[int] = []
        for talk, conversation in enumerate(conversations):
            first = len(row)
            for turn, question in enumerate(conversation):
                read, said = words_of(question)
                labels = [IGNORED] * (len(read) - len(said)) + [WORD_ID[word] for word in said]
                if turn:
                    read, labels = [*NEXT_TURN, *read], [IGNORED] * len(NEXT_TURN) + labels
                begins.append(len(row) + (len(NEXT_TURN) if turn else 0))
                for word, label in zip(read, labels, strict=True):
                    row.append((WORD_ID[word], label, len(begins) - 1, talk, TEXT_START + len(row) - first))
        rows.append(row)
        starts.append(begins)
    longest = max(map(len, rows))
    padding = (PAD, IGNORED, -1, -1, TEXT_START)
    table = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    questions = [[question for conversation in scene for question in conversation] for scene in scenes]
    return Packed(questions, starts, *table.unbind(dim=2))


def attention_mask(conversation: Int[Tensor, "scenes text"], prefix: int) -> Bool[Tensor, "scenes 1 all all"]:
    """True where a token may look: back into the ``prefix``, which is <s> USER: and image, and its own conversation."""
    part = torch.cat([conversation.new_full((len(conversation), prefix), -2), conversation], dim=1)
    mask = part[:, :, None] == part[:, None, :]
    mask[:, :, :prefix] = True
    return mask.tril()[:, None]
