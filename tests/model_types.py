"""What becomes of every model type for images and text, and of every omni type.

``python tests/model_types.py`` prints the table of docs/models.md. Types that run do so in tests, on tiny models. For
the others there is a reason; the class is built here without weights, and the program has to say it.
"""

from __future__ import annotations

import warnings

import torch
import transformers
from transformers import AutoConfig, logging
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import visiontrim as vt
from families import CONFIGS, GENERIC, MISSING
from shrunk import configuration
from visiontrim.models import list_families
from visiontrim.models.refused import REASONS

MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})

RUN_SHRUNK = (
    "apertus1p5",
    "aria",
    "cohere_compass",
    "cosmos3_edge",
    "cosmos3_omni",
    "deepseek_ocr2",
    "deepseek_vl_hybrid",
    "emu3",
    "ernie4_5_vl_moe",
    "exaone4_5",
    "fuyu",
    "gemma4",
    "gemma4_unified",
    "glmga",
    "got_ocr2",
    "granite_docling",
    "hunyuan_vl",
    "hyperclovax_vision_v2",
    "idefics2",
    "kimi_k25",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "minimax_m3_vl",
    "molmo2",
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
RUN_TIMM = ("fast_vlm", "gemma3n", "perception_lm")
"""Those whose encoder is timm's, which is no part of the tests' environment (``tests/timm``)."""
OWN, RUN = "run with facts of their own, see above", "run with generic facts"
WITH_TIMM = "run with generic facts, where timm is installed (`make matrix`)"
INDEXED = "decoder layers keep an index of their own beside keys and values, by which they pick what they attend to"
AT_ONCE = "decoder layers attend and recur at once, or have a window with references: their caches cannot lack tokens"
CACHES: dict[str, tuple[str, ...]] = {
    INDEXED: ("dots3_note", "glm5_next", "hy_v4_vl", "mistral_large4", "qwen4_exp"),
    AT_ONCE: ("inkling2", "inkling2_loop", "inkling_mm_model", "unlimited_ocr"),
}
"""By reason the types that do not run because of what they cache, which is seen on the model itself."""
SAID = {INDEXED: "caches in a DynamicIndexedLayer", AT_ONCE: "of which it is not known how it could lack tokens"}
"""What the program says to them."""


def classes() -> dict[str, str]:
    """By type the class of every model for images and text, and of omni models, that this release knows."""
    return MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def reasons() -> dict[str, tuple[str, ...]]:
    """By reason the types that do not run."""
    return REASONS | CACHES


def refusal(name: str) -> str:
    """What the program says to a model of the type, without weights."""
    kind, model = getattr(transformers, classes()[name]), None
    for config in (configuration, AutoConfig.for_model):  # some cannot be cut down, others are nothing but cut down
        try:
            with torch.device("meta"):
                model = kind(config(name))
            break
        except Exception:  # whatever it is that a configuration lacks
            continue
    assert model is not None
    try:
        vt.trim(model, vt.Random(keep=0.5)).attach().remove()
    except vt.TrimError as error:
        return str(error)
    return ""


def says_why(name: str) -> bool:
    """Whether that is the reason that the table gives."""
    (reason,) = [reason for reason, names in reasons().items() if name in names]
    return SAID.get(reason, reason) in refusal(name)


def table() -> str:
    """The outcomes, each with its model types."""
    own = [name for name in list_families() if name in {*CONFIGS, *MISSING, *RUN_SHRUNK}]
    generic = sorted({*GENERIC, *RUN_SHRUNK} - set(list_families()))
    rows = [(OWN, own), (RUN, generic), (WITH_TIMM, RUN_TIMM), *reasons().items()]
    return "\n".join(
        ["| outcome | model types |", "| --- | --- |", *(f"| {why} | {', '.join(who)} |" for why, who in rows)]
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    print(table())
