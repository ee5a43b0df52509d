"""A tiny random model of every family, prompts for it, and where its vision tokens stand by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import transformers as hf
from packaging.version import Version
from torch import Tensor

from visiontrim.core.method import VisionOutput
from visiontrim.core.trace import ImageTrace, Trace
from visiontrim.models import family_of

PAD, BOS, IMAGE, VIDEO, START, END, VOCABULARY, LAYERS = 0, 1, 3, 4, 5, 6, 200, 5
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
FRAMES = 2


def _text(config: type = hf.LlamaConfig, **options) -> dict:
    return {
        "model_type": config.model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        **options,
    }


words = _text


def _vision(model_type: str, **options) -> dict:
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        **options,
    }


CLIP = _vision("clip_vision_model", projection_dim=24)
SIGLIP = _vision("siglip_vision_model", vision_use_head=False)
PIXTRAL = _vision("pixtral", head_dim=8, image_size=112)
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
QWEN_VISION = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4}
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
HYBRID_LAYERS = ["linear_attention", "full_attention", "linear_attention", "full_attention", "linear_attention"]
CONV_LAYERS = ["conv", "full_attention", "conv", "full_attention", "conv"]
HYBRID = ("qwen3_5", "qwen3_5_moe", "lfm2_vl", "lfm3_vl")
BIDIRECTIONAL = ("paligemma", "paligemma2", "gemma3")
LEAN = HYBRID
"""Families that tests run with one plan and one attention, because a relative of theirs has all."""
WITH_GRIDS = ("qwen", "glm", "lfm3")
OLD = Version(hf.__version__) < Version("5.19")
QWEN_TOKENS = TOKENS | {"vision_start_token_id": START, "vision_end_token_id": END}


def _qwen2_vl() -> Any:
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, **QWEN_VISION}
    text = _text(hf.Qwen2VLTextConfig, rope_parameters=MROPE)
    return hf.Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)


def _qwen2_5_vl() -> Any:
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "window_size": 56}
    vision |= {"fullatt_block_indexes": [1], "tokens_per_second": 2, **QWEN_VISION}
    text = _text(hf.Qwen2_5_VLTextConfig, rope_parameters=MROPE)
    return hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)


def _qwen3_vl() -> Any:
    vision = {"depth": 4, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
    vision |= {"deepstack_visual_indexes": [1, 2], "num_position_embeddings": 64, **QWEN_VISION}
    text = _text(hf.Qwen3VLTextConfig, head_dim=16, rope_parameters=MROPE | {"mrope_interleaved": True})
    return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)


def _qwen3_vl_moe() -> Any:
    config = _qwen3_vl().to_dict()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    text = _text(hf.Qwen3VLMoeTextConfig, head_dim=16, rope_parameters=config["text_config"]["rope_parameters"])
    vision = config["vision_config"] | {"model_type": "qwen3_vl_moe_vision"}
    return hf.Qwen3VLMoeConfig(text_config=text | experts, vision_config=vision, **QWEN_TOKENS)


def _qwen3_5(config: Any = hf.Qwen3_5Config, text: Any = hf.Qwen3_5TextConfig, **options) -> Any:
    vision = {"depth": 4, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
    vision |= {"num_position_embeddings": 64, **QWEN_VISION}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    linear |= {"linear_num_value_heads": 4, "layer_types": HYBRID_LAYERS}
    words = _text(text, head_dim=16, rope_parameters=rope | {"mrope_interleaved": True}, **linear, **options)
    return config(text_config=words, vision_config=vision, **QWEN_TOKENS)


def _lfm3_vl() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"num_key_value_heads": 2, "layer_types": CONV_LAYERS[:4], "patch_size": 14}
    layers = ["conv", "full_attention", "conv", "sliding_attention", "conv"]
    words = _text(hf.Lfm3Config, head_dim=16, layer_types=layers, sliding_window=100)
    return hf.Lfm3VlConfig(vision_config=vision, text_config=words, **QWEN_TOKENS)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS |= {"shared_expert_intermediate_size": 32}


def _glm(config: Any, text: Any, **options) -> Any:
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "image_size": 56}
    rope = MROPE | {"partial_rotary_factor": 1.0}
    ends = {"image_start_token_id": START, "image_end_token_id": END}
    ends |= {"video_start_token_id": 7, "video_end_token_id": 8}
    return config(
        vision_config=vision | QWEN_VISION, text_config=_text(text, rope_parameters=rope, **options), **TOKENS, **ends
    )


GLM_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
GLM_EXPERTS |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llava": lambda: hf.LlavaConfig(vision_config=CLIP, text_config=_text(), image_token_id=IMAGE),
    "pixtral": lambda: hf.LlavaConfig(
        vision_config=PIXTRAL,
        text_config=_text(),
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
    "llava_next": lambda: hf.LlavaNextConfig(
        vision_config=CLIP, text_config=_text(), image_token_id=IMAGE, image_grid_pinpoints=PINPOINTS
    ),
    "llava_next_video": lambda: hf.LlavaNextVideoConfig(
        vision_config=CLIP, text_config=_text(), image_grid_pinpoints=PINPOINTS, **TOKENS
    ),
    "llava_onevision": lambda: hf.LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config=_text(hf.Qwen2Config), image_grid_pinpoints=PINPOINTS, **TOKENS
    ),
    "video_llava": lambda: hf.VideoLlavaConfig(vision_config=CLIP, text_config=_text(), **TOKENS),
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": lambda: _qwen3_5(hf.Qwen3_5MoeConfig, hf.Qwen3_5MoeTextConfig, **EXPERTS),
    "glm4v": lambda: _glm(hf.Glm4vConfig, hf.Glm4vTextConfig),
    "glm46v": lambda: _glm(hf.Glm46VConfig, hf.Glm4vTextConfig),
    "glm4v_moe": lambda: _glm(hf.Glm4vMoeConfig, hf.Glm4vMoeTextConfig, **GLM_EXPERTS),
    "glm_ocr": lambda: _glm(hf.GlmOcrConfig, hf.GlmOcrTextConfig, head_dim=16),
    "internvl": lambda: hf.InternVLConfig(
        vision_config=_vision("internvl_vision", image_size=[56, 56], patch_size=[14, 14]),
        text_config=_text(hf.Qwen2Config),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    ),
    "idefics3": lambda: hf.Idefics3Config(
        vision_config=_vision("idefics3_vision"), text_config=_text(), image_token_id=IMAGE, scale_factor=2
    ),
    "smolvlm": lambda: hf.SmolVLMConfig(
        vision_config=_vision("smolvlm_vision"), text_config=_text(), image_token_id=IMAGE, scale_factor=2
    ),
    "paligemma": lambda: hf.PaliGemmaConfig(
        vision_config=SIGLIP,
        text_config=_text(hf.GemmaConfig, head_dim=16),
        image_token_id=IMAGE,
        projection_dim=64,
        hidden_size=64,
    ),
    "paligemma2": lambda: hf.PaliGemmaConfig(
        vision_config=SIGLIP,
        text_config=_text(hf.Gemma2Config, head_dim=16, sliding_window=64),
        image_token_id=IMAGE,
        projection_dim=64,
        hidden_size=64,
    ),
    "gemma3": lambda: hf.Gemma3Config(
        vision_config=SIGLIP,
        text_config=_text(hf.Gemma3TextConfig, head_dim=16, sliding_window=64, layer_types=GEMMA3_LAYERS),
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
    ),
    "lfm2_vl": lambda: hf.Lfm2VlConfig(
        vision_config=_vision("siglip2_vision_model", num_patches=16, vision_use_head=False),
        text_config=_text(hf.Lfm2Config, layer_types=CONV_LAYERS, block_auto_adjust_ff_dim=False, conv_bias=True),
        image_token_id=IMAGE,
        downsample_factor=2,
    ),
    "lfm3_vl": _lfm3_vl,
    "mistral3": lambda: hf.Mistral3Config(
        vision_config=PIXTRAL,
        text_config=_text(hf.MistralConfig, sliding_window=None, head_dim=16),
        image_token_id=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
}
MISSING = {name for name, config in {"lfm3_vl": "Lfm3Config"}.items() if not hasattr(hf, config)}
"""Families that the installed release of transformers does not have yet."""
for _name in MISSING:
    del CONFIGS[_name]

GENERIC: dict[str, Callable[[], Any]] = {
    "aya_vision": lambda: hf.AyaVisionConfig(
        vision_config=SIGLIP,
        text_config=_text(hf.Cohere2Config, sliding_window=64),
        image_token_id=IMAGE,
        downsample_factor=2,
        vision_feature_layer=-1,
        alignment_intermediate_size=64,
    ),
    "cohere2_vision": lambda: hf.Cohere2VisionConfig(
        vision_config=SIGLIP,
        text_config=_text(hf.Cohere2Config, sliding_window=64),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    ),
    "deepseek_vl": lambda: hf.DeepseekVLConfig(vision_config=SIGLIP, text_config=_text(), image_token_id=IMAGE),
    "janus": lambda: hf.JanusConfig(
        vision_config=_vision("janus_vision_model", projection_dim=64, depth=2),
        text_config=_text(),
        image_token_id=IMAGE,
    ),
    "lighton_ocr": lambda: hf.LightOnOcrConfig(
        vision_config=PIXTRAL,
        text_config=_text(hf.Qwen3Config, head_dim=16),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    ),
    "ovis2": lambda: hf.Ovis2Config(
        vision_config=_vision("ovis2_vision", num_visual_indicator_tokens=5, vocab_size=50, hidden_stride=2),
        text_config=_text(hf.Qwen2Config),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[11, 12, 13, 14, 15],
        vocab_size=VOCABULARY,
        hidden_size=64,
    ),
    "qianfan_ocr": lambda: hf.QianfanOCRConfig(
        vision_config=_vision("qianfan_ocr_vision", image_size=[56, 56], patch_size=[14, 14]),
        text_config=_text(hf.Qwen3Config, head_dim=16),
        image_token_id=IMAGE,
    ),
    "vipllava": lambda: hf.VipLlavaConfig(
        vision_config=CLIP, text_config=_text(), image_token_id=IMAGE, vision_feature_layers=[-2, -1]
    ),
}
"""Model types that no file has facts about."""


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A random model of the family."""
    if name == "paligemma2":  # Gemma 2 caps its scores, which sdpa cannot
        attention = {"": attention, "text_config": "eager"}  # type: ignore[assignment]
    return prepared((CONFIGS | GENERIC)[name](), attention, dtype)


