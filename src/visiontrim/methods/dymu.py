"""DyMU, its dynamic token merging: as many tokens merge after every encoder layer as are similar enough.

"DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs", arXiv 2504.17040. Official code: MikeWangWZHL/dymu,
MIT. ToMe's edges, but in each layer all sources merge whose largest cosine is above the threshold of that layer, at
most half of the tokens. Thresholds come from a calibration on images (:func:`visiontrim.calibrate.dymu`). A simple
image then keeps few tokens and a rich one many; no count is fixed, the published names ("192out") are means.

With ``keep`` instead of thresholds the counts are those of ToMe, which is what the calibration merges by.

Virtual unmerging (``unmerge=True``): every decoder layer projects the merged tokens, repeats queries, keys and values
to the full grid, attends there and averages (:mod:`visiontrim.engine.unmerging`). It spares the work of projections
and MLP only: the cache holds all 576 tokens, and decoding is that of the plain model. So it is off unless asked for,
and the language model sees each merged token once, at the slot nearest to its members' mean place ("without VTU" in
the release). Any other method that merges has it as ``vt.trim(..., positions="unmerged")``.

Other differences: those of :mod:`.tome`. Of the 24 blocks that the release spreads 384 merges over ("192out"), 16 each,
LLaVA uses 23, so that its own counts leave 208 tokens; here 192 are 192. Pictures that the encoder gets in one call
must agree on their counts, so one image at a time (the original takes a batch of one, too).

As in ToMe, work grows with the square of the tokens, and a product of a fourth of all pairs is nearly all there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from visiontrim.core.budget import Amount, check_amount
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Positions
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import View
from visiontrim.methods.checks import check_fields, require
from visiontrim.methods.matching import Matching
from visiontrim.ops.matching import Merged, edges, match, merge_into


@register
@dataclass(frozen=True)
class DyMU(Matching):
    """Hyper-parameters of DyMU. Raises :class:`~visiontrim.core.errors.TrimError` for values that cannot work."""

    keep: Amount | None = 64  # pyright: ignore[reportIncompatibleVariableOverride]
    """Tokens of each image that leave the encoder, as a number or as a fraction; None: by ``thresholds``."""
    thresholds: tuple[float, ...] | None = None
    """For every layer of the encoder but the last the cosine above which tokens merge after it (``keep=None``)."""
    unmerge: bool = False
    """Whether attention in the language model sees merged tokens at all of their places (virtual unmerging)."""

    name: ClassVar[str] = "dymu"
    summary: ClassVar[str] = "merges after every encoder layer what is similar enough, as calibrated"
    paper: ClassVar[str] = "arXiv 2504.17040"

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            (self.keep is None) != (self.thresholds is None),
            f"keep={self.keep} and thresholds={self.thresholds}: give a count, or keep=None and calibrated thresholds",
        )
        if self.keep is not None:
            check_amount(self.keep)

    @property
    def positions(self) -> Positions:
        return "unmerged" if self.unmerge else "keep"

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({"encoder.keys"})

    def count(self, view: View, step: int, steps: int) -> int:
        if self.thresholds is None:
            return super().count(view, step, steps)
        given = len(self.thresholds)
        require(given == steps, f"{given} thresholds for {steps} layers of the encoder: calibrate on this model")
        counts = (edges(metric(view))[0] > self.thresholds[step - 1]).sum(1)
        counts = set(counts.clamp(max=view.features.shape[1] // 2).tolist())
        if len(counts) > 1:
            raise TrimError(
                f"after layer {step} of the encoder between {min(counts)} and {max(counts)} tokens of a picture would "
                "merge, but pictures of one call must agree: pass one image at a time, or keep="
            )
        return counts.pop()

    def merged(self, view: View, count: int) -> Merged:
        return merge_into(view.content, view.encoder.mass, *match(metric(view), count))


def metric(view: View) -> Float[Tensor, "batch tokens dim"]:
    """What the similarity of tokens is the cosine of: their keys, averaged over heads."""
    return view.encoder.keys.float().mean(1)
