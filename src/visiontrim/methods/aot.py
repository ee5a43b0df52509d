"""AOT: anchors of every frame take up its rest by optimal transport, then those of a segment the later frames' ones.

"AOT", CVPR 2026, arXiv 2603.01400. Official code: TyroneLi/AOT, MIT.

1. Anchors of a frame: half by the attention of [CLS] (or received) in the layer whose output is projected, half by
   that in the layer ``shallow`` with equal quotas in windows of 9 x 9, as VScan has them.
2. Inside a frame, the rest goes to the anchors by a Sinkhorn plan P (eps 0.1) over 1 - cos + 0.5 times the distance,
   the frame being the unit square: x_a becomes (x_a + sum P x) / (1 + sum P), and 0.9 of that plus 0.1 of the mean of
   the anchor and the tokens nearest to it. As P sums up to 1 over the *frame*, the first part is nearly x_a.
3. In a segment of ``length`` frames, the anchors of the first stand. Those of a frame dt later go to them by a plan
   over (1 - cos, shifted to 0) (1 - exp(-dt^2 / (2 1.5^2))), its rows scaled to 1; the share ``residual`` of them whose
   largest entry is lowest stay as they are instead.

Position ids are kept. An image is one frame of anchors alone.

Differences: ``keep`` is exact, so the number of anchors follows from it and ``residual``; published are 126 or 108 of
196 a frame and shares of 0.3 and 0.1. The original puts out the first frame's anchors twice, as they were and merged,
here once, merged. Its segments by scenes are not built. The quantile of plan entries is a count, equal for all frames
but for one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.core.budget import Amount
from visiontrim.core.method import Positions
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, by_frame, cls_attention
from visiontrim.methods.checks import require
from visiontrim.ops.groups import rank_within
from visiontrim.ops.merge import merge_into_nearest
from visiontrim.ops.select import even_shares, gather, leftovers, top_k
from visiontrim.ops.transport import sinkhorn
from visiontrim.ops.windows import windows

WINDOW, OWN, FAR, DECAY = 9, 0.9, 0.5, 1.5


@register
@dataclass(frozen=True)
class AOT(EncoderStep):
    keep: Amount = 0.25
    """Tokens of each video that enter the language model, as a number or as a fraction."""
    residual: float = 0.3
    """Share of the later frames' anchors that stay as they are."""
    length: int = 8
    """Frames of a segment, nearly."""
    shallow: int = 5
    """Encoder layer of the local scores, counted from 0, or from the last one if negative."""

    name: ClassVar[str] = "aot"
    summary: ClassVar[str] = "anchors that take up their frame, then their segment, by optimal transport"
    paper: ClassVar[str] = "arXiv 2603.01400, CVPR 2026"
    merges: ClassVar[bool] = True
    for_videos: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.residual <= 1, f"residual={self.residual} is no share: give a number in [0, 1]")
        require(self.length >= 1, f"length={self.length}: a segment has at least 1 frame")

    @property
    def positions(self) -> Positions:
        return "keep"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected", "encoder.cls_attention", ("encoder.cls_attention", self.shallow)})

    def choose(self, view: View, count: int) -> Keep:
        frames, rows, columns = view.grid
        places = rows * columns
        content, space = by_frame(view, view.projected_content), by_frame(view, view.encoder.projected)
        deep, local = by_frame(view, cls_attention(view)), by_frame(view, cls_attention(view, self.shallow))
        quota, first, index, values = even_shares(count, frames), 0, [], []
        for length in even_shares(frames, max(1, round(frames / self.length))):
            wanted = sum(quota[first : first + length])
            size = min(places, math.ceil(wanted / (1 + self.residual * (length - 1))))
            if wanted:
                kept, merged = [], []
                for frame in range(first, first + length if wanted > size else first + 1):
                    at = self._anchors(deep[:, frame], local[:, frame], view, size)
                    merged.append(_taken_up(content[:, frame], space[:, frame], view.coordinates[:, :places], at, view))
                    kept.append(at + frame * places)
                shares = even_shares(wanted - size, max(1, length - 1))
                at, out = _along(torch.stack(kept, 1), torch.stack(merged, 1), shares)
                index.append(at)
                values.append(out)
            first += length
        index, values = torch.cat(index, 1), torch.cat(values, 1)
        order = index.argsort(1)
        return Keep(index.gather(1, order), projected=gather(values, order).to(view.encoder.projected.dtype))

    def _anchors(
        self, deep: Float[Tensor, "batch places"], local: Float[Tensor, "batch places"], view: View, size: int
    ) -> Int[Tensor, "batch {size}"]:
        frame = view.coordinates[:, : deep.shape[1]]
        window, number = windows(frame, (1, *view.grid[1:]), WINDOW)
        # attention is at most 1, so local anchors come before all others
        return top_k(deep + 2 * (rank_within(window, local) < size // 2 // number), size)


def _taken_up(
    content: Float[Tensor, "batch places dim"],
    space: Float[Tensor, "batch places dim"],
    coordinates: Int[Tensor, "batch places 3"],
    anchors: Int[Tensor, "batch anchors"],
    view: View,
) -> Float[Tensor, "batch anchors dim"]:
    """The anchors of one frame with what its other tokens give them."""
    rest = leftovers(anchors, content.shape[1])
    if not rest.shape[1]:
        return gather(content, anchors)
    unit = F.normalize(space, dim=-1)
    side = torch.tensor([max(1, size - 1) for size in view.grid[1:]], device=space.device)
    place = coordinates[..., 1:] / side
    apart = (gather(place, rest)[:, :, None] - gather(place, anchors)[:, None]).square().sum(-1).sqrt()
    plan = sinkhorn(1 - gather(unit, rest) @ gather(unit, anchors).mT + FAR * apart)
    total = gather(content, anchors) + plan.mT @ gather(content, rest)
    moved = total / (1 + plan.sum(1)[..., None])
    nearest = merge_into_nearest(content, space, anchors, "mean").features
    return OWN * moved + (1 - OWN) * nearest


def _along(
    index: Int[Tensor, "batch frames anchors"], values: Float[Tensor, "batch frames anchors dim"], shares: list[int]
) -> tuple[Int[Tensor, "batch kept"], Float[Tensor, "batch kept dim"]]:
    """The first frame's anchors with those of later frames, of which ``shares`` stay beside them."""
    first, load = values[:, 0], torch.zeros_like(values[:, 0, :, :1])
    unit, total = F.normalize(values.detach(), dim=-1), values[:, 0]
    kept, outputs = [index[:, 0]], []
    for frame in range(1, values.shape[1]):
        cost = 1 - unit[:, frame] @ unit[:, 0].mT
        cost = cost - cost.amin((1, 2), keepdim=True)
        plan = sinkhorn(cost * (1 - math.exp(-(frame**2) / (2 * DECAY**2))))
        plan = plan / plan.sum(-1, keepdim=True)
        alone = top_k(-plan.amax(-1), shares[frame - 1])
        goes = torch.ones_like(plan[..., :1]).scatter(1, alone[..., None], 0.0)
        total = total + (plan * goes).mT @ values[:, frame]
        load = load + (plan * goes).sum(1)[..., None]
        kept.append(index[:, frame].gather(1, alone))
        outputs.append(gather(values[:, frame], alone))
    return torch.cat(kept, 1), torch.cat([total / (1 + load) if values.shape[1] > 1 else first, *outputs], 1)
