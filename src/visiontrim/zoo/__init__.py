"""The small vision-language models that ship with the package, and the scenes and questions that test them.

Names are loaded when they are first used, so that the command line need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visiontrim.zoo.dynamic import QWEN_DIR, QWEN_PROMPT, QwenBundle, held_out_canvases, load_qwen
    from visiontrim.zoo.loading import CLIP_DIR, MODEL_DIR, NATURAL_DIR, Bundle, load
    from visiontrim.zoo.questions import TYPES, Question, ask, normalise
    from visiontrim.zoo.scenes import HARD, STANDARD, Object, Scene, World, draw_scene
    from visiontrim.zoo.suite import HELD_OUT, PROMPT, SPLITS, Sample, Split, answer, held_out
    from visiontrim.zoo.watching import CLIP_PROMPT, VIDEO_DIR, ClipProcessor, held_out_clips, load_video

_HOMES = {
    "dynamic": ["QWEN_DIR", "QWEN_PROMPT", "QwenBundle", "held_out_canvases", "load_qwen"],
    "loading": ["CLIP_DIR", "MODEL_DIR", "NATURAL_DIR", "Bundle", "load"],
    "questions": ["TYPES", "Question", "ask", "normalise"],
    "scenes": ["HARD", "STANDARD", "Object", "Scene", "World", "draw_scene"],
    "suite": ["HELD_OUT", "PROMPT", "SPLITS", "Sample", "Split", "answer", "held_out"],
    "watching": ["CLIP_PROMPT", "VIDEO_DIR", "ClipProcessor", "held_out_clips", "load_video"],
}
_HOME = {name: f"visiontrim.zoo.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "CLIP_DIR",
    "CLIP_PROMPT",
    "HARD",
    "HELD_OUT",
    "MODEL_DIR",
    "NATURAL_DIR",
    "PROMPT",
    "QWEN_DIR",
    "QWEN_PROMPT",
    "SPLITS",
    "STANDARD",
    "TYPES",
    "VIDEO_DIR",
    "Bundle",
    "ClipProcessor",
    "Object",
    "Question",
    "QwenBundle",
    "Sample",
    "Scene",
    "Split",
    "World",
    "answer",
    "ask",
    "draw_scene",
    "held_out",
    "held_out_canvases",
    "held_out_clips",
    "load",
    "load_qwen",
    "load_video",
    "normalise",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'visiontrim.zoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
