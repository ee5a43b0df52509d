"""ApET: keep the tokens that a small basis of tokens cannot reconstruct.

"ApET: Approximation-Error Guided Token Compression for Efficient VLMs", CVPR 2026, arXiv 2602.19870. Official code:
MaQianKun0/ApET, MIT. No attention is read anywhere.

1. ``basis`` tokens are sampled, each the one farthest from those before it.
2. The error of a token is the norm of what its least-squares reconstruction from the basis leaves. The tokens with the
   largest errors stay, in raster order.
3. The same before decoder layer 16 of 32, on hidden states.

``keep`` is the mean per layer, and three enter for one that goes on: 192 = 288 -> 96, 128 = 192 -> 64, 64 = 96 -> 32.
Positions are consecutive.

``variant="code"`` is the released code, which does more than the paper says: the ``basis`` kept tokens with the
smallest errors give their places to the basis (``blend``: 1 on LLaVA, 0.5 on Qwen, of its own the rest), and each
dropped token is merged, as a plain mean, into the one of the other kept tokens nearest to it by the cosine.

Differences: the first token of the basis is the one farthest from the mean, the code draws it at random. The ridge is
1e-5 of the mean squared norm, and in ``variant="code"`` 1e-5 itself as there. The kept tokens of which the basis takes
the places, largest error first, get its tokens in the order in which they were sampled. Where fewer stay than the basis
has tokens, all but one give their places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from visiontrim.core.method import Positions
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import in_raster_order, with_clusters
from visiontrim.methods.checks import require
from visiontrim.methods.twostage import TwoStage
from visiontrim.ops.basis import farthest_points, unexplained
from visiontrim.ops.select import gather, top_k

RIDGE = 1e-5


@register
@dataclass(frozen=True)
class ApET(TwoStage):
    basis: int = 10
    """Tokens of the basis; 0: the error is the norm."""
    blend: float = 1.0
    """Share of a basis token in the place that it takes, the rest is the kept token's own (``variant="code"``)."""
    variant: Literal["paper", "code"] = "paper"

    name: ClassVar[str] = "apet"
    summary: ClassVar[str] = "keeps what a small basis of tokens cannot reconstruct"
    paper: ClassVar[str] = "arXiv 2602.19870, CVPR 2026"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.basis >= 0, f"basis={self.basis}: give a number of tokens, 10 in the paper, or 0 for none")
        require(0 <= self.blend <= 1, f"blend={self.blend} is no share: give a number in [0, 1]")

    @property
    def positions(self) -> Positions:
        return "compact"

    @property
    def language_needs(self) -> frozenset[Signal]:
        return frozenset()

    def choose(self, view: View, count: int) -> Keep:
        values = view.features.float()
        size = min(self.basis, values.shape[1])
        first = (values - values.mean(1, keepdim=True)).square().sum(-1).argmax(1)
        basis = farthest_points(values, size, first) if size else first[:, None][:, :0]
        error = unexplained(values, basis, RIDGE, relative=self.variant == "paper")
        if self.variant == "paper":
            return Keep(top_k(error, count))
        ranked = error.sort(dim=1, descending=True, stable=True).indices[:, :count]
        given = min(size, count - 1)
        own, taken = ranked[:, : count - given].sort(1).values, ranked[:, count - given :]
        keep = with_clusters(view, taken, own, view.features, "mean")
        rows, features = gather(view.content, basis[:, :given]), keep.features
        assert features is not None
        instead = self.blend * rows.float() + (1 - self.blend) * features[:, :given].float()
        features = torch.cat([instead.to(features.dtype), features[:, given:]], 1)
        return in_raster_order(replace(keep, features=features, complement=None))

    def prune(self, view: View, count: int) -> Keep:
        return self.choose(view, count)
