"""Stage C: the decoder learns to read what the vision tower really writes.

The vision tower stays as it is; decoder and projector are trained, nothing guides their attention. A step sees all 576
patches, or the centre of every object with some of the other patches, always at their original positions. It never
sees patches that leave an object out: whoever is asked to count what cannot be seen unlearns to count.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPModel, LlamaForCausalLM

from visiontrim.zoo.scenes import GRID, Scene
from visiontrim.zoo.training.decoder import DecoderShape, answered, forward, new_decoder
from visiontrim.zoo.training.loop import Result, Run, Stage, training_scene
from visiontrim.zoo.training.packing import IGNORED, draw_questions, pack
from visiontrim.zoo.training.symbolic import SceneFacts, VisionTokens, choose_patches
from visiontrim.zoo.training.tower import look, new_clip, new_projector, patchify, project

PATCHES = GRID * GRID


@dataclass(frozen=True, kw_only=True)
class JointStage(Stage):
    """Everything that the weights depend on, besides the checkpoints of the first two stages."""

    steps: int = 300
    peak_rate: float = 1.2e-4
    final_rate: float = 5e-6
    warmup: int = 20
    shape: DecoderShape = field(default_factory=DecoderShape)
    first: int = 30_000
    """Number of the first training scene: none that stage A or B has seen."""
    pool: int = 2_400
    """Scenes; they come again when all were seen."""
    scenes: int = 16
    """Scenes a step that sees some of the patches."""
    whole_scenes: int = 5
    """Scenes a step that sees all of them."""
    whole: float = 0.3
    """Share of such steps."""
    fewest: int = 32
    most: int = 192
    text_tokens: int = 180


class Eyes:
    """The vision tower and the projector of a checkpoint of stage B."""

    def __init__(self, clip: CLIPModel, projector: nn.ModuleDict) -> None:
        self.clip, self.projector = clip, projector

    @classmethod
    def load(cls, checkpoint: Path, hidden: int) -> Eyes:
        generator = torch.Generator().manual_seed(0)
        eyes = cls(new_clip(generator), new_projector(hidden, generator))
        state = torch.load(checkpoint, weights_only=True)
        eyes.clip.load_state_dict(state["clip"])
        eyes.projector.load_state_dict(state["projector"])
        eyes.clip.requires_grad_(False)
        return eyes

    @torch.no_grad()
    def features(self, scenes: Sequence[Scene]) -> Float[Tensor, "scenes 576 width"]:
        """What the projector gets of every patch."""
        pixels = torch.stack([torch.from_numpy(patchify(scene.image).copy()) for scene in scenes])
        states = look(self.clip.vision_model, pixels, torch.arange(PATCHES).expand(len(scenes), -1))
        return states[-2][:, 1:]

    def see(self, scenes: Sequence[Scene], facts: SceneFacts, patch: Int[Tensor, "scenes tokens"]) -> VisionTokens:
        """The projected tokens of these patches."""
        return self.tokens(self.features(scenes), facts, patch)

    def tokens(
        self, features: Float[Tensor, "scenes 576 width"], facts: SceneFacts, patch: Int[Tensor, "scenes tokens"]
    ) -> VisionTokens:
        chosen = features.gather(1, patch[..., None].expand(-1, -1, features.shape[-1]))
        return VisionTokens(
            project(self.projector, chosen), patch, facts.owner.gather(1, patch), facts.center.gather(1, patch)
        )


POLISH = JointStage(steps=600, peak_rate=1e-4, final_rate=3e-6, first=50_000, pool=4_800, whole=0.5, seed=1)
"""The second part: on other scenes, and all patches in every other step, which is what counting needs most."""


class JointRun(Run):
    """Decoder and projector in training on pixels; ``start`` is a checkpoint of stage A, or of an earlier such run."""

    def __init__(self, stage: JointStage, start: Path, vision: Path) -> None:
        self.settings = stage
        state = torch.load(start, weights_only=True)
        self.model: LlamaForCausalLM = new_decoder(stage.shape, torch.Generator().manual_seed(0))
        self.model.load_state_dict(state["model"])
        self.eyes = Eyes.load(vision, stage.shape.hidden)
        if "projector" in state:
            self.eyes.projector.load_state_dict(state["projector"])
        self.seen = functools.cache(self._look)
        super().__init__(stage, {"model": self.model, "projector": self.eyes.projector})

    def _look(self, number: int) -> tuple[Scene, Tensor]:
        scene = training_scene(self.settings.first + number)
        return scene, self.eyes.features([scene])[0].half()

    def advance(self) -> Result:
        stage = self.settings
        rng = random.Random(f"{stage.seed} {self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        whole = rng.random() < stage.whole
        tokens = PATCHES if whole else round(stage.fewest * (stage.most / stage.fewest) ** rng.random())
        count = stage.whole_scenes if whole else stage.scenes
        scenes, features = zip(
            *(self.seen((self.step * stage.scenes + number) % stage.pool) for number in range(count)), strict=True
        )
        facts = SceneFacts.of(scenes)
        patch = choose_patches(facts, tokens, generator)
        packed = pack([draw_questions(rng, scene.objects, stage.text_tokens) for scene in scenes])

        run = forward(self.model, self.eyes.tokens(torch.stack(features).float(), facts, patch), packed)
        loss = F.cross_entropy(run.logits.flatten(0, 1), packed.labels.flatten(), ignore_index=IGNORED)
        self.descend(loss)
        return Result.of({"loss of all" if whole else "loss": loss.item()}, packed, answered(run.logits, packed))
