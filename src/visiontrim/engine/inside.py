"""The tokens of an encoding between the encoder's layers: how its sequence holds them before and after they merge.

A token here is what becomes one vision token: a patch, or a unit of patches that the model joins behind its encoder.
Units stay whole: their patches stand side by side in a token, so that a unit merges with a unit, patch by patch.

The encoder gets hidden states [pictures, special + patches, dim], the patches in raster order until something merged
and unit by unit from then on; or one sequence [patches, dim] of all pictures, unit by unit, in an order that the family
knows (:class:`~visiontrim.models.layout.Packing`).

It knows the encoder's sequence; it does not know which tokens stay.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Step
from visiontrim.core.view import Keep
from visiontrim.engine.survivors import Merging
from visiontrim.models.family import Family, Kind
from visiontrim.models.layout import Packing


@dataclass(frozen=True)
class Inside:
    """Where the tokens are now. ``merging``, ``at`` and ``places`` have an entry for every group of equal segments."""

    family: Family
    kind: Kind
    merging: tuple[Merging, ...]
    at: tuple[Int[Tensor, "images total"], ...]
    """Which of all uncompressed tokens, in the order of their placeholders, each token of a segment is."""
    places: tuple[Int[Tensor, "images kept"], ...]
    """Place of every survivor in the encoder's sequence of tokens, pictures one after the other."""
    packing: Packing | None
    """None: pictures are rows of a batch."""
    merged: bool = False

    @classmethod
    def begin(cls, family: Family, kind: Kind, merging: Sequence[Merging], at: Sequence[Tensor]) -> Inside:
        """Before anything merges."""
        inside = cls(family, kind, tuple(merging), tuple(at), tuple(at), None)
        packing = inside._packed()
        if packing is None:
            return inside
        place = packing.order.argsort().to(at[0].device)
        return replace(inside, packing=packing, places=tuple(place[group] for group in at))

    @property
    def unit(self) -> int:
        """Patches of a token."""
        return self.family.factor**2

    def tokens(self, patches: Shaped[Tensor, "patches *rest"]) -> list[Shaped[Tensor, "images kept unit *rest"]]:
        """Values of the encoder's patches, special ones left out, by group and token."""
        factor, rest = self.family.factor, patches.shape[1:]
        if factor > 1 and self.packing is None and not self.merged:
            _, rows, columns = self.merging[0].grid
            patches = patches.view(-1, rows, factor, columns, factor, *rest).transpose(2, 3)
        units = patches.reshape(-1, self.unit, *rest)
        return [units[places] for places in self.places]

    def whole(self, tokens: Shaped[Tensor, "kept *rest"]) -> Shaped[Tensor, "total *rest"]:
        """Values of the tokens in the encoder's sequence, for every uncompressed token that of its survivor."""
        full = tokens.new_empty(sum(at.numel() for at in self.at), *tokens.shape[1:])
        for merging, at, places in zip(self.merging, self.at, self.places, strict=True):
            full[at] = tokens[places.gather(1, merging.now.assignment.clamp_min(0))]
        return full

    def packed(self, tokens: Shaped[Tensor, "total *rest"]) -> Shaped[Tensor, "total *rest"]:
        """All uncompressed tokens in the order that the encoder began with."""
        packing = self.family.packing(self.kind, self._boxes(uncompressed=True))
        return tokens if packing is None else tokens[packing.order.to(tokens.device)]

    def slots(self, tokens: Shaped[Tensor, "total *rest"]) -> Shaped[Tensor, "kept *rest"]:
        """Of the values of all uncompressed tokens those at the survivors' slots, in the encoder's sequence."""
        return self.sequence([tokens[at.gather(1, m.slots)] for m, at in zip(self.merging, self.at, strict=True)])

    def raster(self, patches: Float[Tensor, "patches dim"]) -> Float[Tensor, "pictures patches dim"]:
        """The patches of a batch of pictures, for every uncompressed one that of its survivor, in raster order."""
        factor, (_, rows, columns) = self.family.factor, self.merging[0].grid
        full = self.whole(patches.reshape(-1, self.unit, patches.shape[-1]))
        full = full.view(-1, rows, columns, factor, factor, patches.shape[-1]).transpose(2, 3)
        return full.reshape(-1, rows * columns * self.unit, patches.shape[-1])

    def after(self, keeps: Sequence[Keep], step: Step) -> Inside:
        """The tokens once ``keeps``, answered for the groups, are applied."""
        merging = tuple(old.after(keep, step) for old, keep in zip(self.merging, keeps, strict=True))
        counts = {m.now.index.shape[1] for m in merging}
        if self.packing is None and len(counts) > 1:
            raise TrimError(
                f"{step} would leave {' and '.join(map(str, sorted(counts)))} tokens of tiles that go through the "
                "encoder as one batch: give keep as a fraction, or per='tile', or pass one picture at a time"
            )
        inside = replace(self, merging=merging)
        same = (keep.index.shape == places.shape for keep, places in zip(keeps, self.places, strict=True))
        if all(same) and all(keep.features is None for keep in keeps):
            return inside
        if self.packing is not None and not any(m.mixed for m in merging):
            return inside._fewer()
        packing, numbers = inside._packed(), inside._numbers()
        if packing is not None:
            place = packing.order.argsort().to(numbers[0].device)
            numbers = [place[number] for number in numbers]
        return replace(inside, packing=packing, places=tuple(numbers), merged=True)

    def sequence(self, values: Sequence[Shaped[Tensor, "images kept *rest"]]) -> Shaped[Tensor, "kept *rest"]:
        """Values of the survivors of every group, as the encoder has them in its sequence of tokens."""
        flat = values[0].new_empty(sum(places.numel() for places in self.places), *values[0].shape[2:])
        for places, part in zip(self.places, values, strict=True):
            flat[places] = part
        return flat

    def bias(self, special: int) -> Float[Tensor, "pictures sequence"] | None:
        """What is added to the attention to each token of a picture, ``special`` ones included: log mass."""
        if not any(merging.proportional for merging in self.merging):
            return None
        mass = self.sequence([merging.mass for merging in self.merging])
        return F.pad(mass.log().view(-1, self.places[0].shape[1]), (special, 0))

    def chunks(self, windowed: bool = False) -> list[int] | None:
        """Patches that attend to each other, chunk after chunk; None: each picture is a row of a batch."""
        if self.packing is None:
            return None
        chunks = self.packing.windows if windowed else self.packing.chunks
        return [count * self.unit for count in chunks or self.packing.chunks]

    @functools.cached_property
    def rotary(self) -> tuple[Float[Tensor, "patches dim"], Float[Tensor, "patches dim"]]:
        """Cosines and sines, float32, of the patches' mean places: those of the unit's survivors in its own place."""
        factor = self.family.factor
        within = torch.cartesian_prod(torch.arange(factor), torch.arange(factor)).to(self.places[0].device)
        centres = self.sequence([merging.centres for merging in self.merging])
        return self.family.rotary(self.kind, (factor * centres[:, None, 1:] + within).flatten(0, 1))

    def _segments(self) -> list[tuple[int, int, int]]:
        """(first of all uncompressed tokens, group, image) of every segment, in the order of the first."""
        firsts = torch.cat([at[:, 0] for at in self.at]).tolist()
        numbers = [(group, image) for group, at in enumerate(self.at) for image in range(len(at))]
        return sorted((first, *number) for first, number in zip(firsts, numbers, strict=True))

    def _numbers(self) -> list[Int[Tensor, "images kept"]]:
        """Every survivor's number, with segments one after the other."""
        starts, start = [[0] * len(at) for at in self.at], 0
        for _, group, image in self._segments():
            starts[group][image] = start
            start += self.merging[group].now.index.shape[1]
        return [
            torch.tensor(first, device=at.device)[:, None] + torch.arange(m.now.index.shape[1], device=at.device)
            for first, at, m in zip(starts, self.at, self.merging, strict=True)
        ]

    def _boxes(self, uncompressed: bool = False) -> list[tuple[int, int, int]]:
        """The grid of every segment as its tokens are now; a row of tokens where they form none."""
        boxes = []
        for _, group, _ in self._segments():
            merging = self.merging[group]
            boxes.append(merging.grid if uncompressed else merging.lattice or (1, 1, merging.now.index.shape[1]))
        return boxes

    def _fewer(self) -> Inside:
        """Tokens that nothing merged into stay where the encoder began with them: in their frame and window."""
        whole = self.family.packing(self.kind, self._boxes(uncompressed=True))
        assert whole is not None
        survivors = [at.gather(1, m.now.index).cpu() for m, at in zip(self.merging, self.at, strict=True)]
        here = torch.isin(whole.order, torch.cat([group.flatten() for group in survivors]))
        place = (here.cumsum(0) - 1)[whole.order.argsort()].to(self.at[0].device)
        windows = None if whole.windows is None else _counts(here, whole.windows)
        return replace(
            self,
            packing=Packing(whole.order[here], _counts(here, whole.chunks), windows),
            places=tuple(place[group.to(place.device)] for group in survivors),
            merged=True,
        )

    def _packed(self) -> Packing | None:
        packing = self.family.packing(self.kind, self._boxes())
        if packing is None:
            return None
        for merging in self.merging:
            if merging.lattice is None and (merging.grid[0] > 1 or packing.windows is not None):
                raise TrimError(
                    f"what was merged left no grid of the {' x '.join(map(str, merging.grid))} tokens, in which this "
                    "encoder attends by frames or windows: use a method that keeps a grid, such as luvc"
                )
        return packing


def _counts(here: Bool[Tensor, " tokens"], sizes: Sequence[int]) -> list[int]:
    """How many of each of the chunks of ``sizes`` tokens are ``here``, of those with any."""
    return [count for chunk in here.split(list(sizes)) if (count := int(chunk.sum()))]
