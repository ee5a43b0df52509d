"""The lower bound of any method: the model alone, fed with as many vision tokens as the method leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visiontrim.engine.replaced import Replaced
from visiontrim.models.family import Family, Kind


class Ideal:
    """A context in which every picture gives its first ``kept`` tokens and no more, at no cost.

    The encoder runs as ever; where the projector maps every token by itself it runs on these tokens alone.

    Args:
        family: of the model.
        inputs: of ``generate()``, every row with one picture of the same size and no padding.
        kept: tokens of each picture.
    """

    def __init__(self, family: Family, inputs: Mapping[str, Tensor], kept: int) -> None:
        self._family, self._kept = family, kept
        ids = inputs["input_ids"]
        self._kind: Kind = "image" if family.placeholders(ids, "image").any() else "video"
        vision = family.placeholders(ids)
        self._batch, self._total = len(ids), int(vision[0].sum())
        stay = ~vision | (vision.cumsum(1) <= kept)
        self.inputs: dict[str, Tensor] = {
            key: value[stay].view(len(ids), -1) if value.shape == ids.shape else value for key, value in inputs.items()
        }
        """What to give to ``generate()`` in this context."""
        if family.mrope:  # the grid has more places than tokens are left: any positions cost the same
            positions = torch.arange(self.inputs["input_ids"].shape[1], device=ids.device)
            self.inputs["position_ids"] = positions.expand(3, len(ids), -1)
        self._removers: list[Any] = []

    def __enter__(self) -> Ideal:
        family = self._family
        self._removers.append(Replaced(family.core, f"get_{self._kind}_features", self._cut_features))
        if family.projector is not None:
            self._removers.append(family.projector.register_forward_pre_hook(self._before_projector))
        return self

    def __exit__(self, *_: object) -> None:
        while self._removers:
            self._removers.pop().remove()

    def _before_projector(self, module, args):
        (features,) = args
        if features.shape[:-1] != (self._batch, self._total):  # tiles, which are put together after it
            return None
        return (features[:, : self._kept],)

    def _cut_features(self, encode: Callable, *args, **kwargs):
        output = encode(*args, **kwargs)
        output.pooler_output = self._cut(output.pooler_output)
        if (deep := getattr(output, "deepstack_features", None)) is not None:
            output.deepstack_features = [self._cut(layer) for layer in deep]
        return output

    def _cut(self, together: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """The first tokens of each picture, of one tensor of all tokens, or of one for each picture, tile or row."""
        parts = [together] if isinstance(together, Tensor) else list(together)
        features = torch.cat([part.flatten(0, -2) for part in parts])
        features = features.view(self._batch, -1, features.shape[-1])[:, : self._kept]
        if isinstance(together, Tensor):
            return features.flatten(0, 1) if together.ndim == 2 else features
        return list(features)
