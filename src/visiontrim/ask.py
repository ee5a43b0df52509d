"""One question about one picture or several: load a model, build its prompt, answer with and without compression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    PreTrainedModel,
    ProcessorMixin,
)

from visiontrim import zoo
from visiontrim.core.budget import Amount
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method
from visiontrim.measure import Clock
from visiontrim.measure.shapes import checkpoints
from visiontrim.models import TextTower
from visiontrim.models.checkpoints import check_there, loaded, sentence, whole
from visiontrim.run import Run, trim
from visiontrim.zoo.natural_questions import normalise_natural
from visiontrim.zoo.watching import normalise_video

BUNDLED = "bundled"
"""Name of the LLaVA that ships with the package, with its text tower."""
BUNDLED_QWEN = "bundled-qwen"
"""Name of the Qwen2.5-VL that ships with it."""
BUNDLED_NATURAL = "bundled-natural"
"""Name of the LLaVA of natural scenes that ships with it, with its text tower."""
BUNDLED_VIDEO = "bundled-video"
"""Name of the Qwen2.5-VL that ships with it for clips: the pictures that it is asked about are their frames."""
OWN = (BUNDLED, BUNDLED_QWEN, BUNDLED_NATURAL, BUNDLED_VIDEO)
TOWERS = ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32")
"""Names to which a wrong one of a text tower is compared."""
FALLBACK_PROMPT = "USER: {images}{question} ASSISTANT:"
"""For processors without a chat template: the prompt of LLaVA-1.5, an "<image>" and a new line for every picture."""


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that answers questions about pictures, with what it takes to ask it."""

    name: str
    """Hub name or directory; ``BUNDLED`` for the model that ships with the package."""
    model: PreTrainedModel
    processor: ProcessorMixin
    text_tower: TextTower | None
    normalise: Callable[[str], str] = str.strip
    """Brings a typed question into the form that the model was trained on."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, and the run that it said it in."""

    text: str
    seconds: Mapping[str, float]
    """Of ``vision``, ``method``, ``prefill``, ``decode``, and their ``total``."""
    run: Run
    """Closed; its report, trace and picture speak of this answer."""

    def to_dict(self) -> dict[str, Any]:
        """The answer and what it cost, ready for JSON; seconds as measured, tokens as in the run's report."""
        report = self.run.report
        return {
            "answer": self.text,
            "tokens": {
                "images": report.images,
                "input": report.input_tokens,
                "kept": report.kept_tokens,
                "per_layer": list(report.per_layer),
                "mean": report.mean,
            },
            "kv_bytes": report.kv_bytes,
            "notes": list(report.notes),
            "seconds": dict(self.seconds),
            "method": self.run.method.to_dict(),
            "trace": {
                stage["site"]: {kind: stage[kind] for kind in ("dominant", "complement")} for stage in report.stages
            },
        }

    def beside(self, plain: Answer) -> Table:
        """A table for rich: this answer and its cost beside those of the ``plain`` model, and the shares saved."""

        def row(name: str, before: float, after: float, unit: str, digits: int = 0) -> tuple[str, ...]:
            saved = f"{round(1 - after / before, 2) + 0.0:.0%}" if before else ""  # + 0.0: no "-0%"
            return name, f"{before:,.{digits}f} {unit}".strip(), f"{after:,.{digits}f} {unit}".strip(), saved

        whole, part = plain.run.report, self.run.report
        table = Table("", "plain", str(self.run.method), "saved")
        table.add_row("answer", plain.text, self.text, "")
        each = f", of each of {part.images} images" if part.images > 1 else ""  # the cache is that of all
        table.add_row(*row(f"vision tokens in{each}", whole.kept_tokens, part.kept_tokens, ""))
        table.add_row(*row(f"mean per layer{each}", whole.mean, part.mean, "", 1))
        table.add_row(*row("KV cache", whole.kv_bytes / 1e6, part.kv_bytes / 1e6, "MB", 2))
        for phase, seconds in self.seconds.items():
            before = 0.0 if phase == "method" else plain.seconds[phase]  # the plain model has no method
            table.add_row(*row(phase, 1e3 * before, 1e3 * seconds, "ms", 1))
        for column in table.columns[1:]:
            column.justify = "right"
        return table


