"""Where the time of a generate() goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from visiontrim.models.family import family_of

PARTS = ("vision", "method", "prefill", "decode")


class Clock:
    """Times the parts of what runs inside its context, each without the parts inside it.

    ``vision`` is the encoder and the projector, ``prefill`` every forward of more than one token, ``decode`` those of
    one token, ``method`` what a run does that was opened with ``clock=clock``; ``total`` is the whole context. On CUDA
    borders are events in the stream and nothing waits for them; other accelerators are synchronised at every border.
    ``timer`` gives seconds elsewhere: ``time.process_time`` makes them CPU seconds, which other work on the machine
    hardly changes.

    ::

        with Clock(model) as clock, vt.trim(model, keep=64, clock=clock):
            model.generate(**inputs)
        print(clock.seconds)
    """

    def __init__(self, model: PreTrainedModel, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self._family = family_of(model)
        self._device = model.device
        self._hooks: list = []
        self._stack: list[tuple[str, Any]] = []
        self._spans: list[tuple[str, Any, Any]] = []

    @property
    def seconds(self) -> dict[str, float]:
        """Of every part and of the ``total``, so far. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = dict.fromkeys((*PARTS, "total"), 0.0)
        for part, start, end in self._spans:
            seconds[part] += start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
        return seconds

    def __enter__(self) -> Clock:
        family = self._family
        modules = {family.encoder(kind) for kind in family.kinds}
        for module in modules if family.projector is None else modules | {family.projector}:
            self._time(module, lambda kwargs, args: "vision")
        self._time(family.model, _phase)
        self._began = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self._spans.append(("total", self._began, self._now()))
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._start(part)
        try:
            yield
        finally:
            self._stop()

    def _time(self, module: torch.nn.Module, part) -> None:
        def start(module, args, kwargs):
            self._start(part(kwargs, args))

        self._hooks.append(module.register_forward_pre_hook(start, with_kwargs=True, prepend=True))
        self._hooks.append(module.register_forward_hook(lambda *_: self._stop(), always_call=True))

    def _start(self, part: str) -> None:
        now = self._now()
        if self._stack:
            self._spans.append((*self._stack[-1], now))
        self._stack.append((part, now))

    def _stop(self) -> None:
        now = self._now()
        self._spans.append((*self._stack.pop(), now))
        if self._stack:
            self._stack[-1] = (self._stack[-1][0], now)

    def _now(self) -> Any:
        """A moment: an event on CUDA, seconds elsewhere."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        if self._device.type != "cpu" and hasattr(torch, self._device.type):
            getattr(torch, self._device.type).synchronize(self._device)
        return self._timer()


def _phase(kwargs: dict, args: tuple) -> str:
    ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
    return "prefill" if ids is not None and ids.shape[1] > 1 else "decode"
