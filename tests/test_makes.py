"""Decoders and encoders of other makes inside LLaVA's wrapper, and what prompts write between an image's rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as hf

import visiontrim as vt
from families import CLIP, HYBRID_LAYERS, IMAGE, LAYERS, SIGLIP, Prompts, build, hidden_places, prepared, words
from fed import fed
from tiny import Masked, close, generate

pytestmark = pytest.mark.usefixtures("no_grad")

LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
MIXED = ["mamba", "attention", "mamba", "attention", "mamba"]
DECODERS: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen3_next": (
        hf.Qwen3NextConfig,
        {"head_dim": 16, "layer_types": HYBRID_LAYERS, "shared_expert_intermediate_size": 32} | EXPERTS | LINEAR,
    ),
    "olmo_hybrid": (hf.OlmoHybridConfig, {"layer_types": HYBRID_LAYERS} | LINEAR),
    "bamba": (hf.BambaConfig, {"attn_layer_indices": [1, 3]} | MAMBA),
    "granitemoehybrid": (
        hf.GraniteMoeHybridConfig,
        {"layer_types": MIXED, "num_local_experts": 0, "shared_intermediate_size": 32} | MAMBA,
    ),
    "olmo2": (hf.Olmo2Config, {}),
    "gpt_neox": (hf.GPTNeoXConfig, {}),
    "mistral": (hf.MistralConfig, {"sliding_window": 64}),
    "gemma3_text": (hf.Gemma3TextConfig, {"head_dim": 16, "sliding_window": 64}),
    "cohere2": (hf.Cohere2Config, {"sliding_window": 64}),
}
"""Text models: linear attention, state spaces, no positions, norms behind the attention, windows."""
PLAN = vt.VisionTrim(keep=0.5) | vt.FastV(layer=3)


def text_of(name: str) -> dict[str, Any]:
    config, options = DECODERS[name]
    return words(config, **options)


def llava(**options: Any) -> Any:
    return prepared(
        hf.LlavaConfig(**{"vision_config": CLIP, "text_config": words(), "image_token_id": IMAGE} | options)
    )


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_left_is_all_that_is_seen(name):
    model, prompts = llava(text_config=text_of(name)), Prompts("llava", (3, "image", 5), (1, "image", 2))
    inputs = prompts.batch()
    with vt.trim(model, PLAN) as run:
        ours = generate(model, inputs, max_new_tokens=3)
    hidden, mask = hidden_places("llava", inputs, run.trace), inputs["attention_mask"].bool()
    assert sorted(hidden) == [0, 3]
    for row in range(2):
        of_row = {layer: places[row, mask[row]] for layer, places in hidden.items()}
        reference = fed(model, prompts.batch(row), of_row, ours.sequences[row, mask.shape[1] :])
        for mine, other in zip(ours.logits, reference, strict=True):
            close(mine[row], other, 2e-5)


@pytest.mark.parametrize("method", ["fastv:layer=3", "visiontrim:stages=both,keep=8,layer=3"])
def test_a_window_that_the_prompt_does_not_fill_is_none(method):
    inputs = Prompts("llava", (3, "image", 5)).batch()
    answers = []
    for window in (None, 64):
        model = llava(text_config=words(hf.MistralConfig, sliding_window=window))
        with vt.trim(model, method):
            answers.append(torch.stack(generate(model, inputs).logits))
    assert torch.equal(*answers)


def test_prompts_longer_than_a_window_have_no_stage_between_layers():
    model = llava(text_config=words(hf.MistralConfig, sliding_window=25))
    with (
        pytest.raises(vt.TrimError, match=r"prompt has 25 tokens, but decoder layer 0 sees the last 25 only"),
        vt.trim(model, "fastv:layer=3"),
    ):
        generate(model, Prompts("llava", (3, "image", 5)).batch())


def test_layers_that_attend_and_recur_at_once_are_refused():
    options = {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    model = llava(text_config=words(hf.FalconH1Config, **options))
    with pytest.raises(vt.TrimError, match="LinearAttentionAndFullAttentionLayer, of which it is not known how"):
        vt.trim(model, "random", keep=0.5)


DINO = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56}
TOWERS: dict[str, dict[str, Any]] = {
    "dinov2": {"vision_config": DINO | {"patch_size": 14, "mlp_ratio": 2}, "vision_feature_layer": -1},
    "clip, with [CLS]": {"vision_feature_select_strategy": "full"},
    "siglip, without its first patch": {"vision_config": SIGLIP},
}
"""Encoders that nothing is known about, or whose tokens are no grid."""


@pytest.mark.parametrize("options", TOWERS.values(), ids=TOWERS)
def test_unknown_encoders_refuse_what_reads_them(options):
    model = llava(**options)
    tokens = {"full": 17, "default": 16}[model.config.vision_feature_select_strategy]
    tokens -= "vision_config" in options and options["vision_config"] is SIGLIP
    ids = torch.tensor([[1, 20, *[IMAGE] * tokens, 30, 31]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    for method in ("random:keep=5", "divprune:keep=5", "random:keep=9 | fastv:keep=[5],layer=2"):
        with vt.trim(model, method, positions="keep") as run:
            ours = generate(model, inputs, max_new_tokens=2)
        hidden = {}
        (image,) = run.trace.images
        assert image.total == tokens
        assert image.grid == ((1, 4, 4) if tokens == 16 else (1, 1, tokens))
        for stage in image.stages:
            layer = getattr(stage.site, "index", 0)
            gone = torch.ones(tokens, dtype=torch.bool)
            gone[stage.index] = False
            hidden[layer] = torch.zeros_like(ids, dtype=torch.bool)
            hidden[layer][0, 2 : 2 + tokens] = gone
        with Masked(model, inputs["attention_mask"], hidden):
            reference = generate(model, inputs, max_new_tokens=2)
        close(torch.stack(ours.logits), torch.stack(reference.logits), 2e-5)
    with pytest.raises(vt.TrimError, match="attention"), vt.trim(model, "visiontrim", keep=5):
        generate(model, inputs)


def granite_vision() -> Any:
    """The shape of granite-vision-3: features of four layers side by side."""
    text = words(hf.GraniteConfig, embedding_multiplier=3.0, attention_multiplier=0.25, residual_multiplier=0.5)
    config = hf.LlavaNextConfig(
        vision_config=SIGLIP | {"num_hidden_layers": 6},
        text_config=text,
        image_token_id=IMAGE,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        vision_feature_layer=[-6, -4, -2, -1],
        vision_feature_select_strategy="full",
    )
    return prepared(config)


@pytest.mark.parametrize(
    "plan", [vt.VisionTrim(keep=20, stages="vision"), vt.DivPrune(keep=20) | vt.FastV(keep=(0.5,), layer=2)]
)
def test_features_of_several_layers(plan):
    model, inputs = granite_vision(), Prompts("llava_next", (3, "image", 5), (1, "image", 2)).batch()
    with vt.trim(model, plan, positions="keep") as run:
        ours = generate(model, inputs, max_new_tokens=3)
    with Masked(model, inputs["attention_mask"], hidden_places("llava_next", inputs, run.trace)):
        reference = generate(model, inputs, max_new_tokens=3)
    close(torch.stack(ours.logits), torch.stack(reference.logits), 2e-5)
    assert run.report.kept_tokens == 20


def test_the_last_of_several_layers_ranks():
    model, inputs = granite_vision(), Prompts("llava_next", (3, "image", 5)).batch()
    with vt.trim(model, vt.VisionTrim(keep=20, stages="vision")) as run:
        generate(model, inputs, max_new_tokens=1)
        first = [stage.index.tolist() for image in run.trace.images for stage in image.stages]
    model.config.vision_feature_layer = [-1, -6, -4, -2]  # the same four
    with vt.trim(model, vt.VisionTrim(keep=20, stages="vision")) as run:
        generate(model, inputs, max_new_tokens=1)
    assert first == [stage.index.tolist() for image in run.trace.images for stage in image.stages]


BREAK, LAST = 12, 13


def written(rows: int, columns: int) -> list[int]:
    """An image as Pixtral's processor writes it."""
    ids = []
    for row in range(rows):
        ids += [*[IMAGE] * columns, LAST if row == rows - 1 else BREAK]
    return ids


