"""The oracle of models with linear attention: the plain model, fed only the tokens that are left.

A mask with holes is another function there, because convolutions and states still take up what it hides. This goes
through the decoder's layers by itself, without a cache: everything anew for every token of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature

import torch
from torch import Tensor

from visiontrim.models import family_of


def entering(model, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the text model of the plain model gets: embeddings [1, tokens, dim], positions [axes or 1, 1, tokens]."""
    text, seen = family_of(model).language_model, {}

    def watch(module, args, kwargs) -> None:
        seen.update(kwargs)

    handle = text.register_forward_pre_hook(watch, with_kwargs=True)
    model(**inputs, use_cache=False)
    handle.remove()
    embeddings, positions = seen["inputs_embeds"], seen.get("position_ids")
    if positions is None:
        positions = torch.arange(embeddings.shape[1])[None]
    return embeddings, positions[-3:] if positions.ndim == 3 else positions[None]


def next_logits(model, embeddings: Tensor, positions: Tensor, hidden: Mapping[int, Tensor]) -> Tensor:
    """Logits [vocabulary] after one row; ``hidden`` says by decoder layer which places [tokens] go before it."""
    family = family_of(model)
    text, states = family.language_model, embeddings
    places, gone = torch.arange(embeddings.shape[1]), torch.zeros(embeddings.shape[1], dtype=torch.bool)
    for index, layer in enumerate(text.layers):
        if index in hidden:
            gone = gone | torch.nn.functional.pad(hidden[index], (0, len(gone) - len(hidden[index])))
            states = states[:, ~gone[places]]
            places = places[~gone[places]]
        here = positions[..., places] if len(positions) > 1 else positions[0][:, places]
        by_kind = text.rotary_emb is not None and "layer_type" in signature(text.rotary_emb.forward).parameters
        kind = {"layer_type": text.config.layer_types[index]} if by_kind else {}
        rotary = None if index in family.recurrent or text.rotary_emb is None else text.rotary_emb(states, here, **kind)
        causal = torch.full((len(places),) * 2, torch.finfo(states.dtype).min).triu(1)[None, None]
        states = layer(
            states,
            position_embeddings=rotary,
            attention_mask=None if index in family.recurrent else causal,
            position_ids=None,
        )
        states = states[0] if isinstance(states, tuple) else states
    return model.lm_head(family.final_norm(states[:, -1]))[0]


def fed(model, inputs: Mapping[str, Tensor], hidden: Mapping[int, Tensor], answer: Tensor) -> list[Tensor]:
    """Logits [vocabulary] of every token of ``answer`` for one row without padding, the answer being given."""
    embeddings, positions = entering(model, inputs)
    logits = []
    for token in answer.tolist():
        logits.append(next_logits(model, embeddings, positions, hidden))
        following = family_of(model).language_model.get_input_embeddings()(torch.tensor([[token]]))
        embeddings = torch.cat([embeddings, following], 1)
        positions = torch.cat([positions, (positions.max() + 1).expand(len(positions), 1, 1)], -1)
    return logits
