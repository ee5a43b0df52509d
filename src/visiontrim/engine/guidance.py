"""The questions of a run, encoded once.

It knows which row of a batch asks what; it does not know what a method makes of a question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from visiontrim.core.errors import TrimError
from visiontrim.core.signals import Text
from visiontrim.models.text import Guidance


class Questions:
    """One question for every row of a batch, or one for all, with what encodes them.

    ``guidance`` is the text tower if there is one; ``words`` are the language model's own embeddings, with or without.
    """

    def __init__(self, guidance: Guidance | None, words: Guidance | None, asked: str | Sequence[str] | None) -> None:
        self.guidance = guidance
        self.words = words
        self.asked = asked

    @property
    def asked(self) -> tuple[str, ...]:
        """The questions; () if none was given, which leaves guidance by text out."""
        return self._asked

    @asked.setter
    def asked(self, asked: str | Sequence[str] | None) -> None:
        if not isinstance(asked, str | Sequence | None):
            raise TrimError(f"question={asked!r} is no text: give a string, or a list with one for each row")
        questions = (asked,) if isinstance(asked, str) else tuple(asked or ())
        for number, question in enumerate(questions):
            if not isinstance(question, str) or not question.strip():
                raise TrimError(
                    f"question {number} of {len(questions)} is {question!r}: give the text of the question, or no "
                    "question at all to do without guidance by text"
                )
        self._asked = questions
        self._encoded: dict[Guidance, Text] = {}

    def for_rows(self, guidance: Guidance, rows: Sequence[int], batch: int, device: torch.device) -> Text:
        """Token features of the question that belongs to each of ``rows`` of a batch of ``batch``."""
        if batch % len(self._asked):
            raise TrimError(
                f"{len(self._asked)} questions for a batch of {batch}: give one question for every row, or one for all"
            )
        if guidance not in self._encoded:
            self._encoded[guidance] = guidance.encode(self._asked)
        text = self._encoded[guidance]
        repeats = batch // len(self._asked)  # rows of one sample (beams) stand side by side
        pick = torch.tensor([row // repeats for row in rows], device=text.tokens.device)
        ends = None if text.ends is None else text.ends[pick].to(device)
        return Text(text.tokens[pick].to(device), text.mask[pick].to(device), text.scale, ends)
