"""Scores of a bundled model on a held-out split: all tokens, few tokens, and no picture at all."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from visiontrim.core.method import Method, Site, Step, VisionOutput
from visiontrim.core.view import Keep, View
from visiontrim.methods.controls import NoTrim, Random
from visiontrim.run import trim
from visiontrim.zoo.natural_questions import MORE_TYPES, NATURAL_TYPES, ask_natural
from visiontrim.zoo.natural_scenes import NATURAL, natural_objects
from visiontrim.zoo.questions import TYPES, Question, ask
from visiontrim.zoo.scenes import World, draw_scene
from visiontrim.zoo.suite import Sample, Split, answer
from visiontrim.zoo.video import MOTION_TYPES, VIDEO_TYPES, ask_video, draw_video

BLIND_SCENES = 2_000
"""Training scenes that the blind baseline learns from, a question of each type about each."""
CONTROL_SCENES = 100
"""The controls are scored on the first so many scenes of a split, for their time."""
Told = Callable[[int], object]
"""Hears how many questions were answered just now."""
Progressing = Callable[[int, int], object]
"""Hears how many questions are answered in all, and of how many."""


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a proportion, 95 % by default."""
    p, shrink = right / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)  # rounding leaves -0.0


@dataclass(frozen=True, eq=False)
class KeepPatches(Step):
    """Keeps given patches of each image: what an oracle does that knows where the objects are."""

    index: Int[Tensor, "batch kept"]

    name: ClassVar[str] = "patches"
    summary: ClassVar[str] = "keeps given patches"
    paper: ClassVar[str] = "control"

    @property
    def site(self) -> Site:
        return VisionOutput()

    def select(self, view: View) -> Keep:
        return Keep(self.index.to(view.features.device))

    def __str__(self) -> str:
        return f"{self.name}:{self.index.shape[1]}"


def object_patches(samples: Sequence[Sample], keep: int, seed: int = 0) -> Int[Tensor, "pictures {keep}"]:
    """The patches of objects, filled up with random ones, or random ones of them where they are too many; ascending.

    A row for every picture, also for the frames of a video that the model sees as pictures, and for every video.
    """
    rng = np.random.default_rng(seed)
    chosen: list[np.ndarray] = []
    for sample in samples:
        owners = sample.patch_owner.reshape(1 if sample.video else len(sample.images), -1)
        scores = (owners > 0) + rng.random(owners.shape)
        chosen.append(np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :keep], axis=1))
    return torch.from_numpy(np.concatenate(chosen))


def score(
    bundle: Any, samples: Sequence[Sample], method: Callable[[Sequence[Sample]], Method], told: Told = lambda _: None
) -> list[bool]:
    """Which samples are answered rightly. ``method`` gets a batch, the questions about one scene.

    ``told`` hears after each batch how many questions it had. Methods that are guided by text read the question with
    the text tower of the bundle, or with its processor.
    """
    right: list[bool] = []
    for _, group in itertools.groupby(samples, key=lambda sample: sample.scene_seed):
        batch = list(group)
        asked = [sample.question for sample in batch]
        tower = getattr(bundle, "text_tower", None)
        with trim(bundle.model, method(batch), question=asked, text_tower=tower, processor=bundle.processor):
            answers = answer(bundle.model, bundle.processor, batch, batch_size=len(batch))
        right += [given == sample.answer for given, sample in zip(answers, batch, strict=True)]
        told(len(batch))
    return right


