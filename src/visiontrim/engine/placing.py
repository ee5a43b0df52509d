"""Where the tokens of what is encoded belong: to which row, image, part of an image, and placeholder.

It knows grids and placeholders; it does not know which tokens stay.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool
from torch import Tensor

from visiontrim.engine.call import Call, Encoding
from visiontrim.engine.groups import Group, Part, Placed
from visiontrim.models.family import Family
from visiontrim.models.layout import Segment


def placed(
    call: Call, encoding: Encoding, family: Family, per: str, apart: bool, lengths: list[int] | None
) -> list[Placed]:
    """The segments of what is encoded, by group, or each in a group of its own if they are to be ``apart``.

    ``per`` is that of :meth:`Visual.split`, ``lengths`` that of :meth:`Family.visuals`.
    """
    visuals = family.visuals(encoding.kind, encoding.arguments, lengths)
    device = call.input_ids.device
    placeholders = family.placeholders(call.input_ids, encoding.kind)
    owners = call.owners(placeholders, visuals)
    starts = list(itertools.accumulate((visual.length for visual in visuals), initial=0))
    number = 1 + max((number for group in call.groups for number in group.numbers), default=-1)
    members: dict[tuple[Part, int, int], list[tuple[int, int, Segment]]] = {}
    for tiles in _images(owners, placeholders, family.adjoining):
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
    groups = []
    for (part, *_), segments in members.items():
        start = torch.tensor([starts[tile] for _, tile, _ in segments])[:, None]
        offset = torch.tensor([owners[tile][1] for _, tile, _ in segments])[:, None]
        index = torch.stack([segment.index for _, _, segment in segments])
        marks = torch.stack([segment.marks for _, _, segment in segments])
        group = Group.uncompressed(
            tuple(owners[tile][0] for _, tile, _ in segments),
            tuple(number for number, _, _ in segments),
            part,
            (offset + index).to(device),
            (offset + marks).to(device),
        )
        groups.append(Placed(group, (start + index).to(device), (start + marks).to(device)))
    return groups


def _images(
    owners: list[tuple[int, int]], placeholders: Bool[Tensor, "batch tokens"], adjoining: bool
) -> list[list[int]]:
    """What was encoded, by image: several where the family writes the tiles of an image without text between."""
    if not adjoining:
        return [[number] for number in range(len(owners))]
    columns = [row.nonzero()[:, 0].tolist() for row in placeholders]
    images: list[list[int]] = []
    for number, (row, first) in enumerate(owners):
        if first > 0 and columns[row][first] == columns[row][first - 1] + 1:
            images[-1].append(number)
        else:
            images.append([number])
    return images
