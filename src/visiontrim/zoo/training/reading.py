"""Everything is trained on answers about natural scenes: tower, projector and decoder, from start to end.

A step sees all 576 tokens, a random subset of them, means of clusters beside single tokens, or pooled squares, in
shares that are settings. A question is asked only if every object that it speaks of is still there: whoever is asked
what cannot be seen learns to guess. Nothing guides the attention of the decoder.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from visiontrim.zoo.loading import MODEL_DIR
from visiontrim.zoo.natural_questions import NATURAL_WORDS, ask_natural
from visiontrim.zoo.natural_scenes import STRING, NaturalScene
from visiontrim.zoo.questions import Question
from visiontrim.zoo.scenes import GRID, Object
from visiontrim.zoo.training.decoder import DecoderShape, answered, forward, new_decoder
from visiontrim.zoo.training.joint_space import joint_space
from visiontrim.zoo.training.loop import Result, Run, Stage
from visiontrim.zoo.training.packing import IGNORED, fitting, pack
from visiontrim.zoo.training.scaffold import Noun, nouns_of
from visiontrim.zoo.training.seeing import NATURAL, PATCHES, Facts, Towers, natural_scene, token_loss
from visiontrim.zoo.training.symbolic import VisionTokens, word_embeddings

SHARES = {
    "color": 1.2,
    "shape": 1.2,
    "read": 1.5,
    "exist": 2.5,
    "count": 2.0,
    "pos": 1.2,
    "rel": 1.8,
    "side": 0.8,
    "hop": 0.8,
    "point": 3.0,
    "string": 3.0,
}
"""How often the types are asked."""
PURE = 0.6
"""A mean of tokens shows an object that this share of its patches belong to."""


@dataclass(frozen=True, kw_only=True)
class ReadingStage(Stage):
    """Everything that the weights depend on, besides the checkpoint that they start from."""

    steps: int = 300
    peak_rate: float = 4e-4
    final_rate: float = 1.5e-4
    warmup: int = 30
    weight_decay: float = 0.03
    log_every: int = 20
    shape: DecoderShape = field(default_factory=DecoderShape)
    first: int = 8_000
    """Number of the first training scene: none that stage ``seeing`` has seen."""
    pool: int = 6_000
    whole: float = 0.25
    """Share of the steps that see all tokens."""
    subsets: float = 0.35
    """Share of those that see a subset."""
    clusters: float = 0.25
    """Share of those that see means of clusters beside single tokens; the others see pooled squares."""
    scenes: int = 6
    whole_scenes: int = 3
    """Scenes a step that sees all tokens."""
    fewest: int = 32
    most: int = 400
    count_in_part: float = 0.3
    """How often counting is asked about in a step that does not see all, as a share of what it is else."""
    tower_every: int = 3
    """Every so many steps train the tower, too."""
    tokens: float = 0.6
    """Weight of the token space at the beginning; it falls to zero at the end."""
    bag: float = 0.5
    joint_every: int = 6
    text_tokens: int = 150


SETTLING = ReadingStage(steps=640, peak_rate=3e-4, final_rate=0.0, first=20_000, seed=1)
"""The second part: on other scenes, with a rate that falls to zero."""


@dataclass(frozen=True, eq=False, slots=True)
class Reduced:
    """What is left of the tokens of some scenes."""

    goes_to: Int[Tensor, "scenes 576"]
    """The token that a patch is part of, -1 for none."""
    place: Int[Tensor, "scenes tokens"]
    """The patch at whose position each token stands, ascending."""

    def __call__(self, features: Float[Tensor, "scenes 576 width"]) -> Float[Tensor, "scenes tokens width"]:
        """Means of the features."""
        scenes, tokens = self.place.shape
        index = self.goes_to.clamp(min=0)
        there = (self.goes_to >= 0).float()
        total = features.new_zeros(scenes, tokens, features.shape[-1])
        total = total.scatter_add(1, index[..., None].expand_as(features), features * there[..., None])
        number = there.new_zeros(scenes, tokens).scatter_add(1, index, there)
        return total / number.clamp(min=1)[..., None]

    def shown(self, owner: Int[Tensor, "scenes 576"]) -> Int[Tensor, "scenes objects"]:
        """How many tokens show each object, and the background first."""
        scenes, tokens = self.place.shape
        objects = int(owner.max()) + 1
        there = (self.goes_to >= 0).float()
        index = self.goes_to.clamp(min=0) * objects + owner
        parts = there.new_zeros(scenes, tokens * objects).scatter_add(1, index, there).view(scenes, tokens, objects)
        return (parts / parts.sum(2, keepdim=True).clamp(min=1) >= PURE).sum(1)


def everything(scenes: int) -> Reduced:
    patch = torch.arange(PATCHES).expand(scenes, -1)
    return Reduced(patch, patch)


def chosen(owner: Int[Tensor, "scenes 576"], count: int, generator: torch.Generator) -> Int[Tensor, "scenes {count}"]:
    """Random patches, ascending; of some scenes more of the objects than of the background."""
    share = torch.rand(len(owner), 1, generator=generator) ** 2
    score = torch.rand(owner.shape, generator=generator)
    score += ((owner > 0) & (torch.rand(owner.shape, generator=generator) < share)).float()
    return score.topk(count, dim=1).indices.sort(dim=1).values


def subset(place: Int[Tensor, "scenes tokens"]) -> Reduced:
    """These patches alone."""
    number = torch.arange(place.shape[1]).expand_as(place)
    return Reduced(place.new_full((len(place), PATCHES), -1).scatter(1, place, number), place)


def clustered(
    place: Int[Tensor, "scenes tokens"], features: Float[Tensor, "scenes 576 width"], rng: random.Random
) -> Reduced:
    """Every patch goes to the one of ``place`` that is most like it; some of these stay alone, some patches go."""
    alike = F.normalize(features, dim=-1)
    middle = alike.gather(1, place[..., None].expand(-1, -1, alike.shape[-1]))
    tokens = place.shape[1]
    alone = torch.rand(place.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62))) < 0.9 * rng.random()
    alone[:, 0] = False
    nearest = (alike @ middle.mT).masked_fill(alone[:, None], -2).argmax(-1)
    if rng.random() < 0.5:
        lost = torch.rand(nearest.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62))) < rng.random()
        nearest = nearest.masked_fill(lost, -1)
    return Reduced(nearest.scatter(1, place, torch.arange(tokens).expand_as(place)), place)


def pooled(scenes: int, side: int) -> Reduced:
    """Squares of ``side`` x ``side`` patches, each in the place of its middle one."""
    cells = GRID // side
    row, column = torch.arange(PATCHES) // GRID, torch.arange(PATCHES) % GRID
    goes_to = row // side * cells + column // side
    middle = torch.arange(cells) * side + side // 2
    place = (middle[:, None] * GRID + middle).flatten()
    return Reduced(goes_to.expand(scenes, -1), place.expand(scenes, -1))


def lost(scenes: Sequence[NaturalScene], facts: Facts, reduced: Reduced) -> list[list[bool]]:
    """Of which objects too little is left to speak of them: three tokens, of small ones a quarter, of strings half."""
    shown = reduced.shown(facts.owner)
    rows = []
    for number, scene in enumerate(scenes):
        size = torch.bincount(facts.owner[number], minlength=shown.shape[1])
        row = []
        for n, obj in enumerate(scene.objects, 1):
            need = math.ceil(int(size[n]) / 2) if obj.kind == STRING else min(3, math.ceil(int(size[n]) / 4))
            row.append(int(shown[number, n]) < max(1, need))
        rows.append(row)
    return rows


def can_ask(question: Question, objects: Sequence[Object], gone: Sequence[bool]) -> bool:
    """Whether no object that is gone has anything to do with the question."""
    if not any(gone):
        return True
    nouns = nouns_of(question.text)
    return not any(
        away and (obj is question.found or any(_touches(noun, obj) for noun in nouns))
        for obj, away in zip(objects, gone, strict=True)
    )


def _touches(noun: Noun, obj: Object) -> bool:
    return obj.color == noun.color or obj.kind == noun.kind or (noun.value is not None and noun.value == obj.value)


def draw_natural_questions(
    rng: random.Random, objects: Sequence[Object], gone: Sequence[bool], length: int, count_share: float = 1.0
) -> list[list[Question]]:
    """Single questions of all types, as many as fit into ``length`` words with their answers."""
    shares = SHARES | {"count": SHARES["count"] * count_share}
    planned = ["string", "point", "hop", "side"]

    def drawn() -> Iterator[Question]:
        for _ in range(80):
            type = planned.pop() if planned else rng.choices(list(shares), list(shares.values()))[0]
            question = ask_natural(rng, objects, type)
            if question is not None and can_ask(question, objects, gone):
                yield question

    return fitting(drawn(), length)


def bundled_decoder(shape: DecoderShape) -> LlamaForCausalLM:
    """That of the bundled model, with the new words at the end of its vocabulary."""
    model = new_decoder(shape, torch.Generator().manual_seed(0), NATURAL_WORDS)
    llava: Any = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32)
    own: Any = model.model
    with torch.no_grad():
        for name, weight in llava.model.language_model.state_dict().items():
            if name != "embed_tokens.weight":
                own.state_dict()[name].copy_(weight)
        own.embed_tokens.weight[: len(llava.lm_head.weight)] = llava.model.language_model.embed_tokens.weight
        model.lm_head.weight[: len(llava.lm_head.weight)] = llava.lm_head.weight
    return model


class ReadingRun(Run):
    """Towers, projector and decoder in training.

    ``towers`` is a checkpoint of stage ``seeing`` or of such a run, ``decoder`` one of such a run; the decoder is the
    bundled model's by default.
    """

    def __init__(self, stage: ReadingStage, towers: Path, decoder: Path | None = None) -> None:
        self.settings = stage
        self.towers = Towers(stage.shape.hidden)
        self.towers.load_state_dict(torch.load(towers, weights_only=True)["towers"])
        self.model = bundled_decoder(stage.shape)
        if decoder is not None:
            self.model.load_state_dict(torch.load(decoder, weights_only=True)["model"])
        self.words = word_embeddings(stage.shape.hidden, len(NATURAL_WORDS))
        super().__init__(stage, {"towers": self.towers, "model": self.model})

    def reduce(
        self, rng: random.Random, facts: Facts, features: Float[Tensor, "scenes 576 width"]
    ) -> tuple[str, Reduced]:
        """What this step sees of the tokens, with its name."""
        stage, u, scenes = self.settings, rng.random(), len(features)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        count = round(stage.fewest * (stage.most / stage.fewest) ** rng.random())
        if u < stage.subsets:
            return "subset", subset(chosen(facts.owner, count, generator))
        if u < stage.subsets + stage.clusters:
            return "clusters", clustered(chosen(facts.owner, min(count, 192), generator), features.detach(), rng)
        return "pooled", pooled(scenes, rng.choice((2, 2, 3)))

    def advance(self) -> Result:
        stage, step = self.settings, self.step
        rng = random.Random(f"{stage.seed} {step}")
        whole = rng.random() < stage.whole
        count = stage.whole_scenes if whole else stage.scenes
        scenes = [natural_scene(stage.first + (step * stage.scenes + n) % stage.pool) for n in range(count)]
        facts = Facts.of(scenes)
        every = torch.arange(PATCHES).expand(count, -1)
        moves = step % stage.tower_every == 0
        with torch.set_grad_enabled(moves):
            states = self.towers.look(scenes, every)
        features = states[-2][:, 1:]
        name, reduced = "all", everything(count)
        if not whole:
            rng.random()
            name, reduced = self.reduce(random.Random(f"{stage.seed} {step} way"), facts, features)
        gone = lost(scenes, facts, reduced)
        share = 1.0 if whole else stage.count_in_part
        packed = pack(
            [
                draw_natural_questions(rng, scene.objects, row, stage.text_tokens, share)
                for scene, row in zip(scenes, gone, strict=True)
            ]
        )
        tokens = self.towers.tokens(features if whole else reduced(features))
        nothing = torch.zeros_like(reduced.place)
        run = forward(self.model, VisionTokens(tokens, reduced.place, nothing, nothing.bool()), packed)
        loss = F.cross_entropy(run.logits.flatten(0, 1), packed.labels.flatten(), ignore_index=IGNORED)
        values = {f"loss, {name}": loss.item()}
        if moves:
            weight = stage.tokens * (1 - step / stage.steps)
            if weight:
                more, found = token_loss(self.towers.tokens(features), facts, self.words)
                loss, values = loss + weight * more, values | found
            more, found = self.towers.bag_loss(states, scenes)
            loss, values = loss + stage.bag * more, values | found
            if step % stage.joint_every == 0:
                more, found = joint_space(self.towers.clip, rng, scenes, facts.owner, states[-1], NATURAL)
                loss, values = loss + more, values | found
        self.descend(loss)
        good = answered(run.logits, packed)
        hits = [right for row in good for right in row]
        values[f"right, {name}"] = sum(hits) / max(1, len(hits))
        return Result.of(values, packed, good)
