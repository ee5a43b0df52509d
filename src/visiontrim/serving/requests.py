"""What a request to the server may say, and what is made of it: the chat completions of OpenAI, and ``visiontrim``.

Pictures come inside the request, as data URIs: a server that fetches addresses for strangers opens the network that it
stands in. Knows no queue and no HTTP.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from visiontrim.ask import FALLBACK_PROMPT, Speaker
from visiontrim.core.errors import TrimError
from visiontrim.images import decode_image


@dataclass(frozen=True)
class Limits:
    """Of one request."""

    body_bytes: int = 32 * 2**20
    images: int = 8
    image_bytes: int = 10 * 2**20
    pixels: int = 64_000_000
    new_tokens: int = 1024
    default_new_tokens: int = 256
    question: int = 20_000
    """Characters of all texts together."""


class Trim(BaseModel):
    """The field ``visiontrim`` of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)
    keep: int | float | None = None
    method: str | None = None
    question: str | None = None


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[dict[str, Any]]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A chat completion; fields that are not known are not read, as with other servers of this kind."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    visiontrim: Trim = Trim()

    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or not all(0 < len(stop) <= 200 for stop in stops):
            raise TrimError("stop: give at most 4 texts of 1 to 200 characters")
        return tuple(stops)


@dataclass(frozen=True)
class Conversation:
    """What the model reads."""

    prompt: str
    images: list[Image.Image]
    question: str
    """The text of the last message of the user."""


def conversation(speaker: Speaker, request: ChatRequest, limits: Limits) -> Conversation:
    """Raises :class:`TrimError` for what cannot be read, or is more than the ``limits``."""
    processor: Any = speaker.processor
    images: list[Image.Image] = []
    turns, question, length = [], "", 0
    for message in request.messages:
        parts = [{"type": "text", "text": message.content}] if isinstance(message.content, str) else message.content
        told: list[dict[str, str]] = []
        for part in parts:
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                text = part["text"]
                length += len(text)
                if length > limits.question:
                    raise TrimError(f"the messages have more than {limits.question:,} characters: shorten them")
                if (mark := getattr(processor, "image_token", None)) and mark in text:
                    raise TrimError(f"a text holds {mark!r}, the place of the picture in the prompt: leave it out")
                told.append({"type": "text", "text": speaker.normalise(text) if message.role == "user" else text})
            elif part.get("type") == "image_url":
                if len(images) == limits.images:
                    raise TrimError(f"at most {limits.images} images are read: send fewer")
                images.append(_picture(part, f"image {len(images)}", limits))
                told.append({"type": "image"})
            else:
                raise TrimError(f"a part of type {part.get('type')!r} is not read: send text and image_url")
        if message.role == "user":
            question = " ".join(part["text"] for part in told if part["type"] == "text")
        turns.append({"role": message.role, "content": told})
    if getattr(processor, "chat_template", None):
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    elif len(turns) == 1:
        prompt = FALLBACK_PROMPT.format(images="<image>\n" * len(images), question=question)
    else:
        raise TrimError(f"{speaker.name} has no chat template: send one message")
    return Conversation(prompt, images, question)


def _picture(part: dict[str, Any], name: str, limits: Limits) -> Image.Image:
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url[:100]:
        raise TrimError(f"{name} is no data URI: send data:image/png;base64,... (addresses are not fetched)")
    data = url.partition(",")[2]
    if len(data) * 3 // 4 > limits.image_bytes:
        raise TrimError(f"{name} has more than {limits.image_bytes:,} bytes: send a smaller one")
    try:
        content = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise TrimError(f"{name} is no base64: {error}") from error
    try:
        with Image.open(io.BytesIO(content)) as header:
            width, height = header.size
    except Exception:  # the decoder says what is wrong
        width = height = 0
    if width * height > limits.pixels:
        raise TrimError(f"{name} has {width} x {height} pixels, more than {limits.pixels:,}: send a smaller one")
    return decode_image(content, name)
