"""The half that runs in the front end: fewer placeholders, and what was asked for as fields of each image.

All that an answer depends on is put among the processor's options before vLLM looks at an image, and so into its
identity: the caches of the processor, of the encoder and of prefixes then tell questions, methods and budgets apart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.transformers.multimodal import MultiModalProcessor, _get_embed_token_id
from vllm.multimodal.inputs import MultiModalFieldConfig

from visiontrim.core.errors import TrimError
from visiontrim_vllm.configuring import SEVERAL
from visiontrim_vllm.options import KEY, Asked, Options

ASKED, COUNTS = "visiontrim_asked", "visiontrim_counts"
"""Fields of an image: what is asked for, as bytes; and its tokens, how many stay, over how many positions it goes."""


class BadRequestError(VLLMValidationError, TrimError):
    """A request that cannot be served. Of errors that are not its own vLLM's asynchronous engine tells no reason."""


class Trimming(MultiModalProcessor):
    """vLLM's processor for the models of transformers, with fewer placeholders for each image."""

    @functools.cached_property
    def options(self) -> Options:
        return Options.of(self.info.get_hf_config())

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        try:
            return super().apply(self._with_asked(inputs), timing_ctx)
        except TrimError as error:
            raise BadRequestError(str(error)) from error

    def _with_asked(self, inputs: Any) -> Any:
        given = inputs.hf_processor_mm_kwargs
        if self.options.method is not None and inputs.mm_data_items.get("image"):
            config, request = self.info.get_hf_config(), given.get(KEY) or {}
            asked = self.options.asked(request, getattr(config, SEVERAL), self._question(inputs.prompt))
            return dataclasses.replace(inputs, hf_processor_mm_kwargs={**given, KEY: asked.to_json()})
        if KEY in given:
            raise TrimError(f"{KEY} is asked for, but this server is not configured for it, or there is no image")
        return inputs

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        rest = {key: value for key, value in hf_kwargs.items() if key != KEY}
        data = super()._apply_hf_processor_main(mm_items, rest)
        text = hf_kwargs.get(KEY)
        if not isinstance(text, str) or "image_replacement_ids" not in data:
            return data
        asked, left, counts = Asked.of(text), [], []
        for ids in data["image_replacement_ids"].split(data["image_replacement_sizes"].tolist()):
            places = (ids == _get_embed_token_id(ids)).nonzero()[:, 0]
            total, kept = len(places), asked.count(len(places))
            if kept < total and int(places[-1] - places[0]) != total - 1:
                raise TrimError(
                    "the images of this model have marks between their tokens, of which it is not known which ones "
                    "stay: serve it without the option, or use vt.trim()"
                )
            stays = torch.ones_like(ids, dtype=torch.bool)
            stays[places[kept:]] = False
            left.append(ids[stays])
            counts.append([total, kept, kept if asked.compact else total])
        data["image_replacement_ids"] = torch.cat(left)
        data["image_replacement_sizes"] = torch.tensor([len(ids) for ids in left])
        data[COUNTS] = torch.tensor(counts)
        data[ASKED] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).repeat(len(left), 1)
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        # vLLM's function asks which part of the processor made each field, and none made these
        ours = {key: hf_inputs.pop(key) for key in (ASKED, COUNTS) if key in hf_inputs}
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        hf_inputs.update(ours)
        return fields | {key: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for key in ours}

    def _question(self, prompt: list[int]) -> str:
        """What stands behind the last image, without what the chat template adds for the answer."""
        tokenizer, mark = self.info.get_tokenizer(), self._image_token
        last = max((place for place, token in enumerate(prompt) if token == mark), default=-1)
        text = tokenizer.decode(prompt[last + 1 :], skip_special_tokens=True).strip()
        rest = [token for token in prompt if token != mark]
        if last == len(prompt) - 1 and tokenizer.decode(rest, skip_special_tokens=True).strip():
            # vLLM's own dummies, which are nothing but images, may end so
            raise TrimError("the prompt ends in an image: put the question behind it")
        return text.removesuffix(self._opening).strip()

    @functools.cached_property
    def _image_token(self) -> int:
        config = self.info.get_hf_config()
        return config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index

    @functools.cached_property
    def _opening(self) -> str:
        """What the chat template adds for the answer, such as "ASSISTANT:"; "" without a template."""
        tokenizer, turn = self.info.get_tokenizer(), [{"role": "user", "content": "x"}]
        if not getattr(tokenizer, "chat_template", None):
            return ""
        with_, without = (
            tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=flag) for flag in (True, False)
        )
        ids = tokenizer.encode(with_.removeprefix(without), add_special_tokens=False)
        return tokenizer.decode(ids, skip_special_tokens=True).strip()
