"""How far down a decoder needs its vision tokens: accuracy on held-out canvases after losing them at some depth."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from visiontrim.zoo.canvas import Grid
from visiontrim.zoo.dynamic import held_out_canvases
from visiontrim.zoo.questions import Question
from visiontrim.zoo.training.decoder import answered
from visiontrim.zoo.training.packing import pack
from visiontrim.zoo.training.qwen.model import forward
from visiontrim.zoo.training.qwen.tower import patches_of, vision_tokens
from visiontrim.zoo.training.symbolic import VisionTokens


@torch.inference_mode()
def accuracy_by_depth(
    model: Qwen2_5_VLForConditionalGeneration, grid: Grid, num_scenes: int, batch_size: int = 10
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Accuracy per type when only the first k decoder layers see the vision tokens, for k = 0 to all; questions a type.

    Packed questions about pixels, all vision tokens: the answers of the stock model, one forward a depth.
    """
    by_scene = itertools.groupby(held_out_canvases(grid, num_scenes), key=lambda sample: sample.scene_seed)
    scenes = [list(samples) for _, samples in by_scene]
    language: Any = model.model.language_model
    right: list[Counter[str]] = [Counter() for _ in range(len(language.layers) + 1)]
    total: Counter[str] = Counter()
    for first in range(0, num_scenes, batch_size):
        batch = scenes[first : first + batch_size]
        features = vision_tokens(model.model.visual, patches_of([samples[0].image for samples in batch], grid), grid)
        cells = torch.arange(grid[0] * grid[1]).expand(len(batch), -1)
        # the decoder reads features and cells alone
        vision = VisionTokens(features, cells, torch.zeros_like(cells), torch.zeros_like(cells, dtype=torch.bool))
        packed = pack([[[Question(s.type, s.question, s.answer)] for s in samples] for samples in batch])
        types = [sample.type for samples in batch for sample in samples]
        total.update(types)
        for depth, counter in enumerate(right):
            results = itertools.chain(*answered(forward(model, vision, grid, packed, seen_by=depth).logits, packed))
            counter.update(type for type, good in zip(types, results, strict=True) if good)
    return [{type: row[type] / total[type] for type in total} for row in right], dict(total)
