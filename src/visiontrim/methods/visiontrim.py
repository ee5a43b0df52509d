"""VisionTrim: keep the dominant tokens, and add text-relevant ones that carry the rest.

"VisionTrim: Unified Vision Token Compression for Training-Free MLLM Acceleration", ICLR 2026, arXiv 2601.22674.

- DVTS (eq. 1-6) selects dominant tokens by a global score, the attention of [CLS] or, before a decoder layer, the match
  with the hidden state that generates the first token (eq. 12), fused with a local one, the affinity to neighbours.
- TGVC (eq. 7-11) chooses complement tokens among the leftovers by the question and merges the others into them.
- The vision stage stands before the projector, the language stage before a decoder layer (section 3.3). There, text and
  vision tokens share one space, and similarities are dot products divided by sqrt(D). The relevance of eq. 12 is
  normalised over the vision tokens: over the text tokens, as printed, every token would get the same mean of 1/L.

The defaults are the paper's method. Where it is silent or can be read in two ways, the choice is an option, and the
default a reading that no other measured better than, on the bundled LLaVA (docs/visiontrim.md).

``variant="lean"`` is ahead of every reading there: [CLS] alone, no merging, the vision stage.

The released code differs, and users report that it does not reach the paper's table. ``variant="release"`` does what it
does: half the normalised [CLS] attention plus half the normalised attention received instead of eq. 6, text
similarities without the softmaxes of eq. 7-8, unweighted merging instead of eq. 10, complement tokens after the
dominant ones instead of in raster order, consecutive position ids, and no language stage.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.budget import Amount, check_amount, second_stage, split_two_stage
from visiontrim.core.errors import TrimError
from visiontrim.core.method import DecoderLayer, Layers, Method, Positions, Site, Step, VisionOutput
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import cls_attention
from visiontrim.methods.cascade import PAPERS
from visiontrim.methods.checks import check_fields, require
from visiontrim.methods.complementing import Guide, keep_with_complement
from visiontrim.ops.affinity import Border, Sigma, local_affinity, nearest_affinity
from visiontrim.ops.complement import Merge
from visiontrim.ops.fusion import Fusion, Normalise, Weight, fuse
from visiontrim.ops.select import top_k

_FREE = {
    "lean": {"keep", "stages", "split", "guidance", "global_score", "similarity", "scale", "sign", "patch_space"}
    | {"layer", "funnel", "variant"},
    "release": {"keep", "split", "guidance", "variant"},
}
"""Options that the other variants leave open."""


@register
@dataclass(frozen=True)
class VisionTrim(Method):
    """Hyper-parameters of VisionTrim. Raises :class:`TrimError` for values that cannot work."""

    keep: Amount | tuple[int, int] = 64
    """Mean number of vision tokens per decoder layer and image, or that as a fraction of the image's tokens; with the
    vision stage alone, the number that enters the language model. A pair gives the counts after either stage."""
    stages: Literal["auto", "vision", "language", "both"] = "auto"
    """Where tokens are removed; "auto": at both places where the model allows it, else in the vision stage, which also
    is what stands for it as a part of a plan."""
    split: float = 0.75
    """Share of dominant tokens among those kept: 3:1 on LLaVA-1.5; the paper has 7:1 (0.875) on LLaVA-NeXT."""
    guidance: Literal["auto", "none"] = "auto"
    """Whether a question, if there is one, chooses complement tokens. Without, all kept tokens are dominant ones."""
    fusion: Literal[Fusion, "cls", "local"] = "adaptive"
    """How global and local score are joined (see :func:`visiontrim.ops.fusion.fuse`), or which of them stands alone:
    "cls" is the global one, in the language stage too."""
    normalise: Normalise = "softmax"
    """On which scale the two scores are joined: softmax of each (eq. 3-5), or that of z-scores."""
    weight: Weight = "lower"
    """Which of the two weighs more in "adaptive": that of the lower variance (eq. 6 as printed), or of the higher (as
    its text says)."""
    global_score: Literal["auto", "cls", "received"] = "auto"
    """Attention of [CLS], or attention received from the other patches; "auto": [CLS] where the encoder has it."""
    window: int = 3
    """Side of the neighbourhood of the local score."""
    w1: float = 1.0
    """Width of the feature kernel, in sigmas."""
    w2: float = 1.0
    """Width of the position kernel, in sigmas."""
    w3: float = 0.5
    """Weight of the position kernel."""
    sigma: Sigma = "pairs"
    """What a sigma is measured on: neighbour pairs, or all entries (the released code)."""
    centre: bool = False
    """Whether a token is one of its own neighbours (the released code)."""
    border: Border = "valid"
    """Mean over the neighbours that exist, or over the whole window (the released code)."""
    neighbourhood: Literal["window", "nearest"] = "window"
    """Neighbours in the language stage: survivors in the window, or the window^2 - 1 nearest survivors."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """Similarity of patches and text in the vision stage."""
    scale: float | None = None
    """Factor of the similarity in the vision stage; None: exp(logit_scale) of a cosine, 1/sqrt(d) of a dot product."""
    sign: Literal[1, -1] = 1
    """-1 inverts the similarity in the vision stage: CLIP patches at times match the text best where nothing is."""
    patch_space: Literal["features", "last"] = "features"
    """Patches in the text's space: the selected features projected, or the encoder's normalised last hidden state (on
    models whose tokens are its patches)."""
    iterations: int = 3
    """Rounds of assigning the rest to complement tokens and merging it into them."""
    merge: Merge = "add"
    """How complement tokens take up the others (see :func:`visiontrim.ops.complement.complement`): "add" lets their
    norm grow (eq. 10)."""
    layer: int = 2
    """Decoder layers before the language stage."""
    funnel: float = 4.0
    """Tokens that enter the language model for each one that the language stage leaves, with both stages."""
    variant: Literal["paper", "lean", "release"] = "paper"
    """The paper's method, that without what costs answers on the bundled models, or the released code."""

    name: ClassVar[str] = "visiontrim"
    summary: ClassVar[str] = "dominant tokens by [CLS] and neighbours, complement tokens by the question"
    paper: ClassVar[str] = "arXiv 2601.22674, ICLR 2026"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.keep, tuple):
            self._check_pair(self.keep)
        else:
            check_amount(self.keep)
        DecoderLayer(self.layer)
        require(0 < self.split <= 1, f"split={self.split} is no share: give a number in (0, 1], such as 0.75")
        odd = self.window >= 3 and self.window % 2 == 1
        require(odd, f"window={self.window} has no centre and ring: give an odd number of at least 3")
        require(self.w1 > 0, f"w1={self.w1} divides the differences of features: give a number above 0")
        require(self.w2 > 0, f"w2={self.w2} divides the differences of positions: give a number above 0")
        require(self.w3 >= 0, f"w3={self.w3} would reward distance: give 0 or more")
        positive = self.scale is None or (isinstance(self.scale, int | float) and self.scale > 0)
        require(positive, f"scale={self.scale!r}: give a number above 0, or null for the natural one; sign=-1 inverts")
        require(self.iterations >= 0, f"iterations={self.iterations} is no number of rounds: give 0 or more")
        idle = self.iterations == 0 and self.merge != VisionTrim.merge
        require(not idle, f"merge={self.merge!r} has nothing to say with iterations=0: give iterations=3, as the paper")
        idle = self.fusion in ("cls", "local") and self.normalise != VisionTrim.normalise
        require(not idle, f"normalise={self.normalise!r} has nothing to say with fusion={self.fusion!r}: leave it out")
        idle = self.fusion != "adaptive" and self.weight != VisionTrim.weight
        require(not idle, f"weight={self.weight!r} has nothing to say with fusion={self.fusion!r}: leave it out")
        require(self.funnel >= 1, f"funnel={self.funnel} would add tokens between the stages: give at least 1")
        if self.variant != "paper":
            own = [field for field in dataclasses.fields(self) if field.name not in _FREE[self.variant]]
            for name in [field.name for field in own]:
                value, default = getattr(self, name), getattr(VisionTrim, name)
                require(value == default, f"variant={self.variant!r} has no {name}={value!r}: leave one of the two out")

    def _check_pair(self, keep: tuple[int, ...]) -> None:
        way_out = "give two ints, the first at least as large as the second, together with stages='both'"
        require(
            self.stages in ("auto", "both"), f"keep={keep} counts two stages, but stages={self.stages!r}: {way_out}"
        )
        require(len(keep) == 2 and all(type(k) is int for k in keep), f"keep={keep} is no pair of counts: {way_out}")
        require(1 <= keep[1] <= keep[0], f"keep={keep} cannot be kept one after the other: {way_out}")

    @property
    def positions(self) -> Positions:
        return "compact" if self.variant == "release" else "keep"

    def steps(self) -> tuple[Step, ...]:
        return self.steps_for(Layers(encoder=0, decoder=PAPERS))

    def steps_for(self, layers: Layers) -> tuple[Step, ...]:
        method = self
        if self.variant == "release":
            return (_ReleasedStage(self),)
        if self.variant == "lean":
            method = replace(self.as_part(), variant="paper", fusion="cls", iterations=0)
        if method.stages == "auto":
            possible = isinstance(self.keep, tuple) or (layers.between and self.layer < layers.decoder)
            method = replace(method, stages="both" if possible else "vision")
        vision, language = _VisionStage(method), _LanguageStage(method)
        return {"vision": (vision,), "language": (language,), "both": (vision, language)}[method.stages]

    def as_part(self) -> VisionTrim:
        alone = self.stages == "auto" and not isinstance(self.keep, tuple)
        return replace(self, stages="vision") if alone and self.variant != "release" else self

    def entering(self, view: View) -> int:
        """Tokens that the vision stage leaves of the image."""
        if isinstance(self.keep, tuple):
            return view.count(self.keep[0], view.total, "keep[0]")
        mean = view.count(self.keep, view.total)
        if self.stages != "both":
            return mean
        return split_two_stage(mean, view.total, self.layer, view.num_layers, self.funnel)[0]

    def remaining(self, view: View) -> int:
        """Tokens that the language stage leaves of the image."""
        if isinstance(self.keep, tuple):
            return view.count(self.keep[1], name="keep[1]")
        return second_stage(view.count(self.keep, view.total), view.entered, self.layer, view.num_layers)

    def shares(self, count: int) -> tuple[int, int]:
        """``count`` as dominant and complement tokens."""
        dominant = max(1, round(self.split * count))
        return dominant, count - dominant


