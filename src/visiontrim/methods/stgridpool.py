"""ST-GridPool: frames tiled into later ones, then pooling that weighs a token by its norm.

Pyramid temporal gridding and norm-based spatial pooling, ICLR 2026, arXiv 2605.22078. Official code:
bingjunluo/ST-GridPool, MIT by its licence file, Apache-2.0 by its README.

1. ``gridding``: over blocks of 2, then 4, then 8 frames, the last frame of every block is taken, and of four taken in
   a row a 2 x 2 grid of them, at half their sides, overwrites the fourth. No token is added; of 64 frames 8 lose their
   own content. Fewer than 8 frames, and so an image, stay as they are.
2. Each cell becomes the mean of its tokens in the language model's space, weighted by the softmax of ``beta`` times the
   Euclidean norm over the cell. Cells of 2 x 2 are ``keep`` = 1/4.

Positions are consecutive. ``beta=0.0,gridding=false`` is plain average pooling, the control that the authors' tables
lack; each half alone is its ablation.

Differences: the original is a better pooling at the model's own budget; here cells are as nearly square as any ``keep``
allows (see :func:`visiontrim.ops.pool.pool_cells`) and cover the whole grid, where the released code drops the last row
and column of an odd one. It pools in place of LLaVA's own pooling; here a family that pools has already done so. The
paper has the raw norm (``norm="raw"``), the code divides by sqrt(dim), which makes the weights nearly even; the
published numbers seem to come from the code. Sampled frames are those of the code, the last of each block, each shrunk
by area; the paper takes others, and shrinks the finished grid bilinearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from visiontrim.core.budget import Amount
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep
from visiontrim.ops.frames import temporal_gridding
from visiontrim.ops.pool import pool_by_weight, pool_cells


@register
@dataclass(frozen=True)
class STGridPool(EncoderStep):
    keep: Amount = 0.25
    """Tokens of each video that enter the language model, as a number or as a fraction."""
    gridding: bool = True
    """Tile earlier frames into later ones."""
    beta: float = 1.0
    """Weight of the norm; 0 averages."""
    norm: Literal["rms", "raw"] = "rms"
    """Norm divided by sqrt(dim), as in the released code, or not, as in the paper."""

    name: ClassVar[str] = "st-gridpool"
    summary: ClassVar[str] = "tiles frames into later ones, and pools cells by the norm of tokens"
    paper: ClassVar[str] = "arXiv 2605.22078, ICLR 2026"
    for_videos: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected"})

    def choose(self, view: View, count: int) -> Keep:
        given = view.projected_content
        batch, _, dim = given.shape
        tokens = given.float()
        if self.gridding:
            tokens = temporal_gridding(tokens.view(batch, *view.grid, dim)).reshape(batch, -1, dim)
        norms = tokens.detach().norm(dim=-1) * (dim**-0.5 if self.norm == "rms" else 1.0)
        cells, middles = (part.to(tokens.device) for part in pool_cells(view.grid, count))
        return Keep(
            middles.expand(batch, -1),
            assignment=cells.expand(batch, -1),
            complement=(torch.bincount(cells) > 1).expand(batch, -1),
            projected=pool_by_weight(tokens, self.beta * norms, cells, count).to(given.dtype),
        )
