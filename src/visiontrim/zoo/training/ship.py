"""The checkpoints of training as the directories that ship: stock LLaVA and CLIP in float16, with their processors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from visiontrim.zoo.questions import WORDS
from visiontrim.zoo.scenes import PATCH, SIZE
from visiontrim.zoo.training.decoder import DecoderShape, new_decoder
from visiontrim.zoo.training.joint import Eyes
from visiontrim.zoo.training.symbolic import WORD_ID
from visiontrim.zoo.training.tower import MEAN, STD, vision_config

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{- 'ASSISTANT: ' -}}{%- else -%}{{- 'USER: ' -}}{%- endif -%}
{%- if message.content is string -%}
{{- message.content + ' ' -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<image> ' -}}{%- else -%}{{- part.text + ' ' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message.role == 'assistant' -%}{{- '</s> ' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
"""Writes what ``Sample.prompt`` writes."""


def assemble(model: LlamaForCausalLM, eyes: Eyes) -> LlavaForConditionalGeneration:
    """Decoder, projector and vision tower in one stock model."""
    config = LlavaConfig(
        vision_config=vision_config().to_dict(),
        text_config=model.config.to_dict(),
        image_token_index=WORD_ID["<image>"],
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    llava = LlavaForConditionalGeneration(config)
    whole: Any = llava.model
    whole.language_model.load_state_dict(model.model.state_dict())
    whole.multi_modal_projector.load_state_dict(eyes.projector.state_dict())
    whole.vision_tower.load_state_dict(eyes.clip.vision_model.state_dict())
    llava.lm_head.load_state_dict(model.lm_head.state_dict())
    llava.generation_config.bos_token_id = WORD_ID["<s>"]
    llava.generation_config.eos_token_id = WORD_ID["</s>"]
    llava.generation_config.pad_token_id = WORD_ID["<pad>"]
    return llava.eval()


def tokenizer(
    end: str, append_end: bool, padding_side: str, vocabulary: Sequence[str] = WORDS
) -> PreTrainedTokenizerFast:
    """One token a word; an unknown word is padding. A text begins with <s>, and ends with ``end`` if asked for."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    marks = ["<s>", *([end] if append_end else [])]
    words.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"<s> $A {end}" if append_end else "<s> $A", special_tokens=[(mark, WORD_ID[mark]) for mark in marks]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token=end,
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens=["<image>"],
        padding_side=padding_side,
    )


def ship(model: LlamaForCausalLM, eyes: Eyes, directory: Path, vocabulary: Sequence[str] = WORDS) -> None:
    """Write ``directory``/llava and ``directory``/clip, which ``from_pretrained`` reads."""
    images = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE},
        do_resize=True,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[STD / 255] * 3,
        do_convert_rgb=True,
    )
    assert MEAN / 255 == 0.5
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer("</s>", append_end=False, padding_side="left", vocabulary=vocabulary),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    assemble(model, eyes).half().save_pretrained(directory / "llava")
    processor.save_pretrained(directory / "llava")
    eyes.clip.half().save_pretrained(directory / "clip")
    words = tokenizer("<eot>", append_end=True, padding_side="right", vocabulary=vocabulary)
    words.save_pretrained(directory / "clip")
    images.save_pretrained(directory / "clip")


def load_decoder(shape: DecoderShape, *states: dict[str, Any], share: float = 1.0) -> LlamaForCausalLM:
    """The decoder with the weights of the first state, or their mean with those of the second one."""
    model = new_decoder(shape, torch.Generator().manual_seed(0))
    if len(states) == 1:
        model.load_state_dict(states[0])
    else:
        first, second = states
        model.load_state_dict({name: share * first[name] + (1 - share) * second[name] for name in first})
    return model