@dataclass(frozen=True)
class _Stage(Step):
    """Dominant tokens by :meth:`score`, and complement tokens where a question guides."""

    method: VisionTrim

    name: ClassVar[str] = "visiontrim"
    summary: ClassVar[str] = "one stage of VisionTrim"
    paper: ClassVar[str] = VisionTrim.paper

    @abstractmethod
    def count(self, view: View) -> int:
        """Tokens to keep."""

    @abstractmethod
    def global_score(self, view: View) -> Float[Tensor, "batch tokens"]: ...

    @abstractmethod
    def guide(self, view: View) -> Guide | None: ...

    def local_score(self, view: View) -> Float[Tensor, "batch tokens"]:
        method = self.method
        return local_affinity(
            view.features,
            view.coordinates,
            view.grid,
            window=method.window,
            w1=method.w1,
            w2=method.w2,
            w3=method.w3,
            sigma=method.sigma,
            centre=method.centre,
            border=method.border,
        )

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        match self.method.fusion:
            case "cls":
                return self.global_score(view)
            case "local":
                return self.local_score(view)
            case rule:
                scores = self.global_score(view), self.local_score(view)
                return fuse(*scores, rule, self.method.normalise, self.method.weight)

    def select(self, view: View) -> Keep:
        method, count = self.method, self.count(view)
        if count >= view.features.shape[1]:
            return Keep.everything(view)
        dominant, added = method.shares(count)
        guide = self.guide(view) if method.guidance == "auto" else None
        if guide is None or not added:
            return Keep(top_k(self.score(view), count))
        return self.complemented(view, dominant, added, guide)

    def complemented(self, view: View, dominant: int, added: int, guide: Guide) -> Keep:
        method = self.method
        return keep_with_complement(
            view, self.score(view), dominant, added, guide, merge=method.merge, iterations=method.iterations
        )


