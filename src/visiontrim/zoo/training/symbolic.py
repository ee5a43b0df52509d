"""The token space that decoder and vision tower share, and vision tokens written in it without any pixel.

Words are embedded by fixed orthonormal vectors E. A patch becomes the sum of the words for what it shows:

    E[color] + E[kind] + E[character] + [the centre lies here] E[center]
        + x (E[right] - E[left]) + y (E[bottom] - E[top])

and a patch of background E[background] + its coordinates. The decoder learns to answer from such tokens while the
vision tower learns to produce them; neither has to wait for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.zoo.natural_questions import NATURAL_WORDS
from visiontrim.zoo.questions import CHARACTERS, WORDS
from visiontrim.zoo.scenes import COLORS, GRID, KINDS, Object, Scene

WORD_ID = {word: number for number, word in enumerate(NATURAL_WORDS)}
"""Those of WORDS are the bundled model's; the few behind them the natural one's alone."""
PAD = WORD_ID["<pad>"]

ATTRIBUTES = tuple(torch.tensor([WORD_ID[word] for word in words]) for words in (tuple(COLORS), KINDS, CHARACTERS))
"""Word ids of the colours, of the kinds and of the characters."""

DOUBT = (0.4, 0.7, 0.8)
"""By how much the colour, the kind and the character of a patch may turn into another one when tokens are noisy."""
CENTER_DOUBT = 0.4
"""The same for patches that hold a centre, as a share of DOUBT: a centre patch shows more of its object."""
NOISY_CENTERS = 0.15
"""Share of the centre patches that are noisy at all. With more of them counting is ill-posed."""
MISSED_CENTERS = 0.005
"""Share of the centre patches that are treated like any other patch of the object when patches are chosen."""


def word_embeddings(hidden: int, words: int = len(WORDS)) -> Float[Tensor, "words hidden"]:
    """Orthonormal rows, the same ones on every call. Raises ValueError if the words do not fit into ``hidden``."""
    if hidden < words:
        raise ValueError(f"hidden={hidden}, but {words} words need as many orthogonal directions")
    noise = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(1234))
    return torch.linalg.qr(noise)[0][:words].contiguous()


@dataclass(frozen=True, eq=False, slots=True)
class SceneFacts:
    """What the patches of some scenes show, as tensors; object 0 is the background."""

    owner: Int[Tensor, "scenes 576"]
    """The object that owns each patch."""
    words: Int[Tensor, "scenes objects 3"]
    """Ids of the words for colour, kind and character; PAD stands for none of it."""
    center: Bool[Tensor, "scenes 576"]
    """Whether a patch holds the centre of its object."""

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> SceneFacts:
        owner = torch.stack([torch.from_numpy(scene.patch_owner) for scene in scenes]).long()
        center = torch.zeros(owner.shape, dtype=torch.bool)
        for row, scene in enumerate(scenes):
            center[row, [obj.patch for obj in scene.objects]] = True
        return cls(owner, object_words([scene.objects for scene in scenes]), center)


def object_words(scenes: Sequence[Sequence[Object]]) -> Int[Tensor, "scenes objects 3"]:
    """Ids of the words for colour, kind and character of what is in each scene, the background first."""
    words = torch.full((len(scenes), 1 + max(map(len, scenes)), 3), PAD)
    words[:, 0, 0] = WORD_ID["background"]
    for row, objects in enumerate(scenes):
        for number, obj in enumerate(objects, 1):
            words[row, number] = torch.tensor([WORD_ID[word] for word in (obj.color, obj.kind, obj.value or "<pad>")])
    return words


@dataclass(frozen=True, eq=False, slots=True)
class VisionTokens:
    """Vision tokens of some scenes and what they stand for, in order of their patches."""

    features: Float[Tensor, "scenes tokens hidden"]
    patch: Int[Tensor, "scenes tokens"]
    """Row-major index of the patch."""
    owner: Int[Tensor, "scenes tokens"]
    """Which object it shows, 0 for background."""
    center: Bool[Tensor, "scenes tokens"]
    """Whether it shows the centre of that object."""


def coordinate_code(embeddings: Float[Tensor, "words hidden"]) -> Float[Tensor, "576 hidden"]:
    """Where each patch is, in the words right, left, bottom and top: steep in the middle, graded up to the border."""
    u = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
    steps = 0.5 * torch.tanh(4 * u) + 0.6 * u
    right = embeddings[WORD_ID["right"]] - embeddings[WORD_ID["left"]]
    bottom = embeddings[WORD_ID["bottom"]] - embeddings[WORD_ID["top"]]
    return (steps[None, :, None] * right + steps[:, None, None] * bottom).flatten(0, 1)


def choose_patches(facts: SceneFacts, count: int, generator: torch.Generator) -> Int[Tensor, "scenes {count}"]:
    """``count`` patches a scene, ascending: the centres, then a share of the other object patches, then background."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    shape = facts.owner.shape
    share = 0.8 * uniform(len(facts.owner), 1)
    score = uniform(*shape)
    score += ((facts.owner > 0) & (uniform(*shape) < share)).float()
    score += 4 * (facts.center & (uniform(*shape) >= MISSED_CENTERS)).float()
    return score.topk(count, dim=1).indices.sort(dim=1).values


def symbolic_tokens(
    facts: SceneFacts,
    patch: Int[Tensor, "scenes tokens"],
    embeddings: Float[Tensor, "words hidden"],
    noise: torch.Generator | None = None,
    placed: bool = True,
) -> VisionTokens:
    """The tokens of these patches; with ``noise`` as a vision tower would give them, some of their words in doubt.

    ``placed`` tokens hold their coordinates; others leave it to the position ids of the decoder.
    """
    owner, center = facts.owner.gather(1, patch), facts.center.gather(1, patch)
    words = facts.words.gather(1, owner[..., None].expand(-1, -1, 3))  # [scenes, tokens, 3]
    # <pad> means that there is nothing to say
    vectors = torch.where(torch.arange(len(embeddings))[:, None] == PAD, 0.0, embeddings)
    features = vectors[words].sum(dim=2)
    if placed:
        features += coordinate_code(embeddings)[patch]
    features += center[..., None] * embeddings[WORD_ID["center"]]
    if noise is not None:
        features += _doubt(words, center, vectors, noise)
        scale = 0.06 * torch.rand(len(patch), 1, 1, generator=noise)
        features += scale * torch.randn(features.shape, generator=noise)
    return VisionTokens(features, patch, owner, center)


def _doubt(
    words: Int[Tensor, "scenes tokens 3"],
    center: Bool[Tensor, "scenes tokens"],
    vectors: Float[Tensor, "words hidden"],
    generator: torch.Generator,
) -> Float[Tensor, "scenes tokens hidden"]:
    """A step of each token from its words towards other words of the same attribute, seldom a long one."""
    step = torch.zeros(*center.shape, vectors.shape[1])
    for attribute, (choices, doubt) in enumerate(zip(ATTRIBUTES, DOUBT, strict=True)):
        right = words[..., attribute]
        other = choices[torch.randint(len(choices), right.shape, generator=generator)]
        noisy = torch.rand(right.shape, generator=generator) < NOISY_CENTERS
        limit = torch.where(center, doubt * CENTER_DOUBT * noisy, doubt)
        length = torch.rand(right.shape, generator=generator) ** 2 * limit * torch.isin(right, choices)
        step += length[..., None] * (vectors[other] - vectors[right])
    return step
