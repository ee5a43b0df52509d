"""A tiny model of any type for images and text, from its own default configuration, with prompts that fit it.

Sizes are cut down by their names, and lists with an entry for every layer to as many; how many tokens an image becomes
is asked of the model. So a new release of transformers needs no new configurations here, but where ``CHANGES`` says so.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import pad

from fed import fed
from tiny import Masked, generate

IMAGE, VIDEO, START, END, LAYERS = 3, 4, 5, 6, 5
SIZES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size", "embed_dim", "mlp_dim", "ffn_dim"), 64),
    **dict.fromkeys(("d_model", "projector_hidden_size", "projection_dim", "mm_hidden_size", "text_hidden_size"), 64),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "num_experts_per_tok", "depth"), 2),
    **dict.fromkeys(("num_layers", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "num_position_embeddings"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 200),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "encoder_layers", "bos_token_id"), 1),
    **dict.fromkeys(("hidden_size_per_layer_input", "pad_token_id"), 0),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id"), START),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id"), END),
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO),
    "linear_num_value_heads": 4,
    "num_hidden_layers": LAYERS,
    "image_size": 56,
    "patch_size": 14,
    "max_position_embeddings": 512,
    "sliding_window": 100,
    "audio_token_id": 7,
    "encoder_attention_heads": 4,
}
_AUDIO = {"encoder_attention_heads": 4, "n_window": 10, "output_dim": 64, "max_source_positions": 100}
_MARKS = {"vision_start_token_id": START, "vision_end_token_id": END}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_MINICPM: dict[str, dict[str, Any]] = {"": {"image_token_id": IMAGE}}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma4": {
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
        }
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "position_embedding_size": 50},
        "text_config": {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]},
    },
    "qwen2_5_omni_thinker": {"audio_config": _AUDIO, "text_config": {"rope_parameters": _MROPE}, "": _MARKS},
    "qwen3_omni_moe_thinker": {"audio_config": _AUDIO, "text_config": {"rope_parameters": _MROPE}, "": _MARKS},
    "aria": {"": {"projector_patch_to_query_dict": {16: 4}}},
    "glmga": {"text_config": {"rope_parameters": _MROPE}},
    "got_ocr2": {"vision_config": {"image_size": 256, "patch_size": 16}},
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "pp_chart2table": {"vision_config": {"image_size": 256, "patch_size": 16}},
    "shieldgemma2": {"": {"mm_tokens_per_image": 4}},
}
"""By type and part ("" is the whole), what its default configuration needs beside."""


def shrunk(config: Any, changes: dict[str, Any], part: str = "") -> dict[str, Any]:
    """The configuration as a dictionary, cut down."""
    told = config.to_dict()
    layers = told.get("num_hidden_layers")
    wanted = LAYERS if part in ("", "text_config") else 3
    small: dict[str, Any] = {}
    for name, value in told.items():
        if isinstance(value, dict) and name.endswith("config") and hasattr(getattr(config, name, None), "to_dict"):
            value = shrunk(getattr(config, name), changes, name)
        elif isinstance(value, list) and layers and len(value) == layers:
            value = _cut(value, wanted)
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            value = wanted if name == "num_hidden_layers" else SIZES[name]
        small[name] = None if name == "eos_token_id" else value
    small.pop("per_layer_config", None)
    small |= changes.get(part, {})
    parts = {name: changes[name] for name in changes if part == "" and name and not isinstance(small.get(name), dict)}
    return small | parts


def _cut(values: list, wanted: int) -> list:
    """The first entries, with the kinds that come later in place of the last."""
    later = [value for value in dict.fromkeys(map(str, values)) if value not in map(str, values[:wanted])]
    named = {str(value): value for value in values}
    return values[: wanted - len(later)] + [named[value] for value in later] if len(later) < wanted else values[:wanted]


def built(name: str) -> Any:
    """The model, with random weights large enough that attention is not flat."""
    default = hf.AutoConfig.for_model(name)
    config = type(default)(**shrunk(default, CHANGES.get(name, {})))
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
            if not parameter.isfinite().all():  # left as it came
                parameter.zero_()
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = 0, 1
    model.generation_config.eos_token_id = None
    return model


def pixels_of(model: Any, number: int) -> dict[str, Tensor]:
    """An image as the processor would give it: where any size goes, a square one and a long one by turns."""
    names = signature(model.model.get_image_features).parameters
    vision, generator = model.config.vision_config, torch.Generator().manual_seed(number)
    patch = getattr(vision, "patch_size", 14)
    patch = patch if isinstance(patch, int) else patch[0]
    if "image_grid_thw" in names:
        rows, columns = (4, 4) if number % 2 else (2, 16)
        values = 3 * getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1)) * patch**2
        square = model.config.model_type in ("kimi_k25", "paddleocr_vl")
        shape = (rows * columns, *((3, patch, patch) if square else (values,)))
        given = {"image_grid_thw": torch.tensor([[1, rows, columns]])}
        if "image_merge_sizes" in names:
            given["image_merge_sizes"] = torch.tensor([2])
        return {"pixel_values": torch.randn(shape, generator=generator)} | given
    if "image_position_ids" in names:  # patches of 4 x 3 or 2 x 6 units in a padded row
        factor = vision.pooling_kernel_size
        rows, columns = (2 * factor, 3 * factor) if number % 2 else (factor, 4 * factor)
        places = torch.full((6 * factor**2 + factor**2, 2), -1)
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
        places[: len(grid)] = grid
        values = torch.rand(1, len(places), 3 * patch**2, generator=generator)
        return {"pixel_values": values, "image_position_ids": places[None]}
    side = getattr(vision, "image_size", 56)
    side = side if isinstance(side, int) else side[0]
    given = {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}
    if "target_sizes" in names:  # patches in one row
        rows, columns = (4, 4) if number % 2 else (4, 8)
        given = {"pixel_values": torch.randn(1, 3, patch, rows * columns * patch, generator=generator)}
        given["target_sizes"] = torch.tensor([[rows, columns]])
    return given


def prompts(model: Any) -> list[dict[str, Tensor]]:
    """Rows without padding: one with an image, one with two."""
    rows, number = [], 0
    token = getattr(model.config, "image_token_id", IMAGE)
    for images in (1, 2):
        ids, given = [1, 20, 21], []
        for _ in range(images):
            given.append(pixels_of(model, number))
            number += 1
            with torch.no_grad():
                features = model.model.get_image_features(**given[-1]).pooler_output
            parts = [features] if isinstance(features, Tensor) else list(features)
            count = sum(part.shape[:-1].numel() for part in parts)
            ids += [START, *[token] * count, END, 30 + number]
        row = {"input_ids": torch.tensor([[*ids, 40, 41]])}
        row |= {key: torch.cat([one[key] for one in given]) for key in given[0]}
        rows.append(row)
    return rows


def together(model: Any, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows as one batch, padded at the left."""
    width = max(row["input_ids"].shape[1] for row in rows)
    ids = torch.cat([pad(row["input_ids"], (width - row["input_ids"].shape[1], 0)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    batch |= {key: torch.cat([row[key] for row in rows]) for key in rows[0] if key != "input_ids"}
    named = signature(type(model).forward).parameters
    kinds = (ids == getattr(model.config, "image_token_id", IMAGE)).long()
    return batch | {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in named}


def hidden_of(model: Any, family: Any, ids: Tensor, trace: Any) -> dict[int, Tensor]:
    """By decoder layer the places that are gone from there on."""
    hidden: dict[int, Tensor] = {}
    places = [row.nonzero()[:, 0] for row in family.placeholders(ids)]
    taken = [0] * len(ids)
    for image in trace.images:
        block = places[image.sample][taken[image.sample] :][: image.total]
        taken[image.sample] += image.total
        for stage in image.stages:
            layer = getattr(stage.site, "index", 0)
            gone = torch.ones(image.total, dtype=torch.bool)
            gone[stage.index] = False
            hidden.setdefault(layer, torch.zeros_like(ids, dtype=torch.bool))[image.sample, block[gone]] = True
    return dict(sorted(hidden.items()))


def difference(model: Any, family: Any, rows: list[dict[str, Tensor]], ours: Any, trace: Any) -> float:
    """How far the logits are from those of the plain model that is kept from seeing, or fed without, what is gone."""
    batch = together(model, rows)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    hidden = hidden_of(model, family, ids, trace)
    if not family.recurrent:
        with Masked(model, mask, hidden):
            reference = generate(model, batch, max_new_tokens=len(ours.logits))
        return float((torch.stack(ours.logits) - torch.stack(reference.logits)).abs().max())
    worst = 0.0
    for number, row in enumerate(rows):
        of_row = {layer: places[number, mask[number]] for layer, places in hidden.items()}
        alone = together(model, [row])
        reference = torch.stack(fed(model, alone, of_row, ours.sequences[number, ids.shape[1] :]))
        worst = max(worst, float((torch.stack(ours.logits)[:, number] - reference).abs().max()))
    return worst