class _VisionStage(_Stage):
    @property
    def site(self) -> Site:
        return VisionOutput()

    @property
    def needs(self) -> frozenset[Signal]:
        method = self.method
        needs: set[Signal] = set()
        if method.fusion != "local":
            needs.add("encoder.received_attention" if method.global_score == "received" else "encoder.cls_attention")
        if method.guidance == "auto":
            needs |= {"text.question", "text.joint_last" if method.patch_space == "last" else "text.joint"}
        return frozenset(needs)

    def count(self, view: View) -> int:
        return self.method.entering(view)

    def global_score(self, view: View) -> Float[Tensor, "batch tokens"]:
        wanted = self.method.global_score
        return cls_attention(view) if wanted == "auto" else view.encoder[f"{wanted}_attention"].float()

    def guide(self, view: View) -> Guide | None:
        if "question" not in view.text:
            return None
        method, text = self.method, view.text.question
        joint = view.text.joint_last if method.patch_space == "last" else view.text.joint
        cosine = method.similarity == "cosine"
        scale = method.scale or (text.scale if cosine else joint.shape[-1] ** -0.5)
        return Guide(joint, text, method.sign * scale, cosine)


_RELEASED_ROUNDS = 3
"""Rounds of assignment and merging in the released code."""


class _ReleasedStage(_VisionStage):
    @property
    def needs(self) -> frozenset[Signal]:
        return super().needs | {"encoder.received_attention"}

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        seen = view.encoder
        if "cls_attention" not in seen:
            raise TrimError("variant='release' needs a vision encoder with [CLS], which this one lacks: leave it out")
        return (F.normalize(seen.cls_attention, dim=-1) + F.normalize(seen.received_attention, dim=-1)) / 2

    def complemented(self, view: View, dominant: int, added: int, guide: Guide) -> Keep:
        return keep_with_complement(
            view,
            self.score(view),
            dominant,
            added,
            guide,
            merge="uniform",
            iterations=_RELEASED_ROUNDS,
            scores="raw",
            raster=False,
        )


