"""Stage A, the decoder on symbolic tokens: a loop whose every step depends on nothing but the seed and its number.

A directory holds ``settings.json``, ``checkpoint.pt`` and ``log.jsonl``, a line every few steps. A run that was stopped
goes on when it is started again, and ends with the same weights, bit for bit on the same machine, as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from visiontrim.zoo.questions import TYPES
from visiontrim.zoo.scenes import draw_scene
from visiontrim.zoo.training.decoder import DecoderShape, answered, forward, new_decoder
from visiontrim.zoo.training.packing import IGNORED, Packed, draw_questions, pack
from visiontrim.zoo.training.scaffold import Placement, Scaffold, references
from visiontrim.zoo.training.symbolic import SceneFacts, choose_patches, symbolic_tokens

CLIP_NORM = 1.0
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.98)
PLACEMENT = Placement(bind=0, find=3, count=4, answer=5)  # two layers are left to work on what was retrieved


@dataclass(frozen=True)
class DecoderStage:
    """Everything that the weights depend on."""

    shape: DecoderShape = field(default_factory=DecoderShape)
    placement: Placement = PLACEMENT
    steps: int = 800
    scenes: int = 16
    """Scenes a step; step n draws those of the seeds from n * scenes on."""
    vision_tokens: int = 32
    text_tokens: int = 148
    """Words of questions and answers behind each image."""
    scaffold: float = 0.5
    """Weight of the scaffold's loss beside the one of the answers."""
    peak_rate: float = 2e-3
    final_rate: float = 4e-5
    warmup: int = 50
    log_every: int = 25
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return min(1.0, (step + 1) / self.warmup) * (self.final_rate + (self.peak_rate - self.final_rate) * cosine)


class Run:
    """A decoder in training: model, scaffold, optimizer, and how many steps are done."""

    def __init__(self, stage: DecoderStage) -> None:
        self.stage = stage
        generator = torch.Generator().manual_seed(stage.seed)
        self.model: LlamaForCausalLM = new_decoder(stage.shape, generator)
        self.scaffold = Scaffold(stage.placement, stage.shape.hidden)
        nn.init.normal_(self.scaffold.probe.weight, std=0.05, generator=generator)
        nn.init.zeros_(self.scaffold.probe.bias)
        self.weights = [
            weight for weight in (*self.model.parameters(), *self.scaffold.parameters()) if weight.requires_grad
        ]
        groups: list[dict[str, Any]] = [
            {"params": [weight for weight in self.weights if weight.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [weight for weight in self.weights if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=stage.peak_rate, betas=BETAS, fused=True)
        self.step = 0

    def advance(self) -> tuple[float, float, Packed, list[list[bool]]]:
        """One step; the losses of the answers and of the scaffold, the questions, and which were answered rightly."""
        stage = self.stage
        rng = random.Random(f"{stage.seed} {self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        scenes = [draw_scene(self.step * stage.scenes + number) for number in range(stage.scenes)]
        packed = pack([draw_questions(rng, scene.objects, stage.text_tokens) for scene in scenes])
        facts = SceneFacts.of(scenes)
        patches = choose_patches(facts, stage.vision_tokens, generator)
        embeddings = self.model.model.embed_tokens.weight
        vision = symbolic_tokens(facts, patches, embeddings, noise=generator)

        run = forward(self.model, vision, packed)
        answers = F.cross_entropy(run.logits.flatten(0, 1), packed.labels.flatten(), ignore_index=IGNORED)
        refs = references(packed, [scene.objects for scene in scenes])
        guided = self.scaffold(self.model.model.layers, run.states, run.mask, run.rotary, vision, refs)

        for group in self.optimizer.param_groups:
            group["lr"] = stage.rate(self.step)
        self.optimizer.zero_grad()
        (answers + stage.scaffold * guided).backward()
        nn.utils.clip_grad_norm_(self.weights, CLIP_NORM)
        self.optimizer.step()
        self.step += 1
        return answers.item(), guided.item(), packed, answered(run.logits, packed)

    def save(self, path: Path) -> None:
        """Write a checkpoint; one that is there already is replaced when the new one is whole."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "scaffold": self.scaffold.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        whole = path.with_suffix(".new")
        torch.save(state, whole)
        os.replace(whole, path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.scaffold.load_state_dict(state["scaffold"])
        self.optimizer.load_state_dict(state["optimizer"])


def train(stage: DecoderStage, directory: Path, minutes: float = math.inf) -> Iterator[dict[str, Any]]:
    """Train in ``directory``, go on where a run was stopped, and yield the lines of the log as they are written.

    Stops at the first checkpoint after ``minutes``; the learning rate follows ``stage.steps`` alone. Raises ValueError
    if a run with other settings is in ``directory``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint, log, settings = (directory / name for name in ("checkpoint.pt", "log.jsonl", "settings.json"))
    text = json.dumps(asdict(stage), indent=1) + "\n"
    run = Run(stage)
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
        losses, guides = [], []
        right: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for _ in range(min(stage.log_every, stage.steps - run.step)):
            loss, guide, packed, results = run.advance()
            losses.append(loss)
            guides.append(guide)
            for asked, row in zip(packed.questions, results, strict=True):
                for question, is_right in zip(asked, row, strict=True):
                    right[question.type] += is_right
                    total[question.type] += 1
        line = {
            "step": run.step,
            "scenes": run.step * stage.scenes,
            "seconds": round(time.monotonic() - since, 1),
            "rate": stage.rate(run.step - 1),
            "loss": sum(losses) / len(losses),
            "scaffold": sum(guides) / len(guides),
            "accuracy": {type: round(right[type] / total[type], 4) for type in TYPES if total[type]},
        }
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        run.save(checkpoint)
        yield line
        if time.monotonic() > deadline:
            return
