"""EVS: drop the places of a video that do not change from frame to frame.

"Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624. Official
code: vllm-project/vllm, multimodal/evs.py, Apache-2.0.

The change of a token is 1 - cos between its embedding in the language model's space and that at the same place of the
frame before, dropped or not. The first frame stays whole; of the other tokens those stay that change most, over the
whole video, ties to the earlier one. ``keep`` is 1 - q of the paper, which prunes the fraction q. Survivors keep their
position ids, as in the original on Qwen2.5-VL; on a model with one position per token the original has consecutive
ones: ``vt.trim(..., positions="compact")``.

Differences: a fraction is rounded, where the original rounds down; float32, where it computes in the model's dtype. The
original never keeps less than a frame, and all of an image. Here the count is exact: with less than a frame, and so on
an image, an even lattice of the first frame stays, on which the method has no say. vLLM lets the text go on from the
video's width; here it goes on where it would have without pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from visiontrim.core.budget import Amount
from visiontrim.core.method import Positions
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, by_frame
from visiontrim.ops.frames import whole_frames_lattice
from visiontrim.ops.select import top_k


@register
@dataclass(frozen=True)
class EVS(EncoderStep):
    keep: Amount = 0.25
    """Tokens of each video that enter the language model, as a number or as a fraction: 1 - q."""

    name: ClassVar[str] = "evs"
    summary: ClassVar[str] = "drops the places of a video that do not change"
    paper: ClassVar[str] = "arXiv 2510.14624"
    for_videos: ClassVar[bool] = True

    @property
    def positions(self) -> Positions:
        return "keep"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected"})

    def choose(self, view: View, count: int) -> Keep:
        tokens = by_frame(view, view.encoder.projected)
        if count < tokens.shape[2]:
            lattice = whole_frames_lattice(view.grid, [0], count)
            return Keep(lattice.to(tokens.device).expand(len(tokens), -1))
        change = 1 - F.cosine_similarity(tokens[:, 1:], tokens[:, :-1], dim=-1)
        first = torch.full_like(tokens[:, :1, :, 0], torch.inf)
        return Keep(top_k(torch.cat([first, change], 1).flatten(1), count))
