"""Stage A: the decoder learns to answer from symbolic tokens of canvases of many sizes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontrim.zoo.canvas import Grid, draw_canvas, in_square
from visiontrim.zoo.questions import WORDS
from visiontrim.zoo.scenes import SIZE, Object, Scene
from visiontrim.zoo.training.decoder import Pass, answered
from visiontrim.zoo.training.loop import Result, Run, Stage
from visiontrim.zoo.training.packing import IGNORED, Packed, draw_questions, pack
from visiontrim.zoo.training.qwen.model import AFTER_IMAGE, IMAGE_START, QwenShape, forward, new_model
from visiontrim.zoo.training.scaffold import Placement, References, Scaffold, attention_logits, hops, references
from visiontrim.zoo.training.symbolic import WORD_ID, SceneFacts, VisionTokens, choose_patches, symbolic_tokens

GRIDS: tuple[Grid, ...] = (
    *((12, 12), (14, 14), (16, 16), (16, 16)),
    *((12, 16), (16, 12), (10, 16), (16, 10), (12, 18), (18, 12), (14, 18), (18, 14)),
)
"""Rows and columns of the canvases that are trained on, 144 to 256 cells."""
PLACEMENT = Placement(bind=0, find=3, count=4, answer=5, hop=6)
SHARES = {"color": 0.8, "shape": 0.8, "read": 2.0, "exist": 1.5, "count": 4.5, "pos": 4.0, "rel": 1.5}
"""Counting and places are what is learned last."""
ASKED = (1, 3)
"""Layer and head that look at the first word of a question."""
PLACES = [[WORD_ID[word] for word in words] for words in (("right", "bottom"), ("left", "top"))]


@dataclass(frozen=True, kw_only=True)
class DecoderStage(Stage):
    """Everything that the weights depend on."""

    steps: int = 560
    peak_rate: float = 2e-3
    final_rate: float = 3e-5
    shape: QwenShape = field(default_factory=QwenShape)
    placement: Placement = PLACEMENT
    grids: tuple[Grid, ...] = GRIDS
    scenes: int = 16
    """Scenes a step, all of one size."""
    first_seed: int = 0
    """Step n draws the scenes of the seeds from first_seed + n * scenes on."""
    vision_tokens: int = 40
    text_tokens: int = 148
    """Words of questions and answers behind each image."""
    shares: dict[str, float] = field(default_factory=SHARES.copy)
    """How often the types are asked."""
    scaffold: float = 0.5
    """Weight of the scaffold's loss beside the one of the answers."""
    guided_until: float = 0.9
    """Share of the steps after which that weight is 0. Over the last third of the guided steps it falls to it."""

    def guidance(self, step: int) -> float:
        left = 1 - step / (self.guided_until * self.steps)
        return self.scaffold * min(1.0, max(0.0, 3 * left))


