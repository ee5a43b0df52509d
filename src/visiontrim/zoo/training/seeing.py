"""The towers learn natural scenes, from the weights of the bundled model: every patch of an object says what it is.

What a patch of an object says, in the token space of the decoder, is the colour, kind and character of the object and
where its middle lies, the same in all of its patches: none is more than another. It says how large the object is, too,
in the word "center" (1 for one patch, 0 for 150), which is what counting needs. These targets are for the beginning:
stage ``reading`` takes their weight away and trains everything on answers.

[CLS] learns which objects there are and where, in the layer whose features the decoder reads and in the last one: from
captions that name all objects, and from linear heads that are thrown away afterwards. Nothing supervises attention.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPModel

from visiontrim.zoo.loading import CLIP_DIR, MODEL_DIR
from visiontrim.zoo.natural_questions import MORE_WORDS, NATURAL_TYPES, NATURAL_WORDS, ask_natural
from visiontrim.zoo.natural_scenes import STRING, NaturalScene, draw_natural
from visiontrim.zoo.questions import CHARACTERS
from visiontrim.zoo.scenes import COLORS, GRID, KINDS, SIZE, Object
from visiontrim.zoo.training.joint_space import SCALE_LIMIT, Naming, joint_space
from visiontrim.zoo.training.loop import Result, Run, Stage
from visiontrim.zoo.training.symbolic import PAD, WORD_ID, word_embeddings
from visiontrim.zoo.training.tower import look, new_clip, new_projector, patchify, project
from visiontrim.zoo.training.vision import NO_CHARACTER, SHARPNESS

PATCHES = GRID * GRID
BACKGROUND = 0.06
"""Weight of a patch of background in the losses of the token space; the patches of an object of n have 1 / sqrt(n)."""
LARGEST = 150
"""Patches of an object that is as large as the size code can say."""
NATURAL_KINDS = (*KINDS, STRING)
ATTRIBUTES = tuple(torch.tensor([WORD_ID[w] for w in words]) for words in (tuple(COLORS), NATURAL_KINDS, CHARACTERS))
BAG = (len(COLORS), len(NATURAL_KINDS), len(CHARACTERS), len(COLORS) * len(NATURAL_KINDS))
"""What [CLS] tells of the objects of a scene: which colours, kinds and characters there are, and which kind in which
colour."""


@dataclass(frozen=True, kw_only=True)
class SeeingStage(Stage):
    """Everything that the weights of the towers and of the projector depend on, besides the bundled model's."""

    steps: int = 650
    peak_rate: float = 1e-3
    final_rate: float = 3e-4
    warmup: int = 25
    clip_norm: float = 2.0
    weight_decay: float = 0.03
    hidden: int = 192
    first: int = 0
    pool: int = 6_000
    """Training scenes; they come again when all were seen."""
    scenes: int = 16
    """Scenes a step that sees a part of the patches."""
    whole_scenes: int = 3
    """Scenes a step that sees all of them."""
    whole: float = 0.2
    """Share of such steps."""
    patches: int = 128
    """Seen of a scene in the other steps: those of small objects and of characters, and random ones."""
    bag: float = 1.0
    """Weight of what [CLS] says."""
    text_every: int = 3
    """Every so many steps have the losses of the joint space."""


LOOKING = SeeingStage(steps=420, peak_rate=9e-4, final_rate=1e-4, warmup=15, first=14_000, scenes=14, seed=2)
"""The second part, which goes on from what stage ``reading`` made of the towers."""


@dataclass(frozen=True, eq=False, slots=True)
class Facts:
    """What the patches of natural scenes show."""

    owner: Int[Tensor, "scenes 576"]
    words: Int[Tensor, "scenes 576 3"]
    """Colour ("background" where there is no object), kind and character, PAD for none."""
    middle: Float[Tensor, "scenes 576 2"]
    size: Int[Tensor, "scenes 576"]
    """Patches of the object that a patch belongs to; 0 for background."""

    @classmethod
    def of(cls, scenes: Sequence[NaturalScene]) -> Facts:
        rows = [_facts(scene) for scene in scenes]
        owner, words, middle, size = (torch.stack(part) for part in zip(*rows, strict=True))
        return cls(owner, words, middle, size)

    def gather(self, patch: Int[Tensor, "scenes tokens"]) -> Facts:
        def wide(x: Tensor) -> Tensor:
            return x.gather(1, patch[..., None].expand(-1, -1, x.shape[-1]))

        return Facts(self.owner.gather(1, patch), wide(self.words), wide(self.middle), self.size.gather(1, patch))


