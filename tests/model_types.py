"""What becomes of every model type for images and text.

``python tests/model_types.py`` prints the table of docs/models.md. Types that run do so in tests, on tiny models. For
the others there is a reason; where that is what the program says, the class is built here without weights from its
default configuration, and has to say it.
"""

from __future__ import annotations

import warnings

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import visiontrim as vt
from families import CONFIGS, GENERIC
from visiontrim.models import list_families

RUN_SHRUNK = (
    "aria",
    "cosmos3_omni",
    "deepseek_vl_hybrid",
    "exaone4_5",
    "gemma4",
    "gemma4_unified",
    "glmga",
    "got_ocr2",
    "hyperclovax_vision_v2",
    "kimi_k25",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "minimax_m3_vl",
    "muse_glimmer",
    "muse_spark",
    "paddleocr_vl",
    "pp_chart2table",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "shieldgemma2",
    "step3p7",
    "video_llama_3",
)
"""Types that run on a tiny model of their default configuration (``tests/test_every_type.py``)."""
OWN, RUN = "run with facts of their own, see above", "run with generic facts"
TOGETHER = "the answer comes from a decoder with cross-attention to an encoder: an image is no tokens of the prompt"
CROSS = "cross-attention: images are keys of layers of their own, and no tokens of the prompt"
QUERIES = "a fixed number of learned queries stands for the image, or an older layout without `get_image_features`"
ELSEWHERE = "the text model is not `model.language_model`, or the core is the model itself: facts are not written down"
INDEXED = "decoder layers keep an index of their own beside keys and values, by which they pick what they attend to"
AT_ONCE = "decoder layers attend and recur at once, or have a window with references: their caches cannot lack tokens"
UNTRIED = "not run: the default configuration makes no model that can be cut down, and none was written by hand"
TIMM = "not run: the encoder is timm's"
REASONS: dict[str, tuple[str, ...]] = {
    TOGETHER: ("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"),
    CROSS: ("evolla", "idefics", "mllama"),
    QUERIES: ("blip", "blip-2", "git", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5", "pi0"),
    ELSEWHERE: ("granite_docling", "idefics2", "llama4", "mistral4", "nemotron_h_omni"),
    INDEXED: ("dots3_note", "glm5_next", "hy_v4_vl", "mistral_large4"),
    AT_ONCE: ("inkling2", "inkling2_loop", "inkling_mm_model", "unlimited_ocr"),
    UNTRIED: (
        "apertus1p5",
        "chameleon",
        "cohere_compass",
        "cosmos3_edge",
        "deepseek_ocr2",
        "diffusion_gemma",
        "emu3",
        "ernie4_5_vl_moe",
        "fuyu",
        "granite4_vision",
        "hunyuan_vl",
        "molmo2",
        "qwen4_exp",
    ),
    TIMM: ("fast_vlm", "gemma3n", "perception_lm"),
}
"""By reason the types that do not run."""
SAID = {
    ELSEWHERE: "is not supported: it has no",
    INDEXED: "caches in a DynamicIndexedLayer",
    AT_ONCE: "of which it is not known how it could lack tokens",
    CROSS: "is not supported: it has no",
    QUERIES: "is not supported: it has no",
    TOGETHER: "is not supported: it has no",
}
"""What the program says."""


def types() -> list[str]:
    """All that this release of transformers knows."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def refusal(name: str) -> str | None:
    """What the program says to a model of the type's default configuration; None: there is no such model."""
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name))
    except Exception:  # whatever it is that a default configuration lacks
        return None
    try:
        vt.trim(model, vt.Random(keep=0.5)).attach().remove()
    except vt.TrimError as error:
        return str(error)
    return ""


def table() -> str:
    """The outcomes, each with its model types."""
    own = [name for name in list_families() if name in {*CONFIGS, *RUN_SHRUNK}]
    generic = sorted({*GENERIC, *RUN_SHRUNK} - set(list_families()))
    rows = [(OWN, own), (RUN, generic), *REASONS.items()]
    return "\n".join(
        ["| outcome | model types |", "| --- | --- |", *(f"| {why} | {', '.join(who)} |" for why, who in rows)]
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    print(table())
    for reason, names in REASONS.items():
        for name in names:
            said = refusal(name) if reason in SAID else None
            if said is not None and SAID[reason] not in said:
                raise SystemExit(f"{name}: the program says {said!r}")
