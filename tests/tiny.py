"""Tiny random models, their inputs, and the places of tokens for a reference that masks instead of removing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

import visiontrim as vt
from visiontrim.core.method import VisionOutput
from visiontrim.core.trace import Trace
from visiontrim.promises import Masked as Masked  # what tests of removal compare with

PAD, BOS, IMAGE, VOCABULARY = 0, 1, 4, 200
SIDE = 4
PATCHES = SIDE * SIDE
LAYERS = 5
ANSWER = 4
"""Tokens: of the prefill, of a step that shows what steps need, and of two that rely on it."""

PLANS = {
    "vision": vt.Random(keep=6),
    "language": vt.Random(keep=5, layer=2),
    "both": vt.Random(keep=9) | vt.Random(keep=4, layer=1) | vt.Random(keep=2, layer=3),
}
ROWS = {
    "single": [(3, "image", 5)],
    "batch": [(3, "image", 5), (1, "image", 2, "image", 7), (6,)],
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
every_batch = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def llava(
    attention: str = "sdpa", seed: int = 0, dtype: torch.dtype = torch.float32, tower: str = "clip"
) -> LlavaForConditionalGeneration:
    """A LLaVA of 16 patches and 5 decoder layers, with weights large enough that attention is not flat."""
    torch.manual_seed(seed)
    vision: dict = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 14 * SIDE,
        "patch_size": 14,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, projection_dim=24)
        if tower == "clip"
        else SiglipVisionConfig(**vision, vision_use_head=False),
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=None,
        ),
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
    )
    model = LlavaForConditionalGeneration(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = BOS
    return model


def prompts(*rows: Sequence[int | str], seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A left-padded batch. A row lists numbers of random text tokens and ``"image"``: ``(3, "image", 5)``."""
    generator = torch.Generator().manual_seed(seed)
    sequences, images = [], 0
    for row in rows:
        parts = [torch.tensor([BOS])]
        for part in row:
            if part == "image":
                parts.append(torch.full((PATCHES,), IMAGE))
                images += 1
            else:
                parts.append(torch.randint(10, VOCABULARY, (part,), generator=generator))
        sequences.append(torch.cat(parts))
    width = max(map(len, sequences))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, sequence in enumerate(sequences):
        ids[number, width - len(sequence) :] = sequence
        mask[number, width - len(sequence) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if images:
        pixels = torch.randn(images, 3, 14 * SIDE, 14 * SIDE, generator=generator)
        inputs["pixel_values"] = pixels.to(dtype)
    return inputs


def sample(inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """Row ``row`` of a batch by itself, without padding."""
    real = inputs["attention_mask"][row].bool()
    images = (inputs["input_ids"] == IMAGE).sum(1) // PATCHES
    first = int(images[:row].sum())
    single = {
        "input_ids": inputs["input_ids"][row][real][None],
        "attention_mask": torch.ones(1, int(real.sum())).long(),
    }
    if images[row]:
        single["pixel_values"] = inputs["pixel_values"][first : first + int(images[row])]
    return single


def hidden_places(inputs: dict[str, Tensor], trace: Trace) -> dict[int, Tensor]:
    """For every decoder layer where tokens go, the places [batch, tokens] of the prompt that are gone from there on."""
    is_image = inputs["input_ids"] == IMAGE
    blocks = [list(row.nonzero()[:, 0].split(PATCHES)) for row in is_image]
    hidden: dict[int, Tensor] = {}
    for image in trace.images:
        block = blocks[image.sample].pop(0)
        for stage in image.stages:
            layer = 0 if isinstance(stage.site, VisionOutput) else stage.site.index
            gone = torch.ones(PATCHES, dtype=torch.bool)
            gone[stage.index] = False
            hidden.setdefault(layer, torch.zeros_like(is_image))[image.sample, block[gone]] = True
    return dict(sorted(hidden.items()))


def generate(model, inputs, **options):
    options = {"max_new_tokens": ANSWER, "do_sample": False} | options
    return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)


def close(ours: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance)


def keeps_everything(method, model, inputs) -> None:
    """Assert that with ``keep`` of everything, as a share and as a number, ``method`` is the plain model to the bit."""
    plain = generate(model, inputs)
    for keep in (1.0, PATCHES):
        with vt.trim(model, vt.load_method(method, keep=keep)) as run:
            ours = generate(model, inputs)
        assert run.report.mean == PATCHES
        assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))
