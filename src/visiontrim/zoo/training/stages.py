"""Stage A: the decoder on symbolic tokens, first on the basics, then twice on everything."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from visiontrim.zoo.scenes import GRID, draw_scene
from visiontrim.zoo.training.decoder import DecoderShape, answered, forward, new_decoder
from visiontrim.zoo.training.loop import Result, Run, Stage, training_scene
from visiontrim.zoo.training.packing import IGNORED, draw_questions, pack
from visiontrim.zoo.training.scaffold import Placement, Scaffold, hops, references
from visiontrim.zoo.training.symbolic import SceneFacts, choose_patches, symbolic_tokens

PLACEMENT = Placement(bind=0, find=3, count=4, answer=5, hop=6)  # one layer is left to work on what was retrieved


@dataclass(frozen=True, kw_only=True)
class DecoderStage(Stage):
    """Everything that the weights of the decoder depend on, besides those that it starts from."""

    steps: int = 280
    peak_rate: float = 8e-4
    final_rate: float = 3e-5
    warmup: int = 30
    shape: DecoderShape = field(default_factory=DecoderShape)
    placement: Placement = PLACEMENT
    basic: bool = False
    """Standard scenes, single questions of one step."""
    scenes: int = 16
    """Scenes a step; step n draws those with the numbers from n * scenes on."""
    fewest: int = 32
    """Vision tokens of a scene: between ``fewest`` and twice as many at first, later up to ``most``, at times all."""
    most: int = 192
    all_tokens: float = 0.1
    """Share of the steps in the second half that see every patch, of a third of the scenes."""
    text_tokens: int = 180
    """Words of questions and answers behind each image."""
    scaffold: float = 0.5
    """Weight of the scaffold's loss beside the one of the answers."""
    unguided: float = 0.25
    """Share of the steps, the last ones, without it; it falls for a fifth of the steps before."""

    def guidance(self, step: int) -> float:
        """Weight of the scaffold at this step."""
        return self.scaffold * min(1.0, max(0.0, (1 - self.unguided - step / self.steps) / 0.2))

    def vision_tokens(self, step: int, rng: random.Random) -> int:
        """Number of vision tokens at this step."""
        done = step / self.steps
        if done >= 0.5 and rng.random() < self.all_tokens:
            return GRID * GRID
        most = min(self.most, 2 * self.fewest) if done < 0.35 else self.most
        return round(self.fewest * (most / self.fewest) ** rng.random())


BASICS = DecoderStage(
    steps=680,
    peak_rate=2e-3,
    final_rate=4e-5,
    warmup=50,
    basic=True,
    most=32,
    all_tokens=0.0,
    text_tokens=148,
    unguided=-0.2,
)
"""The first part: it learns to find, count and answer, guided to the end."""
LONGER = DecoderStage(steps=1000, final_rate=2e-5, seed=1)
"""The third part: as the second one on other questions, with a rate that falls further."""


class DecoderRun(Run):
    """A decoder in training, with its scaffold; ``start`` is the checkpoint of an earlier run."""

    def __init__(self, stage: DecoderStage, start: Path | None = None) -> None:
        generator = torch.Generator().manual_seed(stage.seed)
        self.settings = stage
        self.model: LlamaForCausalLM = new_decoder(stage.shape, generator)
        self.scaffold = Scaffold(stage.placement, stage.shape.hidden)
        nn.init.normal_(self.scaffold.probe.weight, std=0.05, generator=generator)
        nn.init.zeros_(self.scaffold.probe.bias)
        if start is not None:
            state = torch.load(start, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.scaffold.load_state_dict(state["scaffold"])
        super().__init__(stage, {"model": self.model, "scaffold": self.scaffold})

    def advance(self) -> Result:
        stage = self.settings
        rng = random.Random(f"{stage.seed} {self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        tokens = stage.vision_tokens(self.step, rng)
        count = stage.scenes if tokens <= stage.most else max(1, stage.scenes // 3)
        numbers = range(self.step * stage.scenes, self.step * stage.scenes + count)
        scenes = [draw_scene(number) if stage.basic else training_scene(number) for number in numbers]
        asked = [draw_questions(rng, scene.objects, stage.text_tokens, stage.basic) for scene in scenes]
        packed = pack(asked)
        facts = SceneFacts.of(scenes)
        patches = choose_patches(facts, tokens, generator)
        vision = symbolic_tokens(facts, patches, self.model.model.embed_tokens.weight, noise=generator)

        run = forward(self.model, vision, packed)
        answers = F.cross_entropy(run.logits.flatten(0, 1), packed.labels.flatten(), ignore_index=IGNORED)
        values, loss = {"loss": answers.item()}, answers
        if weight := stage.guidance(self.step):
            objects = [scene.objects for scene in scenes]
            refs, jumps = references(packed, objects), hops(packed, objects)
            guided = self.scaffold(self.model.model.layers, run.states, run.mask, run.rotary, vision, refs, jumps)
            values["scaffold"], loss = guided.item(), answers + weight * guided
        self.descend(loss)
        return Result.of(values, packed, answered(run.logits, packed))
