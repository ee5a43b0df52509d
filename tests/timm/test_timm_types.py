"""FastVLM, PerceptionLM and Gemma 3n, with tiny encoders of timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import visiontrim as vt
from families import END, IMAGE, START, VIDEO, prepared, words
from model_types import RUN_TIMM
from releases import CACHE, cache_of
from shrunk import difference, hidden_of, together
from tiny import Masked, close, generate
from visiontrim.models import family_of

pytestmark = pytest.mark.usefixtures("no_grad")


def _fast_vlm() -> Any:
    arguments = {"inference_mode": True, "layers": [1, 1, 1, 1], "embed_dims": [16, 16, 16, 64]}
    vision: dict[str, Any] = {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci0",
        "hidden_size": 128,
        "do_pooling": True,
    }
    vision |= {"global_pool": "avg", "model_args": arguments}
    return hf.FastVlmConfig(vision_config=vision, text_config=words(hf.Qwen2Config), image_token_index=IMAGE)


def _perception_lm() -> Any:
    arguments = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [64, 64], "global_pool": ""}
    vision: dict[str, Any] = {
        "model_type": "timm_wrapper",
        "architecture": "vit_pe_core_tiny_patch16_384",
        "do_pooling": False,
    }
    tokens: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    return hf.PerceptionLMConfig(vision_config=vision | {"model_args": arguments}, text_config=words(), **tokens)


def _gemma3n() -> Any:
    """Its last two decoder layers use keys and values of earlier ones, as those of the checkpoints do."""
    vision: dict[str, Any] = {"model_type": "gemma3n_vision", "architecture": "mobilenetv5_300m_enc", "vocab_size": 8}
    vision |= {"vocab_offset": 200, "model_args": {"channel_multiplier": 0.1, "msfa_output_resolution": 4}}
    layers = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    text: dict[str, Any] = {
        "head_dim": 16,
        "sliding_window": 64,
        "layer_types": layers,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
    }
    text |= {"vocab_size_per_layer_input": 200, "hidden_size_per_layer_input": 8, "intermediate_size": 64}
    text |= {"activation_sparsity_pattern": [0.0] * 5}
    audio: dict[str, Any] = {"vocab_size": 8, "vocab_offset": 208, "hidden_size": 32, "conf_num_hidden_layers": 1}
    audio |= {"conf_num_attention_heads": 2, "sscp_conv_channel_size": [8, 8]}
    tokens: dict[str, Any] = {"image_token_id": IMAGE, "audio_token_id": 7, "vision_soft_tokens_per_image": 16}
    text = words(hf.Gemma3nTextConfig, **text)
    return hf.Gemma3nConfig(vision_config=vision, text_config=text, audio_config=audio, **tokens)


CONFIGS: dict[str, tuple[Callable[[], Any], tuple[int, ...], int]] = {
    "fast_vlm": (_fast_vlm, (3, 64, 128), 8),
    "gemma3n": (_gemma3n, (3, 64, 64), 16),
    "perception_lm": (_perception_lm, (1, 3, 64, 64), 16),
}
"""By type how it is made, the shape of one image, and its tokens."""


def built(name: str) -> Any:
    """The model; timm's own first weights would let next to nothing of an image through."""
    model = prepared(CONFIGS[name][0]())
    if name != "perception_lm":
        for module in model.model.vision_tower.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return model


def prompts(name: str) -> list[dict[str, Tensor]]:
    """A row with an image, and one with two."""
    _, shape, tokens = CONFIGS[name]
    generator, rows = torch.Generator().manual_seed(1), []
    for images in (1, 2):
        ids = [1, 20, 21]
        for number in range(images):
            ids += [START, *[IMAGE] * tokens, END, 30 + number]
        rows.append({"input_ids": torch.tensor([[*ids, 40, 41]])})
        rows[-1]["pixel_values"] = torch.randn(images, *shape, generator=generator)
    return rows


def test_these_are_all():
    assert set(CONFIGS) == set(RUN_TIMM)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_removed_is_unseen(name):
    """A padded batch with three images, its rows, and a second turn."""
    model, rows = built(name), prompts(name)
    family, batch = family_of(model), together(model, rows)
    plan = vt.Random(keep=0.5)
    method = plan if name == "gemma3n" else plan | vt.Random(keep=0.5, layer=3)
    plain = generate(model, batch, max_new_tokens=2)
    with vt.trim(model, method) as run:
        ours = generate(model, batch, max_new_tokens=2)
    assert difference(model, family, batch, ours, run.trace) < 2e-5
    assert (ours.logits[0] - plain.logits[0]).abs().max() > 0.01
    assert [image.per_layer[0] for image in run.trace.images] == [CONFIGS[name][2] // 2] * 3
    with vt.trim(model, vt.Random(keep=1.0)):
        whole = generate(model, batch, max_new_tokens=2)
    assert all(a.equal(b) for a, b in zip(whole.logits, plain.logits, strict=True))
    with vt.trim(model, method) as run:
        alone = [generate(model, together(model, [row]), max_new_tokens=2) for row in rows]
        for number, single in enumerate(alone):
            close(ours.logits[0][number], single.logits[0][0], 2e-5)
        hidden = hidden_of(model, family, rows[-1]["input_ids"], run.trace)
        asked = torch.cat([alone[-1].sequences, torch.tensor([[50, 51, 52]])], 1)
        everything = together(model, [rows[-1] | {"input_ids": asked}]) | {"attention_mask": torch.ones_like(asked)}
        later = {key: value for key, value in everything.items() if key != "pixel_values"}
        second = generate(model, later | {CACHE: cache_of(alone[-1])}, max_new_tokens=2)
    with Masked(model, torch.ones_like(rows[-1]["input_ids"]), hidden):
        reference = generate(model, everything, max_new_tokens=2)
    close(second.logits[0], reference.logits[0], 2e-5)


def test_shared_keys_and_values_have_no_stage_between_layers():
    with pytest.raises(vt.TrimError, match=r"use the keys and values of earlier layers.*use a method's vision stage"):
        vt.trim(built("gemma3n"), vt.Random(keep=0.5, layer=1))


def test_videos_of_perception_lm_are_refused():
    """They are encoded by the function for images, which the engine cannot tell apart."""
    model, (row, _) = built("perception_lm"), prompts("perception_lm")
    inputs = together(model, [row])
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    with vt.trim(model, "random", keep=0.5), pytest.raises(vt.TrimError, match="send the frames as images"):
        model(**inputs)
