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

from fed import entering, following
from shrunk_images import of_batch, of_row, pixels_of
from tiny import Masked, generate
from visiontrim.models import family_of

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
_SAM = {"image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "output_channels": 64}
_QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4}
_KINDS = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
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
    "apertus1p5": {
        "": {"image_token_offset": 20, "audio_token_offset": 84},
        "text_config": {"num_key_value_heads": 2},
        "vision_config": {"codebook_size": 64, "embed_dim": 16, "latent_channels": 16, "base_channels": 32}
        | {"channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "resolution": 16},
        "audio_config": {"hidden_size": 16, "codebook_dim": 16, "codebook_size": 16},
    },
    "aria": {"": {"projector_patch_to_query_dict": {16: 4}}},
    "chameleon": {
        "": {
            "image_token_id": IMAGE,
            "vocabulary_map": {"<image>": IMAGE} | {f"IMGIMG{chr(65 + n)}Z": 100 + n for n in range(10)},
        },
        "vq_config": {"num_embeddings": 10, "embed_dim": 16, "latent_channels": 16, "resolution": 32}
        | {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    },
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _MROPE}, "num_key_value_heads": 2},
        "vision_config": {"deepstack_visual_indexes": [1, 2]},
    },
    "cosmos3_edge": {"text_config": {"rope_parameters": _MROPE}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1), "num_key_value_heads": 2}
        | {"n_shared_experts": 1, "num_experts_per_tok": 2},
        "sam_config": {**_SAM, "downsample_channels": [32, 64], "mlp_dim": 64},
        "encoder_config": {"vocab_size": 10},
    },
    "deepseek_vl_hybrid": {
        "high_res_vision_config": {
            "image_size": 64,
            "patch_size": 16,
            "global_attn_indexes": [1],
            "output_channels": 64,
        }
    },
    "diffusion_gemma": {"text_config": {"moe_intermediate_size": 64, "top_k_experts": 2, "num_experts": 4}},
    "emu3": {
        "": {
            "image_token_id": IMAGE,
            "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 7}
            | {f"<|visual token {n:06d}|>": 100 + n for n in range(10)},
        },
        "vq_config": {"codebook_size": 10, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
        | {"attn_resolutions": [], "num_attention_heads": 1, "hidden_size": 32},
    },
    "ernie4_5_vl_moe": {
        "": {"image_start_token_id": START, "image_end_token_id": END, "video_start_token_id": 7}
        | {"video_end_token_id": 8},
        "text_config": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [64, 32]}
        | {"moe_num_shared_experts": 1, "rope_parameters": _MROPE | {"mrope_section": [3, 3, 2]}},
    },
    "gemma4_unified": {
        "vision_config": {"model_type": "gemma4_unified_vision", "mm_embed_dim": 64, "mm_posemb_size": 50}
        | {"output_proj_dims": 64},
        "text_config": {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]},
    },
    "glmga": {"text_config": {"rope_parameters": _MROPE}},
    "got_ocr2": {"vision_config": {"image_size": 256, "patch_size": 16}},
    "granite_docling": {
        "vision_config": {"image_size": 56, "patch_size": 7, "deepstack_visual_indexes": [0, 1]},
        "text_config": {"num_key_value_heads": 2, "embedding_multiplier": 1.0, "attention_multiplier": 0.25}
        | {"residual_multiplier": 1.0, "logits_scaling": 1.0},
    },
    "granite4_vision": {
        "": {
            "image_grid_pinpoints": [[56, 112], [112, 56]],
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[0, 0], [1, 1]],
            "spatial_target_layers": [1, 2, 2, 3],
        },
    },
    "hunyuan_vl": {
        "text_config": {"rope_parameters": _MROPE | {"mrope_section": [2, 2, 2, 2]}, "head_dim": 16}
        | {"num_key_value_heads": 2},
    },
    "idefics2": {
        "perceiver_config": {"resampler_n_latents": 6, "resampler_depth": 1, "resampler_n_heads": 4}
        | {"resampler_head_dim": 16, "num_key_value_heads": 2},
    },
    "kimi_k25": {"": {"projection_hidden_size": 64}, "text_config": {"head_dim": 8, "num_key_value_heads": 4}},
    "molmo2": {
        "": {"image_patch_id": IMAGE},
        "adapter_config": {"vision_feature_layer": [2, 1], "num_key_value_heads": 4},
        "vision_config": {"image_size": [56, 56], "num_position_embeddings": 16, "num_key_value_heads": 4},
    },
    "muse_glimmer": {"": {"out_hidden_size": 256}},
    "muse_spark": {"": {"out_hidden_size": 256}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen3_omni_moe": {
        "text_config": {"shared_expert_intermediate_size": 64},
        "talker_config": {"spatial_merge_size": 2},
    },
    "qwen4_exp": {
        "text_config": {"rope_parameters": _MROPE | {"mrope_interleaved": True}, "indexer_compress_ratio": 2, **_QSA},
    },
    "step3p7": {"text_config": {"sliding_window": 100}, "vision_config": {"image_size": 224}},
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": {"": {"image_token_id": IMAGE, "insert_layer_id": 1}},
    "minicpmv4_7": {"": {"image_token_id": IMAGE, "insert_layer_id": 1}},
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


