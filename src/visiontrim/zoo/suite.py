"""Held-out questions for the bundled models, in five splits, and the models' answers to them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image

from visiontrim.core.errors import TrimError
from visiontrim.zoo.natural_questions import LONGEST, NATURAL_TYPES, ask_natural, ask_pair
from visiontrim.zoo.natural_scenes import NATURAL, draw_natural
from visiontrim.zoo.questions import TYPES, Question, ask
from visiontrim.zoo.scenes import DENSE, STANDARD, World, draw_scene
from visiontrim.zoo.video import FRAMES, VIDEO_TYPES, ask_video, draw_video

PROMPT = "USER: <image> {question} ASSISTANT:"
"""What the models were trained on: <s> USER:, the vision tokens, the words of the question, ASSISTANT:."""
TURN = "{answer} </s> USER: {question} ASSISTANT:"
"""What follows the prompt of one turn in that of the next one."""

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
    earlier: tuple[tuple[str, str], ...] = ()
    """Questions and right answers of the turns before this one."""
    template: str = PROMPT
    """How the model is asked."""
    before: tuple[Image.Image, ...] = ()
    """The frames of a video before ``image``, the last one; ``patch_owner`` holds those of all frames, in order."""
    number: int = 0
    """How many questions of this type about the scene came before."""
    max_new_tokens: int = 3
    """Of an answer with the token that ends it: most have at most two words."""
    video: bool = False
    """The model sees its pictures as one video, not as pictures one after the other."""

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The picture, or the frames of the video in order of time."""
        return (*self.before, self.image)

    @property
    def prompt(self) -> str:
        """The whole conversation up to what the model must say."""
        questions = [question for question, _ in self.earlier] + [self.question]
        text = self.template.format(question=questions[0]).replace("<image>", " ".join(["<image>"] * len(self.images)))
        for (_, answer), question in zip(self.earlier, questions[1:], strict=True):
            text += " " + TURN.format(answer=answer, question=question)
        return text


@dataclass(frozen=True, slots=True)
class Split:
    """A fixed set of held-out questions."""

    name: str
    world: World
    scenes: int
    digest: str
    """:func:`digest` of the samples about the first 20 scenes."""
    turns: int = 1
    """Turns of each conversation; 1 for single questions, one of each type."""
    frames: int = 1
    """Pictures of a scene; more than one for videos, which the standard world shows."""

    def samples(self, scenes: int | None = None) -> Iterator[Sample]:
        """The questions about the first ``scenes`` scenes, about all by default."""
        scenes = self.scenes if scenes is None else scenes
        if self.frames > 1:
            return videos(scenes, self.frames)
        if self.world is NATURAL:
            return natural(scenes)
        if self.turns == 1:
            return held_out(scenes, world=self.world)
        return conversations(scenes, self.turns, world=self.world)


def held_out(
    num_scenes: int,
    per_scene: int | None = None,
    seed: int = HELD_OUT,
    world: World = STANDARD,
) -> Iterator[Sample]:
    """Questions about the scenes ``seed``, ``seed + 1``, ...: for each scene one of every type that it allows.

    With ``per_scene`` below the number of types, they take turns from scene to scene. The question of a type about a
    scene does not depend on ``per_scene``.
    """
    per_scene = len(TYPES) if per_scene is None else per_scene
    if not 1 <= per_scene <= len(TYPES):
        raise TrimError(f"per_scene={per_scene}, but a scene is asked one question per type: give 1 to {len(TYPES)}")
    for number in range(num_scenes):
        scene_seed = seed + number
        scene = draw_scene(scene_seed, world)
        turn = number * per_scene
        for type in (TYPES[(turn + j) % len(TYPES)] for j in range(per_scene)):
            question = ask(random.Random(f"{scene_seed} {type}"), scene.objects, type)
            if question is not None:
                yield Sample(scene_seed, scene.image, question.text, question.answer, type, scene.patch_owner)


