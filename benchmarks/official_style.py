"""VisionZip and FastV hooked into transformers 4.37 as their authors hook them, on a random slice of LLaVA-1.5-7B.

    .peers/bin/python benchmarks/official_style.py        # benchmarks/peers.py makes that environment and calls this

Written from the papers and from descriptions of what the released code asks a model for; no line of it is theirs.
VisionZip lets the whole vision tower return attention maps and all hidden states and slices them with masks; FastV
lets the decoder layer before its cut return the map of all pairs, for one row of it. It needs torch and transformers
4.37 and knows nothing of this package.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask
from transformers.models.llama.modeling_llama import LlamaAttention
from turns import Way, compare, deepen

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()


@dataclass(frozen=True)
class Task:
    """What is asked in both environments."""

    vision: dict[str, Any]
    text: dict[str, Any]
    words: int
    """Text tokens of the prompt, the picture in their middle."""
    keep: int
    layer: int
    """Decoder layer before which FastV cuts."""
    rounds: int

    @property
    def tokens(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


class Llava(torch.nn.Module):
    """LLaVA as its authors put it together: a tower, a projector, and a language model that is given embeddings.

    Random weights. The language model attends with sdpa; the encoder of this release knows eager attention alone.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.tower: Any = CLIPVisionModel(CLIPVisionConfig(**task.vision))
        width, wide = task.vision["hidden_size"], task.text["hidden_size"]
        self.projector = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, wide))
        text = task.text | {"num_hidden_layers": 1}
        config = LlamaConfig(**text, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        config._attn_implementation = "sdpa"
        self.language: Any = LlamaForCausalLM(config)
        deepen(self.language.model.layers, task.text["num_hidden_layers"])

    def embeddings(self, words: Tensor, pixels: Tensor, place: int) -> Tensor:
        """[1, tokens, width] of a prompt with the picture at ``place``."""
        features = self.projector(self.select(self.tower(pixels, output_hidden_states=True)))
        before, after = (self.language.model.embed_tokens(part) for part in (words[:, :place], words[:, place:]))
        return torch.cat([before, features, after], 1)

    def select(self, seen: Any) -> Tensor:
        return seen.hidden_states[-2][:, 1:]

    @torch.no_grad()
    def answer(self, task: Task) -> Any:
        """The cache after the first token."""
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(10, task.text["vocab_size"], (1, task.words), generator=generator)
        side = task.vision["image_size"]
        pixels = torch.randn(1, 3, side, side, generator=generator)
        embeds = self.embeddings(words, pixels, task.words // 2)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
        return self.language.generate(inputs_embeds=embeds, attention_mask=mask, **options).past_key_values


class ZippedTower(nn.Module):
    """Stands for the vision tower; returns ``keep`` tokens, [CLS] among them."""

    def __init__(self, tower: Any, keep: int, layer: int = -2) -> None:
        super().__init__()
        self.tower, self.layer = tower, layer
        self.contextual = keep * 5 // 32
        self.dominant = keep - self.contextual
        attention = tower.vision_model.encoder.layers[layer].self_attn
        self.heads = attention.num_heads
        self.keys: Tensor | None = None
        self.hook = attention.k_proj.register_forward_hook(self._remember)

    def _remember(self, module: Any, args: Any, output: Tensor) -> None:
        self.keys = output

    def forward(self, pixels: Tensor, output_hidden_states: bool = True) -> Tensor:
        seen = self.tower(pixels, output_hidden_states=True, output_attentions=True)
        hidden, attention = seen.hidden_states[self.layer], seen.attentions[self.layer]
        batch, tokens, width = hidden.shape
        assert self.keys is not None
        metric = self.keys.view(batch, tokens, self.heads, -1).mean(2)
        ranked = attention[:, :, 0, 1:].sum(1).topk(self.dominant - 1, dim=1).indices + 1
        first = torch.zeros(batch, 1, dtype=ranked.dtype)
        others = torch.ones(batch, tokens, dtype=torch.bool)
        others.scatter_(1, torch.cat([first, ranked], 1), False)
        dominant = hidden.masked_select(~others[..., None]).view(batch, self.dominant, width)

        left = tokens - self.dominant
        rest = hidden.masked_select(others[..., None]).view(batch, left, width)
        metric = metric[others].view(batch, left, -1)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        target = torch.arange(0, left, max(1, left // self.contextual))[: self.contextual]
        moves = torch.ones(left, dtype=torch.bool)
        moves[target] = False
        nearest = (metric[:, moves] @ metric[:, target].transpose(1, 2)).argmax(-1)
        members = nn.functional.one_hot(nearest, len(target)).to(hidden.dtype)
        carried = members.transpose(1, 2) @ rest[:, moves] / members.sum(1).clamp(min=1)[..., None]
        return torch.cat([dominant, rest[:, target] + carried], 1)


@contextlib.contextmanager
def visionzip(model: Llava, task: Task) -> Iterator[None]:
    tower = model.tower
    model.tower, model.select = ZippedTower(tower, task.keep), lambda kept: kept
    try:
        yield
    finally:
        model.tower.hook.remove()
        model.tower = tower
        del model.select


@contextlib.contextmanager
def eager(model: Llava) -> Iterator[None]:
    """All of the language model with attention maps."""
    language = model.language.model
    for layer in language.layers:
        layer.self_attn.forward = functools.partial(LlamaAttention.forward, layer.self_attn)
    language._use_sdpa = False
    try:
        yield
    finally:
        for layer in language.layers:
            del layer.self_attn.forward
        language._use_sdpa = True


class FastV:
    """Where images begin is told, as in the released code, and one row is a batch."""

    def __init__(self, task: Task) -> None:
        self.first, self.count, self.keep, self.cut = task.words // 2, task.tokens, task.keep, task.layer
        self.length = 0
        self.attention: Tensor = torch.empty(0)
        self.places: Tensor = torch.empty(0)
        self.mask: Tensor | None = None

    @contextlib.contextmanager
    def on(self, model: Llava) -> Iterator[None]:
        hooks = []
        for number, layer in enumerate(model.language.model.layers):
            if number == self.cut - 1:
                hooks.append(layer.register_forward_pre_hook(self._ask, with_kwargs=True))
                hooks.append(layer.register_forward_hook(self._answered))
            elif number >= self.cut:
                hooks.append(layer.register_forward_pre_hook(self._cut(number), with_kwargs=True))
                rotary = layer.self_attn.rotary_emb
                hooks.append(rotary.register_forward_pre_hook(self._whole_length, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _ask(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        (hidden,) = args
        self.length = hidden.shape[1]
        mask = kwargs["attention_mask"]
        if mask is None:  # what sdpa does without, an attention map needs
            mask = _prepare_4d_causal_attention_mask(None, hidden.shape[:2], hidden, 0)
        return args, kwargs | {"output_attentions": True, "attention_mask": mask}

    def _answered(self, module: Any, args: Any, output: tuple) -> tuple:
        hidden, self.attention, cache = output
        return hidden, cache

    def _cut(self, number: int) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            (hidden,), mask = args, kwargs["attention_mask"]
            if number == self.cut:
                score = self.attention.mean(1)[0, -1, self.first : self.first + self.count]
                top = score.topk(self.keep).indices + self.first
                text = torch.arange(self.length, device=hidden.device)
                text = torch.cat([text[: self.first], text[self.first + self.count :]])
                self.places = torch.cat([text, top]).sort().values
                self.attention = torch.empty(0)
                hidden = hidden[:, self.places]
                self.mask = None if mask is None else mask[:, :, : len(self.places), : len(self.places)]
            return (hidden,), kwargs | {"attention_mask": self.mask, "position_ids": self.places[None]}

        return before

    def _whole_length(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"seq_len": self.length}  # positions go on to the end of the whole prompt


def ways(model: Llava, task: Task) -> list[Way]:
    def answered(*contexts: Callable[[], Any]) -> Any:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return model.answer(task)

    def cut() -> Any:
        return FastV(task).on(model)

    maps, zipped = functools.partial(eager, model), functools.partial(visionzip, model, task)
    return [
        Way("plain", answered),
        Way("VisionZip", functools.partial(answered, zipped)),
        Way("FastV, a map in one layer", functools.partial(answered, cut)),
        Way("plain, eager", functools.partial(answered, maps), "plain, eager", timed=False),
        Way("FastV, eager", functools.partial(answered, maps, cut), "plain, eager", timed=False),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", type=json.loads, help="the fields of Task, as JSON")
    task = Task(**parser.parse_args().task)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = compare(ways(Llava(task).eval(), task), task.rounds)
    told = {"transformers": transformers.__version__, "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps(told | {"rows": rows}))


if __name__ == "__main__":
    main()
