"""How likely a model holds a given answer: for tasks that rank answers instead of generating one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from visiontrim.ask import Speaker
from visiontrim.core.method import Method
from visiontrim.evaluate.asking import encode
from visiontrim.evaluate.items import Item
from visiontrim.run import trim


@torch.inference_mode()
def likelihood(speaker: Speaker, item: Item, answer: str, method: Method) -> tuple[float, bool]:
    """Mean loss (negative log-likelihood, nats a token) of ``answer`` behind the prompt, and whether it is greedy.

    The prompt's vision tokens are compressed as for generating. Methods that read the last rows of the prompt inside
    the decoder see those of the answer.
    """
    model: Any = speaker.model
    inputs = encode(speaker, [item])
    tokenizer: Any = speaker.processor.tokenizer
    ids = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    length = inputs["input_ids"].shape[1]
    for name, value in list(inputs.items()):
        if value.ndim == 2 and value.shape[1] == length:  # the prompt, its mask, and whatever else has its length
            fill = ids if name == "input_ids" else value.new_full(ids.shape, int(name == "attention_mask"))
            inputs[name] = torch.cat([value, fill.to(value.dtype)], dim=1)
    if not item.sources:
        logits = model(**inputs).logits
    else:
        question, tower = speaker.normalise(item.question), speaker.text_tower
        with trim(model, method, question=question, text_tower=tower, processor=speaker.processor):
            logits = model(**inputs).logits
    told = logits[0, length - 1 : -1].float()
    return float(F.cross_entropy(told, ids[0])), bool((told.argmax(-1) == ids[0]).all())
