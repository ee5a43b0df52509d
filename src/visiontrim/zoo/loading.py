"""The model that ships, loaded with stock transformers classes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from visiontrim.models import TextTower

MODEL_DIR = Path(__file__).parent / "llava"
"""A stock LLaVA checkpoint (fp16): ``from_pretrained`` takes this path."""
CLIP_DIR = Path(__file__).parent / "clip"
"""A stock CLIP checkpoint (fp16); its vision tower is identical to the one of the LLaVA."""


NATURAL_DIR = Path(__file__).parent / "natural"
"""The LLaVA of natural scenes and its CLIP, in the same form: ``NATURAL_DIR / "llava"`` is a stock checkpoint."""


class Bundle(NamedTuple):
    """A bundled model and the text tower that belongs to its vision tower."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    text_tower: TextTower


def load(directory: Path | None = None) -> Bundle:
    """Load the bundled model with stock transformers classes: float32, CPU, eval mode, a new copy on every call.

    ``directory`` holds another one, as ``llava`` and ``clip``; that of natural scenes is in ``NATURAL_DIR``, has the
    same shape and three words more.

    ==================  ===================================================================================
    image               192 x 192, any other picture is resized to it; 24 x 24 patches of 8 pixels
    vision tower        CLIP ViT with [CLS], 6 layers, 4 heads, width 128; features of layer -2: [B, 576, 128]
    projector           MLP 128 -> 192 -> 192
    language model      Llama, 8 layers, 3 heads of 64, width 192, MLP 256, 66 words
    prompt              ``PROMPT``: 2 tokens, 576 vision tokens, then the question from position 578
    text tower          CLIP, 2 layers, 4 heads, width 128, at most 40 tokens; joint space of width 96
    ==================  ===================================================================================
    """
    llava, clip = (MODEL_DIR, CLIP_DIR) if directory is None else (directory / "llava", directory / "clip")
    return Bundle(
        LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval(),
        LlavaProcessor.from_pretrained(llava),
        TextTower.from_pretrained(clip, dtype=torch.float32),
    )