def conversations(num_scenes: int, turns: int, seed: int = HELD_OUT, world: World = STANDARD) -> Iterator[Sample]:
    """Every turn of a conversation about each of the scenes ``seed``, ``seed + 1``, ..., no question twice.

    A turn is a sample of its own: before it stand the right answers to the earlier turns.
    """
    for scene_seed in range(seed, seed + num_scenes):
        scene = draw_scene(scene_seed, world)
        rng = random.Random(f"{scene_seed} turns")
        asked: dict[str, Question] = {}
        while len(asked) < turns:
            question = ask(rng, scene.objects, rng.choice(TYPES))
            if question is not None:
                asked.setdefault(question.text, question)
        earlier: tuple[tuple[str, str], ...] = ()
        for q in asked.values():
            yield Sample(scene_seed, scene.image, q.text, q.answer, q.type, scene.patch_owner, earlier)
            earlier = (*earlier, (q.text, q.answer))


def videos(num_videos: int, frames: int = FRAMES, seed: int = HELD_OUT) -> Iterator[Sample]:
    """Questions about the videos ``seed``, ``seed + 1``, ...: for each one of every type that it allows."""
    for number in range(seed, seed + num_videos):
        video = draw_video(number, frames)
        *before, last = video.frames
        owner = np.concatenate([frame.patch_owner for frame in video.frames])
        for type in VIDEO_TYPES:
            q = ask_video(random.Random(f"{number} {type}"), video, type)
            if q is not None:
                earlier = tuple(frame.image for frame in before)
                yield Sample(number, last.image, q.text, q.answer, type, owner, before=earlier)


def natural(num_scenes: int, seed: int = HELD_OUT) -> Iterator[Sample]:
    """Questions about the natural scenes ``seed``, ``seed + 1``, ...: of every type that they allow, and a pair of
    questions about what is there and what is not."""
    for scene_seed in range(seed, seed + num_scenes):
        scene = draw_natural(scene_seed)
        asked: list[tuple[str, int, Question]] = []
        for type in NATURAL_TYPES:
            rng = random.Random(f"{scene_seed} {type}")
            if type == "exist":
                asked += [(type, n, q) for n, q in enumerate(ask_pair(rng, scene.objects) or ())]
            elif q := ask_natural(rng, scene.objects, type):
                asked.append((type, 0, q))
        for type, n, q in asked:
            yield Sample(
                scene_seed, scene.image, q.text, q.answer, type, scene.patch_owner, number=n, max_new_tokens=LONGEST
            )


def digest(samples: Iterable[Sample]) -> str:
    """SHA-256 of pixels, prompts and answers."""
    total = hashlib.sha256()
    for sample in samples:
        for image in sample.images:
            total.update(image.tobytes())
        total.update(f"{sample.type}|{sample.prompt}|{sample.answer}\n".encode())
    return total.hexdigest()


SPLITS = {
    split.name: split
    for split in (
        Split("standard", STANDARD, 260, "c6ecd8a9bcbab37adeadd14c78fa80a43e6898473bc3863738e1dc5d0c63efb2"),
        Split("hard", DENSE, 160, "d917c49078d631c15522fc8abfdce129e5199b5b235e55713c408eff1dca80e7"),
        Split("turns", STANDARD, 120, "c01aee7b0b6a886e9288fd3dc737afe3447ba57c8690976c71fef320f2b7c1fb", turns=5),
        Split("video", STANDARD, 60, "b35a9e698b8271a5fae8f2ded38e9b326470ba070f43d605927961e5045fc405", frames=FRAMES),
        Split("natural", NATURAL, 120, "488a510eedb79f33280317f22e1db66d42e05be983b800132a024a5ad267c141"),
    )
}
"""``standard`` has more than 2,000 questions, ``turns`` 600 in 120 conversations."""


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
            images=[image for sample in batch for image in sample.images],
            text=[sample.prompt for sample in batch],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        longest = max(sample.max_new_tokens for sample in batch)
        output = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers
