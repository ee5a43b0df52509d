"""CDPruner: a determinantal point process over patches, conditioned on the question.

"Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025,
arXiv 2506.10967. Official code: Theia-4869/CDPruner, Apache-2.0.

The kernel is diag(r) S diag(r): S holds cosines of projected patches, r is each patch's relevance, its cosine with the
question scaled to [0, 1] within the image. The greedy maximum of the determinant goes on in raster order with
consecutive positions. Published: 192, 128 and 64 tokens.

Like the released code, relevance is *minus* the cosine of CLIP's patches (final norm and projection applied to the
selected layer) and the end token of CLIP's text tower: patches of that layer match a text best where nothing is. Where
the language model's own embeddings of the question guide, which have no end token, relevance is plus the mean cosine
with all of them. ``sign`` sets it by hand. Without a question, diversity alone decides.

Differences: the released code scales relevance over all tiles of a batch together, here each segment by itself, so that
a batch equals its samples. A question longer than CLIP's context is cut into windows with an end token each (raw slices
there). The weighting of relevance that the released code has commented out is left out.

Linear in the patches. It is not five times cheaper than the plain greedy loop: each of ``keep`` picks hangs on the one
before, reads all vectors once (there is no map of their products) and finds, multiplies, subtracts and marks, some 20
kernels; one product for vectors and known directions, which has 14, takes as long on the CPU and rounds otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep
from visiontrim.methods.checks import require
from visiontrim.ops.diverse import determinant_picks


@register
@dataclass(frozen=True)
class CDPruner(EncoderStep):
    sign: int | None = None
    """1 or -1: relevance grows or falls with the cosine; None: -1 with a CLIP text tower, 1 with word embeddings."""

    name: ClassVar[str] = "cdpruner"
    summary: ClassVar[str] = "diverse patches that the question asks for, by a determinantal point process"
    paper: ClassVar[str] = "arXiv 2506.10967, NeurIPS 2025"
    text_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sign in (None, 1, -1), f"sign={self.sign!r}: give 1, -1, or null for the guidance's own")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected", "text.joint_normalised", "text.question"})

    def choose(self, view: View, count: int) -> Keep:
        vectors = F.normalize(view.encoder.projected.float(), dim=-1)
        relevance = self.relevance(view)
        if relevance is not None:
            vectors = vectors * relevance[..., None]
        return Keep(determinant_picks(vectors, count).sort(1).values)

    def relevance(self, view: View) -> Float[Tensor, "batch tokens"] | None:
        """Relevance of each patch in (0, 1]; 1 if all are equal, None without a question."""
        if "question" not in view.text:
            return None
        text = view.text.question
        share = (text.mask if text.ends is None else text.ends).float()
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
        cosine = F.normalize(view.text.joint_normalised.float(), dim=-1) @ F.normalize(text.tokens.float(), dim=-1).mT
        sign = self.sign or (1 if text.ends is None else -1)
        score = sign * (cosine @ share[..., None])[..., 0]
        low, high = score.aminmax(dim=-1, keepdim=True)
        differ = high - low > 1e-6  # below it there is only rounding of float32
        return torch.where(differ, (score - low + 1e-6) / torch.where(differ, high - low, 1.0), 1.0)
