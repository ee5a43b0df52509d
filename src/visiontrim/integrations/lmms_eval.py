"""A model for lmms-eval (0.7), found through its entry-point group ``lmms_eval.models``::

    lmms-eval --model visiontrim --tasks gqa,pope \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=visiontrim,keep=64

``method`` is a name, or a recipe file (commas of options would end the argument); ``method=none`` is the plain model.
The whole text of a request, with whatever the task adds to the question, guides methods that read the question.
Without ``pretrained`` the small model of this package answers. A video, which tasks give as a path, is shown as so many
``frames``, each a picture. Tasks that rank answers by likelihood get the mean loss of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from PIL import Image
from tqdm import tqdm

from visiontrim.ask import load
from visiontrim.core.errors import TrimError
from visiontrim.core.registry import load_method
from visiontrim.evaluate.asking import encode
from visiontrim.evaluate.frames import Frames
from visiontrim.evaluate.items import Item, Source
from visiontrim.evaluate.likelihood import likelihood
from visiontrim.run import trim

MANIFEST = ModelManifest("visiontrim", simple_class_path=f"{__name__}.VisionTrimModel")
GREEDY_TOKENS = 1024
"""Longest answer where a task does not say."""
FRAMES = 8
"""Of a video."""


class VisionTrimModel(lmms):
    """Generates with fewer vision tokens; everything else is a stock Hugging Face model."""

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        method: str = "visiontrim",
        keep: float | None = None,
        text_tower: str | None = None,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        frames: int | str = FRAMES,
    ) -> None:
        """``keep`` is a number of tokens (an int) or a fraction. Raises :class:`TrimError` for what cannot work."""
        super().__init__()
        # lmms-eval gives 64 as "64", 64 or 64.0, depending on the version
        amount = None if keep is None else float(keep)
        whole = amount is not None and amount > 1
        budget = {} if amount is None else {"keep": int(amount) if whole else amount}
        self._method = load_method(method, **budget)
        self._speaker = load(pretrained, text_tower=text_tower, device=device or "auto", dtype=dtype)
        self._batch, self._frames = int(batch_size), int(frames)

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc=str(self._method)) as bar:
            for numbers, items, options in self._batches(requests):
                answers |= zip(numbers, self._generate(items, options), strict=True)
                bar.update(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def _batches(self, requests: list[Any]) -> Iterator[tuple[list[int], list[Item], dict[str, Any]]]:
        """Requests with equal generation options, ``batch_size`` at a time."""
        order = sorted(range(len(requests)), key=lambda number: repr(requests[number].args[1]))
        for _, same in itertools.groupby(order, key=lambda number: repr(requests[number].args[1])):
            rest = list(same)
            while rest:
                numbers, rest = rest[: self._batch], rest[self._batch :]
                yield numbers, [self._item(requests[n].args) for n in numbers], dict(requests[numbers[0]].args[1])

    def _item(self, arguments: tuple) -> Item:
        context, _, doc_to_visual, doc_id, task, split = arguments
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        sources = tuple(self._source(visual, task) for visual in visuals)
        return Item(str(doc_id), str(doc_id), sources, context.replace("<image>", "").strip(), (), task)

    def _source(self, visual: Any, task: str) -> Image.Image | Source:
        if isinstance(visual, Image.Image):
            return visual.convert("RGB")
        if isinstance(visual, str | Path):
            return Frames(Path(visual), self._frames)
        raise TrimError(f"task {task!r} shows a {type(visual).__name__}, but only pictures and videos are supported")

    @torch.inference_mode()
    def _generate(self, items: list[Item], options: dict[str, Any]) -> list[str]:
        speaker, stops = self._speaker, options.get("until") or []
        model: Any = speaker.model
        inputs = encode(speaker, items)
        warmth = options.get("temperature") or 0.0
        sampling = {"do_sample": True, "temperature": warmth} if warmth > 0 else {"do_sample": False}
        questions = [speaker.normalise(item.question) for item in items]
        tower, processor = speaker.text_tower, speaker.processor
        with trim(model, self._method, question=questions, text_tower=tower, processor=processor):
            output = model.generate(
                **inputs,
                **sampling,
                num_beams=options.get("num_beams") or 1,
                max_new_tokens=options.get("max_new_tokens") or GREEDY_TOKENS,
            )
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for stop in filter(str.strip, [stops] if isinstance(stops, str) else stops):
            texts = [text.split(stop)[0] for text in texts]
        return [text.strip() for text in texts]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise TrimError("tasks of several rounds are not supported: choose tasks that generate once")

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Mean loss of each answer, which lmms-eval ranks from the lowest on, and whether it is the greedy one.

        Each pair in a wrapping that lmms-eval takes off: of a bare pair 0.7.3 makes a text, which no task can score.
        """
        found = []
        for request in tqdm(requests, desc=str(self._method)):
            context, target, doc_to_visual, doc_id, task, split = request.args
            answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            item = self._item((context, None, doc_to_visual, doc_id, task, split))
            found.append(GenerationResult(likelihood(self._speaker, item, answer, self._method)))
        return found
