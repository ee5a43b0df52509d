"""VLM-Pruner: from a few pivots outward, near places first, and what is dropped comes back by likeness.

"VLM-Pruner: Buffering for Spatial Sparsity in an Efficient VLM Centrifugal Token Pruning Paradigm", CVPR 2026, arXiv
2512.02700. Official code: Casey-bit/VLMPruner, Apache-2.0. No attention is computed.

Before decoder layer 2, with the hidden states x and the keys of the layer before:

1. ``pivots`` tokens: the largest L1 norm of the key, over all heads, then each the one farthest from those before it.
2. Likeness is the cosine over the 256 channels of x that vary most over the tokens. That of a token to the kept ones
   is the largest, times 1 + ``buffer`` d / D, d its distance on the grid to the nearest kept one and D the diagonal of
   the grid: what is far looks redundant, so that the choice grows from near to far.
3. In rounds, tokens are taken, least alike first, in batches of 16, if their likeness to what is kept before the batch
   is below a threshold, 0.8 in the first round and 0.1 more in each. A batch that would overflow gives its least alike.
4. Each dropped token goes to the kept one most like it, which becomes ``1 - recovery`` itself and ``recovery`` the mean
   of its dropped ones, weighted by their likeness.

Survivors keep their position ids. Published: 192, 128 and 64 tokens *after* layer 2, means of 216, 156 and 96.

Differences: a round that adds nothing ends the released search, also below the count (4 tokens on a uniform picture);
here the threshold goes on rising. D is 24 sqrt(2) there, whatever the grid. Each image has its own order, so the
rounds are a loop over images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.budget import Depth
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.methods.checks import require
from visiontrim.ops.basis import farthest_points
from visiontrim.ops.select import gather

CHANNELS, BATCH, THRESHOLD, STEP = 256, 16, 0.8, 0.1


@register
@dataclass(frozen=True)
class VLMPruner(Cascade):
    keep: Counts = (64,)
    """Mean number of vision tokens per decoder layer (int) or its fraction (float); a 1-tuple gives what is left from
    ``layer`` on."""
    layer: Depth = 2
    """Decoder layer before which tokens are removed: its index, or a fraction of the depth."""
    pivots: int = 4
    buffer: float = 0.5
    """Weight of the distance; 0: likeness alone."""
    recovery: float = 0.7
    """Weight of the dropped tokens in the kept one that they go to; 0: a pure selection."""

    name: ClassVar[str] = "vlm-pruner"
    summary: ClassVar[str] = "grows from pivots outward to tokens unlike those kept, which take up the others"
    paper: ClassVar[str] = "arXiv 2512.02700, CVPR 2026"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.pivots >= 1, f"pivots={self.pivots}: give at least 1")
        require(self.buffer >= 0, f"buffer={self.buffer}: give 0 or more")
        require(0 <= self.recovery <= 1, f"recovery={self.recovery} is no share: give a number in [0, 1]")

    @property
    def depths(self) -> tuple[Depth, ...]:
        return (self.layer,)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"decoder.keys"})

    def choose(self, view: View, count: int) -> Keep:
        keys = view.decoder.keys.tokens.float().transpose(1, 2).flatten(2)
        pivots = farthest_points(keys, min(self.pivots, count), keys.abs().sum(-1).argmax(1))
        values = view.features.float()
        varied = values.var(1, correction=0).sort(dim=-1, descending=True, stable=True).indices[:, :CHANNELS]
        unit = F.normalize(values.gather(2, varied[:, None].expand(-1, values.shape[1], -1)), dim=-1)
        index = torch.stack(
            [self._grown(unit[b], view.coordinates[b].float(), view.grid, pivots[b], count) for b in range(len(unit))]
        )
        if not self.recovery:
            return Keep(index)
        ordinals = torch.arange(count, device=index.device).expand_as(index)
        likeness, home = (unit @ gather(unit, index).mT).max(-1)
        home = home.scatter(1, index, ordinals)
        weight = likeness.clamp(min=1e-8).scatter(1, index, 0.0)
        spread = torch.zeros(*home.shape, count, device=home.device).scatter(2, home[..., None], weight[..., None])
        total = spread.sum(1)[..., None]
        of_dropped = (spread.mT @ view.content.float()) / total.clamp(min=1e-8)
        own = gather(view.content, index)
        mixed = (1 - self.recovery) * own.float() + self.recovery * of_dropped
        features = torch.where(total > 0, mixed.to(own.dtype), own)
        return Keep(index, features, home, total[..., 0] > 0)

    def _grown(
        self,
        unit: Float[Tensor, "tokens channels"],
        places: Float[Tensor, "tokens 3"],
        grid: tuple[int, int, int],
        pivots: Int[Tensor, " pivots"],
        count: int,
    ) -> Int[Tensor, " kept"]:
        """``count`` tokens, ascending, grown from the ``pivots`` of one image."""
        _, rows, columns = grid
        diagonal = (rows**2 + columns**2) ** 0.5
        frame, at = places[:, 0], places[:, 1:]
        nearest = unit.new_full(unit.shape[:1], -torch.inf)
        apart = unit.new_full(unit.shape[:1], torch.inf)
        taken = torch.zeros_like(frame, dtype=torch.bool)
        left = count

        def take(new: Tensor) -> None:
            nonlocal nearest, apart, left
            taken[new] = True
            left -= len(new)
            nearest = torch.maximum(nearest, (unit @ unit[new].mT).amax(-1))
            distance = torch.linalg.vector_norm(at[:, None] - at[new], dim=-1)
            distance = distance.masked_fill(frame[:, None] != frame[new], diagonal)  # another frame is as far as can be
            apart = torch.minimum(apart, distance.amin(-1))

        def alike() -> Float[Tensor, " tokens"]:
            return nearest * (1 + self.buffer * apart / diagonal)

        take(pivots)
        threshold = THRESHOLD
        while left:
            order = alike().masked_fill(taken, torch.inf).sort(stable=True).indices[: int((~taken).sum())]
            for number, some in enumerate(order.split(BATCH)):
                value = alike()[some]
                new = some[~(value >= threshold)]  # broken numbers must not go round for ever
                if len(new) > left:
                    new = some[value.sort(stable=True).indices[:left]]
                if len(new):
                    take(new)
                if not left or (number == 0 and not len(new)):
                    break
            threshold += STEP
        return taken.nonzero()[:, 0]
