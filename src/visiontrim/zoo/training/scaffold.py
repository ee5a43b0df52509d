"""Supervision of a few attention heads in training, which lays out where a decoder retrieves what.

Without it a decoder of this size finds no way to existence, counting and relations in reasonable time. It adds nothing
to the model: its losses read the attention of five layers, and a linear probe that is thrown away. They are for the
beginning; a decoder that ships is trained without them in the end.

========  =====  ==============================  ==============================================================
layer     head   from                            to
========  =====  ==============================  ==============================================================
bind      2      kind, in "red star"             its colour
find      1      noun                            all patches of the objects that it names, <s> if none
count     0      noun                            <s> and the centre patches of the n objects, 1 / (n + 1) each
answer    0, 1   ASSISTANT:, "top" of "top left"  first noun, last noun
hop       2      ASSISTANT:                      all patches of the object that the nouns lead to: the digit left of ...
========  =====  ==============================  ==============================================================

Where ``find``, ``count`` and ``hop`` lie decides until which layer vision tokens are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from visiontrim.zoo.natural_scenes import STRING
from visiontrim.zoo.questions import CHARACTERS, Question
from visiontrim.zoo.scenes import COLORS, KINDS, Object
from visiontrim.zoo.training.packing import IMAGE_START, Packed, words_of
from visiontrim.zoo.training.symbolic import VisionTokens

PROBE_WEIGHT = 0.5
BLOCKED = -1e9  # not -inf, which times a target of 0 would be nan
MOST = 6
"""The probe counts up to this many objects, more are as many."""


@dataclass(frozen=True)
class Placement:
    """Numbers of the supervised decoder layers, from 0."""

    bind: int
    find: int
    count: int
    answer: int
    hop: int


class Noun(NamedTuple):
    """A noun of a question; places are words of the question, from 0."""

    place: int
    color_place: int | None
    color: str | None
    kind: str | None
    value: str | None

    def names(self, obj: Object) -> bool:
        wanted = ((self.color, obj.color), (self.kind, obj.kind), (self.value, obj.value))
        return all(word is None or word == found for word, found in wanted)


def nouns_of(text: str) -> list[Noun]:
    """The nouns of a question: "is the red star above the 7 ?" -> red star, 7. A lone colour is a noun too."""
    nouns: list[Noun] = []
    words = text.split()
    for place, word in enumerate(words):
        color = words[place - 1] if place and words[place - 1] in COLORS else None
        if word in (*KINDS, STRING):
            nouns.append(Noun(place, place - 1 if color else None, color, word, None))
        elif word in CHARACTERS:
            nouns.append(Noun(place, None, None, None, word))
        elif word in COLORS and words[place + 1] not in KINDS:
            nouns.append(Noun(place, None, word, None, None))
    return nouns


class References(NamedTuple):
    """All nouns of packed questions, a row each; columns count the words of packed text."""

    scene: Int[Tensor, " nouns"]
    noun: Int[Tensor, " nouns"]
    color: Int[Tensor, " nouns"]
    """Where its colour stands, -1 if it has none."""
    ask: Int[Tensor, " nouns"]
    """Where ASSISTANT: stands, which the first word of the answer follows."""
    speak: Int[Tensor, " nouns"]
    """What the last word of the answer follows: ASSISTANT: again, or the first of two words."""
    is_first: Bool[Tensor, " nouns"]
    is_last: Bool[Tensor, " nouns"]
    objects: Bool[Tensor, "nouns objects"]
    """Which objects it names; object 0, the background, is never named."""


class Hops(NamedTuple):
    """The questions of several steps in packed questions, a row each."""

    scene: Int[Tensor, " hops"]
    ask: Int[Tensor, " hops"]
    found: Int[Tensor, " hops"]
    """The object that the question leads to, counted from 1."""


def references(packed: Packed, objects: Sequence[Sequence[Object]]) -> References:
    """What the nouns of packed questions refer to in their scenes."""
    rows: list[tuple[int, int, int, int, int, bool, bool]] = []
    meant: list[list[bool]] = []
    most = max(map(len, objects))
    for scene, (asked, there) in enumerate(zip(packed.questions, objects, strict=True)):
        for question, start in zip(asked, packed.starts[scene], strict=True):
            nouns = nouns_of(question.text)
            read, said = words_of(question)
            ask = start + len(read) - len(said)
            for noun in nouns:
                color = -1 if noun.color_place is None else start + noun.color_place
                ends = noun is nouns[0], noun is nouns[-1]
                rows.append((scene, start + noun.place, color, ask, start + len(read) - 2, *ends))
                meant.append([False, *named(question, noun, there), *[False] * (most - len(there))])
    scene, place, color, ask, speak, is_first, is_last = torch.tensor(rows).unbind(dim=1)
    return References(scene, place, color, ask, speak, is_first.bool(), is_last.bool(), torch.tensor(meant))


def hops(packed: Packed, objects: Sequence[Sequence[Object]]) -> Hops:
    """Where questions of several steps are answered, and what from."""
    rows = [
        (
            scene,
            start + len(words_of(question)[0]) - len(words_of(question)[1]),
            1 + objects[scene].index(question.found),
        )
        for scene, asked in enumerate(packed.questions)
        for question, start in zip(asked, packed.starts[scene], strict=True)
        if question.found is not None
    ]
    return Hops(*torch.tensor(rows, dtype=torch.long).reshape(-1, 3).unbind(dim=1))


def named(question: Question, noun: Noun, objects: Sequence[Object]) -> list[bool]:
    shapes_only = question.type == "shape"  # "what shape is red ?" does not mean the red digit
    return [noun.names(obj) and not (shapes_only and obj.value) for obj in objects]


class Scaffold(nn.Module):
    """The losses; its only weights are those of the probe."""

    def __init__(self, placement: Placement, hidden: int, image_start: int = IMAGE_START, after_image: int = 0) -> None:
        """``image_start`` tokens stand before the image, ``after_image`` between it and the first question."""
        super().__init__()
        self.placement = placement
        self.image_start, self.after_image = image_start, after_image
        self.probe = nn.Linear(hidden, MOST + 1)

    def forward(
        self,
        layers: Sequence[Any],
        states: Sequence[Float[Tensor, "scenes all hidden"]],
        mask: Bool[Tensor, "scenes 1 all all"],
        rotary: tuple[Tensor, Tensor],
        vision: VisionTokens,
        refs: References,
        jumps: Hops,
    ) -> Float[Tensor, ""]:
        """Sum of the losses. ``states`` holds the input of every decoder layer, then the output of the last one."""

        def log_attention(layer: int, head: int) -> Float[Tensor, "scenes all all"]:
            return attention_logits(layers[layer], states[layer], rotary, head, mask[:, 0]).log_softmax(dim=-1)

        image_end = self.image_start + vision.patch.shape[1]
        text_start = image_end + self.after_image
        scene, noun = refs.scene, text_start + refs.noun

        colored = refs.color >= 0
        to_color = log_attention(self.placement.bind, 2)[scene, noun, text_start + refs.color]
        loss = -to_color[colored].sum() / colored.sum().clamp(min=1)

        shown = refs.objects.gather(1, vision.owner[scene])  # [nouns, tokens]
        targets = (
            (self.placement.find, 1, shown, False),
            (self.placement.count, 0, shown & vision.center[scene], True),
        )
        for layer, head, tokens, always_first in targets:
            target = torch.zeros(len(scene), mask.shape[-1])
            target[:, self.image_start : image_end] = tokens.float()
            target[:, 0] = 1.0 if always_first else (~tokens.any(dim=1)).float()
            target /= target.sum(dim=1, keepdim=True)
            loss = loss + F.kl_div(log_attention(layer, head)[scene, noun], target, reduction="batchmean")

        for head, chosen in ((0, refs.is_first), (1, refs.is_last)):
            to_noun = log_attention(self.placement.answer, head)
            for speaker in (refs.ask, refs.speak):  # mostly one and the same
                loss = loss - 0.5 * to_noun[scene, text_start + speaker, noun][chosen].mean()

        if len(jumps.scene):
            there = vision.owner[jumps.scene] == jumps.found[:, None]
            target = torch.zeros(len(there), mask.shape[-1])
            target[:, self.image_start : image_end] = there.float()
            target[:, 0] = (~there.any(dim=1)).float()
            target /= target.sum(dim=1, keepdim=True)
            to_found = log_attention(self.placement.hop, 2)[jumps.scene, text_start + jumps.ask]
            loss = loss + F.kl_div(to_found, target, reduction="batchmean")

        heard = F.rms_norm(states[self.placement.count + 1][scene, noun], states[0].shape[-1:])
        counted = refs.objects.sum(dim=1).clamp(max=MOST)
        return loss + PROBE_WEIGHT * F.cross_entropy(self.probe(heard), counted)


def attention_logits(
    layer: Any,
    hidden: Float[Tensor, "scenes all hidden"],
    rotary: tuple[Tensor, Tensor],
    head: int,
    mask: Bool[Tensor, "scenes all all"],
) -> Float[Tensor, "scenes all all"]:
    """Attention logits of one head of a Llama or Qwen layer, BLOCKED where ``mask`` is False.

    ``hidden`` is the input of the layer.
    """
    attention = layer.self_attn
    hidden = layer.input_layernorm(hidden)
    cos, sin = rotary

    def turned(projection: nn.Linear, number: int) -> Tensor:
        rows = slice(number * attention.head_dim, (number + 1) * attention.head_dim)
        x = F.linear(hidden, projection.weight[rows], None if projection.bias is None else projection.bias[rows])
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    keys = turned(attention.k_proj, head // attention.num_key_value_groups)
    logits = turned(attention.q_proj, head) @ keys.mT * attention.scaling
    return logits.masked_fill(~mask, BLOCKED)
