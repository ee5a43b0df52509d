"""The joint space of both towers in training: captions, names of objects and questions against pictures and patches.

It knows what is said of the scenes of a world (:class:`Naming`); it does not know what else a stage trains.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPModel

from visiontrim.zoo.questions import TYPES, Question, ask
from visiontrim.zoo.scenes import COLORS, DIGITS, LETTERS, SHAPES, Object, Scene
from visiontrim.zoo.training.scaffold import named, nouns_of
from visiontrim.zoo.training.tower import TEXT_LENGTH, read_texts

PHRASES = (
    *(f"a {color} {shape}" for color in COLORS for shape in SHAPES),
    *(f"a {color} digit {digit}" for color in COLORS for digit in DIGITS),
    *(f"a {color} letter {letter}" for color in COLORS for letter in LETTERS),
)
"""Every object by its name."""
CANDIDATES = 100
"""Phrases that a patch is told apart from."""
SCALE_LIMIT = math.log(60)
"""Of CLIP's logarithm of the scale of similarities."""


@dataclass(frozen=True, slots=True)
class Naming:
    """What is said of the scenes of a world."""

    phrase: Callable[[Object], str] = lambda obj: obj.phrase
    """The name of an object."""
    ask: Callable[[random.Random, Sequence[Object]], Question | None] = lambda rng, objects: ask(
        rng, objects, rng.choice(TYPES)
    )
    """A question of any type, None if the scene or the draw allows none."""
    tries: int = 4
    """Draws of a question that names something which is there."""


BUNDLED = Naming()
"""Of the worlds of the bundled model."""


def joint_space(
    clip: CLIPModel,
    rng: random.Random,
    scenes: Sequence[Scene],
    owner: Int[Tensor, "scenes tokens"],
    last: Float[Tensor, "scenes 1+tokens width"],
    naming: Naming = BUNDLED,
) -> tuple[Tensor, dict[str, float]]:
    """Losses of captions, phrases and questions, and what of each is right.

    ``last`` are the states of the last layer of the vision tower, that of [CLS] first; ``owner`` says which object each
    of the others shows, 0 for background.
    """
    joint = F.normalize(clip.visual_projection(clip.vision_model.post_layernorm(last)), dim=-1)
    scale = clip.logit_scale.exp()
    loss, values = torch.zeros(()), {}
    if len(scenes) > 8:
        texts, ends = read_texts(clip, [caption(rng, scene.objects, naming) for scene in scenes])
        logits = scale * joint[:, 0] @ texts[torch.arange(len(texts)), ends].T
        same = torch.arange(len(scenes))
        loss = 0.3 * (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same))
        values["caption"] = (logits.argmax(dim=1) == same).float().mean().item()

    names = [[naming.phrase(o) for o in scene.objects] for scene in scenes]
    there = list(dict.fromkeys(name for row in names for name in row))
    others = [phrase for phrase in PHRASES if phrase not in there]
    phrases = there + rng.sample(others, min(len(others), max(8, CANDIDATES - len(there))))
    number = {phrase: n for n, phrase in enumerate(phrases)}
    index = torch.full((len(scenes), 1 + max(map(len, names))), -1)
    for row, found in enumerate(names):
        index[row, 1 : 1 + len(found)] = torch.tensor([number[name] for name in found])
    shown = owner > 0
    target = index.gather(1, owner)[shown]
    texts, ends = read_texts(clip, [phrase.split() for phrase in phrases])
    logits = scale * joint[:, 1:][shown] @ texts[torch.arange(len(texts)), ends].T
    loss = loss + 0.6 * F.cross_entropy(logits, target)
    values["phrase"] = (logits.argmax(dim=1) == target).float().mean().item()

    asked, spoken = questions_that_name(rng, scenes, naming)
    texts, _ = read_texts(clip, [text.split() for text in asked])
    scene, text, place = torch.tensor([where for where, _ in spoken]).unbind(dim=1)
    most = 1 + max(len(objects) for _, objects in spoken)
    means = torch.zeros(len(spoken), most, dtype=torch.bool)
    for row, (_, objects) in enumerate(spoken):
        means[row, : 1 + len(objects)] = torch.tensor([False, *objects])
    similar = scale * (joint[scene, 1:] @ texts[text, place][..., None])[..., 0]
    meant = means.gather(1, owner[scene])
    meant, similar = meant[meant.any(dim=1)], similar[meant.any(dim=1)]
    to_patches = -(similar.log_softmax(dim=1) * meant).sum(dim=1) / meant.sum(dim=1)
    values["question"] = meant.gather(1, similar.argmax(dim=1, keepdim=True)).float().mean().item()
    return loss + 0.3 * to_patches.mean(), values


def caption(rng: random.Random, objects: Sequence[Object], naming: Naming = BUNDLED) -> list[str]:
    """ "a red star and a blue digit 7 and ...", in random order, as many objects as the text tower can read."""
    words: list[str] = []
    for obj in rng.sample(list(objects), len(objects)):
        more = [*(["and"] if words else []), *naming.phrase(obj).split()]
        if len(words) + len(more) + 2 > TEXT_LENGTH:
            break
        words += more
    return words


def questions_that_name(
    rng: random.Random, scenes: Sequence[Scene], naming: Naming = BUNDLED
) -> tuple[list[str], list[tuple[tuple[int, int, int], list[bool]]]]:
    """A question about each scene that names something in it; its nouns and its end as scene, text and word, with the
    objects that they mean."""
    texts: list[str] = []
    spoken: list[tuple[tuple[int, int, int], list[bool]]] = []
    for number, scene in enumerate(scenes):
        for _ in range(naming.tries):
            question = naming.ask(rng, scene.objects)
            if question is None:
                continue
            nouns = nouns_of(question.text)
            meant = [named(question, noun, scene.objects) for noun in nouns]
            if not nouns or not all(map(any, meant)):
                continue
            spoken += [
                ((number, len(texts), 1 + noun.place), objects) for noun, objects in zip(nouns, meant, strict=True)
            ]
            end = 1 + len(question.text.split())
            spoken.append(((number, len(texts), end), [any(column) for column in zip(*meant, strict=True)]))
            texts.append(question.text)
            break
    return texts, spoken