def configuration(name: str, changes: dict[str, Any] | None = None) -> Any:
    """The type's default one, cut down, with its ``CHANGES`` or others."""
    default = hf.AutoConfig.for_model(name)
    return type(default)(**shrunk(default, CHANGES.get(name, {}) if changes is None else changes))


def built(name: str, changes: dict[str, Any] | None = None) -> Any:
    """The model, with random weights large enough that attention is not flat."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(configuration(name, changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
            if not parameter.isfinite().all():  # left as it came
                parameter.zero_()
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = 0, 1
    model.generation_config.eos_token_id = None
    return model


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
                features = getattr(model.model.get_image_features(**given[-1]), family_of(model).features)
            parts = [features] if isinstance(features, Tensor) else list(features)
            count = sum(part.shape[:-1].numel() for part in parts)
            ids += [START, *[token] * count, END, 30 + number]
        row = {"input_ids": torch.tensor([[*ids, 40, 41]])}
        row |= {key: of_row(key, given) for key in given[0]}
        rows.append(row)
    return rows


def together(model: Any, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows as one batch, padded at the left."""
    width = max(row["input_ids"].shape[1] for row in rows)
    ids = torch.cat([pad(row["input_ids"], (width - row["input_ids"].shape[1], 0)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    batch |= {key: of_batch(key, rows) for key in rows[0] if key != "input_ids"}
    named = signature(type(model).forward).parameters
    kinds = (ids == getattr(model.config, "image_token_id", IMAGE)).long() + 2 * (ids == VIDEO).long()
    batch |= {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in named}
    ends = torch.isin(ids, torch.tensor([START, END]))
    return batch | {name: (kinds > 0) | ends for name in ("moe_mm_token_type_ids",) if name in named}


def _spread(image: Any) -> tuple[Tensor, Tensor]:
    """HunYuan's grid among its placeholders: one before it, one behind each of its rows, one behind it all."""
    _, rows, columns = image.grid
    places = 1 + torch.arange(rows * (columns + 1)).view(rows, -1)
    return places[:, :-1].flatten(), places[:, -1]


def hidden_of(model: Any, family: Any, ids: Tensor, trace: Any) -> dict[int, Tensor]:
    """By decoder layer the places that are gone from there on."""
    hidden: dict[int, Tensor] = {}
    places = [row.nonzero()[:, 0] for row in family.placeholders(ids)]
    taken = [0] * len(ids)
    for image in trace.images:
        block = places[image.sample][taken[image.sample] :][: image.total + image.marks]
        taken[image.sample] += image.total + image.marks
        tokens, rows = _spread(image) if image.marks else (torch.arange(image.total), torch.arange(0))
        for stage in image.stages:
            layer = getattr(stage.site, "index", 0)
            gone = torch.ones(image.total, dtype=torch.bool)
            gone[stage.index] = False
            of_row = hidden.setdefault(layer, torch.zeros_like(ids, dtype=torch.bool))[image.sample]
            of_row[block[tokens[gone]]] = True
            of_row[block[rows]] |= bool(gone.any())
    return dict(sorted(hidden.items()))


def difference(model: Any, family: Any, batch: dict[str, Tensor], ours: Any, trace: Any) -> float:
    """How far the logits are from those of the plain model that is kept from seeing, or fed without, what is gone."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    hidden = hidden_of(model, family, ids, trace)
    if not family.recurrent:
        with Masked(model, mask, hidden):
            reference = generate(model, batch, max_new_tokens=len(ours.logits))
        return float((torch.stack(ours.logits) - torch.stack(reference.logits)).abs().max())
    worst, entered = 0.0, entering(model, batch)  # together: images of a call may not be independent of each other
    for number, row in enumerate(mask):
        of_row = {layer: places[number, row] for layer, places in hidden.items()}
        alone = (entered[0][number : number + 1, row], entered[1][:, number : number + 1, row])
        reference = torch.stack(following(model, *alone, of_row, ours.sequences[number, ids.shape[1] :]))
        worst = max(worst, float((torch.stack(ours.logits)[:, number] - reference).abs().max()))
    return worst
