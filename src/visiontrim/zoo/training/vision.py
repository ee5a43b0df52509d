"""Stage B: the vision tower learns the token space of the decoder, and with the text tower to match words and patches.

Losses, all on patches drawn so that every object is among them:

* projected features of the last layer but one equal the symbolic tokens: squared error, and cross-entropy against the
  words of each attribute; a linear head, thrown away afterwards, tells centre and radius of the object;
* in the joint space of the last layer: [CLS] matches the caption of its picture, a patch the phrase of its object, and
  the nouns and the end of a question their objects' patches.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from visiontrim.zoo.questions import WORDS
from visiontrim.zoo.scenes import GRID, PATCH, Scene
from visiontrim.zoo.training.joint_space import SCALE_LIMIT, joint_space
from visiontrim.zoo.training.loop import Result, Run, Stage, training_scene
from visiontrim.zoo.training.symbolic import ATTRIBUTES, PAD, WORD_ID, SceneFacts, symbolic_tokens, word_embeddings
from visiontrim.zoo.training.tower import look, new_clip, new_projector, patchify, project

OBJECT, CENTER, BACKGROUND = 1.0, 2.0, 0.12
"""Weights of patches in the losses of the token space."""
SHARPNESS, NO_CHARACTER = 7.0, 2.5
"""Logit of a word for a cosine of 1, and logit of no character at all."""


@dataclass(frozen=True, kw_only=True)
class VisionStage(Stage):
    """Everything that the weights of the towers and of the projector depend on."""

    steps: int = 1900
    peak_rate: float = 2e-3
    final_rate: float = 4e-5
    warmup: int = 60
    clip_norm: float = 2.0
    weight_decay: float = 0.03
    log_every: int = 50
    hidden: int = 192
    """Width of the decoder."""
    pool: int = 24_000
    """Training scenes; they come again when all were seen."""
    scenes: int = 32
    """Scenes a step that sees a part of the patches."""
    whole_scenes: int = 4
    """Scenes a step that sees all of them."""
    whole: float = 0.15
    """Share of such steps in the first half; in the second half three times as many."""
    patches: tuple[int, int] = (56, 96)
    """Seen of a scene: the first number in 70 % of the steps, else the second one."""
    text_every: int = 2
    """Every so many steps have the losses of the joint space."""


@functools.cache
def remembered(number: int) -> Scene:
    """A training scene, drawn once: 110 kB each."""
    return training_scene(number)


class VisionRun(Run):
    """Towers and projector in training."""

    def __init__(self, stage: VisionStage) -> None:
        self.settings = stage
        generator = torch.Generator().manual_seed(stage.seed)
        self.clip = new_clip(generator)
        self.projector = new_projector(stage.hidden, generator)
        self.geometry = nn.Linear(128, 3)
        nn.init.normal_(self.geometry.weight, std=0.05, generator=generator)
        nn.init.zeros_(self.geometry.bias)
        self.words = word_embeddings(stage.hidden)
        super().__init__(stage, {"clip": self.clip, "projector": self.projector, "geometry": self.geometry})

    def advance(self) -> Result:
        stage, step = self.settings, self.step
        rng = random.Random(f"{stage.seed} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        share = stage.whole * (1 if step < stage.steps / 2 else 3)
        whole = rng.random() < share
        count = stage.whole_scenes if whole else stage.scenes
        scenes = [remembered((step * stage.scenes + number) % stage.pool) for number in range(count)]
        facts = SceneFacts.of(scenes)
        tokens = GRID * GRID if whole else stage.patches[rng.random() > 0.7]
        score = torch.rand(facts.owner.shape, generator=generator) + 2 * (facts.owner > 0)
        patch = score.topk(tokens, dim=1).indices.sort(dim=1).values
        pixels = torch.stack(
            [torch.from_numpy(patchify(s.image)[p]) for s, p in zip(scenes, patch.numpy(), strict=True)]
        )

        states = look(self.clip.vision_model, pixels, patch)
        loss, values = self.token_space(facts, scenes, patch, states[-2][:, 1:])
        if step % stage.text_every == 0:
            more, found = joint_space(self.clip, rng, scenes, facts.owner.gather(1, patch), states[-1])
            loss, values = loss + more, values | found
        self.descend(loss)
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=SCALE_LIMIT)
        return Result({f"{name} of all" if whole else name: value for name, value in values.items()})

    def token_space(
        self,
        facts: SceneFacts,
        scenes: Sequence[Scene],
        patch: Int[Tensor, "scenes tokens"],
        features: Float[Tensor, "scenes tokens width"],
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of the projected features against the symbolic tokens, and what share of object patches is right."""
        wanted = symbolic_tokens(facts, patch, self.words)
        tokens = project(self.projector, features)
        shown, center = wanted.owner > 0, wanted.center
        weight = torch.where(center, CENTER, torch.where(shown, OBJECT, BACKGROUND))
        weight = weight / weight.sum()
        error = ((tokens - wanted.features).square().sum(dim=-1) * weight).sum()
        loss, values = 2 * error, {"error": error.item()}
        words = facts.words.gather(1, wanted.owner[..., None].expand(-1, -1, 3))
        for number, (name, choices) in enumerate(zip(("color", "kind", "character"), ATTRIBUTES, strict=True)):
            # the colour of background is "background", its kind none, like the character of a shape
            nothing = WORD_ID["background"] if name == "color" else PAD
            logits = SHARPNESS * tokens @ self.words[torch.cat([choices, torch.tensor([WORD_ID["background"]])])].T
            if name == "character":
                logits = torch.cat([logits[..., :-1], torch.full_like(logits[..., :1], NO_CHARACTER)], dim=-1)
            index = torch.full((len(WORDS),), -1)
            index[choices], index[nothing] = torch.arange(len(choices)), len(choices)
            target = index[words[..., number]]
            loss = (
                loss
                + (F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none") * weight.flatten()).sum()
            )
            told = target < len(choices)
            right = logits.argmax(dim=-1) == target
            values[name] = right[told].float().mean().item()
            values[f"{name} in centre"] = right[told & center].float().mean().item()
        marked = tokens @ self.words[WORD_ID["center"]] > 0.5
        values["centre"] = (marked == center)[shown].float().mean().item()

        place = torch.zeros(*facts.words.shape[:2], 3)
        for row, scene in enumerate(scenes):
            place[row, 1 : 1 + len(scene.objects)] = torch.tensor([(o.x, o.y, o.radius) for o in scene.objects])
        place = place.gather(1, wanted.owner[..., None].expand(-1, -1, 3))
        middle = PATCH * (torch.stack([patch % GRID, patch // GRID], dim=-1) + 0.5)
        place = torch.cat([place[..., :2] - middle, place[..., 2:]], dim=-1) / PATCH
        return loss + F.smooth_l1_loss(self.geometry(features)[shown], place[shown]), values
