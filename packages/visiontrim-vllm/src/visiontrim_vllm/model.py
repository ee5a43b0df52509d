"""The half that runs in the workers: vLLM's backend for transformers' models, whose images pass visiontrim's entrance.

One class for every family that visiontrim knows; encoder and projector are transformers' own. Knows no method.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
    MultiModalProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processor import cached_processor_from_config

from visiontrim.core.errors import TrimError
from visiontrim.core.registry import load_method
from visiontrim.engine.entrance import Entrance
from visiontrim.engine.memory import Memory
from visiontrim.engine.ranks import Ranks
from visiontrim.models.family import family_of
from visiontrim.models.text import TextTower
from visiontrim_vllm.configuring import SEVERAL
from visiontrim_vllm.options import Asked, Options
from visiontrim_vllm.positions import first_positions, set_positions, with_places
from visiontrim_vllm.processing import ASKED, COUNTS, Trimming

ENTRANCES = 64
"""Methods with their options that a worker keeps ready; clients may ask for ever new ones."""


@MULTIMODAL_REGISTRY.register_processor(
    Trimming, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class Trimmed(TransformersMultiModalForCausalLM):
    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs", "vidcom2")  # whatever the rate was set for: see Configured

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.trimming = options = Options.of(self.config)
        self.sets_positions = options.method is not None
        self.several = getattr(self.config, SEVERAL, True)
        self.channels = 3 if self.several else 1
        self._entrances: OrderedDict[str, Entrance] = OrderedDict()
        self._memory = Memory(options.remember, once_each=False) if options.remember else None
        self._tower = self._processor = self._ranks = None
        if not self.sets_positions:
            return
        if (group := get_tp_group()).world_size > 1:
            self._ranks = Ranks(group.device_group, _heads_are_split(self.model))
        self._processor = cached_processor_from_config(self.model_config)
        if options.text_tower is not None:
            self._tower = TextTower.from_pretrained(options.text_tower, dtype=self.model_config.dtype)
            self._tower.model.requires_grad_(False).to(vllm_config.device_config.device)
        self._entrance(options.asked({}, self.several).recipe)  # refuses what cannot work before anything is served

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.sets_positions and not self.several:
            return super(MultiModalMixin, self).forward(input_ids, positions[:1], *args, **kwargs)
        return super().forward(input_ids, positions, *args, **kwargs)

    @torch.no_grad()
    def _process_vision_input(
        self, modality: Any, pixel_values: Any, num_patches: Tensor, **kwargs: Any
    ) -> list[Tensor]:
        asked, counts = kwargs.pop(ASKED, None), kwargs.pop(COUNTS, None)
        if asked is None or counts is None:
            whole = super()._process_vision_input(modality, pixel_values, num_patches, **kwargs)
            return [with_places(tokens, None, self.channels) for tokens in whole] if self.sets_positions else whole
        sizes = num_patches.flatten().tolist()
        pixels = (
            list(pixel_values.split(sizes)) if isinstance(pixel_values, Tensor) else [p[None] for p in pixel_values]
        )
        jobs = [Asked.of(bytes(row.flatten().tolist()).decode()) for row in asked]
        said: list[Tensor | None] = [None] * len(jobs)
        for rows in self._groups(jobs, pixels):
            own = {key: _rows(value, rows, len(jobs)) for key, value in kwargs.items()}
            features = self._kept([jobs[row] for row in rows], modality, [pixels[row] for row in rows], own)
            for row, tokens in zip(rows, features, strict=True):
                kept = int(counts[row].flatten()[1])
                if len(tokens) != kept:
                    raise TrimError(
                        f"{jobs[row].recipe} left {len(tokens)} tokens of an image where {kept} were scheduled: this "
                        "model's counts are not known before encoding; use vt.trim()"
                    )
                said[row] = tokens
        return [tokens for tokens in said if tokens is not None]

    def _groups(self, jobs: Sequence[Asked], pixels: Sequence[Tensor]) -> list[list[int]]:
        """Images that are encoded together: those of one method, with or without a question, of one form."""
        groups: dict[Any, list[list[int]]] = {}
        for row, (job, picture) in enumerate(zip(jobs, pixels, strict=True)):
            parts = groups.setdefault((job.recipe, bool(job.question), picture.shape[1:]), [[]])
            if len(parts[-1]) == self.trimming.pictures_at_once:
                parts.append([])
            parts[-1].append(row)
        return [part for parts in groups.values() for part in parts]

    def _kept(self, jobs: list[Asked], modality: Any, pixels: list[Tensor], kwargs: dict[str, Any]) -> list[Tensor]:
        joined = torch.cat(pixels)
        device = joined.device
        arguments = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        tiled = joined.ndim == 4 and "image_sizes" not in kwargs and any(len(picture) > 1 for picture in pixels)
        entered = self._entrance(jobs[0].recipe)(
            modality,
            questions=[job.question for job in jobs] if jobs[0].question else None,
            tiles=[len(picture) for picture in pixels] if tiled else (),
            pixel_values=joined,
            **arguments,
        )
        said = []
        for job, image in zip(jobs, entered, strict=True):
            index = image.index
            if job.compact:
                places = torch.arange(len(index), device=device)[:, None]
            elif self.several:
                _, _, columns = image.parts[0].grid
                places = torch.stack([index * 0, index // columns, index % columns], -1)
            else:
                places = index[:, None]
            said.append(with_places(image.features, places, self.channels))
        return said

    def _entrance(self, recipe: str) -> Entrance:
        if recipe in self._entrances:
            self._entrances.move_to_end(recipe)
            return self._entrances[recipe]
        method = load_method(json.loads(recipe) if recipe else "none")
        entrance = Entrance(
            self.model,
            method,
            text_tower=self._tower,
            processor=self._processor,
            memory=self._memory,
            ranks=self._ranks,
        )
        self._entrances[recipe] = entrance
        if len(self._entrances) > ENTRANCES:
            self._entrances.popitem(last=False)
        return entrance

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        if not self.sets_positions:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        return first_positions(list(input_tokens), features, list(map(_span, features)), self._whole, self.several)

    def _whole(self, tokens: list[int], features: list[Any]) -> tuple[Tensor, int]:
        if self.several:
            return super().get_mrope_input_positions(tokens, features)
        return torch.arange(len(tokens)).repeat(4, 1), 0

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        # prompts end in text, so what follows is one further
        last = mrope_positions[: self.channels, -1].max()
        delta = int(last) + 1 - mrope_positions.shape[1]
        if not len(multimodal_embeddings):  # every step of decoding, for every request: no work here
            return multimodal_embeddings, mrope_positions, delta
        ids = torch.as_tensor(input_ids)[num_computed_tokens:]
        visual = torch.isin(ids, torch.tensor(self._placeholders, device=ids.device))
        at = num_computed_tokens + visual.nonzero()[:, 0]
        clean, positions = set_positions(mrope_positions, at, multimodal_embeddings, self.channels)
        return clean, positions, delta

    @property
    def _placeholders(self) -> list[int]:
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        return [token for name in names if (token := getattr(self.config, name, None)) is not None]


def _heads_are_split(core: Any) -> bool:
    """Whether vLLM gave each rank a part of the encoder's heads; where it could not, each has a whole encoder."""
    family, found = family_of(core), set[bool]()
    for kind in family.kinds:
        for attention in family.attentions(kind):
            parts = [part for part in attention.modules() if isinstance(part, ColumnParallelLinear)]
            found.add(any(part.tp_size > 1 and not part.gather_output for part in parts))
    if len(found) > 1:
        raise TrimError(
            "vLLM shares some attention modules of the encoder among its ranks, and others not: serve on one"
        )
    return found == {True}


def _span(feature: Any) -> int:
    """Positions over which an image or video goes."""
    place = feature.mm_position
    if feature.data is not None and COUNTS in feature.data:
        return int(feature.data[COUNTS].data.flatten()[2])
    return place.length if place.is_embed is None else int(place.is_embed.sum())


def _rows(value: Any, rows: list[int], images: int) -> Any:
    """The part of a field with a row an image; any other field is for all of them."""
    if isinstance(value, Tensor) and len(value) == images:
        return value[rows]
    return [value[row] for row in rows] if isinstance(value, list) and len(value) == images else value
