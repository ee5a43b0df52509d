"""The last step: a trained model as a folder that stock transformers loads, weights in float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PaddleOCRVLProcessor, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from visiontrim.zoo.canvas import CELL
from visiontrim.zoo.training.qwen.model import TOKEN_ID, QwenShape, new_model
from visiontrim.zoo.training.qwen.tower import MEAN, STD

SMALLEST, LARGEST = 8 * 8, 20 * 20
"""Cells of an image; larger and smaller ones are resized."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- message.role | upper + ': ' -}}
{%- if message.content is string -%}
{{- message.content + ' ' -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><image><|vision_end|> ' -}}
{%- else -%}
{{- part.text + ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


VIDEO_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{- '<|vision_start|><image><|vision_end|> ' -}}",
    """\
{%- if loop.first -%}{{- '<|vision_start|>' -}}{%- endif -%}
{{- '<image>' -}}
{%- if loop.last or loop.nextitem.type != 'image' -%}{{- '<|vision_end|> ' -}}{%- endif -%}""",
)
"""Pictures are the frames of one video."""


def new_processor(template: str = CHAT_TEMPLATE) -> PaddleOCRVLProcessor:
    """An image processor, a word-level tokenizer and a stock processor for both.

    The processor is the one of PaddleOCR-VL: it does with images what the one of Qwen2.5-VL does, but can be had
    without a video processor, and so without torchvision.
    """
    words = Tokenizer(WordLevel(TOKEN_ID, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    words.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", TOKEN_ID["<s>"])]
    )
    special: dict[str, Any] = {
        "image_token": "<image>",
        "video_token": "<video>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        padding_side="left",
        extra_special_tokens=special,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=CELL // 2,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        size={"shortest_edge": SMALLEST * CELL**2, "longest_edge": LARGEST * CELL**2},
    )
    return PaddleOCRVLProcessor(images, tokenizer, chat_template=template)


def video_model(model: Any) -> Any:
    """The model with a time step of one position a frame, and room for clips."""
    model.config.vision_config.tokens_per_second = 1
    model.config.text_config.max_position_embeddings = 4096
    return model.eval()


def assemble(shape: QwenShape, vision: Path, joint: Path) -> Any:
    """One model from checkpoints: the vision tower of stage B, merger and decoder of the joint stage."""
    model = new_model(shape, torch.Generator().manual_seed(0))
    whole: Any = model.model
    whole.visual.load_state_dict(torch.load(vision, weights_only=True)["visual"])
    learned = torch.load(joint, weights_only=True)
    parts = (("merger", whole.visual.merger), ("text", whole.language_model), ("head", model.lm_head))
    for name, module in parts:
        module.load_state_dict(learned[name])
    return model.eval()


def ship(model: Any, directory: Path, template: str = CHAT_TEMPLATE) -> None:
    """Write ``config.json``, ``model.safetensors`` and the files of the processor into ``directory``."""
    model.generation_config.eos_token_id = TOKEN_ID["</s>"]
    model.generation_config.pad_token_id = TOKEN_ID["<pad>"]
    model.to(torch.float16).save_pretrained(directory)
    new_processor(template).save_pretrained(directory)
