"""A batch of questions to a model with a method, and the log that a stopped evaluation goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature

from visiontrim.ask import Speaker
from visiontrim.core.budget import Amount
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method
from visiontrim.core.registry import load_method
from visiontrim.evaluate.suites import Item, Suite, digest
from visiontrim.measure import Clock
from visiontrim.run import Run, trim

PLAIN = "none"
TOLERANCE = 0.02
"""How far the mean of tokens per layer may lie from the budget, as a share of it; one token is always allowed."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A method at a budget."""

    method: str
    """As it is written on the command line, without ``keep``."""
    keep: Amount | None
    """Mean vision tokens per decoder layer; None for the plain model."""

    def load(self, batch: int = 0) -> Method:
        """The method. One that draws at random draws anew for every ``batch``: that is added to its seed."""
        method = load_method(self.method, **({} if self.keep is None else {"keep": self.keep}))
        seed = getattr(method, "seed", None)
        return method if seed is None else dataclasses.replace(method, seed=seed + batch)  # pyright: ignore[reportArgumentType]


Key = tuple[str, str, Amount | None, str]
"""Weights, method, budget and questions: what tells rows apart."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a cell answered to a batch, one line of the log."""

    weights: str
    method: str
    """With every option, as JSON: a row must not outlive a change of a default."""
    keep: Amount | None
    questions: str
    """Digest of the batch."""
    ids: tuple[str, ...]
    predictions: tuple[str, ...]
    """() where the method cannot work at this budget."""
    error: str
    """Why it cannot, else ""."""
    per_layer: tuple[float, ...]
    """Mean vision tokens of an image that each decoder layer processed."""
    seconds: Mapping[str, float]
    """Of ``vision``, ``method``, ``prefill`` and ``decode``."""

    @property
    def key(self) -> Key:
        return self.weights, self.method, self.keep, self.questions


class Log:
    """Rows in a file of JSON lines, which is read when it is opened and grows with every row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._rows = {row.key: row for row in map(_row, lines)}

    def get(self, key: Key) -> Row | None:
        return self._rows.get(key)

    def add(self, row: Row) -> None:
        self._rows[row.key] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def _row(line: str) -> Row:
    fields: dict[str, Any] = json.loads(line)
    fields.update({name: tuple(fields[name]) for name in ("ids", "predictions", "per_layer")})
    return Row(**fields)


class Examiner:
    """Asks the questions of a suite in batches, and remembers in ``log`` what was answered."""

    def __init__(self, speaker: Speaker, suite: Suite, log: Log, batch: int) -> None:
        self.speaker, self.suite, self._log = speaker, suite, log
        self.batches = suite.batches(batch)
        self.weights = fingerprint(speaker.model)
        self._inputs: tuple[int, BatchFeature] | None = None

    def ask(self, cell: Cell, number: int) -> Row:
        """What ``cell`` says to batch ``number``: from the log if it is there, else asked now and logged."""
        items = self.batches[number]
        method = cell.load(number)
        key: Key = (self.weights, json.dumps(method.to_dict()), cell.keep, digest(items))
        row = self._log.get(key)
        if row is None:
            row = self._ask(method, cell, number, key)
            self._log.add(row)
        return row

    def _ask(self, method: Method, cell: Cell, number: int, key: Key) -> Row:
        items = self.batches[number]
        ids = tuple(item.id for item in items)
        if self._inputs is None or self._inputs[0] != number:
            self._inputs = number, encode(self.speaker, items)
        inputs = self._inputs[1]
        try:
            texts, run, seconds = answers(self.speaker, items, inputs, method, self.suite.max_new_tokens)
        except TrimError as error:
            if cell.keep is None:
                raise
            return Row(*key, ids, (), str(error), (), {})
        error, mean = "", run.report.mean
        if isinstance(cell.keep, int) and abs(mean - cell.keep) > max(1.0, TOLERANCE * cell.keep):
            error = f"it leaves a mean of {mean:.0f} vision tokens per layer where {cell.keep} were asked for"
        return Row(*key, ids, tuple(texts), error, run.report.per_layer, seconds)


@torch.inference_mode()
def answers(
    speaker: Speaker, items: Sequence[Item], inputs: BatchFeature, method: Method, max_new_tokens: int
) -> tuple[list[str], Run, dict[str, float]]:
    """Greedy answers to a batch, the closed run, and the seconds of its parts. Equal pictures are encoded once."""
    model: Any = speaker.model
    with Clock(model) as clock:
        run = trim(
            model,
            method,
            question=[_question(speaker, item) for item in items],
            text_tower=speaker.text_tower,
            processor=speaker.processor,
            remember=1,
            clock=clock,
        )
        with run:
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = speaker.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts], run, clock.seconds


def encode(speaker: Speaker, items: Sequence[Item]) -> BatchFeature:
    """Left-padded inputs for ``generate()``: the prompts of the items, or the processor's chat template."""
    processor: Any = speaker.processor
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    processor.tokenizer.padding_side = "left"
    prompts = [item.prompt for item in items]
    if None not in prompts:
        images = [picture for item in items for picture in item.pictures()]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    elif not getattr(processor, "chat_template", None):
        raise TrimError(f"the processor of {speaker.name} has no chat template, which builds the prompts of a batch")
    else:
        inputs = processor.apply_chat_template(
            [_turn(speaker, item) for item in items],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
    return inputs.to(speaker.model.device, speaker.model.dtype)


def _turn(speaker: Speaker, item: Item) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in item.pictures()]
    return [{"role": "user", "content": [*content, {"type": "text", "text": _question(speaker, item)}]}]


def _question(speaker: Speaker, item: Item) -> str:
    return speaker.normalise(item.question) if item.prompt is None else item.question


def fingerprint(model: nn.Module) -> str:
    """Eight digits that tell weights, and their dtype, apart."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name}{tuple(value.shape)}{value.dtype}{value.double().sum().item():.6e}".encode())
    return total.hexdigest()[:8]