def controls(keep: int, num_layers: int) -> dict[str, Callable[[Sequence[Sample]], Method]]:
    """All tokens, ``keep`` random ones (others for every scene), ``keep`` with those of the objects, and all tokens
    until a decoder layer, one from there on, which is next to none."""
    return {
        "all": lambda batch: NoTrim(),
        f"random {keep}": lambda batch: Random(keep=keep, seed=batch[0].scene_seed),
        f"oracle {keep}": lambda batch: KeepPatches(object_patches(batch, keep)),
        "1 from layer 2": lambda batch: Random(keep=1, layer=2),
        f"1 from layer {num_layers // 2}": lambda batch: Random(keep=1, layer=num_layers // 2),
    }


def blind_answers(samples: Sequence[Sample], world: World, scenes: int = BLIND_SCENES, frames: int = 1) -> list[str]:
    """The most frequent answer to each question in training scenes of this world; to an unseen one that of its type.

    With more than one of ``frames``, in videos.
    """
    return most_frequent(_training_questions(world, scenes, frames), samples)


def most_frequent(asked: Iterable[Question | None], samples: Sequence[Sample]) -> list[str]:
    """The answer that each question of ``samples`` has most often in ``asked``; to an unseen one that of its type."""
    by_text: dict[str, Counter[str]] = {}
    by_type: dict[str, Counter[str]] = {}
    for question in asked:
        if question is not None:
            by_text.setdefault(question.text, Counter())[question.answer] += 1
            by_type.setdefault(question.type, Counter())[question.answer] += 1
    return [by_text.get(s.question, by_type[s.type]).most_common(1)[0][0] for s in samples]


def _training_questions(world: World, scenes: int, frames: int) -> Iterator[Question | None]:
    for seed in range(scenes):
        rng = random.Random(f"{seed} blind")
        if frames > 1:
            video = draw_video(seed, frames)
            yield from (ask_video(rng, video, type) for type in VIDEO_TYPES)
        elif world is NATURAL:
            objects = natural_objects(seed)
            yield from (ask_natural(rng, objects, type) for type in NATURAL_TYPES)
        else:
            objects = draw_scene(seed, world).objects
            yield from (ask(rng, objects, type) for type in TYPES)


Tally = dict[str, tuple[int, int]]
"""Right answers and questions of each type, in order of TYPES, then of natural scenes alone, motion, and of all."""


def tally(samples: Sequence[Sample], right: Sequence[bool]) -> Tally:
    table: Tally = {}
    for type in (*TYPES, *MORE_TYPES, *MOTION_TYPES):
        hits = [good for sample, good in zip(samples, right, strict=True) if sample.type == type]
        if hits:
            table[type] = (sum(hits), len(hits))
    return table | {"all": (sum(right), len(right))}


THERE = "all, as the controls"
"""All tokens, on the scenes of the controls."""


@dataclass(frozen=True)
class Scores:
    """Scores on a split: for each way to look, ``all`` first and ``blind`` last, a tally."""

    scenes: int
    tallies: dict[str, Tally]

    def table(self) -> str:
        """Markdown: accuracy per type with its 95 % interval, then what the other ways give; last the mean of types."""
        plain = self.tallies["all"]
        ways = [way for way in self.tallies if way != "all"]
        lines = [
            f"| type | questions | accuracy | 95 % interval | {' | '.join(ways)} |",
            "|---" * (4 + len(ways)) + "|",
        ]
        for type, (right, total) in plain.items():
            low, high = wilson(right, total)
            others = [self.tallies[way].get(type) for way in ways]
            rest = " | ".join(f"{other[0] / other[1]:.1%}" if other else "" for other in others)
            lines.append(f"| {type} | {total} | {right / total:.1%} | {low:.1%} to {high:.1%} | {rest} |")
        means = " | ".join(f"{mean_of_types(self.tallies[way]):.1%}" for way in ways)
        return "\n".join([*lines, f"| mean of types | | {mean_of_types(plain):.1%} | | {means} |"])

    def title(self, name: str) -> str:
        return f"{name}: {self.tallies['all']['all'][1]} questions about {self.scenes} scenes"

    def to_dict(self) -> dict[str, Any]:
        return {"scenes": self.scenes, "tallies": self.tallies}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scores:
        tallies = {way: {type: tuple(n) for type, n in rows.items()} for way, rows in data["tallies"].items()}
        return cls(data["scenes"], tallies)


def mean_of_types(table: Tally) -> float:
    """Mean accuracy over the types."""
    shares = [right / total for type, (right, total) in table.items() if type != "all"]
    return sum(shares) / len(shares)


def report(
    bundle: Any,
    split: Split,
    scenes: int | None,
    keep: int,
    control_scenes: int = CONTROL_SCENES,
    progress: Progressing = lambda *_: None,
) -> Scores:
    """Score a model on the first ``scenes`` scenes of a split, on all by default.

    The controls, and what all tokens give beside them, are scored on the first ``control_scenes``. ``progress`` hears
    how many questions are answered, of how many.
    """
    samples = list(split.samples(scenes))
    layers = bundle.model.config.text_config.num_hidden_layers
    blind = blind_answers(samples, split.world, BLIND_SCENES, split.frames)
    return compare(bundle, samples, controls(keep, layers), blind, control_scenes, progress)


def compare(
    bundle: Any,
    samples: Sequence[Sample],
    ways: Mapping[str, Callable[[Sequence[Sample]], Method]],
    blind: Sequence[str],
    control_scenes: int,
    progress: Progressing = lambda *_: None,
) -> Scores:
    """Score the first of ``ways`` on all samples, the others on those about the first ``control_scenes`` scenes."""
    seeds = list(dict.fromkeys(sample.scene_seed for sample in samples))
    few = [sample for sample in samples if sample.scene_seed in seeds[:control_scenes]]
    every, *others = ways.items()
    done, total = 0, len(samples) + len(others) * len(few)

    def told(questions: int) -> None:
        nonlocal done
        done += questions
        progress(done, total)

    right = score(bundle, samples, every[1], told)
    tallies = {every[0]: tally(samples, right), THERE: tally(few, right[: len(few)])}
    tallies |= {way: tally(few, score(bundle, few, method, told)) for way, method in others}
    guessed = [guess == sample.answer for guess, sample in zip(blind, samples, strict=True)]
    return Scores(len(seeds), tallies | {"blind": tally(samples, guessed)})
