"""Positional preservation: a merged token stands at the places of several of its members (``positions="members"``).

Positional Preservation Embedding (PPE), arXiv 2510.22936, ICLR 2026. Official code: MouxiaoHuang/PPE, Apache-2.0.

A rotary encoding turns every pair of a head's entries by itself, so the pairs of one token may have different
positions. The pairs of each axis of a position (time, row and column with mRoPE, else one), from the highest frequency
to the lowest, are cut into K equal chunks, and chunk k has the position of member k. K is 8, the paper's for
Qwen2.5-VL, or its largest divisor that divides the pairs of every axis. A token that carries only itself stands where
it stood.

Members are the tokens of the uncompressed grid that a survivor carries, the nearest to the one that it stands for
first, begun anew where there are fewer than K. Differences: the paper has the nearest to the centre of a cluster, of
which the engine knows no features, so here it is nearest on the grid; the released code has the last ones in raster
order. Tokens that merge again in a later stage get the nearest of all members, where the paper shares the chunks out
between the parents.

It knows where each token went; it does not know why.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from visiontrim.core.errors import TrimError
from visiontrim.engine.context import Context
from visiontrim.engine.forward import Forward, Prefill
from visiontrim.engine.pack import gather
from visiontrim.engine.survivors import Survivors, coordinates
from visiontrim.models.family import Family
from visiontrim.ops.groups import first_members

MOST = 8
"""Members of a token, at most."""


class Chunks(NamedTuple):
    """How the entries of a rotary encoding are shared out between members."""

    number: int
    member: Int[Tensor, " dim"]
    """For every entry the member whose position it has."""


def chunks(sines: Float[Tensor, "axes dim"]) -> Chunks:
    """The chunks of a rotary encoding, of which ``sines[a]`` are those of position 1 on axis a and 0 on all others.

    An entry belongs to the axis that it listens to, and the entries of a pair have the same sine. Raises
    :class:`TrimError` where the pairs of the axes cannot be cut into two or more equal chunks.
    """
    pairs = [axis[axis != 0].unique(return_inverse=True) for axis in sines.abs()]
    sizes = [len(frequencies) for frequencies, _ in pairs]
    count = math.gcd(MOST, *sizes)
    if count == 1:
        raise TrimError(
            f"positions='members' cuts the rotary pairs of every axis into 2, 4 or 8 chunks, which {sizes} pairs "
            "cannot be: use 'keep'"
        )
    member = torch.zeros(sines.shape[1], dtype=torch.long, device=sines.device)
    for axis, size, (_, ascending) in zip(sines, sizes, pairs, strict=True):
        member[axis != 0] = (size - 1 - ascending) * count // size
    return Chunks(count, member)


def nearest_members(survivors: Survivors, grid: tuple[int, int, int], count: int) -> Int[Tensor, "images kept {count}"]:
    """Raster indices of the members of each survivor, the nearest to its own index on ``grid`` first."""
    kept = survivors.index.shape[1]
    every = torch.arange(survivors.assignment.shape[1], device=survivors.index.device)
    home = survivors.index.gather(1, survivors.assignment.clamp(min=0))
    away = (coordinates(home, grid) - coordinates(every, grid)).square().sum(-1)
    owner = survivors.assignment % (kept + 1)  # the last one: gone
    members = first_members(owner, -away.float(), kept + 1, count)[:, :kept]
    return torch.where(members < 0, survivors.index[..., None], members)


class Members:
    """Hook on the rotary encoding of the language model. Raises :class:`TrimError` where that cannot be cut."""

    def __init__(self, family: Family, context: Context) -> None:
        self._rotary: Any = family.language_model.rotary_emb
        self._context = context
        if not hasattr(self._rotary, "inv_freq"):
            raise TrimError(
                f"{type(family.model).__name__} has several rotary encodings, and positions='members' needs one: use "
                "'keep'"
            )
        ones = torch.ones(1, 1, dtype=torch.long, device=self._rotary.inv_freq.device)
        if family.mrope:  # a token for every axis
            ones = torch.eye(family.axes, dtype=torch.long, device=ones.device)[:, None]
        sines = self._rotary.forward(ones.float(), position_ids=ones)[1]
        if sines.ndim != 3:
            raise TrimError(
                f"this release of transformers leaves the {len(sines)} axes of a position to the decoder layers, and "
                "positions='members' needs their rotary encoding whole: update transformers, or use 'keep'"
            )
        self._chunks, self._axes = chunks(sines[0]), len(sines[0])

    def attach(self) -> RemovableHandle:
        """Install the hook and return what removes it again."""
        return self._rotary.register_forward_hook(self._place)

    def _place(self, module, args, output):
        prefill: Forward | None = self._context.forward
        if not isinstance(prefill, Prefill) or not prefill.removals:
            return None
        return self.rotary(prefill, output[0])

    def rotary(self, prefill: Prefill, like: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines [batch, tokens, dim] of what is left, in the dtype of ``like``."""
        count, member = self._chunks
        origin = prefill.alive.origin[..., None].repeat(1, 1, count)
        groups = zip(prefill.groups, prefill.rows, prefill.whole, prefill.alive.columns, strict=True)
        for group, rows, whole, columns in groups:
            if group.kept:
                members = nearest_members(group.now, group.grid, count)
                origin[rows[:, None], columns] = whole.gather(1, members.flatten(1)).view_as(members)
        places, positions = origin.flatten(1), prefill.positions
        if positions.ndim == 3 and self._axes == 1:
            raise TrimError(
                f"a position of this model is {len(positions)} numbers, but its family is not known, nor which rotary "
                "pairs belong to which: use positions='keep'"
            )
        if positions.ndim == 3:  # the last ones: time, row, column
            positions = torch.stack([gather(axis, places) for axis in positions[-self._axes :]])
        else:
            positions = gather(positions, places)
        entry = torch.arange(len(member), device=member.device)
        angles = self._rotary.forward(like, position_ids=positions)
        return tuple(part.unflatten(1, (-1, count))[:, :, member, entry] for part in angles)