def prepared(config: Any, attention: Any = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A random model of ``config``, with weights large enough that attention is not flat."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    model = model.eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = BOS
    return model


@dataclass
class Visual:
    """One image or video of a prompt: its pixels, and the ids that stand for it."""

    pixels: dict[str, Tensor]
    ids: Tensor


def _visual(name: str, kind: str, number: int, generator: torch.Generator) -> Visual:
    """Images come in two sizes by turns where the family takes any size."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    token = IMAGE if kind == "image" else VIDEO
    even = number % 2 == 0
    if name.startswith(WITH_GRIDS):
        grid = (1, 8, 8 if even else 4) if kind == "image" else (FRAMES, 8, 4)
        patches = grid[0] * grid[1] * grid[2]
        key = "pixel_values" if kind == "image" else "pixel_values_videos"
        pixels = {key: noise(patches, 14 * 14 * 3 * 2), f"{kind}_grid_thw": torch.tensor([grid])}
        if (
            name.startswith(("qwen3_vl", "qwen3_5", "lfm3_vl")) and kind == "video"
        ):  # frames with their time stamps as text between them
            frame = [START, *[token] * (patches // 4 // FRAMES), END]
            return Visual(pixels, torch.tensor([10, *frame, 11, *frame]))
        return Visual(pixels, torch.tensor([START, *[token] * (patches // 4), END]))
    if kind == "video":
        tokens = {"video_llava": 17 * FRAMES, "llava_next_video": 4 * FRAMES, "llava_onevision": 4 * FRAMES + 1}[name]
        return Visual({"pixel_values_videos": noise(1, FRAMES, 3, 56, 56)}, torch.full((tokens,), token))
    if name in ("llava_next", "llava_next_video", "llava_onevision"):
        # 112 x 112: 5 tiles, 16 + 8 rows of 8 and a newline; 56 x 112: 3 tiles, 16 + 4 rows of 8 and a newline
        size, tiles, tokens = ((112, 112), 5, 16 + 8 * 9) if even else ((56, 112), 3, 16 + 4 * 9)
        pixels = torch.nn.functional.pad(noise(1, tiles, 3, 56, 56), (0, 0, 0, 0, 0, 0, 0, 5 - tiles))
        return Visual({"pixel_values": pixels, "image_sizes": torch.tensor([size])}, torch.full((tokens,), token))
    if name in ("pixtral", "mistral3", "lighton_ocr"):
        height, width = (56, 56) if even else (112, 56)
        pixels = torch.nn.functional.pad(noise(1, 3, height, width), (0, 0, 0, 112 - height))
        tokens = height // 14 * (width // 14) // (1 if name == "pixtral" else 4)
        sizes = {"image_sizes": torch.tensor([[height, width]])}
        return Visual({"pixel_values": pixels} | sizes, torch.full((tokens,), token))
    if name == "internvl":  # one or two tiles
        tiles = 2 if even else 1
        return Visual({"pixel_values": noise(tiles, 3, 56, 56)}, torch.tensor([START, *[token] * (4 * tiles), END]))
    if name == "video_llava" and "pixel_values_images" in signature(hf.VideoLlavaModel.forward).parameters:
        return Visual({"pixel_values_images": noise(1, 3, 56, 56)}, torch.full((16,), token))
    if name == "lfm2_vl":  # packs patches itself, in rows padded at the end
        rows, columns = (4, 8) if even else (2, 6)
        pixels = {
            "pixel_values": torch.nn.functional.pad(
                noise(1, rows * columns, 14 * 14 * 3), (0, 0, 0, 32 - rows * columns)
            )
        }
        pixels["pixel_attention_mask"] = (torch.arange(32) < rows * columns)[None].long()
        return Visual(
            pixels | {"spatial_shapes": torch.tensor([[rows, columns]])}, torch.full((rows * columns // 4,), token)
        )
    tokens = (
        4 if name in ("idefics3", "smolvlm", "gemma3", "aya_vision", "cohere2_vision", "ovis2", "qianfan_ocr") else 16
    )
    return Visual({"pixel_values": noise(1, 3, 56, 56)}, torch.full((tokens,), token))


class Prompts:
    """Rows of random text and images: ``Prompts("llava", (3, "image", 5), (6,))``; ``batch()`` pads at the left."""

    def __init__(self, name: str, *rows: Sequence[int | str], seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.name = name
        self.rows: list[tuple[Tensor, list[Visual]]] = []
        number = 0
        for row in rows:
            parts, visuals = [torch.tensor([BOS])], []
            for part in row:
                if isinstance(part, str):
                    visuals.append(_visual(name, part, number, generator))
                    parts.append(visuals[-1].ids)
                    number += 1
                else:
                    parts.append(torch.randint(10, VOCABULARY, (part,), generator=generator))
            self.rows.append((torch.cat(parts), visuals))

    def batch(self, *numbers: int) -> dict[str, Tensor]:
        """Processor's output for the given rows, all by default."""
        rows = [self.rows[number] for number in numbers] if numbers else self.rows
        width = max(len(ids) for ids, _ in rows)
        ids = torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0), value=PAD) for ids, _ in rows])
        mask = torch.stack([torch.arange(width) >= width - len(ids) for ids, _ in rows]).long()
        inputs = {"input_ids": ids, "attention_mask": mask}
        visuals = [visual for _, row in rows for visual in row]
        for key in dict.fromkeys(key for visual in visuals for key in visual.pixels):
            inputs[key] = torch.cat([visual.pixels[key] for visual in visuals if key in visual.pixels])
        if self.name.startswith(WITH_GRIDS) and self.name != "lfm3_vl":
            inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        if self.name == "gemma3":
            inputs["token_type_ids"] = (ids == IMAGE).long()
        if self.name.startswith("paligemma"):
            inputs["token_type_ids"] = torch.zeros_like(ids)  # all of it is prefix
        if self.name in ("idefics3", "smolvlm") and visuals:
            most = max(len(row) for _, row in rows)
            pixels = torch.zeros(len(rows), most, 3, 56, 56)
            for number, (_, row) in enumerate(rows):
                for place, visual in enumerate(row):
                    pixels[number, place] = visual.pixels["pixel_values"][0]
            inputs["pixel_values"] = pixels
        return inputs


