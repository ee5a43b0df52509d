"""Decoding steps of two ways in turn: what it takes to see half a percent of a step on a machine that others use too.

Two calls of ``generate()``, each in a thread and on a model of its own that shares its weights with the other, take
turns after every token, so that whatever slows the machine down slows both. It knows when a step begins and ends; it
does not know what is done in one.
"""

from __future__ import annotations

import copy
import functools
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, StoppingCriteria

DRAWS = 1_000
"""Of the bootstrap."""


def twin(model: PreTrainedModel) -> Any:
    """A copy of ``model`` that shares its parameters and buffers: modules and hooks are its own."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


class _Turns(StoppingCriteria):
    """Asked by ``generate()`` after every token, where it waits for its turn. Never stops anything."""

    def __init__(self, own: threading.Semaphore, other: threading.Semaphore, device: torch.device) -> None:
        self._own, self._other, self._device = own, other, device
        self._began: tuple[float, float] | None = None
        self.steps: list[tuple[float, float]] = []
        """(wall, CPU) seconds of every step after the first token."""
        self.alone = False
        """Whether the other has ended, and nobody is there to give the turn back."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        now = self._now()
        if self._began is not None:
            self.steps.append((now[0] - self._began[0], now[1] - self._began[1]))
        self._other.release()
        if not self.alone:
            self._own.acquire()
        self._began = self._now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()


Answering = Callable[[StoppingCriteria], object]
"""Calls ``generate()`` with a stopping criterion."""


def in_turn(first: Answering, second: Answering, device: torch.device) -> np.ndarray:
    """Seconds [steps, 2 ways, (wall, CPU)] of the steps of two answers as long as each other.

    Raises what either raises.
    """
    semaphores = threading.Semaphore(0), threading.Semaphore(0)
    turns = [_Turns(own, other, device) for own, other in (semaphores, semaphores[::-1])]
    errors: list[BaseException] = []

    def answer(way: Answering, number: int) -> None:
        semaphores[number].acquire()
        try:
            with torch.inference_mode():
                way(turns[number])
        except BaseException as error:  # of a thread, which nobody else hears
            errors.append(error)
        finally:
            turns[1 - number].alone = True
            semaphores[1 - number].release()  # it may wait already

    threads = [threading.Thread(target=answer, args=(way, number)) for number, way in enumerate((first, second))]
    for thread in threads:
        thread.start()
    semaphores[0].release()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return np.array([turn.steps for turn in turns]).transpose(1, 0, 2)


def ratio(orders: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """[2.5 %, middle, 97.5 %] of second / first by ``wall`` and ``cpu``, over orders in which the copies were swapped.

    ``orders`` are arrays [steps, (first, second), (wall, CPU)]. The middle of an order is its median over the steps,
    that of all the geometric mean over orders, in which what a copy alone makes cancels out; the interval is a
    bootstrap over steps.
    """
    drawn = np.random.default_rng(0)
    told = {}
    for number, name in enumerate(("wall", "cpu")):
        logs = [np.log(steps[:, 1, number] / steps[:, 0, number]) for steps in orders]
        middle = np.mean([np.median(log) for log in logs])
        draws = [np.median(log[drawn.integers(0, len(log), (DRAWS, len(log)))], axis=1) for log in logs]
        low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
        told[name] = [float(np.exp(value)) for value in (low, middle, high)]
    return told


Way = Callable[[Any, StoppingCriteria], object]
"""Answers with a model and a stopping criterion for ``generate()``."""


def compare(
    ways: Mapping[str, Way], pairs: Sequence[tuple[str, str]], model: Any, rounds: int
) -> list[dict[str, list[float]]]:
    """For every pair of names of ``ways`` the :func:`ratio` of the second one's step to the first one's.

    A pair of a way with itself is the noise floor. Each is answered ``rounds`` times on ``model`` and on its twin.
    """
    copies = model, twin(model)
    found = []
    for first, second in pairs:
        orders = []
        for one, other in (copies, copies[::-1]):
            answers = functools.partial(ways[first], one), functools.partial(ways[second], other)
            orders.append(np.concatenate([in_turn(*answers, model.device) for _ in range(rounds)]))
        found.append(ratio(orders))
    return found
