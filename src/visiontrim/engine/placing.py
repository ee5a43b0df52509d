"""Where the tokens of what is encoded belong: to which row, image, part of an image, and placeholder.

It knows grids and placeholders; it does not know which tokens stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.engine.call import Call, Counted, Encoding
from visiontrim.engine.groups import Group, Part, Placed
from visiontrim.models.family import Family, Kind
from visiontrim.models.layout import Segment, Visual


def counted(family: Family, ids: Int[Tensor, "batch tokens"], mask: object) -> Counted:
    """What ``ids`` hold, with their 2-D ``mask`` [batch, past + tokens] if there is padding. One look at the device."""
    batch, tokens = ids.shape
    rows = [family.placeholders(ids, kind).sum(-1) for kind in family.kinds]
    padding = mask if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= tokens else None
    if padding is not None:
        rows.append(padding[:, -tokens:].to(ids.device).bool().sum(-1))
    found: list[list[int]] = torch.stack(rows).tolist()
    valid = None if padding is None else found.pop()
    return Counted(batch, tokens, dict(zip(family.kinds, found, strict=True)), valid)


def placed(
    call: Call, encoding: Encoding, family: Family, per: str, apart: bool, lengths: list[int] | None
) -> list[Placed]:
    """The segments of what is encoded, by group, or each in a group of its own if they are to be ``apart``.

    ``per`` is that of :meth:`Visual.split` and of no concern to sound, ``lengths`` that of :meth:`Family.visuals`.
    """
    per = "image" if encoding.kind == "audio" else per
    visuals = family.visuals(encoding.kind, encoding.arguments, lengths)
    device = call.input_ids.device
    owners, images = _located(call, family, encoding.kind, visuals)
    starts = list(itertools.accumulate((visual.length for visual in visuals), initial=0))
    heard = encoding.kind == "audio"  # sounds are counted by themselves
    numbers = (n for group in call.groups if (group.part.kind == "audio") == heard for n in group.numbers)
    number = 1 + max(numbers, default=-1)
    members: dict[tuple[Part, int, int], list[tuple[int, int, Segment]]] = {}
    for tiles in images:
        whole, before = [visuals[tile] for tile in tiles], 0
        for tile, visual in zip(tiles, whole, strict=True):
            for segment, budget, start in visual.split(per):
                if len(tiles) > 1 and per == "image":
                    budget, start = sum(tile.total for tile in whole), before + start
                part = Part(encoding.kind, segment.grid, budget, start, segment.marks_stay)
                alike = part, len(segment.marks), len(members) if apart else 0
                members.setdefault(alike, []).append((number, tile, segment))
            before += visual.total
        number += 1
    if not members:
        return []
    firsts = torch.tensor(  # of every segment the first among placeholders, and in what is encoded
        [(owners[tile][1], starts[tile]) for segments in members.values() for _, tile, _ in segments]
    )
    here = [
        first.T[..., None] + torch.stack([torch.cat([segment.index, segment.marks]) for _, _, segment in segments])
        for first, segments in zip(firsts.split(list(map(len, members.values()))), members.values(), strict=True)
    ]
    there = torch.cat([group.flatten() for group in here]).to(device).split([group.numel() for group in here])
    groups = []
    for ((part, *_), segments), flat, group in zip(members.items(), there, here, strict=True):
        (places, index), (marks, marks_at) = flat.view_as(group).tensor_split((len(segments[0][2].index),), -1)
        uncompressed = Group.uncompressed(
            tuple(owners[tile][0] for _, tile, _ in segments),
            tuple(number for number, _, _ in segments),
            part,
            places,
            marks,
        )
        groups.append(Placed(uncompressed, index, marks_at))
    return groups


def _located(
    call: Call, family: Family, kind: Kind, visuals: Sequence[Visual]
) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Row of the batch of everything encoded, which placeholder of that row is its first, and what makes one image."""
    if not call.alone:
        there = call.counted
        if there is None or not there.covers(call.input_ids) or there.rows != len(call.input_ids):
            there = call.counted = counted(family, call.input_ids, None)
        owners = _owners(there.placeholders[kind], visuals, kind)
        return owners, _images(owners, family.placeholders(call.input_ids, kind) if family.adjoining else None)
    call.tiles = call.tiles or [1] * len(visuals)
    if sum(call.tiles) != len(visuals):
        raise TrimError(
            f"{len(visuals)} pictures were encoded, but {', '.join(map(str, call.tiles))} announced for "
            f"{len(call.tiles)} images: give how many pictures make each image"
        )
    numbers, owners, images = iter(range(len(visuals))), [], []
    for row, count in enumerate(call.tiles):
        images.append(list(itertools.islice(numbers, count)))
        starts = itertools.accumulate((visuals[number].length for number in images[-1]), initial=0)
        owners += [(row, start) for _, start in zip(images[-1], starts, strict=False)]
    return owners, images


def _owners(counts: Sequence[int], visuals: Sequence[Visual], kind: Kind) -> list[tuple[int, int]]:
    """Row of the batch of every image, and which placeholder of that row is its first; ``counts`` are a row's.

    Raises :class:`TrimError` if images and placeholders do not fit.
    """
    owners: list[tuple[int, int]] = []
    for row, count in enumerate(counts):
        taken = 0
        while taken < count and len(owners) < len(visuals):
            owners.append((row, taken))
            taken += visuals[len(owners) - 1].length
        if taken != count:
            break
    total = sum(visual.length for visual in visuals)
    noun, tokens = ("sound", "audio") if kind == "audio" else ("image", "vision")
    if len(owners) != len(visuals) or sum(counts) != total:
        raise TrimError(
            f"the prompt has {sum(counts)} {noun} placeholders ({', '.join(map(str, counts))} by row) but the "
            f"{len(visuals)} {noun}s give {total} {tokens} tokens: build prompt and {noun}s with one call of the "
            "model's processor"
        )
    return owners


def _images(owners: list[tuple[int, int]], placeholders: Bool[Tensor, "batch tokens"] | None) -> list[list[int]]:
    """What was encoded, by image: several where the family writes the tiles of an image without text between.

    ``placeholders`` are looked at for such a family, None for others.
    """
    if placeholders is None:
        return [[number] for number in range(len(owners))]
    columns = [row.nonzero()[:, 0].tolist() for row in placeholders]
    images: list[list[int]] = []
    for number, (row, first) in enumerate(owners):
        if first > 0 and columns[row][first] == columns[row][first - 1] + 1:
            images[-1].append(number)
        else:
            images.append([number])
    return images
