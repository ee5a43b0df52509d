"""Prompts without meaning: pictures of noise and words at random, of a given size."""

from __future__ import annotations

import torch
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.models.family import Family, Picture

FIRST_WORD = 10
"""Ids below are special tokens in some vocabularies."""
FEWEST_WORDS = 4
"""Text tokens of the shortest prompt: a first one, borders around the picture in some families, and a question."""


@torch.inference_mode()
def noise_prompt(family: Family, picture: Picture, text: int, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of ``generate()``: ``batch`` rows of one picture in the middle of ``text`` text tokens, without padding.

    How many vision tokens the picture has is read off ``get_image_features``. Raises :class:`TrimError` for pictures
    that the family does not take, and fewer than ``FEWEST_WORDS`` text tokens.
    """
    if text < FEWEST_WORDS:
        raise TrimError(f"text={text}: give at least {FEWEST_WORDS} text tokens")
    model, kind = family.model, picture.kind
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        one = family.noise(picture)
        words = torch.randint(FIRST_WORD, _words(family), (text,))
    words[torch.isin(words, torch.tensor(_special(family)))] = FIRST_WORD
    one = {key: _placed(value, model) for key, value in one.items()}
    output = getattr(getattr(family.core, f"get_{kind}_features")(**one), family.features)
    parts = [output] if isinstance(output, Tensor) else list(output)
    length = sum(part.shape[:-1].numel() for part in parts)
    ids = torch.cat(
        [words[: text // 2], torch.full((length,), getattr(model.config, f"{kind}_token_id")), words[text // 2 :]]
    )
    for name, place in (("vision_start", text // 2 - 1), ("vision_end", text // 2 + length)):
        if (token := getattr(model.config, f"{name}_token_id", None)) is not None:
            ids[place] = token
    ids = ids.expand(batch, -1).to(model.device)
    inputs = {key: family.joined(key, [value] * batch) for key, value in one.items()}
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | family.along(ids, kind)


def _words(family: Family) -> int:
    """The first id that is no plain word: a special token, or the end of the vocabulary."""
    config = family.model.config
    special = [getattr(config, f"{kind}_token_id") for kind in family.kinds]
    return min([config.text_config.vocab_size, *(token for token in special if token > FIRST_WORD)])


def _special(family: Family) -> list[int]:
    """Ids that the configuration names, which may mean more to a model than a word."""
    named = [value for key, value in family.model.config.to_dict().items() if "token_id" in key]
    return [token for value in named for token in (value if isinstance(value, list) else [value]) if token is not None]


def _placed(value: Tensor, model) -> Tensor:
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
