"""Stage B: the vision tower learns the token space of the decoder, and with the text tower to match words and patches.

Losses, all on patches drawn so that every object is among them:

* projected features of the last layer but one equal the symbolic tokens: squared error, and cross-entropy against the
  words of each attribute; a linear head, thrown away afterwards, tells centre and radius of the object;
* in the joint space of the last layer: [CLS] matches the caption of its picture, a patch the phrase of its object, and
  the nouns and the end of a question their objects' patches.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from visiontrim.zoo.questions import TYPES, WORDS, ask
from visiontrim.zoo.scenes import COLORS, DIGITS, GRID, LETTERS, PATCH, SHAPES, Object, Scene
from visiontrim.zoo.training.loop import Result, Run, Stage, training_scene
from visiontrim.zoo.training.scaffold import named, nouns_of
from visiontrim.zoo.training.symbolic import ATTRIBUTES, PAD, WORD_ID, SceneFacts, symbolic_tokens, word_embeddings
from visiontrim.zoo.training.tower import TEXT_LENGTH, look, new_clip, new_projector, patchify, project, read_texts

PHRASES = (
    *(f"a {color} {shape}" for color in COLORS for shape in SHAPES),
    *(f"a {color} digit {digit}" for color in COLORS for digit in DIGITS),
    *(f"a {color} letter {letter}" for color in COLORS for letter in LETTERS),
)
"""Every object by its name."""
OBJECT, CENTER, BACKGROUND = 1.0, 2.0, 0.12
"""Weights of patches in the losses of the token space."""
SHARPNESS, NO_CHARACTER = 7.0, 2.5
"""Logit of a word for a cosine of 1, and logit of no character at all."""
CANDIDATES = 100
"""Phrases that a patch is told apart from."""
SCALE_LIMIT = math.log(60)


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
            last = self.clip.vision_model.post_layernorm(states[-1])
            joint = F.normalize(self.clip.visual_projection(last), dim=-1)
            more, found = self.joint_space(rng, scenes, facts.owner.gather(1, patch), joint)
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

    def joint_space(
        self,
        rng: random.Random,
        scenes: Sequence[Scene],
        owner: Int[Tensor, "scenes tokens"],
        joint: Float[Tensor, "scenes 1+tokens joint"],
    ) -> tuple[Tensor, dict[str, float]]:
        """Losses of captions, phrases and questions; ``joint`` are unit vectors, that of [CLS] first."""
        scale = self.clip.logit_scale.exp()
        loss, values = torch.zeros(()), {}
        if len(scenes) > 8:
            texts, ends = read_texts(self.clip, [caption(rng, scene.objects) for scene in scenes])
            logits = scale * joint[:, 0] @ texts[torch.arange(len(texts)), ends].T
            same = torch.arange(len(scenes))
            loss = 0.3 * (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same))
            values["caption"] = (logits.argmax(dim=1) == same).float().mean().item()

        names = [[o.phrase for o in scene.objects] for scene in scenes]
        there = list(dict.fromkeys(name for row in names for name in row))
        others = [phrase for phrase in PHRASES if phrase not in there]
        phrases = there + rng.sample(others, min(len(others), max(8, CANDIDATES - len(there))))
        number = {phrase: n for n, phrase in enumerate(phrases)}
        index = torch.full((len(scenes), 1 + max(map(len, names))), -1)
        for row, found in enumerate(names):
            index[row, 1 : 1 + len(found)] = torch.tensor([number[name] for name in found])
        shown = owner > 0
        target = index.gather(1, owner)[shown]
        texts, ends = read_texts(self.clip, [phrase.split() for phrase in phrases])
        logits = scale * joint[:, 1:][shown] @ texts[torch.arange(len(texts)), ends].T
        loss = loss + 0.6 * F.cross_entropy(logits, target)
        values["phrase"] = (logits.argmax(dim=1) == target).float().mean().item()

        asked, spoken = questions_that_name(rng, scenes)
        texts, _ = read_texts(self.clip, [text.split() for text in asked])
        scene, text, place = torch.tensor([where for where, _ in spoken]).unbind(dim=1)
        most = 1 + max(len(objects) for _, objects in spoken)
        means = torch.zeros(len(spoken), most, dtype=torch.bool)
        for row, (_, objects) in enumerate(spoken):
            means[row, : 1 + len(objects)] = torch.tensor([False, *objects])
        similar = scale * (joint[scene, 1:] @ texts[text, place][..., None])[..., 0]
        meant = means.gather(1, owner[scene])
        meant, similar = meant[meant.any(dim=1)], similar[meant.any(dim=1)]
        to_patches = -(similar.log_softmax(dim=1) * meant).sum(dim=1) / meant.sum(dim=1)
        values["question"] = meant.gather(1, similar.argmax(dim=1, keepdim=True)).float().mean().item()
        return loss + 0.3 * to_patches.mean(), values


def caption(rng: random.Random, objects: Sequence[Object]) -> list[str]:
    """ "a red star and a blue digit 7 and ...", in random order, as many objects as the text tower can read."""
    words: list[str] = []
    for obj in rng.sample(list(objects), len(objects)):
        more = [*(["and"] if words else []), *obj.phrase.split()]
        if len(words) + len(more) + 2 > TEXT_LENGTH:
            break
        words += more
    return words


def questions_that_name(
    rng: random.Random, scenes: Sequence[Scene]
) -> tuple[list[str], list[tuple[tuple[int, int, int], list[bool]]]]:
    """A question about each scene that names something in it; its nouns and its end as scene, text and word, with the
    objects that they mean."""
    texts: list[str] = []
    spoken: list[tuple[tuple[int, int, int], list[bool]]] = []
    for number, scene in enumerate(scenes):
        for _ in range(4):
            question = ask(rng, scene.objects, rng.choice(TYPES))
            if question is None:
                continue
            nouns = nouns_of(question.text)
            meant = [named(question, noun, scene.objects) for noun in nouns]
            if not all(map(any, meant)):
                continue
            spoken += [
                ((number, len(texts), 1 + noun.place), objects) for noun, objects in zip(nouns, meant, strict=True)
            ]
            end = 1 + len(question.text.split())
            spoken.append(((number, len(texts), end), [any(column) for column in zip(*meant, strict=True)]))
            texts.append(question.text)
            break
    return texts, spoken
