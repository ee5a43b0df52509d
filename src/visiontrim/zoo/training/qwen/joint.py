"""Stage C: the decoder meets all the vision tokens of an image, and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from visiontrim.zoo.canvas import Grid
from visiontrim.zoo.questions import WORDS
from visiontrim.zoo.scenes import Scene
from visiontrim.zoo.training.qwen.decoder import DecoderRun, DecoderStage
from visiontrim.zoo.training.qwen.tower import patches_of, vision_tokens
from visiontrim.zoo.training.symbolic import SceneFacts, VisionTokens, choose_patches, symbolic_tokens

SYMBOLIC = 0.65
"""Share of the steps with symbolic tokens, which cost no vision tower."""
ALL = 0.55
"""Share of the steps with all vision tokens; the others have those of the centres and some more."""
SHARES = {"color": 0.8, "shape": 0.8, "read": 1.5, "exist": 1.5, "count": 8.0, "pos": 3.5, "rel": 1.5}


@dataclass(frozen=True, kw_only=True)
class JointStage(DecoderStage):
    """Everything that the weights depend on, but for the checkpoints of the other stages."""

    steps: int = 500
    peak_rate: float = 2.2e-4
    final_rate: float = 1e-5
    warmup: int = 30
    scenes: int = 8
    text_tokens: int = 260
    shares: dict[str, float] = field(default_factory=SHARES.copy)
    first_seed: int = 200_000_000
    scaffold: float = 0.3
    guided_until: float = 0.45


class JointRun(DecoderRun):
    """The vision tower stays as it is but for its merger; decoder and merger are trained."""

    def __init__(self, stage: JointStage, decoder: Path, vision: Path) -> None:
        """``decoder`` and ``vision`` are the checkpoints of stages A and B."""
        super().__init__(stage)
        learned = torch.load(decoder, weights_only=True)
        for name, module in super().trained().items():
            module.load_state_dict(learned[name])
        self.model.model.visual.load_state_dict(torch.load(vision, weights_only=True)["visual"])

    def trained(self) -> dict[str, nn.Module]:
        merger = self.model.model.visual.merger
        merger.requires_grad_(True)
        return {**super().trained(), "merger": merger}

    def see(self, scenes: Sequence[Scene], grid: Grid, generator: torch.Generator) -> VisionTokens:
        facts = SceneFacts.of(scenes)
        cells = self.choose(facts, generator)
        if torch.rand((), generator=generator) < SYMBOLIC:
            embeddings = self.model.model.language_model.embed_tokens.weight[: len(WORDS)]
            return symbolic_tokens(facts, cells, embeddings, noise=generator, placed=False)
        images = [scene.image for scene in scenes]
        features = vision_tokens(self.model.model.visual, patches_of(images, grid), grid)
        every = cells[..., None].expand(-1, -1, features.shape[2])
        owner, center = facts.owner.gather(1, cells), facts.center.gather(1, cells)
        return VisionTokens(features.gather(1, every), cells, owner, center)

    @staticmethod
    def choose(facts: SceneFacts, generator: torch.Generator) -> torch.Tensor:
        """The cells whose tokens the decoder gets: all, or the centres and from 24 to nearly all."""
        scenes, cells = facts.owner.shape
        kind, share = torch.rand(2, generator=generator).tolist()
        if kind < ALL:
            return torch.arange(cells).expand(scenes, -1)
        return choose_patches(facts, int(24 * (cells / 24) ** share), generator)
