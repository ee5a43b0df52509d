"""What tests have to know of the installed release of transformers, found without the package's help."""

import inspect

from transformers import LlamaModel

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What models call their key-value cache, as an argument and in their output; ``past_key_values`` before 5.24."""


def cache_of(output):
    """The key-value cache in a model's or generate()'s output."""
    return getattr(output, CACHE)
