"""Control: average pooling of the grid, to any number of cells.

The control for methods that merge. A cell is as nearly square as the budget allows (see
:func:`visiontrim.ops.pool.pool_cells`), 2 x 2 patches for 144 of 24 x 24; its patches are averaged before the
projector, and positions are consecutive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visiontrim.core.errors import TrimError
from visiontrim.core.registry import register
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep
from visiontrim.ops.pool import pool_by_weight, pool_cells


@register
@dataclass(frozen=True)
class AvgPool(EncoderStep):
    name: ClassVar[str] = "avgpool"
    summary: ClassVar[str] = "averages the patches of even cells"
    paper: ClassVar[str] = "control"
    merges: ClassVar[bool] = True

    def choose(self, view: View, count: int) -> Keep:
        batch, tokens = view.features.shape[:2]
        if tokens != view.total:
            raise TrimError(
                f"avgpool averages a whole grid of {view.total} tokens, but {tokens} of them are left: use it alone"
            )
        cells, middles = (part.to(view.features.device) for part in pool_cells(view.grid, count))
        return Keep(
            middles.expand(batch, -1),
            pool_by_weight(view.content, torch.zeros_like(view.features[..., 0]), cells, count),
            assignment=cells.expand(batch, -1),
            complement=(torch.bincount(cells) > 1).expand(batch, -1),
        )
