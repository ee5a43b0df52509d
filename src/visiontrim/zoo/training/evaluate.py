"""How a decoder does on held-out symbolic scenes, with all its vision tokens and after losing them at some depth."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain

import torch
from transformers import LlamaForCausalLM

from visiontrim.zoo.questions import TYPES, Question, ask
from visiontrim.zoo.scenes import Scene, draw_scene
from visiontrim.zoo.suite import HELD_OUT
from visiontrim.zoo.training.decoder import answered, forward
from visiontrim.zoo.training.packing import pack
from visiontrim.zoo.training.symbolic import SceneFacts, choose_patches, symbolic_tokens


def questions_about(scene_seed: int, scene: Scene) -> list[Question]:
    """The questions that ``zoo.held_out`` asks about this scene: one of each type that it allows."""
    asked = (ask(random.Random(f"{scene_seed} {type}"), scene.objects, type) for type in TYPES)
    return [question for question in asked if question is not None]


@torch.inference_mode()
def accuracy_by_depth(
    model: LlamaForCausalLM, num_scenes: int, vision_tokens: int, batch_size: int = 50
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Accuracy per type when only the first k decoder layers see the vision tokens, for k = 0 to all; questions a type.

    The tokens carry no noise: the centre of every object, then other patches.
    """
    depths = range(len(model.model.layers) + 1)
    right: list[Counter[str]] = [Counter() for _ in depths]
    total: Counter[str] = Counter()
    for first in range(0, num_scenes, batch_size):
        seeds = range(HELD_OUT + first, HELD_OUT + min(first + batch_size, num_scenes))
        scenes = [draw_scene(seed) for seed in seeds]
        packed = pack([questions_about(seed, scene) for seed, scene in zip(seeds, scenes, strict=True)])
        facts = SceneFacts.of(scenes)
        patches = choose_patches(facts, vision_tokens, torch.Generator().manual_seed(first))
        vision = symbolic_tokens(facts, patches, model.model.embed_tokens.weight)
        types = [question.type for asked in packed.questions for question in asked]
        total.update(types)
        for depth in depths:
            results = answered(forward(model, vision, packed, seen_by=depth).logits, packed)
            right[depth].update(type for type, good in zip(types, chain(*results), strict=True) if good)
    return [{type: row[type] / total[type] for type in TYPES if total[type]} for row in right], dict(total)


def as_markdown(rows: list[dict[str, float]], questions: dict[str, int]) -> str:
    """A row for each number of layers that see the vision tokens."""
    types = list(questions)
    lines = [f"| layers with vision | mean | {' | '.join(types)} |", "|---" * (len(types) + 2) + "|"]
    for depth, row in enumerate(rows):
        cells = [sum(row.values()) / len(row), *row.values()]
        lines.append(f"| {depth} | " + " | ".join(f"{cell:.1%}" for cell in cells) + " |")
    lines.append("| questions | " + " | ".join(str(n) for n in (sum(questions.values()), *questions.values())) + " |")
    return "\n".join(lines)
