"""Clips: the decoder of the bundled Qwen2.5-VL learns what moved and what appeared; its vision tower stays as it is.

Many steps see symbolic tokens, which cost no vision tower, mostly those of objects. The others see all tokens of some
clips, a random subset, what is left when the places that do not change are dropped or averaged over time, or pooled
squares of cells, in shares that are settings. A question is asked only if what is left can answer it. No attention is
supervised: at first two linear probes tell the tokens of objects whether these have moved or appeared.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from visiontrim.zoo.canvas import Grid
from visiontrim.zoo.clips import FRAMES, Clip, ask_clip, draw_clip
from visiontrim.zoo.dynamic import load_qwen
from visiontrim.zoo.questions import WORDS, Question
from visiontrim.zoo.training.decoder import answered
from visiontrim.zoo.training.loop import Result, Run, Stage
from visiontrim.zoo.training.packing import IGNORED, Packed, fitting, pack
from visiontrim.zoo.training.qwen.model import IMAGE_START, forward
from visiontrim.zoo.training.qwen.tower import patches_of, vision_tokens
from visiontrim.zoo.training.reading import Reduced, can_ask
from visiontrim.zoo.training.symbolic import SceneFacts, VisionTokens, object_words, symbolic_tokens
from visiontrim.zoo.video import MOTION_TYPES

GRIDS: tuple[Grid, ...] = ((12, 12), (12, 12), (10, 12), (12, 10), (10, 10))
SHARES = {"color": 1.0, "shape": 1.0, "read": 1.5, "exist": 2.0}
"""How often the types are asked beside what moved and what appeared."""
PROBED = 5
"""The decoder layer whose input the probes read."""


@dataclass(frozen=True, kw_only=True)
class ClipStage(Stage):
    """Everything that the weights depend on, besides those of the bundled model."""

    steps: int = 2400
    peak_rate: float = 6e-4
    final_rate: float = 0.0
    warmup: int = 40
    weight_decay: float = 0.03
    pool: int = 1_200
    """Clips of which the vision tower makes tokens; they come back with other tokens left and other questions."""
    symbolic: float = 0.6
    """Share of the steps with symbolic tokens, of new clips, mostly of objects."""
    grids: tuple[Grid, ...] = GRIDS
    whole: float = 0.12
    """Share of the other steps that see all tokens."""
    subsets: float = 0.35
    """Share of those that see a random subset."""
    static: float = 0.3
    """Share of those that lose places that do not change; the others see pooled squares."""
    scenes: int = 6
    whole_scenes: int = 2
    fewest: float = 0.1
    """Tokens that are left of all, at least, where some are dropped."""
    text_tokens: int = 50
    motion: float = 3.0
    """Weight of a word about motion beside other words of answers."""
    probes: float = 1.0
    """Weight of the probes at the beginning; it falls to zero over half of the steps."""


CALMING = ClipStage(steps=420, peak_rate=4e-4, pool=600, symbolic=0.3, probes=0.0, seed=1)
"""The second part: fewer symbolic tokens, other steps, and a rate that falls to zero."""


@dataclass(frozen=True, eq=False, slots=True)
class ClipFacts:
    """What the cells of some clips show."""

    owner: Int[Tensor, "clips frames cells"]
    moved: Int[Tensor, " clips"]
    """Number of the object that moves, from 1."""
    appeared: Int[Tensor, " clips"]

    @classmethod
    def of(cls, clips: Sequence[Clip]) -> ClipFacts:
        owner = torch.stack([torch.from_numpy(clip.owner) for clip in clips]).long()
        moved = torch.tensor([1 + clip.moved for clip in clips])
        return cls(owner, moved, torch.tensor([1 + clip.appeared for clip in clips]))

    @property
    def still(self) -> Tensor:
        """Whether a cell shows what it showed in the frame before, [clips, frames, cells]."""
        still = torch.zeros(self.owner.shape, dtype=torch.bool)
        still[:, 1:] = self.owner[:, 1:] == self.owner[:, :-1]
        return still


def subset(facts: ClipFacts, count: int, generator: torch.Generator) -> Reduced:
    """Random cells, in some clips more of objects than of the background."""
    owner = facts.owner.flatten(1)
    share = torch.rand(len(owner), 1, generator=generator) ** 0.5
    score = torch.rand(owner.shape, generator=generator)
    score += ((owner > 0) & (torch.rand(owner.shape, generator=generator) < share)).float()
    return _keeping(score.topk(count, dim=1).indices.sort(dim=1).values, owner.shape[1])


def objects(facts: ClipFacts, generator: torch.Generator) -> Reduced:
    """Nearly all cells of objects, and some of the background."""
    owner = facts.owner.flatten(1)
    score = torch.rand(owner.shape, generator=generator) + 1.5 * (owner > 0)
    count = int((owner > 0).sum(1).max()) + int(torch.randint(8, 64, (), generator=generator))
    left_out = torch.rand(owner.shape, generator=generator)
    score -= (left_out < 0.2 * torch.rand(len(owner), 1, generator=generator)).float()
    return _keeping(score.topk(min(count, owner.shape[1]), dim=1).indices.sort(dim=1).values, owner.shape[1])


def scene_facts(clips: Sequence[Clip], facts: ClipFacts) -> SceneFacts:
    """What symbolic tokens are made of."""
    owner = facts.owner
    center = torch.zeros(owner.shape, dtype=torch.bool)
    for row, clip in enumerate(clips):
        for frame, cells in enumerate(clip.middle):
            center[row, frame, torch.from_numpy(cells[cells >= 0])] = True
    return SceneFacts(owner.flatten(1), object_words([clip.objects for clip in clips]), center.flatten(1))


def changes(facts: ClipFacts, count: int, average: bool, generator: torch.Generator) -> Reduced:
    """The first frame and what changes before what does not; with ``average``, what is dropped counts where it last
    looked the same."""
    clips, frames, cells = facts.owner.shape
    score = (~facts.still).float()
    score[:, 0] *= 0.9  # what changes comes before the background of the first frame
    score[:, 0] += 0.3 * (facts.owner[:, 0] > 0)
    score += 0.2 * torch.rand(score.shape, generator=generator)
    place = score.flatten(1).topk(count, dim=1).indices.sort(dim=1).values
    kept = _keeping(place, frames * cells)
    if not average:
        return kept
    goes_to = kept.goes_to.view(clips, frames, cells).clone()
    for frame in range(1, frames):
        earlier = torch.where(facts.still[:, frame], goes_to[:, frame - 1], -1)
        goes_to[:, frame] = torch.where(goes_to[:, frame] >= 0, goes_to[:, frame], earlier)
    return Reduced(goes_to.flatten(1), place)


def squares(clips: int, frames: int, grid: Grid) -> Reduced:
    """Squares of 2 x 2 cells of every frame, each in the place of its last one."""
    rows, cols = grid
    index = torch.arange(frames * rows * cols)
    frame, row, col = index // (rows * cols), index // cols % rows, index % cols
    goes_to = (frame * (rows // 2) + row // 2) * (cols // 2) + col // 2
    place = index[(row % 2 == 1) & (col % 2 == 1)]
    return Reduced(goes_to.expand(clips, -1), place.expand(clips, -1))


def _keeping(place: Int[Tensor, "clips tokens"], total: int) -> Reduced:
    number = torch.arange(place.shape[1]).expand_as(place)
    return Reduced(place.new_full((len(place), total), -1).scatter(1, place, number), place)


def everything(clips: int, total: int) -> Reduced:
    place = torch.arange(total).expand(clips, -1)
    return Reduced(place, place)


def there(clip: Clip, goes_to: Int[Tensor, "frames cells"]) -> Tensor:
    """In which frames something is left of each object, [objects, frames]."""
    owner = torch.from_numpy(clip.owner)
    seen = [((owner == number) & (goes_to >= 0)).any(1) for number in range(1, 1 + len(clip.objects))]
    return torch.stack(seen)


def can_tell(clip: Clip, seen: Tensor, type: str) -> bool:
    """Whether what is left shows what moved, or what appeared: two places of the one, and the other not at the
    beginning, where everything else is."""
    if type == "moved":
        return int(seen[clip.moved].sum()) >= 2
    return bool(seen[clip.appeared].any() and (seen[:, 0] | torch.from_numpy(clip.middle[0] < 0)).all())


class ClipRun(Run):
    """The decoder in training; from the checkpoint ``start`` of such a run, or from the bundled model."""

    def __init__(self, stage: ClipStage, start: Path | None = None) -> None:
        self.settings = stage
        self.model = load_qwen().model
        self.model.requires_grad_(False)
        text = self.model.model.language_model
        for module in (text.layers, text.norm, self.model.lm_head):
            module.requires_grad_(True)
        self.probes = nn.Linear(self.model.lm_head.in_features, 2)
        nn.init.zeros_(self.probes.weight)
        nn.init.zeros_(self.probes.bias)
        self.seen = functools.cache(self._look)
        modules = {"text": text, "head": self.model.lm_head, "probes": self.probes}
        learned = {} if start is None else torch.load(start, weights_only=True)
        for name, module in modules.items() if learned else ():
            module.load_state_dict(learned[name])
        super().__init__(stage, modules)

    @torch.no_grad()
    def _look(self, number: int, grid: Grid, frames: int) -> tuple[Clip, Float[Tensor, "tokens hidden"]]:
        clip = draw_clip(number, grid, frames)
        features = vision_tokens(self.model.model.visual, patches_of(clip.images, grid), grid)
        return clip, features.flatten(0, 1).half()

    def reduce(self, rng: random.Random, facts: ClipFacts, grid: Grid) -> tuple[str, Reduced]:
        """What a step that does not see all of the tokens sees of them, with its name."""
        stage, (clips, frames, cells) = self.settings, facts.owner.shape
        u = stage.whole + (1 - stage.whole) * rng.random()
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        count = round(frames * cells * stage.fewest ** rng.random())
        if u < stage.whole + stage.subsets:
            return "subset", subset(facts, count, generator)
        if u < stage.whole + stage.subsets + stage.static:
            return "static", changes(facts, min(count, frames * cells // 2), rng.random() < 0.5, generator)
        return "pooled", squares(clips, frames, grid)

    def advance(self) -> Result:
        stage, step = self.settings, self.step
        rng = random.Random(f"{stage.seed} {step}")
        if rng.random() < stage.symbolic:
            grid, frames = rng.choice(stage.grids), rng.randint(*FRAMES)
            clips = [draw_clip(stage.pool + step * stage.scenes + n, grid, frames) for n in range(stage.scenes)]
            name, facts = "symbolic", ClipFacts.of(clips)
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            reduced = objects(facts, generator)
            embeddings = self.model.model.language_model.embed_tokens.weight[: len(WORDS)]
            vision = symbolic_tokens(scene_facts(clips, facts), reduced.place, embeddings, generator, placed=False)
        else:
            # all clips of a step have one size, and come back with it
            first = rng.randrange(stage.pool // stage.scenes) * stage.scenes
            size = random.Random(f"{stage.seed} {first} size")
            grid, frames = size.choice(stage.grids), size.randint(*FRAMES)
            whole = rng.random() < stage.whole
            count = stage.whole_scenes if whole else stage.scenes
            clips, features = zip(*(self.seen(first + n, grid, frames) for n in range(count)), strict=True)
            facts = ClipFacts.of(clips)
            name, reduced = ("all", everything(count, len(features[0]))) if whole else self.reduce(rng, facts, grid)
            tokens = torch.stack(features).float()
            nothing = torch.zeros_like(reduced.place)
            vision = VisionTokens(tokens if whole else reduced(tokens), reduced.place, nothing, nothing.bool())
        left = reduced.goes_to.view(facts.owner.shape)
        packed = pack([self.questions(rng, clip, goes_to) for clip, goes_to in zip(clips, left, strict=True)])
        run = forward(self.model, vision, grid, packed)
        loss = self.answers(run.logits, packed)
        values = {f"loss, {name}": loss.item()}
        weight = stage.probes * max(0.0, 1 - 2 * step / stage.steps)
        if weight:
            probed = self.probe(run.states[PROBED][:, IMAGE_START:][:, : reduced.place.shape[1]], facts, reduced)
            values["probes"] = probed.item()
            loss = loss + weight * probed
        self.descend(loss)
        good = answered(run.logits, packed)
        motion = [
            right
            for asked, row in zip(packed.questions, good, strict=True)
            for question, right in zip(asked, row, strict=True)
            if question.type in MOTION_TYPES
        ]
        if motion:
            values[f"motion, {name}"] = sum(motion) / len(motion)
        return Result.of(values, packed, good)

    def answers(self, logits: Float[Tensor, "clips text words"], packed: Packed) -> Tensor:
        """Cross-entropy of the words of answers, in which those about motion weigh more."""
        most = max(map(len, packed.questions))
        weights = torch.ones(len(packed.questions), most + 1)  # the last one is that of padding, number -1
        for row, asked in enumerate(packed.questions):
            for number, question in enumerate(asked):
                if question.type in MOTION_TYPES:
                    weights[row, number] = self.settings.motion
        weight = weights.gather(1, packed.number % (most + 1)) * (packed.labels != IGNORED)
        each = F.cross_entropy(logits.flatten(0, 1), packed.labels.flatten(), ignore_index=IGNORED, reduction="none")
        return (each * weight.flatten()).sum() / weight.sum()

    def questions(self, rng: random.Random, clip: Clip, goes_to: Int[Tensor, "frames cells"]) -> list[list[Question]]:
        """What moved and what appeared, where it can be told, and questions of the other types."""
        seen = there(clip, goes_to)
        gone = [not row.any() for row in seen]
        planned = [type for type in MOTION_TYPES if can_tell(clip, seen, type)]

        def drawn() -> Iterator[Question]:
            for _ in range(20):
                type = planned.pop() if planned else rng.choices(list(SHARES), list(SHARES.values()))[0]
                question = ask_clip(rng, clip, type)
                if question is not None and (type in MOTION_TYPES or can_ask(question, clip.objects, gone)):
                    yield question

        return fitting(drawn(), self.settings.text_tokens)

    def probe(self, states: Float[Tensor, "clips tokens hidden"], facts: ClipFacts, reduced: Reduced) -> Tensor:
        """How badly tokens of objects know whether these have moved or appeared since the first frame."""
        owner, cells = facts.owner.flatten(1).gather(1, reduced.place), facts.owner.shape[2]
        later = (owner > 0) & (reduced.place >= cells)
        truth = torch.stack([owner == facts.moved[:, None], owner == facts.appeared[:, None]], dim=2)
        logits = self.probes(states)
        return F.binary_cross_entropy_with_logits(logits[later], truth[later].float())