def _facts(scene: NaturalScene) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    owner = torch.from_numpy(scene.patch_owner).long()
    names = [(WORD_ID["background"], PAD)] + [(WORD_ID[o.color], WORD_ID[o.kind]) for o in scene.objects]
    characters = torch.tensor([WORD_ID[c] if c else PAD for c in scene.patch_character])
    words = torch.cat([torch.tensor(names)[owner], characters[:, None]], dim=1)
    size = torch.bincount(owner, minlength=len(names))[owner].masked_fill(owner == 0, 0)
    assert scene.patch_middle is not None
    return owner, words, torch.from_numpy(scene.patch_middle).float(), size


def wanted_tokens(facts: Facts, words: Float[Tensor, "words hidden"]) -> Float[Tensor, "scenes tokens hidden"]:
    """What the projector should write at first."""
    vectors = words.clone()
    vectors[PAD] = 0
    u = facts.middle / SIZE * 2 - 1
    steps = 0.5 * torch.tanh(4 * u) + 0.6 * u
    right = words[WORD_ID["right"]] - words[WORD_ID["left"]]
    bottom = words[WORD_ID["bottom"]] - words[WORD_ID["top"]]
    small = (1 - facts.size.clamp(min=1).log() / math.log(LARGEST)).clamp(min=0) * (facts.size > 0)
    return (
        vectors[facts.words].sum(dim=2)
        + steps[..., :1] * right
        + steps[..., 1:] * bottom
        + small[..., None] * words[WORD_ID["center"]]
    )


def token_loss(
    tokens: Float[Tensor, "scenes tokens hidden"], facts: Facts, words: Float[Tensor, "words hidden"]
) -> tuple[Tensor, dict[str, float]]:
    """Squared error to the wanted tokens and cross-entropy of each attribute, with the share that is right."""
    shown = facts.owner > 0
    weight = torch.where(shown, facts.size.clamp(min=1) ** -0.5, BACKGROUND)
    weight = weight / weight.sum()
    error = ((tokens - wanted_tokens(facts, words)).square().sum(dim=-1) * weight).sum()
    loss, values = 2 * error, {"error": error.item()}
    for number, (name, choices) in enumerate(zip(("color", "kind", "character"), ATTRIBUTES, strict=True)):
        nothing = WORD_ID["background"] if name == "color" else PAD
        logits = SHARPNESS * tokens @ words[torch.cat([choices, torch.tensor([WORD_ID["background"]])])].T
        if name == "character":
            logits = torch.cat([logits[..., :-1], torch.full_like(logits[..., :1], NO_CHARACTER)], dim=-1)
        index = torch.full((len(NATURAL_WORDS),), -1)
        index[choices], index[nothing] = torch.arange(len(choices)), len(choices)
        target = index[facts.words[..., number]]
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        loss = loss + (2 if name == "character" else 1) * (each * weight.flatten()).sum()
        told = target < len(choices)
        values[name] = (logits.argmax(dim=-1) == target)[told].float().mean().item()
    return loss, values