def load(
    name: str | None = None, *, text_tower: str | None = None, device: str = "auto", dtype: str = "auto"
) -> Speaker:
    """Load a model by hub name, directory, or as one of ``OWN``; None is ``BUNDLED``.

    ``text_tower`` is the hub name or directory of the CLIP model that reads the question (the bundled LLaVAs bring
    their own). ``device`` "auto" is the first accelerator, else the CPU; ``dtype`` "auto" is the checkpoint's on an
    accelerator and float32 on the CPU. Raises :class:`TrimError`, in one sentence, for whatever cannot be loaded.
    """
    place = on_device(device)
    number: Any = getattr(torch, dtype) if dtype != "auto" else torch.float32 if place.type == "cpu" else "auto"
    if name in (None, BUNDLED):
        model, processor, tower = zoo.load()
        _moved(tower.model, place, number)
        normalise = zoo.normalise
    elif name == BUNDLED_NATURAL:
        model, processor, tower = zoo.load(zoo.NATURAL_DIR)
        _moved(tower.model, place, number)
        normalise = normalise_natural
    elif name == BUNDLED_QWEN:
        (model, processor), tower, normalise = zoo.load_qwen(), None, zoo.normalise
    elif name == BUNDLED_VIDEO:
        (model, processor), tower, normalise = zoo.load_video(), None, normalise_video
    else:
        check_there("model", name, (*OWN, *checkpoints()))
        processor = loaded("processor of", name, AutoProcessor.from_pretrained)
        model = whole("model", name, AutoModelForImageTextToText.from_pretrained, dtype=number).eval()
        tower, normalise = None, str.strip
    if text_tower is not None:
        check_there("text tower", text_tower, TOWERS)
        tower = loaded("text tower", text_tower, TextTower.from_pretrained, dtype=number)
        _moved(tower.model, place, number)
    return Speaker(name or BUNDLED, _moved(model, place, number), processor, tower, normalise)


def encode(speaker: Speaker, images: Sequence[Image.Image], question: str) -> BatchFeature:
    """Inputs for ``generate()``: the processor's chat template, or ``FALLBACK_PROMPT`` where it has none."""
    processor: Any = speaker.processor  # its annotations are narrower than what it takes
    if (placeholder := getattr(processor, "image_token", None)) and placeholder in question:
        raise TrimError(f"the question holds {placeholder!r}, the place of the picture in the prompt: leave it out")
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        prompt = FALLBACK_PROMPT.format(images="<image>\n" * len(images), question=question)
        inputs = processor(images=list(images), text=prompt, return_tensors="pt")
    return inputs.to(speaker.model.device, speaker.model.dtype)  # only floating-point inputs change their dtype


@torch.inference_mode()
def answer(
    speaker: Speaker,
    images: Sequence[Image.Image],
    question: str,
    method: str | Path | Mapping[str, Any] | Method = "visiontrim",
    keep: Amount | None = None,
    *,
    max_new_tokens: int = 64,
) -> Answer:
    """Answer greedily, from one prompt with all ``images``; ``method="none"`` is the plain model.

    Raises :class:`TrimError` for a method, budget, model or question that cannot work.
    """
    question = speaker.normalise(question)
    inputs = encode(speaker, images, question)
    model: Any = speaker.model
    with Clock(model) as clock:
        run = trim(
            model,
            method,
            keep=keep,
            question=question,
            text_tower=speaker.text_tower,
            processor=speaker.processor,
            clock=clock,
        )
        with run:
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    text = speaker.processor.tokenizer.decode(new, skip_special_tokens=True)
    return Answer(text.strip(), clock.seconds, run)


def on_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first accelerator, else the CPU. Raises :class:`TrimError` without one."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()  # "meta" has no numbers
    except Exception as error:  # of which class, the device decides
        raise TrimError(f"there is no device {name!r} ({sentence(error)}): choose cpu, or leave it at auto") from error
    return device


def _moved(model: Any, device: torch.device, dtype: Any) -> Any:
    return model.to(device) if dtype == "auto" else model.to(device, dtype)
