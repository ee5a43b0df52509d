"""Survivors at their own positions, where vLLM would count them one after the other.

A model gives each kept token its place relative to where its image begins as further columns of its features: digits
that bfloat16 holds exactly, whatever the length (whole numbers it holds only up to 256). vLLM takes them off again
before the language model sees them, and sets the positions. Text behind an image is right from the start.

Where a model has one position a token, vLLM carries four rows along, of which row 0 is what the language model gets and
row 3 where the token's image begins. Where it has three (M-RoPE), row 0 says that: it is the same for a whole image.
So positions can be set again, after preemption, and in parts, by chunked prefill. Knows no method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DIGIT = 128
Whole = Callable[[list[int], list[Any]], tuple[Tensor, int]]
"""Positions of an uncompressed prompt, and what is added to the length for the next one."""


def with_places(tokens: Tensor, places: Tensor | None, channels: int) -> Tensor:
    """``tokens`` [n, width] with ``places`` [n, channels] behind them; None: their positions are right already."""
    if places is None:
        return torch.nn.functional.pad(tokens, (0, 2 * channels + 1))
    digits = torch.stack([places // DIGIT, places % DIGIT], -1).flatten(1)
    return torch.cat([tokens, torch.nn.functional.pad(digits, (0, 1), value=1).to(tokens)], -1)


def first_positions(
    tokens: list[int], features: Sequence[Any], spans: Sequence[int], whole: Whole, several: bool
) -> tuple[Tensor, int]:
    """Positions of a prompt before its images are encoded, and what is added to its length for the next one.

    ``spans`` are the positions over which each of ``features`` goes: what stands behind an image begins after them.
    """
    full, moved, stays = list[int](), [], list[int]()
    done = 0
    starts: list[tuple[int, int]] = []
    for feature, span in zip(features, spans, strict=True):
        place = feature.mm_position
        lit = range(place.length) if place.is_embed is None else place.is_embed.nonzero()[:, 0].tolist()
        first, kept = place.offset + lit[0], len(lit)
        stays += range(len(full), len(full) + first + kept - done)
        full += tokens[done:first]
        starts.append((first, kept))
        at = dataclasses.replace(
            place,
            offset=place.offset + len(full) - first,
            length=place.length + span - kept,
            is_embed=_stretched(place.is_embed, lit[0], kept, span),
        )
        full += [tokens[first]] * span
        moved.append(dataclasses.replace(feature, mm_position=at))
        done = first + kept
    stays += range(len(full), len(full) + len(tokens) - done)
    full += tokens[done:]
    positions, delta = whole(full, moved)
    positions = positions[:, stays].clone()
    if not several:
        for first, kept in starts:
            positions[-1, first : first + kept] = positions[0, first].item()
    return positions, len(full) + delta - len(tokens)


def set_positions(
    positions: Tensor, at: Tensor, embeddings: Sequence[Tensor], channels: int
) -> tuple[list[Tensor], Tensor]:
    """The features without their columns, and the positions [rows, tokens] with those of the tokens ``at`` set."""
    positions, clean, done = positions.clone(), [], 0
    for tokens in embeddings:
        digits = tokens[:, -2 * channels - 1 :].to(positions.device).round().long()
        places = at[done : done + len(tokens)].to(positions.device)
        own = digits[:, -1] == 1
        values = (digits[:, :-1:2] * DIGIT + digits[:, 1:-1:2])[own].T
        places = places[own]
        base = positions[-1, places] if channels == 1 else positions[0, places]
        positions[:channels, places] = base + values
        clean.append(tokens[:, : -2 * channels - 1])
        done += len(tokens)
    return clean, positions


def _stretched(is_embed: Tensor | None, first: int, kept: int, span: int) -> Tensor | None:
    if is_embed is None:
        return None
    lit = is_embed.new_ones(span)
    return torch.cat([is_embed[:first], lit, is_embed[first + kept :]])