class Towers(nn.Module):
    """Both towers, the projector, and what reads [CLS] in training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.clip: CLIPModel = new_clip(generator, NATURAL_WORDS)
        self.projector = new_projector(hidden, generator)
        self.bags = nn.ModuleList(nn.Linear(128, sum(BAG)) for _ in range(2))
        for head in self.bags:
            nn.init.normal_(head.weight, std=0.02, generator=generator)  # pyright: ignore
            nn.init.constant_(head.bias, -2.0)  # pyright: ignore

    def start(self) -> None:
        """Take the weights of the bundled model; new words begin as small noise."""
        from transformers import LlavaForConditionalGeneration

        old = CLIPModel.from_pretrained(CLIP_DIR, dtype=torch.float32).state_dict()
        generator = torch.Generator().manual_seed(1)
        name = "text_model.embeddings.token_embedding.weight"
        more = old[name].std() * torch.randn(len(MORE_WORDS), old[name].shape[1], generator=generator)
        old[name] = torch.cat([old[name], more])
        self.clip.load_state_dict(old)
        llava: Any = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32)
        self.projector.load_state_dict(
            {k: v for k, v in llava.model.multi_modal_projector.state_dict().items() if k.startswith("linear")}
        )

    def look(
        self, scenes: Sequence[NaturalScene], patch: Int[Tensor, "scenes tokens"]
    ) -> list[Float[Tensor, "scenes 1+tokens width"]]:
        pixels = torch.stack(
            [torch.from_numpy(patchify(s.image)[p]) for s, p in zip(scenes, patch.numpy(), strict=True)]
        )
        return look(self.clip.vision_model, pixels, patch)

    def tokens(self, features: Tensor) -> Tensor:
        return project(self.projector, features)

    def bag_loss(self, states: Sequence[Tensor], scenes: Sequence[NaturalScene]) -> tuple[Tensor, dict[str, float]]:
        """What [CLS] of the last two states says of the objects of a scene; of the colours, how many are right."""
        target = torch.stack([_bag(scene.objects) for scene in scenes])
        loss, values = torch.zeros(()), {}
        for name, head, state in zip(("-2", "-1"), self.bags, states[-2:], strict=True):
            logits = head(F.layer_norm(state[:, 0], state.shape[-1:]))
            each = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(0).split(BAG)
            loss = loss + torch.stack([part.mean() for part in each]).sum()
            colors = slice(0, BAG[0])
            said, there = logits[:, colors] > 0, target[:, colors] > 0
            values[f"[CLS] {name}"] = (said == there).float().mean().item()
        return loss, values


def phrase(obj: Object) -> str:
    """The object in words of the vocabulary: "a red digit 7", "a red string 7 A"."""
    return f"a {obj.color} {STRING} {' '.join(obj.value or '')}" if obj.kind == STRING else obj.phrase


NATURAL = Naming(phrase, lambda rng, objects: ask_natural(rng, objects, rng.choice(NATURAL_TYPES)), tries=6)
"""What is said of natural scenes."""


def _bag(objects: Sequence[Object]) -> Float[Tensor, " bag"]:
    """1 for whatever of BAG the scene holds."""
    colors: list[str] = list(COLORS)
    kinds: list[str] = list(NATURAL_KINDS)
    pairs = torch.zeros(len(colors), len(kinds))
    characters = torch.zeros(len(CHARACTERS))
    for obj in objects:
        color = colors.index(obj.color)
        pairs[color, kinds.index(obj.kind)] = 1
        for character in obj.value or "":
            characters[CHARACTERS.index(character)] = 1
    return torch.cat([pairs.amax(1), pairs.amax(0), characters, pairs.flatten()])


@functools.cache
def natural_scene(number: int) -> NaturalScene:
    """Scene ``number`` of the training set, drawn once: 130 kB each."""
    return draw_natural(number)


def some_patches(facts: Facts, count: int, generator: torch.Generator) -> Int[Tensor, "scenes {count}"]:
    """Patches, ascending: those of characters and small objects, which are nothing in parts, then random ones."""
    score = torch.rand(facts.owner.shape, generator=generator)
    score += 0.3 * (facts.owner > 0)
    score += 2 * ((facts.words[..., 2] != PAD) | ((facts.size > 0) & (facts.size <= 10))).float()
    return score.topk(count, dim=1).indices.sort(dim=1).values


class SeeingRun(Run):
    """Towers and projector in training."""

    def __init__(self, stage: SeeingStage, start: Path | None = None) -> None:
        """``start`` is a checkpoint to go on from, by default the bundled model."""
        self.settings = stage
        self.towers = Towers(stage.hidden)
        self.towers.start()
        if start is not None:
            self.towers.load_state_dict(torch.load(start, weights_only=True)["towers"])
        self.words = word_embeddings(stage.hidden, len(NATURAL_WORDS))
        super().__init__(stage, {"towers": self.towers})

    def advance(self) -> Result:
        stage, step = self.settings, self.step
        rng = random.Random(f"{stage.seed} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        whole = rng.random() < stage.whole
        count = stage.whole_scenes if whole else stage.scenes
        scenes = [natural_scene(stage.first + (step * stage.scenes + n) % stage.pool) for n in range(count)]
        facts = Facts.of(scenes)
        patch = torch.arange(PATCHES).expand(count, -1)
        if not whole:
            patch = some_patches(facts, stage.patches, generator)
        states = self.towers.look(scenes, patch)
        seen = facts.gather(patch)
        loss, values = token_loss(self.towers.tokens(states[-2][:, 1:]), seen, self.words)
        more, found = self.towers.bag_loss(states, scenes)
        loss, values = loss + stage.bag * more, values | found
        if step % stage.text_every == 0:
            more, found = joint_space(self.towers.clip, rng, scenes, seen.owner, states[-1], NATURAL)
            loss, values = loss + more, values | found
        self.descend(loss)
        with torch.no_grad():
            self.towers.clip.logit_scale.clamp_(max=SCALE_LIMIT)
        return Result({f"{name} of all" if whole else name: value for name, value in values.items()})
