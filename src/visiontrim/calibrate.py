"""Methods whose settings are measured on images first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from visiontrim.core.budget import Amount
from visiontrim.core.errors import TrimError
from visiontrim.core.view import View
from visiontrim.methods.dymu import DyMU, metric
from visiontrim.ops.matching import edges
from visiontrim.run import trim


def dymu(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], keep: Amount) -> DyMU:
    """DyMU with thresholds by which images like those of ``batches`` keep about ``keep`` tokens each.

    ``batches`` are outputs of the model's processor, with one or more images each. In every layer the edges of all
    images of a batch are pooled; where n merge per image and B images are in the batch, the threshold is the value of
    the (n B + 1)-th largest edge, at least 0, and the mean over batches is what the method gets (arXiv 2504.17040). The
    original merges the n B largest of the batch and goes on with those; here every image goes on with n merged.
    Raises :class:`TrimError` if there is no batch.
    """
    method = _Listening(keep=keep)
    with torch.inference_mode(), trim(model, method):
        for inputs in batches:
            model(**inputs)
    if not method.heard:
        raise TrimError("no image was given to calibrate on: pass at least one batch with images")
    return DyMU(keep=None, thresholds=tuple(float(torch.stack(values).mean()) for values in method.heard.values()))


@dataclass(frozen=True)
class _Listening(DyMU):
    """Merges by counts, and notes the threshold of every step and batch."""

    heard: dict[int, list[Tensor]] = field(default_factory=dict, compare=False)

    def count(self, view: View, step: int, steps: int) -> int:
        count = super().count(view, step, steps)
        values = edges(metric(view))[0].flatten().sort(descending=True).values
        place = min(count * len(view.features), len(values) - 1)
        self.heard.setdefault(step, []).append(values[place].clamp_min(0))
        return count
