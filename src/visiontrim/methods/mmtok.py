"""MMTok: patches that cover the words of the question and the image itself.

"MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026, arXiv 2508.18264. Official code:
Ironieser/MMTok, Apache-2.0.

How well a patch stands for a word is the softmax over patches of the cosine of the projected patch and the word's input
embedding, over ``text_temperature``; how well it stands for another patch, the same of the encoder's features over
``image_temperature``. A set covers a row as its best patch does. Tokens are picked greedily by the coverage that they
add, summed over words (mean) and, times ``image_weight``, over patches (mean); they go on in raster order with
consecutive positions. Published: 192, 128 and 64 tokens, text temperature 0.02 (0.01 on Qwen). Without a question the
image alone is covered.

Every patch stands for every patch, so work and memory grow with the square of the patches. A pair takes width x 2
operations for its cosine, of which half are done (the rest is the same), and three at every pick of the plain greedy
loop, which :mod:`visiontrim.ops.coverage` makes about five in all instead of 192 at 64 picks. In CPU time that is 1.1
times less than the plain form at 576 patches, 3.7 at 2,304 and 7.9 at 9,216, for the same choice. It cannot be five
at 576, where all cosines and the words' are two fifths of the plain form's time and 64 picks, each of which hangs on
the one before, are 64 times some 40 calls; at 2,304 half of the cosines are more than half of what is left.

Differences: all tokens of the question are its words, as the released code does on Qwen; for LLaVA it drops articles,
pronouns, auxiliaries and prompts for the answer's format first. On Qwen the original covers the patches before the
merger, four of them averaged for a token; here the merged tokens, which is what a method is shown. Patches of padding
are no special case: transformers' LLaVA crops where the original pads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal, Text
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep
from visiontrim.methods.checks import require
from visiontrim.ops.coverage import coverage_picks
from visiontrim.ops.diverse import later_similarities


@register
@dataclass(frozen=True)
class MMTok(EncoderStep):
    image_weight: float = 0.5
    """Weight of the coverage of patches; that of words has 1."""
    text_temperature: float = 0.02
    image_temperature: float = 0.2

    name: ClassVar[str] = "mmtok"
    summary: ClassVar[str] = "patches that cover the question's words and the image"
    paper: ClassVar[str] = "arXiv 2508.18264, ICLR 2026"
    text_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.image_weight >= 0, f"image_weight={self.image_weight} rewards gaps: give 0 or more")
        for name in ("text_temperature", "image_temperature"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} divides cosines: give a number above 0")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.projected", "text.words"})

    def choose(self, view: View, count: int) -> Keep:
        unit = F.normalize(view.features.float(), dim=-1)
        batch, tokens = unit.shape[:2]
        guided = "words" in view.text
        words = view.text.words.tokens.shape[1] if guided else 0
        rows = unit.new_empty(batch, words + tokens, tokens)
        if guided:
            rows[:, :words] = self.of_words(view.text.words, view.encoder.projected)
        of_patches = rows[:, words:]
        for start, cosine in later_similarities(unit):  # the other half is the same
            end = start + cosine.shape[1]
            of_patches[:, start:end, start:] = cosine
            of_patches[:, end:, start:end] = cosine[:, :, end - start :].mT
        # a softmax, in place: no other of these numbers is as large by far
        of_patches.div_(self.image_temperature).sub_(of_patches.amax(-1, keepdim=True)).exp_()
        share = (self.image_weight if guided else 1.0) / tokens
        of_patches.mul_(share / of_patches.sum(-1, keepdim=True))
        return Keep(coverage_picks(rows, count).sort(1).values)

    def of_words(
        self, words: Text, projected: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch words tokens"]:
        """How well each patch stands for each word; 0 for padding."""
        length = torch.linalg.vector_norm(projected.float(), dim=-1).clamp(min=1e-12)
        cosine = F.normalize(words.tokens.float(), dim=-1) @ projected.float().mT / length[:, None]
        share = words.mask / words.mask.sum(-1, keepdim=True).clamp(min=1)
        return (cosine / self.text_temperature).softmax(-1) * share[..., None]
