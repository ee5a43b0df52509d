"""The questions of a run, encoded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from visiontrim.core.errors import TrimError
from visiontrim.core.view import Text
from visiontrim.models.text import Guidance


class Questions:
    """One question for every row of a batch, or one for all, with the tower that encodes them."""

    def __init__(self, guidance: Guidance | None, asked: str | Sequence[str] | None) -> None:
        self.guidance = guidance
        self.asked = asked

    @property
    def asked(self) -> tuple[str, ...]:
        """The questions; () if none was given, which leaves guidance by text out."""
        return self._asked

    @asked.setter
    def asked(self, asked: str | Sequence[str] | None) -> None:
        questions = (asked,) if isinstance(asked, str) else tuple(asked or ())
        for number, question in enumerate(questions):
            if not isinstance(question, str) or not question.strip():
                raise TrimError(
                    f"question {number} of {len(questions)} is {question!r}: give the text of the question, or no "
                    "question at all to do without guidance by text"
                )
        self._asked = questions
        self._text: Text | None = None

    def for_rows(self, rows: Sequence[int], batch: int, device: torch.device) -> Text | None:
        """Token features of the question that belongs to each of ``rows`` of a batch of ``batch``."""
        if not self._asked or self.guidance is None:
            return None
        if batch % len(self._asked):
            raise TrimError(
                f"{len(self._asked)} questions for a batch of {batch}: give one question for every row, or one for all"
            )
        if self._text is None:
            self._text = self.guidance.encode(self._asked)
        repeats = batch // len(self._asked)  # rows of one sample (beams) stand side by side
        pick = torch.tensor([row // repeats for row in rows], device=self._text.tokens.device)
        return Text(self._text.tokens[pick].to(device), self._text.mask[pick].to(device), self._text.scale)
