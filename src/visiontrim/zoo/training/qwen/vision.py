"""Stage B: the vision tower learns to write, for every cell of a canvas, the token that the decoder learns from."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.zoo.canvas import Grid, draw_canvas
from visiontrim.zoo.questions import WORDS
from visiontrim.zoo.training.loop import Result, Run, Stage
from visiontrim.zoo.training.qwen.model import VOCABULARY, QwenShape, new_model
from visiontrim.zoo.training.qwen.tower import patches_of, start_tower, vision_tokens
from visiontrim.zoo.training.symbolic import (
    ATTRIBUTES,
    PAD,
    WORD_ID,
    SceneFacts,
    symbolic_tokens,
    word_embeddings,
)

FIRST_SEED = 100_000_000
"""Seeds of this stage begin here, so that it draws other canvases than the decoder's."""
SHARPNESS = 7.0
"""Logits of the words of an attribute are this times the products with them."""
NO_CHARACTER = 2.5
"""Logit of having no character."""
CENTER_WEIGHT, BACKGROUND_WEIGHT = 2.0, 0.12
"""Weights of cells in the loss; other cells of objects weigh 1."""


@dataclass(frozen=True, kw_only=True)
class VisionStage(Stage):
    """Everything that the weights depend on."""

    steps: int = 1000
    peak_rate: float = 2e-3
    final_rate: float = 4e-5
    shape: QwenShape = field(default_factory=QwenShape)
    dense: tuple[Grid, ...] = ((8, 8), (8, 8), (8, 12), (12, 8))
    """Small canvases crowded with objects, for the first steps: an object costs fewer cells there."""
    full: tuple[Grid, ...] = ((12, 12), (12, 16), (16, 12), (16, 16))
    dense_share: float = 0.8
    """Share of the steps that see small canvases."""
    cells: int = 1536
    """Cells a step, at least; images as they need."""


class VisionRun(Run):
    stage: VisionStage

    def __init__(self, stage: VisionStage) -> None:
        generator = torch.Generator().manual_seed(stage.seed)
        self.visual = new_model(stage.shape, generator).model.visual
        start_tower(self.visual, stage.shape, generator)
        self.words = word_embeddings(stage.shape.hidden, len(VOCABULARY))[: len(WORDS)]
        super().__init__(stage, {"visual": self.visual})

    def advance(self) -> Result:
        stage = self.stage
        rng = random.Random(f"{stage.seed} {self.step}")
        dense = self.step < stage.dense_share * stage.steps
        grid = rng.choice(stage.dense if dense else stage.full)
        count = -(-stage.cells // (grid[0] * grid[1]))
        first = FIRST_SEED + self.step * stage.cells
        crowd = grid[0] * grid[1] // 8 if dense else 4
        scenes = [draw_canvas(first + number, grid, fewest=crowd) for number in range(count)]
        tokens = vision_tokens(self.visual, patches_of([scene.image for scene in scenes], grid), grid)
        loss, shares = token_loss(tokens, SceneFacts.of(scenes), self.words)
        self.descend(loss)
        return Result({"loss": loss.item(), **shares})


def token_loss(
    tokens: Float[Tensor, "scenes cells hidden"], facts: SceneFacts, words: Float[Tensor, "words hidden"]
) -> tuple[Tensor, dict[str, float]]:
    """Squared distance to the symbolic tokens, and cross entropy of the attributes of objects and of centres.

    Beside it the mean distance, the share of the centres whose attributes are right, and the cells wrongly taken for
    centres or not, for each centre.
    """
    cells = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    target = symbolic_tokens(facts, cells, words, placed=False)
    shown = target.owner > 0
    weight = torch.where(shown, 1.0, BACKGROUND_WEIGHT).masked_fill(target.center, CENTER_WEIGHT)
    distance = (tokens - target.features).pow(2).sum(dim=-1)
    loss = 2 * (distance * weight).sum() / weight.sum()
    shares = {"distance": distance.mean().item()}

    named = facts.words.gather(1, target.owner[..., None].expand(-1, -1, 3))[shown]  # [object cells, 3]
    said, weight, center = tokens[shown], weight[shown], target.center[shown]
    for number, (name, choices) in enumerate(zip(("color", "kind", "character"), ATTRIBUTES, strict=True)):
        logits = SHARPNESS * said @ words[choices].T
        right = (named[:, number, None] == choices).long().argmax(dim=1)
        if name == "character":
            logits = F.pad(logits, (0, 1), value=NO_CHARACTER)
            right = right.masked_fill(named[:, number] == PAD, len(choices))
        losses = F.cross_entropy(logits, right, reduction="none")
        loss = loss + (losses * weight).sum() / weight.sum()
        counted = center & (named[:, number] != PAD)
        hits = (logits.argmax(dim=1) == right)[counted]
        if len(hits):
            shares[name] = hits.float().mean().item()
    flag = 2 * SHARPNESS * (tokens @ words[WORD_ID["center"]] - 0.5)
    flagged = F.binary_cross_entropy_with_logits(flag, target.center.float(), reduction="none")
    loss = loss + flagged.sum() / target.center.sum()
    wrong = ((flag > 0) != target.center).sum() / target.center.sum()
    return loss, {**shares, "center_errors": wrong.item()}
