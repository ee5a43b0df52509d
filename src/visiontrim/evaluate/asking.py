"""A batch of questions to a model with a method: encoded, answered, and remembered in the log."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from visiontrim.ask import Speaker
from visiontrim.core.budget import Amount
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method
from visiontrim.core.registry import load_method
from visiontrim.engine.session import Per
from visiontrim.evaluate.fingerprint import fingerprint, setup
from visiontrim.evaluate.items import Digests, Item, Suite
from visiontrim.evaluate.log import Key, Log, Row
from visiontrim.evaluate.protocol import Protocol
from visiontrim.evaluate.smaller import DOWNSAMPLED, POOLED, boundless, follows_size, shrunk
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
    """Mean vision tokens per decoder layer; None for the plain model, or where the method says it."""
    per: Per = "image"
    """What a number of tokens is meant for."""

    def load(self, batch: int = 0) -> Method:
        """The method. One that draws at random draws anew for every ``batch``: that is added to its seed."""
        name = POOLED if self.method == DOWNSAMPLED else self.method
        method = load_method(name, **({} if self.keep is None else {"keep": self.keep}))
        seed = getattr(method, "seed", None)
        return method if seed is None else dataclasses.replace(method, seed=seed + batch)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True)
class Said:
    """Answers to a batch, the closed run, and the seconds of its parts."""

    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens of each answer, without the end."""
    run: Run | None
    """None for questions without pictures, where nothing is compressed."""
    seconds: dict[str, float]


class Examiner:
    """Asks the questions of a suite in batches, and remembers in ``log`` what was answered."""

    def __init__(self, speaker: Speaker, suite: Suite, log: Log, batch: int, protocol: Protocol | None = None) -> None:
        self.speaker, self.suite, self._log = speaker, suite, log
        self.protocol = protocol or Protocol()
        if suite.prompted and self.protocol != Protocol():
            raise TrimError(f"{suite.name} brings its own prompts: leave the protocol {self.protocol.name} away")
        self.batches = suite.batches(batch)
        _ready(speaker)
        _check_words(speaker, suite)
        self.weights = fingerprint(speaker.model)
        self._name = f"{self.weights}-{setup(speaker)}"
        self._digests = Digests()
        self._inputs: tuple[int, BatchFeature] | None = None
        self._questions: dict[int, str] = {}

    def ask(self, cell: Cell, number: int) -> tuple[Row, bool]:
        """What ``cell`` says to batch ``number``, and whether it was asked now: else it is from the log.

        Questions without pictures are the same to every method: they have the plain model's answers.
        """
        cell = cell if self.batches[number][0].sources else Cell(PLAIN, None)
        small = cell.method == DOWNSAMPLED and follows_size(self.speaker.processor)
        method = load_method(PLAIN) if small else cell.load(number)
        spelled = method.to_dict() | ({} if cell.per == "image" else {"per": cell.per})
        spelled |= {DOWNSAMPLED: cell.keep} if small else {}
        key: Key = (self._name, json.dumps(spelled), cell.keep, self._digest(number))
        row = self._log.get(key)
        if row is not None:
            return row, False
        row = self._ask(method, cell, number, key)
        self._log.add(row)
        return row, True

    def _ask(self, method: Method, cell: Cell, number: int, key: Key) -> Row:
        items: Sequence[Item] = self.batches[number]
        ids = tuple(item.id for item in items)
        small = DOWNSAMPLED in json.loads(key[1])
        try:
            if small:
                speaker = boundless(self.speaker)
                items = shrunk(items, cell.keep, speaker.processor)
                inputs = encode(speaker, items, self.protocol)
            else:
                speaker, inputs = self.speaker, self._encoded(number)
            said = answers(speaker, items, inputs, method, self.max_new_tokens, self.protocol, cell.per)
        except TrimError as error:
            if cell.method == PLAIN:
                raise
            return Row(*key, ids, (), (), str(error), (), {})
        layers = () if said.run is None else said.run.report.per_layer
        # a smaller picture has at most as many tokens as the budget, in whole rows and columns
        error = "" if said.run is None or small else _off(said.run, cell.keep)
        return Row(*key, ids, said.texts, said.lengths, error, layers, said.seconds)

    def _encoded(self, number: int) -> BatchFeature:
        if self._inputs is None or self._inputs[0] != number:
            self._inputs = number, encode(self.speaker, self.batches[number], self.protocol)
        return self._inputs[1]

    @property
    def max_new_tokens(self) -> int:
        return self.protocol.max_new_tokens or self.suite.max_new_tokens

    def _digest(self, number: int) -> str:
        """Sixteen digits that tell batches apart: what is sent, about which pictures, how long answers may be."""
        if number not in self._questions:
            protocol, speaker = self.protocol, self.speaker
            asked = [
                (
                    item.id,
                    item.prompt or protocol.question(speaker, item),
                    protocol.guidance(speaker, item),
                    [self._digests.of(source) for source in item.sources],
                )
                for item in self.batches[number]
            ]
            how = (protocol.template, protocol.pad, self.max_new_tokens)
            self._questions[number] = hashlib.sha256(json.dumps([asked, how]).encode()).hexdigest()[:16]
        return self._questions[number]