class _LanguageStage(_Stage):
    @property
    def site(self) -> Site:
        return DecoderLayer(self.method.layer)

    @property
    def needs(self) -> frozenset[Signal]:
        needs: set[Signal] = set()
        if self.method.fusion != "local":
            needs.add("decoder.query")
        if self.method.guidance == "auto":
            needs.add("text.question")
        return frozenset(needs)

    def count(self, view: View) -> int:
        return self.method.remaining(view)

    def global_score(self, view: View) -> Float[Tensor, "batch tokens"]:
        features = view.features.float()
        match = torch.einsum("bd,bnd->bn", view.decoder.query.float(), features)
        return (match * features.shape[-1] ** -0.5).softmax(-1)

    def local_score(self, view: View) -> Float[Tensor, "batch tokens"]:
        method = self.method
        if method.neighbourhood == "window":
            return super().local_score(view)
        return nearest_affinity(
            view.features,
            view.coordinates,
            neighbours=method.window**2 - 1,
            w1=method.w1,
            w2=method.w2,
            w3=method.w3,
            sigma=method.sigma,
        )

    def guide(self, view: View) -> Guide | None:
        if "question" not in view.text:
            return None
        return Guide(view.features, view.text.question, view.features.shape[-1] ** -0.5, cosine=False)
