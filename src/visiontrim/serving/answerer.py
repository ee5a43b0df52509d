"""Answers a batch of rows with a method; a bad row spoils only itself. Knows no files of answers and no processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visiontrim.ask import FALLBACK_PROMPT, Speaker
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method
from visiontrim.core.registry import load_method
from visiontrim.evaluate.asking import answers, encode
from visiontrim.evaluate.items import Item
from visiontrim.run import trim
from visiontrim.serving.rows import Row


@dataclass(frozen=True)
class Settings:
    """What makes an answerer, in this process or in another one; all of it can be pickled."""

    load: Callable[[], Speaker]
    """Loads the model."""
    method: Mapping[str, Any]
    """A recipe: the method with every option."""
    max_new_tokens: int

    def make(self) -> Answerer:
        return Answerer(self.load(), self.method, self.max_new_tokens)


class Answerer:
    """A model with a method. Raises :class:`TrimError` for a method that cannot work on the model."""

    def __init__(self, speaker: Speaker, method: Mapping[str, Any], max_new_tokens: int = 64) -> None:
        self.speaker, self.max_new_tokens = speaker, max_new_tokens
        self._method = load_method(method)
        trim(speaker.model, self._method, text_tower=speaker.text_tower, processor=speaker.processor)  # refuses at once

    def __call__(self, rows: Sequence[Row], number: int = 0) -> list[dict[str, Any]]:
        """Rows of answers, in order: ``id``, ``question``, ``answer``, vision ``tokens`` and how many were ``kept``,
        and ``error``, which is None for a row that was answered.

        ``number`` counts batches: methods that draw at random draw anew for each.
        """
        found: dict[int, dict[str, Any]] = {}
        ready: list[tuple[int, Item]] = []
        for place, row in enumerate(rows):
            try:
                ready.append((place, self._item(row)))
            except Exception as error:
                found[place] = _failed(row, error)
        try:
            found |= self._answered(rows, ready, number)
        except Exception:  # not known whose fault it is: one by one
            for one in ready:
                try:
                    found |= self._answered(rows, [one], number)
                except Exception as error:
                    found[one[0]] = _failed(rows[one[0]], error)
        return [found[place] for place in range(len(rows))]

    def _item(self, row: Row) -> Item:
        if row.error or row.source is None:
            raise TrimError(row.error)
        processor: Any = self.speaker.processor
        question = self.speaker.normalise(row.question)
        if (mark := getattr(processor, "image_token", None)) and mark in question:
            raise TrimError(f"the question holds {mark!r}, the place of the picture in the prompt: leave it out")
        item = Item(row.id, "", (row.source,), question, (), "")
        templated = bool(getattr(processor, "chat_template", None))
        prompt = None if templated else FALLBACK_PROMPT.format(images="<image>\n", question=question)
        return Item(row.id, "", tuple(item.pictures()), question, (), "", prompt)

    def _drawing_anew(self, number: int) -> Method:
        seed = getattr(self._method, "seed", None)
        return self._method if seed is None else dataclasses.replace(self._method, seed=seed + number)  # pyright: ignore[reportArgumentType]

    def _answered(
        self, rows: Sequence[Row], ready: Sequence[tuple[int, Item]], number: int
    ) -> dict[int, dict[str, Any]]:
        if not ready:
            return {}
        items = [item for _, item in ready]
        said = answers(
            self.speaker, items, encode(self.speaker, items), self._drawing_anew(number), self.max_new_tokens
        )
        assert said.run is not None  # every row has a picture
        counts = [[0, 0] for _ in items]
        for image in said.run.trace.images:
            counts[image.sample][0] += image.total + image.marks
            counts[image.sample][1] += image.entered
        return {
            place: {
                "id": rows[place].id,
                "question": rows[place].question,
                "answer": text,
                "tokens": tokens,
                "kept": kept,
                "error": None,
            }
            for (place, _), text, (tokens, kept) in zip(ready, said.texts, counts, strict=True)
        }


def _failed(row: Row, error: Exception) -> dict[str, Any]:
    text = str(error) if isinstance(error, TrimError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return {"id": row.id, "question": row.question, "answer": None, "tokens": None, "kept": None, "error": text}
