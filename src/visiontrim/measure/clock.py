"""Where the time of a generate() goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from visiontrim.models.family import family_of

PARTS = ("vision", "method", "prefill", "decode")


class Clock:
    """Times the parts of what runs inside its context, each without the parts inside it.

    ``vision`` is the encoder and the projector, ``prefill`` every forward of more than one token, ``decode`` those of
    one token, ``method`` what a run does that was opened with ``clock=clock``; ``total`` is the whole context. The
    device is synchronised at every border, so a timed run is slower than an untimed one.

    ::

        with Clock(model) as clock, vt.trim(model, keep=64, clock=clock):
            model.generate(**inputs)
        print(clock.seconds)
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._family = family_of(model)
        self._device = model.device
        self._hooks: list = []
        self._stack: list[tuple[str, float]] = []
        self.seconds: dict[str, float] = dict.fromkeys((*PARTS, "total"), 0.0)

    def __enter__(self) -> Clock:
        family = self._family
        modules = {family.encoder(kind) for kind in family.kinds}
        for module in modules if family.projector is None else modules | {family.projector}:
            self._time(module, lambda kwargs, args: "vision")
        self._time(family.model, _phase)
        self._began = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds["total"] += self._now() - self._began
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
            outer, since = self._stack[-1]
            self.seconds[outer] += now - since
        self._stack.append((part, now))

    def _stop(self) -> None:
        now = self._now()
        part, since = self._stack.pop()
        self.seconds[part] += now - since
        if self._stack:
            self._stack[-1] = (self._stack[-1][0], now)

    def _now(self) -> float:
        if self._device.type != "cpu" and hasattr(torch, self._device.type):
            getattr(torch, self._device.type).synchronize(self._device)
        return time.perf_counter()


def _phase(kwargs: dict, args: tuple) -> str:
    ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
    return "prefill" if ids is not None and ids.shape[1] > 1 else "decode"
