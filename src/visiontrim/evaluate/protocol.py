"""How questions are put: template, system sentence, padding, suffix, answer length, and what guides text-aware methods.

Scores of one checkpoint differ by several points between protocols, so a report states all of it. The one that the
published numbers of LLaVA-1.5 share is ``llava-1.5``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from PIL import Image

from visiontrim.ask import OWN, Speaker
from visiontrim.core.errors import TrimError
from visiontrim.evaluate.items import Item

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
Template = Literal["chat", "vicuna_v1"]
Guide = Literal["prompt", "question"]
PLACE = "<image>"
"""Of a picture in LLaVA's template."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """One way to put questions."""

    name: str = "chat"
    template: Template = "chat"
    """The processor's chat template, or LLaVA's with its system sentence."""
    pad: bool = False
    """Whether pictures are padded to a square with the encoder's mean colour."""
    suffix: bool = True
    """Whether a benchmark's options, hints and sentence on the form of the answer are sent; else the question alone."""
    guide: Guide = "prompt"
    """What text-aware methods read: the whole text, or the question alone."""
    max_new_tokens: int | None = None
    """Longest answer; None: the benchmark's."""

    def question(self, speaker: Speaker, item: Item) -> str:
        """What is sent, without the template. Raises :class:`TrimError` for what the model has no words for."""
        return self._said(speaker, item.question if self.suffix else item.bare or item.question, item)

    def guidance(self, speaker: Speaker, item: Item) -> str:
        """What text-aware methods read."""
        if item.prompt is None and self.guide == "question" and item.bare:
            return self._said(speaker, item.bare, item)
        return self.question(speaker, item)

    def prompt(self, speaker: Speaker, item: Item, pictures: int) -> str | None:
        """The whole prompt; None where the processor's chat template makes it."""
        if item.prompt is not None or self.template == "chat":
            return item.prompt
        if speaker.name in OWN:
            raise TrimError(
                f"the model {speaker.name} knows no word of LLaVA's system sentence: --protocol bare sends the "
                "question alone in its own template"
            )
        if (place := getattr(speaker.processor, "image_token", PLACE)) != PLACE:
            raise TrimError(
                f"the template vicuna_v1 is LLaVA's, but {speaker.name} has {place!r} for pictures: use chat"
            )
        images = PLACE * pictures + "\n" if pictures else ""
        return f"{SYSTEM} USER: {images}{self.question(speaker, item)} ASSISTANT:"

    def shown(self, picture: Image.Image, processor: Any) -> Image.Image:
        """The picture as it is handed to the processor."""
        return square(picture, processor.image_processor.image_mean) if self.pad else picture

    def __str__(self) -> str:
        template = "LLaVA's template with its system sentence" if self.template == "vicuna_v1" else "the chat template"
        pad = "padded to a square" if self.pad else "as the processor takes them"
        suffix = "with its suffix" if self.suffix else "alone"
        guide = "the whole text" if self.guide == "prompt" else "the question alone"
        length = "" if self.max_new_tokens is None else f", at most {self.max_new_tokens} new tokens"
        return f"{self.name}: {template}, pictures {pad}, the question {suffix}; {guide} guides methods{length}"

    def _said(self, speaker: Speaker, text: str, item: Item) -> str:
        if item.prompt is not None:
            return text
        try:
            return speaker.normalise(text)
        except TrimError as error:
            if self.suffix and item.bare and item.bare != item.question:
                raise TrimError(f"{str(error).partition(':')[0]}: --protocol bare sends the question alone") from error
            raise


PROTOCOLS = {
    "chat": Protocol(),
    "llava-1.5": Protocol("llava-1.5", template="vicuna_v1", pad=True),
    "bare": Protocol("bare", suffix=False, guide="question"),
}


def protocol(name: str, **changes: Any) -> Protocol:
    """A protocol by name, with the options of ``changes`` that are not None. Raises :class:`TrimError`."""
    if name not in PROTOCOLS:
        raise TrimError(f"there is no protocol {name!r}: choose {', '.join(PROTOCOLS)}")
    given = {field: value for field, value in changes.items() if value is not None}
    for field, choices in (("template", get_args(Template)), ("guide", get_args(Guide))):
        if field in given and given[field] not in choices:
            raise TrimError(f"--{field} {given[field]!r}: choose {' or '.join(choices)}")
    found = dataclasses.replace(PROTOCOLS[name], **given)
    return found if found == PROTOCOLS[name] else dataclasses.replace(found, name=f"{name}, changed")


def square(picture: Image.Image, mean: Any) -> Image.Image:
    """The picture in the middle of a square of the colour ``mean`` (three numbers in [0, 1]), as LLaVA-1.5 sees it."""
    if picture.width == picture.height:
        return picture
    side = max(picture.size)
    ground = Image.new("RGB", (side, side), tuple(int(255 * part) for part in mean))
    ground.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return ground
