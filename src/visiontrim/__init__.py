"""visiontrim: faster vision-language models without training.

Vision tokens are removed or merged at inference, so prefill, key-value cache and decoding shrink::

    import visiontrim as vt

    with vt.trim(model, "visiontrim", keep=64) as run:
        out = model.generate(**inputs, max_new_tokens=64)
    print(run.report)

Names are loaded when they are first used, so that ``import visiontrim`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visiontrim.core.errors import TrimError
    from visiontrim.core.method import DecoderLayer, Decoding, EncoderLayer, Layers, Method, Plan, Step, VisionOutput
    from visiontrim.core.registry import list_methods, load_method, register
    from visiontrim.core.view import Glance, Keep, Text, View
    from visiontrim.methods import (
        ADSC,
        DART,
        EVS,
        LUVC,
        PPE,
        AvgPool,
        CDPruner,
        CrossGET,
        DivPrune,
        DyCoke,
        DyMU,
        Fade,
        FasterVLM,
        FastV,
        FastVID,
        FiCoCoL,
        FiCoCoV,
        HiPrune,
        HoliTom,
        HoliTomInner,
        MMTok,
        MustDrop,
        NoTrim,
        ParVTS,
        PixelPrune,
        PruMerge,
        PruMergePlus,
        PruneSID,
        PyramidDrop,
        Random,
        SparseVLM,
        STGridPool,
        ToMe,
        Turbo,
        Uniform,
        V2Drop,
        VidCom2,
        VisionTrim,
        VisionZip,
        VisPruner,
        VScan,
    )
    from visiontrim.models import TextTower
    from visiontrim.report import Report
    from visiontrim.run import Run, trim

    __version__: str

_HOMES = {
    "core.errors": ["TrimError"],
    "core.method": ["DecoderLayer", "Decoding", "Layers", "EncoderLayer", "Method", "Plan", "Step", "VisionOutput"],
    "core.registry": ["list_methods", "load_method", "register"],
    "core.view": ["Glance", "Keep", "Text", "View"],
    "methods": [
        "FastVID",
        "HoliTomInner",
        "HoliTom",
        "STGridPool",
        "VidCom2",
        "DyCoke",
        "EVS",
        "ADSC",
        "Turbo",
        "FiCoCoV",
        "DyMU",
        "CrossGET",
        "LUVC",
        "PPE",
        "Fade",
        "ToMe",
        "AvgPool",
        "CDPruner",
        "DART",
        "DivPrune",
        "FastV",
        "FasterVLM",
        "FiCoCoL",
        "HiPrune",
        "MMTok",
        "MustDrop",
        "NoTrim",
        "PruMerge",
        "PruMergePlus",
        "PruneSID",
        "ParVTS",
        "PixelPrune",
        "PyramidDrop",
        "Random",
        "SparseVLM",
        "Uniform",
        "V2Drop",
        "VScan",
        "VisPruner",
        "VisionTrim",
        "VisionZip",
    ],
    "models": ["TextTower"],
    "report": ["Report"],
    "run": ["Run", "trim"],
}
_HOME = {name: f"visiontrim.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "ADSC",
    "DART",
    "EVS",
    "LUVC",
    "PPE",
    "AvgPool",
    "CDPruner",
    "CrossGET",
    "DecoderLayer",
    "Decoding",
    "DivPrune",
    "DyCoke",
    "DyMU",
    "EncoderLayer",
    "Fade",
    "FastV",
    "FastVID",
    "FasterVLM",
    "FiCoCoL",
    "FiCoCoV",
    "Glance",
    "HiPrune",
    "HoliTom",
    "HoliTomInner",
    "Keep",
    "Layers",
    "MMTok",
    "Method",
    "MustDrop",
    "NoTrim",
    "ParVTS",
    "PixelPrune",
    "Plan",
    "PruMerge",
    "PruMergePlus",
    "PruneSID",
    "PyramidDrop",
    "Random",
    "Report",
    "Run",
    "STGridPool",
    "SparseVLM",
    "Step",
    "Text",
    "TextTower",
    "ToMe",
    "TrimError",
    "Turbo",
    "Uniform",
    "V2Drop",
    "VScan",
    "VidCom2",
    "View",
    "VisPruner",
    "VisionOutput",
    "VisionTrim",
    "VisionZip",
    "__version__",
    "list_methods",
    "load_method",
    "register",
    "trim",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("visiontrim")
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'visiontrim' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
