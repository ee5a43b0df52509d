"""How a decoder does on scenes that it was not trained on, and after losing its vision tokens at some depth.

Fast, for use while training: many questions in one forward. Published scores come from ``visiontrim zoo eval``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaForCausalLM

from visiontrim.zoo.questions import TYPES, Question, ask
from visiontrim.zoo.scenes import STANDARD, Scene, World, draw_scene
from visiontrim.zoo.training.decoder import answered, forward
from visiontrim.zoo.training.packing import pack
from visiontrim.zoo.training.symbolic import SceneFacts, VisionTokens, choose_patches, symbolic_tokens

DEVELOPMENT = 900_000_000
"""Seed of the first scene to make choices with: neither trained on nor held out."""

See = Callable[[Sequence[Scene], SceneFacts, Int[Tensor, "scenes tokens"]], VisionTokens]
"""Vision tokens of some patches of some scenes."""


def questions_about(scene_seed: int, scene: Scene) -> list[Question]:
    """The questions that ``zoo.held_out`` asks about this scene: one of each type that it allows."""
    asked = (ask(random.Random(f"{scene_seed} {type}"), scene.objects, type) for type in TYPES)
    return [question for question in asked if question is not None]


def symbolic(model: LlamaForCausalLM) -> See:
    """Tokens without any pixel and without noise."""
    embeddings = model.model.embed_tokens.weight
    return lambda scenes, facts, patch: symbolic_tokens(facts, patch, embeddings)


@torch.inference_mode()
def accuracy_by_depth(
    model: LlamaForCausalLM,
    num_scenes: int,
    vision_tokens: int,
    see: See | None = None,
    depths: Iterable[int] | None = None,
    world: World = STANDARD,
    batch_size: int = 20,
    talk: bool = False,
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Accuracy per type when only the first k decoder layers see the vision tokens; number of questions of each type.

    ``depths`` are the k, by default 0 to all. The patches are the centre of every object, then others, in the end all.
    With ``talk`` the questions about a scene are the turns of one conversation, else each stands alone.
    """
    depths = list(range(len(model.model.layers) + 1) if depths is None else depths)
    see = see or symbolic(model)
    right: list[Counter[str]] = [Counter() for _ in depths]
    total: Counter[str] = Counter()
    for first in range(0, num_scenes, batch_size):
        seeds = range(DEVELOPMENT + first, DEVELOPMENT + min(first + batch_size, num_scenes))
        scenes = [draw_scene(seed, world) for seed in seeds]
        asked = [questions_about(*pair) for pair in zip(seeds, scenes, strict=True)]
        packed = pack([[row] if talk else [[question] for question in row] for row in asked])
        facts = SceneFacts.of(scenes)
        patches = choose_patches(facts, vision_tokens, torch.Generator().manual_seed(first))
        vision = see(scenes, facts, patches)
        types = [question.type for row in packed.questions for question in row]
        total.update(types)
        for row, depth in zip(right, depths, strict=True):
            results = answered(forward(model, vision, packed, seen_by=depth).logits, packed)
            row.update(type for type, good in zip(types, chain(*results), strict=True) if good)
    questions = {type: total[type] for type in TYPES if total[type]}
    return [{type: row[type] / count for type, count in questions.items()} for row in right], questions


def as_markdown(rows: list[dict[str, float]], questions: dict[str, int]) -> str:
    """A row for each number of layers that see the vision tokens, from 0."""
    types = list(questions)
    lines = [f"| layers with vision | mean | {' | '.join(types)} |", "|---" * (len(types) + 2) + "|"]
    for depth, row in enumerate(rows):
        cells = [sum(row.values()) / len(row), *row.values()]
        lines.append(f"| {depth} | " + " | ".join(f"{cell:.1%}" for cell in cells) + " |")
    lines.append("| questions | " + " | ".join(str(n) for n in (sum(questions.values()), *questions.values())) + " |")
    return "\n".join(lines)
