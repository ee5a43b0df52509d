"""The small Qwen2.5-VL that ships with the package, and questions about canvases of any size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoProcessor, ProcessorMixin, Qwen2_5_VLForConditionalGeneration

from visiontrim.zoo.canvas import Grid, draw_canvas, in_square
from visiontrim.zoo.questions import ask
from visiontrim.zoo.suite import HELD_OUT, Sample

QWEN_DIR = Path(__file__).parent / "qwen"
"""A stock Qwen2.5-VL checkpoint (fp16): ``from_pretrained`` takes this path."""

QWEN_PROMPT = "USER: <|vision_start|><image><|vision_end|> {question} ASSISTANT:"
"""What the model was trained on; the processor writes <s> before it and one <image> for each cell."""

QWEN_TYPES = ("color", "shape", "read", "exist", "count", "pos", "rel")
"""The types of questions that it was trained to answer."""


class QwenBundle(NamedTuple):
    """The model and its processor."""

    model: Qwen2_5_VLForConditionalGeneration
    processor: ProcessorMixin


def load_qwen(directory: Path | None = None) -> QwenBundle:
    """Load it with stock transformers classes: float32, CPU, eval mode, a new copy on every call.

    ``directory`` holds another one.

    ==================  ===================================================================================
    image               of any size from 120 to 216 pixels a side, rounded to cells of 12 x 12: R x C vision tokens
    vision tower        Qwen2.5 ViT without [CLS], 6 layers, 4 heads, width 96; patches of 6 pixels, windows of
                        4 x 4 cells, full attention in layers 2 and 5; merger of 2 x 2 patches 384 -> 384 -> 256
    language model      Qwen2.5, 8 layers, 4 heads of 64 on 2 key-value heads, width 256, MLP 256
    prompt              ``QWEN_PROMPT``: 3 tokens, R * C vision tokens, <|vision_end|>, then the question
    processor           images and text, without torchvision; no videos
    ==================  ===================================================================================
    """
    directory = directory or QWEN_DIR
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    return QwenBundle(model, AutoProcessor.from_pretrained(directory))


def held_out_canvases(grid: Grid, num_scenes: int, seed: int = HELD_OUT) -> Iterator[Sample]:
    """Questions about the canvases ``seed``, ``seed + 1``, ... of ``grid``: of every type that it allows, one each.

    ``patch_owner`` of the samples counts cells, in the order of the vision tokens.
    """
    for scene_seed in range(seed, seed + num_scenes):
        scene = draw_canvas(scene_seed, grid)
        objects = in_square(scene.objects, grid)
        for type in QWEN_TYPES:
            question = ask(random.Random(f"{scene_seed} {grid} {type}"), objects, type)
            if question is not None:
                yield Sample(
                    scene_seed,
                    scene.image,
                    question.text,
                    question.answer,
                    type,
                    scene.patch_owner,
                    template=QWEN_PROMPT,
                )
