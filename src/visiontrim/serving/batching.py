"""Requests answered in batches by one model: those that agree in method and budget go together.

One thread owns the model. Every row has its own question, sampling, seed, stops and end, so what it says does not
depend on what it is batched with. Batches are static: a row that waits enters with the next one. Knows no HTTP.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from visiontrim.ask import Speaker
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method
from visiontrim.evaluate.asking import encode
from visiontrim.evaluate.items import Item
from visiontrim.run import Run, trim

HALF = "\ufffd"
"""What a tokenizer gives for a part of a character."""


@dataclass(frozen=True)
class Done:
    """The end of an answer."""

    reason: str
    """``"stop"``: its end token or one of its stops; ``"length"``."""
    prompt_tokens: int
    """Without compression."""
    answer_tokens: int
    report: dict[str, Any] | None
    """The method, and the ``tokens`` of each image and how many were ``kept``; None without images."""


@dataclass(frozen=True)
class Failed:
    """Why there is no answer."""

    text: str
    fault: bool
    """Whether it is the server's, not the request's."""


@dataclass(eq=False)
class Job:
    """A request."""

    prompt: str
    images: list[Image.Image]
    question: str
    """What guides the method."""
    method: Method | None
    """None where there are no images."""
    max_new_tokens: int
    tell: Callable[[str | Done | Failed], None]
    """Takes pieces of text as they come, and then the end; called in the thread of the model."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set by whoever no longer waits; its row then ends."""


class FullError(Exception):
    """As many requests wait as may."""


class Batcher:
    """A model and the queue before it.

    Args:
        speaker: the model; nobody else may use it.
        max_batch: rows that are answered at once.
        max_waiting: rows that may wait beyond these; more are refused with :class:`FullError`.
        max_prompt: tokens of a prompt, uncompressed; longer ones fail.
        gather: seconds that the first row of a batch waits for others.
    """

    def __init__(
        self, speaker: Speaker, max_batch: int = 8, max_waiting: int = 64, max_prompt: int = 8192, gather: float = 0.005
    ) -> None:
        self.speaker, self.max_batch, self.max_prompt, self._gather = speaker, max_batch, max_prompt, gather
        self._jobs: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self._closed = False
        self.on_batch: Callable[[int], None] = lambda rows: None
        """Told the size of every batch."""
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Raises :class:`FullError`."""
        if self._closed:
            raise FullError
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise FullError from None

    def close(self, patience: float = 60.0) -> None:
        """Answer what waits, and end."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join(patience)

    def _work(self) -> None:
        held: list[Job] = []  # taken from the queue, for another method than the batch before
        ending = False
        while held or not ending:
            if not held and (job := self._jobs.get()) is not None:
                held.append(job)
            elif not held:
                return
            until = time.monotonic() + self._gather
            while not ending and sum(job.method == held[0].method for job in held) < self.max_batch:
                if len(held) >= 4 * self.max_batch:
                    break
                try:
                    job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                ending = job is None
                held += [job] if job is not None else []
            batch = [job for job in held if job.method == held[0].method][: self.max_batch]
            held = [job for job in held if job not in batch]
            self._answer([job for job in batch if not job.cancelled.is_set()])

    def _answer(self, batch: list[Job]) -> None:
        if not batch:
            return
        ends = _ends(self.speaker.model)
        rows = [_Row(job, self.speaker.processor.tokenizer, ends) for job in batch]
        try:
            self._generate(rows)
        except Exception as error:
            fault = not isinstance(error, TrimError)
            text = f"{type(error).__name__}: {' '.join(str(error).split())}" if fault else str(error)
            for row in rows:
                if len(batch) > 1 and not row.sent:  # whose fault is it?
                    self._answer([row.job])
                else:
                    row.job.tell(Failed(text, fault))

    @torch.inference_mode()
    def _generate(self, rows: list[_Row]) -> None:
        model: Any = self.speaker.model
        batch = [row.job for row in rows]
        items = [Item(0, "", tuple(job.images), job.question, (), "", job.prompt) for job in batch]
        inputs = encode(self.speaker, items)
        lengths = inputs["attention_mask"].sum(1).tolist()
        if (longest := max(lengths)) > self.max_prompt:
            raise TrimError(f"the prompt has {longest:,} tokens, but at most {self.max_prompt:,} are read: shorten it")
        self.on_batch(len(batch))
        options = {
            "max_new_tokens": max(job.max_new_tokens for job in batch),
            "do_sample": False,  # rows that sample draw by themselves
            "stopping_criteria": StoppingCriteriaList([_Stopping(rows)]),
            "logits_processor": LogitsProcessorList([_Drawing(batch)]),
        }
        run = None
        if batch[0].method is None:
            model.generate(**inputs, **options)
        else:
            run = trim(
                model,
                batch[0].method,
                question=[job.question for job in batch] if all(job.question.strip() for job in batch) else None,
                text_tower=self.speaker.text_tower,
                processor=self.speaker.processor,
            )
            with run:
                model.generate(**inputs, **options)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            row.finish(int(length), None if run is None else _report(run, number))


