"""Where the steps of a method stand in a model.

It knows how many layers there are; it does not know what a step does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from visiontrim.core.errors import TrimError
from visiontrim.core.method import DecoderLayer, EncoderLayer, Layers, Method, Step, VisionOutput, check_order
from visiontrim.models.family import Family, Kind

Per = Literal["image", "tile", "frame"]
"""What a number of tokens is meant for: a whole image or video, each tile of an anyres image, or each frame."""


@dataclass(frozen=True)
class Sites:
    """The steps of a method by their places in one model."""

    encoder: Mapping[int, Step]
    """Before which layer of the encoder."""
    vision: Step | None
    """Between the encoder and the language model."""
    language: Mapping[int, Step]
    """Before which decoder layer."""

    @classmethod
    def of(cls, family: Family, method: Method, between: bool, kind: Kind = "image") -> Sites:
        """The steps of ``method`` in a model. Raises :class:`TrimError` for places that are not there.

        ``between``: whether tokens can be removed between the model's decoder layers. ``kind``: what the steps are for,
        sound or pictures of any kind.
        """
        inside = family.depth(kind) if family.encoder_layers(kind) else 0
        whole = tuple(layer for layer in range(inside) if not family.windowed(kind, layer))
        layers = Layers(inside, len(family.language_model.layers), () if len(whole) == inside else whole, between)
        encoder, vision, language = {}, None, {}
        steps = method.steps_for(layers)
        if not inside and any(isinstance(step.site, EncoderLayer) for step in steps):
            raise TrimError(
                f"{method} acts inside the {'audio' if kind == 'audio' else 'vision'} encoder, which is not supported "
                "for this model: leave that stage out"
            )
        check_order(method, steps)
        for step in steps:
            match step.site:
                case EncoderLayer(index):
                    if index >= inside:
                        raise TrimError(
                            f"{method} acts before encoder layer {index}, but the output of the encoder passes through "
                            f"{inside} layers"
                        )
                    encoder[index] = step
                case VisionOutput():
                    vision = step
                case DecoderLayer(index):
                    if index >= layers.decoder:
                        raise TrimError(
                            f"{method} acts before decoder layer {index}, but the model has {layers.decoder} layers"
                        )
                    language[index] = step
        return cls(encoder, vision, language)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, in order."""
        return (*self.encoder.values(), *(() if self.vision is None else (self.vision,)), *self.language.values())

    @property
    def apart(self) -> bool:
        """Whether what a picture shows decides how much is kept, so that each is looked at by itself."""
        return any(step.own_counts for step in self.steps)


def by_layer(sites: Mapping[Kind, Sites]) -> dict[int, dict[Kind, Step]]:
    """By decoder layer, in order, the steps before it, each for its kind of tokens."""
    layers = sorted({layer for places in sites.values() for layer in places.language})
    return {
        layer: {kind: places.language[layer] for kind, places in sites.items() if layer in places.language}
        for layer in layers
    }