def places(name: str, kind: str, image: ImageTrace) -> tuple[Tensor, Tensor, bool]:
    """Among the placeholders of its image: those of a part's tokens in raster order, its marks, whether these stay."""
    frames, rows, columns = image.grid
    index, none = torch.arange(frames * rows * columns), torch.zeros(0, dtype=torch.long)
    if kind == "video":
        if name == "video_llava":
            return index + 1 + index // (rows * columns), torch.arange(frames) * (rows * columns + 1), True
        return index, torch.tensor([len(index)]) if name == "llava_onevision" else none, False
    if name in ("llava_next", "llava_next_video", "llava_onevision"):
        if image.before or rows * columns != 16:
            return 16 + index + index // columns, 16 + torch.arange(rows) * (columns + 1) + columns, False
        return index, none, False
    return image.before + index, none, False  # tiles of InternVL follow each other


def hidden_places(name: str, inputs: dict[str, Tensor], trace: Trace) -> dict[int, Tensor]:
    """For every decoder layer where tokens go, the places [batch, tokens] of the prompt that are gone from there on."""
    ids = inputs["input_ids"]
    hidden: dict[int, Tensor] = {}
    kinds = {"image": (ids == IMAGE), "video": (ids == VIDEO)}
    starts: dict[int, tuple[str, int]] = {}
    taken = {("image", row): 0 for row in range(len(ids))} | {("video", row): 0 for row in range(len(ids))}
    by_number = sorted({image.number: image for image in trace.images}.items())
    for number, image in by_number:
        kind = "video" if image.grid[0] > 1 else "image"
        parts = [part for part in trace.images if part.number == number]
        starts[number] = kind, taken[kind, image.sample]
        taken[kind, image.sample] += sum(part.total + part.marks for part in parts)
    for image in trace.images:
        kind, start = starts[image.number]
        block = kinds[kind][image.sample].nonzero()[:, 0]
        index, marks, stay = places(name, kind, image)
        for stage in image.stages:
            layer = 0 if isinstance(stage.site, VisionOutput) else stage.site.index
            gone = torch.ones(len(index), dtype=torch.bool)
            gone[stage.index] = False
            row = hidden.setdefault(layer, torch.zeros_like(ids, dtype=torch.bool))[image.sample]
            row[block[start + index[gone]]] = True
            if gone.any() and not stay:
                row[block[start + marks]] = True
    return dict(sorted(hidden.items()))


def decoder_layers(model) -> Any:
    return family_of(model).language_model.layers


def squares_of(picture: torch.Tensor, side: int) -> list[torch.Tensor]:
    """Pixels [channels, side * side] of every square of a picture [channels, height, width], in raster order."""
    _, height, width = picture.shape
    return [
        picture[:, top : top + side, left : left + side].flatten(1)
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
