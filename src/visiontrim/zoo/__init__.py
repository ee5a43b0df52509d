"""The small vision-language model that ships with the package, and the scenes and questions that test it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from visiontrim.models import TextTower
from visiontrim.zoo.questions import TYPES, Question, ask, normalise
from visiontrim.zoo.scenes import Object, Scene, draw_scene
from visiontrim.zoo.suite import HELD_OUT, PROMPT, Sample, answer, held_out

__all__ = [
    "CLIP_DIR",
    "HELD_OUT",
    "MODEL_DIR",
    "PROMPT",
    "TYPES",
    "Bundle",
    "Object",
    "Question",
    "Sample",
    "Scene",
    "answer",
    "ask",
    "draw_scene",
    "held_out",
    "load",
    "normalise",
]

MODEL_DIR = Path(__file__).parent / "llava"
"""A stock LLaVA checkpoint (fp16): ``from_pretrained`` takes this path."""
CLIP_DIR = Path(__file__).parent / "clip"
"""A stock CLIP checkpoint (fp16); its vision tower is identical to the one of the LLaVA."""


class Bundle(NamedTuple):
    """The bundled model and the text tower that belongs to its vision tower."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    text_tower: TextTower


def load() -> Bundle:
    """Load the bundled model with stock transformers classes: float32, CPU, eval mode, a new copy on every call.

    ==================  ===================================================================================
    image               192 x 192, any other picture is resized to it; 24 x 24 patches of 8 pixels
    vision tower        CLIP ViT with [CLS], 6 layers, 4 heads, width 128; features of layer -2: [B, 576, 128]
    projector           MLP 128 -> 192 -> 192
    language model      Llama, 5 layers, 3 heads of 64, width 192, MLP 384, 63 words
    prompt              ``PROMPT``: 2 tokens, 576 vision tokens, then the question from position 578
    text tower          CLIP, 2 layers, 4 heads, width 128, at most 40 tokens; joint space of width 96
    ==================  ===================================================================================
    """
    return Bundle(
        LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32).eval(),
        LlavaProcessor.from_pretrained(MODEL_DIR),
        TextTower.from_pretrained(CLIP_DIR, dtype=torch.float32),
    )
