"""Which tokens are left, what they carry, and where they stand.

It knows one image's grid; it does not know batches, prompts and models.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from visiontrim.core.method import Site, Step
from visiontrim.core.view import Keep
from visiontrim.engine.pack import gather


def coordinates(index: Int[Tensor, "*shape"], grid: tuple[int, int, int]) -> Int[Tensor, "*shape 3"]:
    """(frame, row, column) of raster indices on ``grid``."""
    _, rows, columns = grid
    return torch.stack([index // (rows * columns), index // columns % rows, index % columns], -1)


@dataclass(frozen=True)
class Survivors:
    """Which tokens of a group's images are left, in terms of the uncompressed images."""

    index: Int[Tensor, "images kept"]
    """Raster index of the token that each survivor stands for."""
    assignment: Int[Tensor, "images total"]
    """Survivor that carries each token, -1 where it is gone."""
    complement: Bool[Tensor, "images kept"]
    """Survivors that stand for a cluster."""
    marked: Bool[Tensor, "images kept"] | None = None
    """Survivors that a step marked for later ones; None: no step did."""
    noted: Float[Tensor, "images kept"] | None = None
    """A number of each survivor that a step noted for later ones; None: no step did."""

    def after(self, keep: Keep) -> Survivors:
        """The survivors once ``keep``, answered for the current ones, is applied."""
        batch, kept = keep.index.shape
        if keep.assignment is None:
            went_to = self.index.new_full(self.index.shape, -1)
            went_to.scatter_(1, keep.index, torch.arange(kept, device=keep.index.device).expand(batch, kept))
        else:
            went_to = keep.assignment
        complement = self.complement.gather(1, keep.index)
        marked = None if self.marked is None else self.marked.gather(1, keep.index)
        if keep.marked is not None:
            marked = keep.marked if marked is None else marked | keep.marked
        noted = keep.noted
        if noted is None and self.noted is not None:
            noted = self.noted.gather(1, keep.index)
        return Survivors(
            self.index.gather(1, keep.index),
            F.pad(went_to, (0, 1), value=-1).gather(1, self.assignment % (went_to.shape[1] + 1)),  # gone stays gone
            complement if keep.complement is None else complement | keep.complement,
            marked,
            noted,
        )

    @classmethod
    def uncompressed(cls, images: int, total: int, device: torch.device) -> Survivors:
        index = torch.arange(total, device=device).expand(images, total)
        return cls(index, index, torch.zeros_like(index, dtype=torch.bool))

    def pick(self, images: Int[Tensor, " picked"]) -> Survivors:
        marked = None if self.marked is None else self.marked[images]
        noted = None if self.noted is None else self.noted[images]
        return Survivors(self.index[images], self.assignment[images], self.complement[images], marked, noted)


@dataclass(frozen=True)
class Merging:
    """Equal segments on their way through the encoder: which of their tokens merged."""

    grid: tuple[int, int, int]
    """(frames, rows, columns) of each segment, uncompressed."""
    lattice: tuple[int, int, int] | None
    """(frames, rows, columns) that the tokens form in the encoder's order; None: no such box."""
    now: Survivors
    """In the encoder's order."""
    history: tuple[tuple[Site, Survivors], ...] = ()
    """What each step so far left, in order."""
    proportional: bool = False
    """Whether attention to a token is in proportion to its mass."""
    mixed: bool = False
    """Whether a step changed what tokens carry; if not, they are just fewer."""

    @property
    def mass(self) -> Float[Tensor, "images kept"]:
        """Tokens of the grid that each survivor carries."""
        return scatter_sum(self.now, torch.ones_like(self.now.assignment)[..., None])[..., 0]

    def after(self, keep: Keep, step: Step) -> Merging:
        """The tokens once ``keep``, answered for the current ones, is applied."""
        same = keep.index.shape[1] == self.now.index.shape[1]
        now = self.now.after(keep)
        return replace(
            self,
            lattice=self.lattice if same else keep.lattice,
            now=now,
            history=(*self.history, (step.site, now)),
            proportional=self.proportional or step.proportional,
            mixed=self.mixed or keep.features is not None,
        )

    @property
    def centres(self) -> Float[Tensor, "images kept 3"]:
        """Mean (frame, row, column) of the tokens that each survivor carries."""
        carried = self.now.assignment
        places = coordinates(torch.arange(carried.shape[1], device=carried.device), self.grid).float()
        return scatter_sum(self.now, places.expand(len(carried), -1, -1)) / self.mass[..., None]

    @functools.cached_property
    def slots(self) -> Int[Tensor, "images kept"]:
        """For each survivor the one of its members that is nearest to their mean place, of two as near the first."""
        carried = self.now.assignment
        images, total = carried.shape
        every = torch.arange(total, device=carried.device)
        away = (gather(self.centres, carried.clamp_min(0)) - coordinates(every, self.grid)).square().sum(-1)
        kept = self.now.index.shape[1]
        owner = carried % (kept + 1)  # the last entry: dropped ones
        least = away.new_full((images, kept + 1), torch.inf).scatter_reduce(1, owner, away, "amin")
        candidate = torch.where(away <= least.gather(1, owner) + 1e-4, every, total)
        return owner.new_full((images, kept + 1), total).scatter_reduce(1, owner, candidate, "amin")[:, :-1]

    def settled(self) -> tuple[Survivors, tuple[tuple[Site, Survivors], ...]]:
        """The survivors at their slots, in raster order, and the history that ends with them."""
        index, order = self.slots.sort(1)
        rank = order.argsort(1)
        went_to = F.pad(rank, (0, 1), value=-1).gather(1, self.now.assignment % (rank.shape[1] + 1))
        marked = None if self.now.marked is None else self.now.marked.gather(1, order)
        noted = None if self.now.noted is None else self.now.noted.gather(1, order)
        now = Survivors(index, went_to, self.now.complement.gather(1, order), marked, noted)
        return now, (*self.history[:-1], (self.history[-1][0], now))


def scatter_sum(survivors: Survivors, values: Shaped[Tensor, "images total *rest"]) -> Tensor:
    """Sum, in float32, of the values of the tokens that each survivor carries: [images, kept, *rest]."""
    images, kept = survivors.index.shape
    total = torch.zeros(images, kept + 1, *values.shape[2:], device=values.device)  # the last entry: dropped ones
    owner = (survivors.assignment % (kept + 1)).view(*values.shape[:2], *(1 for _ in values.shape[2:]))
    return total.scatter_add(1, owner.expand_as(values), values.float())[:, :-1]
