"""Held-out questions for the bundled model, and its answers to them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image

from visiontrim.core.errors import TrimError
from visiontrim.zoo.questions import TYPES, ask
from visiontrim.zoo.scenes import draw_scene

PROMPT = "USER: <image> {question} ASSISTANT:"
"""What the model was trained on: <s> USER:, 576 vision tokens, the words of the question, ASSISTANT:."""

HELD_OUT = 1_000_000_000
"""Seed of the first held-out scene; training must draw its scenes from seeds below."""


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """One question about one scene."""

    scene_seed: int
    image: Image.Image
    question: str
    """In words of the vocabulary, as ``PROMPT`` takes it."""
    answer: str
    type: str
    patch_owner: Int[np.ndarray, " patches"]
    """Which object owns each patch, 0 for background, as in :class:`Scene`."""


def held_out(num_scenes: int, per_scene: int = 7, seed: int = HELD_OUT) -> Iterator[Sample]:
    """Questions about the scenes ``seed``, ``seed + 1``, ...: for each scene one of every type that it allows.

    With ``per_scene`` < 7 the types take turns from scene to scene. The question of a type about a scene does not
    depend on ``per_scene``.
    """
    if not 1 <= per_scene <= len(TYPES):
        raise TrimError(f"per_scene={per_scene}, but a scene is asked one question per type: give 1 to {len(TYPES)}")
    for number in range(num_scenes):
        scene_seed = seed + number
        scene = draw_scene(scene_seed)
        turn = number * per_scene
        for type in (TYPES[(turn + j) % len(TYPES)] for j in range(per_scene)):
            question = ask(random.Random(f"{scene_seed} {type}"), scene.objects, type)
            if question is not None:
                yield Sample(scene_seed, scene.image, question.text, question.answer, type, scene.patch_owner)


@torch.inference_mode()
def answer(model: Any, processor: Any, samples: Iterable[Sample], batch_size: int = 8) -> list[str]:
    """The model's answers in the order of ``samples``: stock greedy ``generate()`` on left-padded batches.

    ``model`` and ``processor`` come from :func:`visiontrim.zoo.load`; an answer is right when it equals
    ``sample.answer``.
    """
    samples, answers = list(samples), []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        inputs = processor(
            images=[sample.image for sample in batch],
            text=[PROMPT.format(question=sample.question) for sample in batch],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        # An answer has at most two words and an end token.
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers
