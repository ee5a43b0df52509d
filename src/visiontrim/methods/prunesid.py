"""PruneSID: groups by principal components over the tokens, suppression inside groups, a quota for each.

PruneSID, ICLR 2026, arXiv 2603.09480. Official code: ZhengyaoFang/PruneSID, Apache-2.0.

1. The features, squashed by a sigmoid and centred, have principal directions over the token axis; a patch belongs to
   the one of the first ``keep / 4`` on which its loading is largest.
2. In a group, patches that are more like a better one than a threshold are suppressed. The threshold is 18 ``keep`` / N
   times the mean cosine of all pairs of the N patches, which of 576 is ``keep`` / 32: it reaches 1 and switches
   suppression off when that mean is 0.5 at 64 of 576, 0.25 at 128, 0.17 at 192.
3. Each group has a quota in proportion to its survivors, and gives its best patches.

``variant="paper"`` centres by the mean patch, ranks by the loading, and keeps raster order. ``variant="release"``
centres each patch by the mean of its features, ranks by the attention of [CLS], has the factor ``keep`` / 32 whatever N
is and puts out group after group, as the released code for LLaVA does. Both have consecutive positions. Published: 192,
128 and 64 tokens.

Differences: the published counts include [CLS], which transformers' LLaVA never projects: the next patch has its place.
Principal components are exact (randomised and unseeded there). The code for Qwen takes a factor of at least 1, and a
mean over a matrix that is half zeros, so about half of it. The budget that varies over a data set, which needs
statistics of all its images and is not in the released code, is left out. Without [CLS], the release's variant ranks by
the attention received.

Exact components take the cube of the patches or of the width, whichever is less, and patches of a group are compared
with each other: above linear. Of 576 patches all eigenvectors are some 20 x 576^3 operations, more than half of the
plain form's time (a loop over the patches, N x N components); a factor of five is out of reach there without giving up
exactness, 1.4 is what is left. At 2,304 patches components on the side of the width make it ten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, cls_attention
from visiontrim.ops.groups import principal_loadings, quotas, rank_within, suppressed


@register
@dataclass(frozen=True)
class PruneSID(EncoderStep):
    variant: Literal["paper", "release"] = "paper"
    """The paper's method, or the released code."""

    name: ClassVar[str] = "prunesid"
    summary: ClassVar[str] = "groups by principal components, suppression and quotas inside groups"
    paper: ClassVar[str] = "arXiv 2603.09480, ICLR 2026"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.cls_attention"} if self.variant == "release" else ())

    def choose(self, view: View, count: int) -> Keep:
        release = self.variant == "release"
        squashed = view.features.float().sigmoid()
        centred = squashed - squashed.mean(-1 if release else 1, keepdim=True)
        loading, group = principal_loadings(centred, max(1, count // 4)).max(-1)
        score, factor = cls_attention(view) if release else loading, count / 32 if release else 18 * count / view.total
        return pick_from_groups(view.features, group, score, count, factor=factor, by_group=release)


def pick_from_groups(
    features: Float[Tensor, "batch tokens dim"],
    group: Tensor,
    score: Float[Tensor, "batch tokens"],
    count: int,
    *,
    factor: float,
    by_group: bool,
) -> Keep:
    """Steps 2 and 3: ``count`` tokens by suppression above ``factor`` times the mean cosine, and by quotas.

    They stand in raster order, or group by group as ranked there.
    """
    tokens, groups = features.shape[1], max(1, count // 4)
    unit = F.normalize(features.float(), dim=-1)
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    threshold = factor * pairs / (tokens * (tokens - 1))
    gone = suppressed(unit, group, score, threshold)
    members = (group[..., None] == torch.arange(groups, device=group.device)).long()
    survivors = (members * ~gone[..., None]).sum(1)
    quota = quotas(members.sum(1), survivors, count, cap=5 * -(-count // 64))
    rank = rank_within(group, score, behind=gone)
    chosen = rank < quota.gather(1, group)
    place = torch.arange(tokens, device=group.device).expand_as(group)
    key = group * tokens + rank if by_group else place
    first = key.masked_fill(~chosen, groups * tokens).sort(dim=1).indices[:, :count]
    return Keep(first)
