"""Which model types of transformers run: ``python tests/model_types.py`` prints the table of docs/models.md.

Every class for images and text is built without weights from its own default configuration, and a run is opened on it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import visiontrim as vt
from families import GENERIC
from visiontrim.models import list_families
from visiontrim.models.family import Generic

OWN, RUN, OPEN, WINDOWS, NO_CACHE, NO_PARTS, UNKNOWN = (
    "facts of their own, see above",
    "generic facts, run on a tiny model (`tests/test_generic.py`)",
    "generic facts, opened but never run",
    "generic facts, vision stage alone, opened but never run",
    "refused: linear attention, shared or indexed keys and values",
    "refused: parts elsewhere, cross-attention, or encoder and decoder",
    "not known: the default configuration makes no model, or timm is needed",
)


def outcome(name: str) -> str:
    """What becomes of a model type."""
    if name in list_families():
        return OWN
    if name in GENERIC:
        return RUN
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name))
    except Exception:  # whatever it is that a default configuration lacks
        return UNKNOWN
    if Generic.missing(model):
        return NO_PARTS
    for plan, result in ((vt.Random(keep=0.5) | vt.Random(keep=0.5, layer=2), OPEN), (vt.Random(keep=0.5), WINDOWS)):
        try:
            vt.trim(model, plan).attach().remove()
        except vt.TrimError:
            continue
        return result
    return NO_CACHE


def table() -> str:
    """The outcomes, each with its model types."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        groups[outcome(name)].append(name)
    rows = [
        f"| {result} | {', '.join(groups[result])} |"
        for result in (OWN, RUN, OPEN, WINDOWS, NO_CACHE, NO_PARTS, UNKNOWN)
    ]
    return "\n".join(["| outcome | model types |", "| --- | --- |", *rows])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    print(table())
