"""PPE: clusters by density peaks, whose means stand at the places of several of their members.

Positional Preservation Embedding (PPE), arXiv 2510.22936, ICLR 2026. Official code: MouxiaoHuang/PPE, Apache-2.0.

The merging is that of Chat-UniVi, frame by frame in the language model's space: density peaks (5 neighbours, itself
counted; where a frame has n < 5 centres, min(3, max(n // 2, 1))) are centres, every other token goes to the nearest
one, and a cluster becomes its mean. What is the paper's own is the position rule, which any other merging method can
have: ``vt.trim(..., positions="members")`` (:mod:`visiontrim.engine.members`). The control with one position a token is
``vt.trim(model, "ppe", positions="keep")``. Published: 45 % of the tokens, of N the next whole number above 0.45 N.

Differences: tokens stay in raster order, where the released code has them by the score of their centres, which through
causal attention is what they see of each other. No noise breaks ties in the density. Frames of a video have equal
numbers of tokens, or such that differ by one, so that their sum is ``keep`` (there each frame's share is rounded up: up
to one token a frame more). The merging again before layers 11, 23 and 35 (the cascade) is not
built: at a mean of 52.6 % per layer it costs more than the single stage.

Every density hangs on all distances inside a frame: work grows with the square of a frame's tokens, memory up to 64 MB
of them. Distances are products but for the nearest ones: 6.4 times less CPU time at 576 tokens than by differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visiontrim.core.budget import Amount
from visiontrim.core.method import Positions
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, by_frame
from visiontrim.ops.recycle import density_peaks
from visiontrim.ops.select import even_shares

NEIGHBOURS = 5
"""Tokens that the density of a token is measured by."""


@register
@dataclass(frozen=True)
class PPE(EncoderStep):
    keep: Amount = 0.45
    """Tokens of each image that enter the language model, as a number or as a fraction."""

    name: ClassVar[str] = "ppe"
    summary: ClassVar[str] = "means of density peaks' clusters, at the places of several of their members"
    paper: ClassVar[str] = "arXiv 2510.22936, ICLR 2026"
    merges: ClassVar[bool] = True

    @property
    def positions(self) -> Positions:
        return "members"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected"})

    def choose(self, view: View, count: int) -> Keep:
        tokens = by_frame(view, view.projected_content)
        batch, frames, places = tokens.shape[:3]
        assignment = torch.full((batch, frames, places), -1, device=tokens.device)
        index, features, before = [], [], 0
        for frame, share in enumerate(even_shares(count, frames)):
            if share:
                neighbours = NEIGHBOURS if share >= NEIGHBOURS else min(3, max(share // 2, 1))
                peaks = density_peaks(tokens[:, frame], share, min(neighbours, places))
                index.append(peaks.centres + frame * places)
                features.append(peaks.features)
                assignment[:, frame] = peaks.assignment + before
                before += share
        assignment = assignment.flatten(1)
        size = torch.zeros(batch, count + 1, device=tokens.device, dtype=torch.long)
        size.scatter_add_(1, assignment % (count + 1), torch.ones_like(assignment))
        projected = torch.cat(features, 1).to(view.encoder.projected.dtype)
        return Keep(torch.cat(index, 1), None, assignment, size[:, :-1] > 1, projected=projected)