@torch.inference_mode()
def answers(
    speaker: Speaker,
    items: Sequence[Item],
    inputs: BatchFeature,
    method: Method,
    max_new_tokens: int,
    protocol: Protocol | None = None,
    per: Per = "image",
) -> Said:
    """Greedy answers to a batch of questions, with pictures or without. Equal pictures are encoded once.

    The seconds of a model on the CPU are CPU seconds: other work on the machine hardly changes them.
    """
    model: Any = speaker.model
    protocol = protocol or Protocol()
    timer = time.process_time if model.device.type == "cpu" else time.perf_counter
    with Clock(model, timer) as clock:
        if not items[0].sources:
            run, output = None, model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        else:
            run = trim(
                model,
                method,
                question=[protocol.guidance(speaker, item) for item in items],
                text_tower=speaker.text_tower,
                processor=speaker.processor,
                per=per,
                remember=1,
                clock=clock,
            )
            with run:
                output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = speaker.processor.batch_decode(new, skip_special_tokens=True)
    return Said(tuple(text.strip() for text in texts), _lengths(speaker, new), run, clock.seconds)


def encode(speaker: Speaker, items: Sequence[Item], protocol: Protocol | None = None) -> BatchFeature:
    """Left-padded inputs for ``generate()``: the prompts of the items, or a template around pictures and question."""
    processor: Any = speaker.processor
    protocol = protocol or Protocol()
    _ready(speaker)
    pictures = [[protocol.shown(picture, processor) for picture in item.pictures()] for item in items]
    prompts = [protocol.prompt(speaker, item, len(shown)) for item, shown in zip(items, pictures, strict=True)]
    if None not in prompts:
        images = [picture for shown in pictures for picture in shown] or None
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    elif not getattr(processor, "chat_template", None):
        raise TrimError(f"the processor of {speaker.name} has no chat template, which builds the prompts of a batch")
    else:
        questions = [protocol.question(speaker, item) for item in items]
        inputs = processor.apply_chat_template(
            [_turn(shown, question) for shown, question in zip(pictures, questions, strict=True)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
    return inputs.to(speaker.model.device, speaker.model.dtype)


def _turn(pictures: Sequence[Image.Image], question: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def _ready(speaker: Speaker) -> None:
    """Let the tokenizer pad on the left, as ``generate()`` wants it."""
    tokenizer: Any = speaker.processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"


def _check_words(speaker: Speaker, suite: Suite) -> None:
    """Raise :class:`TrimError` where the suite's own prompts hold words that the model would read as padding."""
    tokenizer: Any = speaker.processor.tokenizer
    prompts = (item.prompt for item in suite.items if item.prompt is not None)
    words = dict.fromkeys(word for prompt in prompts for word in prompt.split())
    if tokenizer.unk_token_id is None or not words:
        return
    read = tokenizer([*words], add_special_tokens=False)["input_ids"]
    foreign = [word for word, ids in zip(words, read, strict=True) if tokenizer.unk_token_id in ids]
    if foreign:
        raise TrimError(
            f"{speaker.name} does not know {len(foreign)} words of {suite.name}, {foreign[0]!r} among them: give the "
            "--model that this suite is for, see visiontrim eval --help"
        )


def _lengths(speaker: Speaker, new: Int[Tensor, "batch tokens"]) -> tuple[int, ...]:
    """Tokens of each answer before its end."""
    ends = speaker.model.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends], device=new.device)
    return tuple((torch.isin(new, ends).cumsum(1) == 0).sum(1).tolist())


def _off(run: Run, keep: Amount | None) -> str:
    """What is wrong with the mean of tokens per layer, else "". Images of fewer tokens than the budget pass whole."""
    if not isinstance(keep, int):
        return ""
    parts = [list(group) for _, group in itertools.groupby(run.trace.images, key=lambda image: image.number)]
    wanted = [min(keep, sum(part.total + part.marks for part in image)) for image in parts]
    asked, mean = sum(wanted) / len(wanted), run.report.mean
    if abs(mean - asked) <= max(1.0, TOLERANCE * asked):
        return ""
    return f"it leaves a mean of {mean:.0f} vision tokens per layer where {asked:.0f} were asked for"