class _Row:
    """One answer on its way."""

    def __init__(self, job: Job, tokenizer: Any, ends: set[int]) -> None:
        self.job, self._tokenizer, self._ends = job, tokenizer, ends
        self._tokens: list[int] = []
        self.sent = 0
        """Characters that were told."""
        self.reason: str | None = None
        self._held = max(map(len, job.stops), default=1) - 1  # characters that may be the beginning of a stop

    def add(self, token: int) -> None:
        if self.reason is not None:
            return
        if self.job.cancelled.is_set():
            self.reason = "stop"
            return
        if token in self._ends:
            self.reason = "stop"
        else:
            self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True).lstrip()
        found = [place for stop in self.job.stops if (place := text.find(stop)) >= 0]
        if found:
            text, self.reason = text[: min(found)], "stop"
        elif self.reason is None and len(self._tokens) >= self.job.max_new_tokens:
            self.reason = "length"
        if self.reason is None:
            text = text.rstrip(HALF)
            text = text[: len(text) - self._held] if self._held else text
        if len(text) > self.sent:
            self.job.tell(text[self.sent :])
            self.sent = len(text)

    def finish(self, prompt_tokens: int, report: dict[str, Any] | None) -> None:
        self.job.tell(Done(self.reason or "length", prompt_tokens, len(self._tokens), report))


class _Stopping(StoppingCriteria):
    """Hands each row its tokens, and ends rows one by one."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.add(token)
        return torch.tensor([row.reason is not None for row in self._rows], device=input_ids.device)


class _Drawing(LogitsProcessor):
    """Draws the next token of every row that samples, with a generator of its own, and leaves no other choice."""

    def __init__(self, batch: Sequence[Job]) -> None:
        self._rows = [
            (row, job.temperature, job.top_p, _generator(job.seed))
            for row, job in enumerate(batch)
            if job.temperature > 0
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone() if self._rows else scores
        for row, temperature, top, generator in self._rows:
            chances, order = (scores[row].float().cpu() / temperature).softmax(-1).sort(descending=True)
            chances[chances.cumsum(-1) - chances >= top] = 0.0  # the first that reach ``top`` together stay
            token = order[torch.multinomial(chances, 1, generator=generator)]
            scores[row] = -torch.inf
            scores[row, token] = 0.0
        return scores


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)
    return generator


def _ends(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _report(run: Run, row: int) -> dict[str, Any]:
    images: dict[int, list[int]] = {}
    for image in run.trace.images:
        if image.sample == row:
            count = images.setdefault(image.number, [0, 0])
            count[0] += image.total + image.marks
            count[1] += image.entered
    counts = [{"tokens": tokens, "kept": kept} for tokens, kept in images.values()]
    return {"method": str(run.method), "images": counts}
