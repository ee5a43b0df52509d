"""PixelPrune: drop, before the vision encoder's first layer, what its neighbours' pixels predict.

"PixelPrune", arXiv 2604.00886. Official code: OPPO-Mente-Lab/PixelPrune, Apache-2.0. For documents, charts and
screenshots, whose pixels repeat exactly.

A unit is what becomes one vision token (32 x 32 pixels on Qwen3-VL). Each is predicted from the unit to the left or
the one above (:func:`visiontrim.ops.predictive.prediction_errors`) and kept if it is farther from that than ``tau``, so
that with ``tau=0`` kept units and their places give the picture back exactly. Encoder, merger and language model run on
kept units alone, which keep position embeddings, windows and position ids of the full grid. How many are kept is up to
the picture: on natural photographs almost all at ``tau=0``. That number is read from the device.

``tau`` is a difference of colours in [0, 1] (a level of 8 bits is 1/255), for which the run needs ``processor=``.
``rule="anchored"`` compares with what a decoder would know, so that with the metric "max" no pixel is off by more than
``tau``; "sliding" compares with the pixels themselves, and errors add up.

Differences: the original keeps one unit of a flat picture (``minimum=1``); here at least 16, spread over it. ``keep``
as an upper bound, which leaves the units farthest from their predictions, is ours. The frames of a video, in pairs as
the encoder takes them, are pictures each (the original takes images only). ``pixel_values`` that were cast to bfloat16
before the model got them have lost levels, and units may look equal that were not.

Linear in the units. Each picture keeps its own number, so that each is looked at by itself: one stop and, at the
sliding rule, 30 kernels here, some 70 more for the places of what is left; 3,382 kernels more than the plain model for
32 pictures at once. Pictures of one batch that keep different numbers have no tensor in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from visiontrim.core.budget import Amount, check_amount
from visiontrim.core.method import EncoderLayer, Site, Step
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.checks import check_fields, require
from visiontrim.ops.predictive import Metric, prediction_errors, spread_to
from visiontrim.ops.select import top_k

ROUNDING = 1e-5
"""What undoing a normalisation in float32 may add to a difference of colours."""


@register
@dataclass(frozen=True)
class PixelPrune(Step):
    """Hyper-parameters of PixelPrune. Raises :class:`~visiontrim.core.errors.TrimError` for values that cannot work."""

    keep: Amount | None = None
    """Upper bound of the tokens of each image, as a number or as a fraction; None: none."""
    tau: float = 0.0
    """Distance to its prediction up to which a unit is dropped, of colours in [0, 1]."""
    metric: Metric = "max"
    """Distance of two units: the largest difference of two pixels, the mean one, or the root of the mean square."""
    rule: Literal["anchored", "sliding"] = "anchored"
    """Whether predictions are made of what was kept, or of all pixels as they are."""
    minimum: int = 16
    """Units of a picture that stay however flat it is, if ``keep`` allows them."""
    layer: int = 0
    """The encoder layer before which units are dropped; 0: before the first."""

    name: ClassVar[str] = "pixelprune"
    summary: ClassVar[str] = "drops what neighbouring pixels predict, before the vision encoder"
    paper: ClassVar[str] = "arXiv 2604.00886"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep is not None:
            check_amount(self.keep)
        require(0 <= self.tau < 1, f"tau={self.tau} is no distance of colours: give 0, or a little more such as 0.02")
        require(self.minimum >= 1, f"minimum={self.minimum}: the first unit of a picture always stays, give 1 or more")
        EncoderLayer(self.layer)

    @property
    def site(self) -> Site:
        return EncoderLayer(self.layer)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.colours" if self.tau else "encoder.pixels"})

    @property
    def own_counts(self) -> bool:
        return True

    def select(self, view: View) -> Keep:
        total, left = view.total, view.features.shape[1]
        require(left == total, f"{self.name} compares all {total} units, of which {left} are left: put it first")
        values = view.encoder["colours" if self.tau else "pixels"].float().view(*view.grid, -1)
        tau = self.tau + ROUNDING if self.tau else 0.0
        error = prediction_errors(values, tau, self.metric, anchored=self.rule == "anchored")
        kept = error > tau
        count = int(kept.sum())
        if count < self.minimum:  # only flat pictures
            kept = spread_to(kept, self.minimum)
            count = min(self.minimum, total)
        if self.keep is not None:
            most = self.keep if isinstance(self.keep, float) else min(self.keep, view.whole or total)
            count = min(count, view.count(most))
        return Keep(top_k(error.masked_fill(~kept, -1.0).view(1, total), count))
