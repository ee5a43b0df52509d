"""Tokens that a prompt itself writes behind the rows of an image, such as Pixtral's [IMG_BREAK] and [IMG_END].

They are text, but mean nothing once the grid is gone: they stay while it is complete, and go with its first token. No
configuration names them, so they are known by their places: one behind every row of placeholders, the same behind all
but the last. It knows ids and grids; it does not know which tokens stay.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from visiontrim.engine.forward import Prefill
from visiontrim.models.family import Family


def claim_row_ends(prefill: Prefill, family: Family) -> None:
    """Make the tokens behind rows the marks of their images."""
    if not family.row_ends:
        return
    ids = prefill.call.forward_ids
    text = ~family.placeholders(ids)
    ends = [
        _ends(ids, text, *parts) for parts in zip(prefill.rows, prefill.alive.columns, _widths(prefill), strict=True)
    ]
    last = {int(behind[-1]) for _, found, behind in ends if found for behind in behind}
    for number, (places, found, behind) in enumerate(ends):
        single = places.shape[1] == 1 and bool(torch.isin(behind, torch.tensor(sorted(last), device=ids.device)).all())
        if found or single:
            group = prefill.groups[number]
            prefill.alive.marks[number] = places
            prefill.groups[number] = replace(group, marks=torch.zeros_like(places))


def _widths(prefill: Prefill) -> list[int]:
    return [group.grid[2] for group in prefill.groups]


def _ends(
    ids: Int[Tensor, "batch tokens"],
    text: Bool[Tensor, "batch tokens"],
    rows: Int[Tensor, " images"],
    columns: Int[Tensor, "images total"],
    width: int,
) -> tuple[Int[Tensor, "images ends"], bool, Int[Tensor, "images ends"]]:
    """The places behind every row of images, whether ends of rows stand there, and their ids."""
    places = columns[:, width - 1 :: width] + 1
    if not len(places) or int(places.max()) >= ids.shape[1]:
        return places[:, :0], False, places[:, :0]
    behind, free = ids[rows[:, None], places], text[rows[:, None], places]
    same = (behind[:, :-1] == behind[:1, :1]).all() & free.all()
    return places, places.shape[1] > 1 and bool(same), behind