@functools.cache
def with_rows(name: str) -> Any:
    return build(name)


@pytest.mark.parametrize(("name", "merge"), [("pixtral", 1), ("mistral3", 2)])
@pytest.mark.parametrize("plan", [vt.Random(keep=3), vt.Random(keep=3, layer=2), vt.Random(keep=1.0)])
def test_ends_of_rows_go_with_their_rows(name, merge, plan):
    """Two images in a prompt, one of them a single row of tokens, and a row with text alone."""
    model, patch = with_rows(name), 14 * merge
    grids = ((3, 2), (1, 4)) if name == "mistral3" else ((4, 8), (1, 7))
    one = [1, 20, *written(*grids[0]), 30, *written(*grids[1]), BREAK, 31]
    ids = torch.tensor([one, [0] * (len(one) - 5) + [1, 40, BREAK, 41, 42]])
    sizes = [(rows * patch, columns * patch) for rows, columns in grids]
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels}
    inputs["image_sizes"] = torch.tensor(sizes)
    plain = generate(model, inputs, max_new_tokens=3)
    with vt.trim(model, plan) as run:
        ours = generate(model, inputs, max_new_tokens=3)
    if plan.keep == 1.0:
        assert all(a.equal(b) for a, b in zip(ours.logits, plain.logits, strict=True))
        assert run.report.kept_tokens == run.report.input_tokens
        return
    assert [image.marks for image in run.trace.images] == [rows for rows, _ in grids]
    assert {image.per_layer[-1] for image in run.trace.images} == {3}
    assert run.trace.cache_lengths[LAYERS - 1] == len(one) - sum(rows * (columns + 1) for rows, columns in grids) + 6
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    start = 2
    for image, (rows, columns) in zip(run.trace.images, grids, strict=True):
        kept = {int(place) + int(place) // columns for place in image.stages[-1].index}
        for place in range(rows * (columns + 1)):
            hidden[0, start + place] = place not in kept
        start += rows * (columns + 1) + 1
    with Masked(model, inputs["attention_mask"], {getattr(plan.site, "index", 0): hidden}):
        reference = generate(model, inputs, max_new_tokens=3)
    close(torch.stack(ours.logits), torch.stack(reference.logits), 2e-5)
