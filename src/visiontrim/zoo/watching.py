"""The small Qwen2.5-VL that watches clips, and held-out questions about them.

Its processor takes the frames of a clip as pictures, in order of time, and makes one video of them: stock processors of
videos need torchvision.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PaddleOCRVLProcessor, Qwen2_5_VLForConditionalGeneration

from visiontrim.core.errors import TrimError
from visiontrim.zoo.canvas import Grid
from visiontrim.zoo.clips import CLIP_TYPES, ask_clip, draw_clip
from visiontrim.zoo.dynamic import QwenBundle
from visiontrim.zoo.questions import ASKABLE, normalise
from visiontrim.zoo.suite import HELD_OUT, Sample
from visiontrim.zoo.video import MOTION_TYPES

VIDEO_DIR = Path(__file__).parent / "qwen-video"
"""A stock Qwen2.5-VL checkpoint (fp16): ``from_pretrained`` takes this path."""
FRAME = "<video>"
CLIP_PROMPT = "USER: <|vision_start|><image><|vision_end|> {question} ASSISTANT:"
"""What the model was trained on: :attr:`Sample.prompt` writes a place for every frame."""


class ClipProcessor(PaddleOCRVLProcessor):
    """The stock processor, with pictures as the frames of videos: one time step each, as it doubles a still."""

    makes_videos = True
    """The pictures of a prompt are one video."""

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> BatchFeature:  # pyright: ignore
        """``text`` has an ``image_token`` for every frame; the frames of a prompt are one video and have one size."""
        texts = [text] if isinstance(text, str) else list(text)
        options = {name: options[name] for name in ("padding", "return_tensors") if name in options}
        counts = [one.count(self.image_token) for one in texts]
        images = list(_flat(images))
        if sum(counts) != len(images):
            raise TrimError(
                f"the prompts have places for {sum(counts)} frames and there are {len(images)}: give as many"
            )
        if not images:
            return self.tokenizer(texts, **options)
        seen = self.image_processor(images=images, return_tensors="pt")
        grids, videos, first = seen["image_grid_thw"].tolist(), [], 0
        for number, count in enumerate(counts):
            sizes = {tuple(grid) for grid in grids[first : first + count]}
            if len(sizes) > 1:
                raise TrimError(f"the frames of a video have {len(sizes)} sizes: give frames of one size")
            first += count
            if count:
                _, height, width = sizes.pop()
                cells = height * width // self.image_processor.merge_size**2
                texts[number] = texts[number].replace(self.image_token, FRAME * cells)
                videos.append([count, height, width])
        encoded = self.tokenizer(texts, **options)
        kinds = torch.as_tensor(encoded["input_ids"]) == self.tokenizer.convert_tokens_to_ids(FRAME)
        return BatchFeature(
            {
                **encoded,
                "mm_token_type_ids": 2 * kinds.long(),
                "pixel_values_videos": seen["pixel_values"],
                "video_grid_thw": torch.tensor(videos),
            }
        )


def _flat(images: Any) -> Iterator[Image.Image]:
    """Pictures, alone or in lists of lists."""
    if isinstance(images, Image.Image):
        yield images
    elif isinstance(images, list | tuple):
        for one in images:
            yield from _flat(one)
    elif images is not None:
        raise TrimError(f"a frame is a {type(images).__name__}: give pictures of PIL, or lists of them")


def load_video(directory: Path | None = None) -> QwenBundle:
    """Load it with stock transformers classes but for the processor: float32, CPU, eval mode, a new copy on every call.

    The shape is that of :func:`visiontrim.zoo.load_qwen`, whose vision tower it has; ``directory`` holds another one.
    A frame of R x C cells of 12 pixels is R * C vision tokens, and a time step.
    """
    directory = directory or VIDEO_DIR
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    return QwenBundle(model, ClipProcessor.from_pretrained(directory))


def normalise_video(question: str) -> str:
    """As :func:`visiontrim.zoo.normalise`, with the words of motion."""
    return normalise(question, ASKABLE | set(MOTION_TYPES))


def held_out_clips(grid: Grid, num_clips: int, seed: int = HELD_OUT) -> Iterator[Sample]:
    """Questions about the clips ``seed``, ``seed + 1``, ... of ``grid``: of every type that they allow, one each.

    ``patch_owner`` of the samples counts cells, in the order of the vision tokens.
    """
    for clip_seed in range(seed, seed + num_clips):
        clip = draw_clip(clip_seed, grid)
        *before, last = clip.images
        for type in CLIP_TYPES:
            q = ask_clip(random.Random(f"{clip_seed} {grid} {type}"), clip, type)
            if q is not None:
                yield Sample(
                    clip_seed,
                    last,
                    q.text,
                    q.answer,
                    type,
                    clip.owner.flatten(),
                    template=CLIP_PROMPT,
                    before=tuple(before),
                    video=True,
                )
