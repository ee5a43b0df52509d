"""The control for all compression: a smaller picture, which is as many vision tokens and asks for no method.

Where a picture's tokens follow its size (Qwen-VL, GLM-4V) the picture is made smaller before the model sees it. Other
encoders squeeze every picture to the same size; there the features are pooled by the method ``avgpool``. Knows pictures
and processors, no model and no scores.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image

from visiontrim.ask import Speaker
from visiontrim.core.budget import Amount
from visiontrim.evaluate.items import Item
from visiontrim.images import downsample

DOWNSAMPLED = "downsampled"
"""The control's name in a cell."""
POOLED = "avgpool"
"""The method that stands for it where pictures cannot be made smaller."""


def follows_size(processor: Any) -> bool:
    """Whether a smaller picture is fewer vision tokens."""
    images = processor.image_processor
    return hasattr(images, "merge_size") and hasattr(images, "get_number_of_image_patches")


def boundless(speaker: Speaker) -> Speaker:
    """The same model with a processor that leaves small pictures as small as they are."""
    processor: Any = copy.copy(speaker.processor)
    processor.image_processor = copy.copy(processor.image_processor)
    size = dict(processor.image_processor.size)
    processor.image_processor.size = type(processor.image_processor.size)(**size | {"shortest_edge": 1})
    return dataclasses.replace(speaker, processor=processor)


def shrunk(items: Sequence[Item], keep: Amount | None, processor: Any) -> list[Item]:
    """The items with pictures of at most ``keep`` tokens each; ``processor`` is that of :func:`boundless`.

    The frames of a processor that makes one video of them share the budget. A picture that has no more stays as it is;
    equal ones stay one object, so that they are encoded once.
    """
    small: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    keys = [tuple(id(one) if isinstance(one, Image.Image) else one for one in item.sources) for item in items]
    for key, item in zip(keys, items, strict=True):
        if key not in small:
            pictures = item.pictures()
            share = keep
            if isinstance(keep, int) and getattr(processor, "makes_videos", False):
                share = max(1, keep // len(pictures))
            small[key] = tuple(_smaller(one, share, processor.image_processor) for one in pictures)
    return [dataclasses.replace(item, sources=small[key]) for key, item in zip(keys, items, strict=True)]


def _smaller(picture: Image.Image, keep: Amount | None, images: Any) -> Image.Image:
    if keep is None:
        return picture
    own = images.get_number_of_image_patches(*reversed(picture.size), {}) // images.merge_size**2
    return picture if isinstance(keep, int) and keep >= own else downsample(picture, keep, images)
