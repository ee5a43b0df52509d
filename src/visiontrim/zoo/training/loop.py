"""What all stages of training share: a loop whose every step depends on nothing but the seed and its number.

A directory holds ``settings.json``, ``checkpoint.pt`` and ``log.jsonl``, a line every few steps. A run that was stopped
goes on when it is started again, and ends with the same weights, bit for bit on the same machine, as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visiontrim.zoo.natural_questions import MORE_TYPES
from visiontrim.zoo.questions import TYPES
from visiontrim.zoo.scenes import HARD, STANDARD, Scene, World, draw_scene
from visiontrim.zoo.training.packing import Packed
from visiontrim.zoo.video import MOTION_TYPES

BETAS = (0.9, 0.98)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Settings that every stage has; the weights depend on them and nothing else."""

    steps: int
    peak_rate: float
    final_rate: float
    warmup: int = 50
    clip_norm: float = 1.0
    weight_decay: float = 0.05
    log_every: int = 25
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return min(1.0, (step + 1) / self.warmup) * (self.final_rate + (self.peak_rate - self.final_rate) * cosine)


@dataclass(frozen=True, slots=True)
class Result:
    """What one step was like."""

    values: dict[str, float]
    """Losses and other numbers; a name that does not occur in a step is left out of its mean."""
    right: Counter[str] = field(default_factory=Counter)
    """Questions of each type that were answered rightly."""
    total: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, values: dict[str, float], packed: Packed, answered: list[list[bool]]) -> Result:
        result = cls(values)
        for asked, row in zip(packed.questions, answered, strict=True):
            for question, right in zip(asked, row, strict=True):
                result.right[question.type] += right
                result.total[question.type] += 1
        return result


class Run(ABC):
    """Something in training: its modules, its optimizer, and how many steps are done."""

    def __init__(self, stage: Stage, modules: dict[str, nn.Module]) -> None:
        self.stage = stage
        self.modules = modules
        self.step = 0
        self.weights = [w for module in modules.values() for w in module.parameters() if w.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [w for w in self.weights if w.ndim > 1], "weight_decay": stage.weight_decay},
            {"params": [w for w in self.weights if w.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=stage.peak_rate, betas=BETAS, fused=True)

    @abstractmethod
    def advance(self) -> Result:
        """One step."""

    def descend(self, loss: torch.Tensor) -> None:
        """Step of the optimizer down the gradient of ``loss``."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, self.stage.clip_norm)
        self.optimizer.step()
        self.step += 1

    def save(self, path: Path) -> None:
        """Write a checkpoint; one that is there already is replaced when the new one is whole."""
        state = {"step": self.step, "optimizer": self.optimizer.state_dict()}
        state |= {name: module.state_dict() for name, module in self.modules.items()}
        whole = path.with_suffix(".new")
        torch.save(state, whole)
        os.replace(whole, path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        for name, module in self.modules.items():
            module.load_state_dict(state[name])


def train(run: Run, directory: Path, minutes: float = math.inf) -> Iterator[dict[str, Any]]:
    """Train in ``directory``, go on where a run was stopped, and yield the lines of the log as they are written.

    Stops at the first checkpoint after ``minutes``; the learning rate follows ``stage.steps`` alone. Raises ValueError
    if a run with other settings is in ``directory``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint, log, settings = (directory / name for name in ("checkpoint.pt", "log.jsonl", "settings.json"))
    stage = run.stage
    text = json.dumps(asdict(stage), indent=1) + "\n"
    if checkpoint.exists():
        if settings.read_text() != text:
            raise ValueError(f"{directory} holds a run with other settings, see {settings}: give another directory")
        run.restore(checkpoint)
    settings.write_text(text)
    # a run that was killed between log and checkpoint has a line too many
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= run.step))

    deadline = time.monotonic() + 60 * minutes
    while run.step < stage.steps:
        since = time.monotonic()
        results = [run.advance() for _ in range(min(stage.log_every, stage.steps - run.step))]
        seconds = round(time.monotonic() - since, 1)
        line = {"step": run.step, "seconds": seconds, "rate": stage.rate(run.step - 1), **summary(results)}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        run.save(checkpoint)
        yield line
        if time.monotonic() > deadline:
            return


def summary(results: Iterable[Result]) -> dict[str, Any]:
    """Means of the values, and the accuracy of each type of question."""
    values: dict[str, list[float]] = {}
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for result in results:
        right.update(result.right)
        total.update(result.total)
        for name, value in result.values.items():
            values.setdefault(name, []).append(value)
    means = {name: round(sum(found) / len(found), 5) for name, found in values.items()}
    accuracy = {
        type: round(right[type] / total[type], 4) for type in (*TYPES, *MORE_TYPES, *MOTION_TYPES) if total[type]
    }
    return means | ({"accuracy": accuracy} if accuracy else {})


def training_world(number: int) -> World:
    """The world of a training scene: three in ten are hard."""
    return HARD if number % 10 in (3, 6, 9) else STANDARD


def training_scene(number: int) -> Scene:
    """Scene ``number`` of the training set; its seed is its number."""
    return draw_scene(number, training_world(number))