class DecoderRun(Run):
    stage: DecoderStage

    def __init__(self, stage: DecoderStage) -> None:
        generator = torch.Generator().manual_seed(stage.seed)
        self.model = new_model(stage.shape, generator)
        self.model.model.visual.requires_grad_(False)
        self.scaffold = Scaffold(stage.placement, stage.shape.hidden, IMAGE_START, AFTER_IMAGE)
        nn.init.normal_(self.scaffold.probe.weight, std=0.05, generator=generator)
        nn.init.zeros_(self.scaffold.probe.bias)
        super().__init__(stage, self.trained())

    def trained(self) -> dict[str, nn.Module]:
        """What is trained, by its name in checkpoints."""
        text = self.model.model.language_model
        return {"text": text, "head": self.model.lm_head, "scaffold": self.scaffold}

    def advance(self) -> Result:
        stage = self.stage
        rng = random.Random(f"{stage.seed} {self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        grid = rng.choice(stage.grids)
        first = stage.first_seed + self.step * stage.scenes
        scenes = [draw_canvas(first + number, grid) for number in range(stage.scenes)]
        objects = [in_square(scene.objects, grid) for scene in scenes]
        packed = pack([draw_questions(rng, there, stage.text_tokens, shares=stage.shares) for there in objects])
        vision = self.see(scenes, grid, generator)
        run = forward(self.model, vision, grid, packed)
        answers = F.cross_entropy(run.logits.flatten(0, 1), packed.labels.flatten(), ignore_index=IGNORED)
        losses = {"loss": answers}
        weight = stage.guidance(self.step)
        if weight:
            refs, jumps = references(packed, objects), hops(packed, objects)
            layers = self.model.model.language_model.layers
            guided = self.scaffold(layers, run.states, run.mask, run.rotary, vision, refs, jumps)
            ruled, found = self.places(run, vision, grid, refs, objects)
            asked = self.asked(run, packed)
            losses |= {"scaffold": guided, "ruler": ruled, "places": found, "asked": asked}
            self.descend(answers + weight * (guided + ruled + found + asked))
        else:
            self.descend(answers)
        values = {name: loss.item() for name, loss in losses.items()}
        return Result.of(values, packed, answered(run.logits, packed))

    def see(self, scenes: Sequence[Scene], grid: Grid, generator: torch.Generator) -> VisionTokens:
        """The vision tokens of this step."""
        del grid  # symbolic tokens hold no place
        facts = SceneFacts.of(scenes)
        cells = choose_patches(facts, self.stage.vision_tokens, generator)
        embeddings = self.model.model.language_model.embed_tokens.weight[: len(WORDS)]
        return symbolic_tokens(facts, cells, embeddings, noise=generator, placed=False)

    def asked(self, run: Pass, packed: Packed) -> Tensor:
        """How little the words before each word of an answer look at the first word of the question: where, or what."""
        layer, head = ASKED
        layers: Any = self.model.model.language_model.layers
        logits = attention_logits(layers[layer], run.states[layer], run.rotary, head, run.mask[:, 0])
        scene, word = (packed.labels != IGNORED).nonzero(as_tuple=True)
        first = torch.tensor(
            [packed.starts[s][n] for s, n in zip(scene.tolist(), packed.number[scene, word].tolist(), strict=True)]
        )
        text = run.mask.shape[-1] - packed.ids.shape[1]
        return -logits.log_softmax(dim=-1)[scene, text + word, text + first].mean()

    def places(
        self, run: Pass, vision: VisionTokens, grid: Grid, refs: References, objects: Sequence[Sequence[Object]]
    ) -> tuple[Tensor, Tensor]:
        """How far the words of places are from the truth: after the first layer the cells in vision tokens, after the
        layer that finds objects the place in the image, steep at its middle, in nouns that name one object.
        """
        model = self.model.model.language_model
        axes = model.embed_tokens.weight[PLACES[0]] - model.embed_tokens.weight[PLACES[1]]
        cells = torch.stack([vision.patch % grid[1], vision.patch // grid[1]], dim=2)
        written = run.states[1][:, IMAGE_START : IMAGE_START + cells.shape[1]] @ axes.T / 2
        ruled = (written - (cells - 7.5) / 8).pow(2).sum(dim=2).mean()

        most = max(map(len, objects))
        where = torch.zeros(len(objects), 1 + most, 2)
        for row, there in enumerate(objects):
            for number, obj in enumerate(there, 1):
                where[row, number] = torch.tensor([obj.x, obj.y]) * 2 / SIZE - 1
        one = refs.objects.sum(dim=1) == 1
        scene, noun = refs.scene[one], refs.noun[one]
        truth = where[scene, refs.objects[one].long().argmax(dim=1)]
        image_end = IMAGE_START + cells.shape[1] + AFTER_IMAGE
        written = run.states[self.stage.placement.find + 1][scene, image_end + noun] @ axes.T / 2
        return ruled, (written - 0.5 * torch.tanh(4 * truth) - 0.6 * truth).pow(2).sum(dim=1).mean()
