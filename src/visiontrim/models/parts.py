"""What text models call their parts, which differs from one to the next.

It knows names; it does not know which model has which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visiontrim.core.errors import TrimError

INPUT_NORMS = ("input_layernorm", "operator_norm", "attention_layernorm")
FINAL_NORMS = ("norm", "embedding_norm", "final_layer_norm", "final_layernorm")
ATTENTIONS = ("self_attn", "attention")
TEXT_MODELS = ("language_model", "text_model")
"""What text models call these parts."""


def first_of(module: Any, names: Sequence[str], what: str) -> Any:
    """The part of ``module`` that has one of ``names``. Raises :class:`TrimError` if there is none."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise TrimError(
        f"the {what} of {type(module).__name__} is not known (looked for {', '.join(names)}): use a method's vision "
        "stage, or write the fact down (CONTRIBUTING.md)"
    )
