"""What LUVC's merging and its spectrum pruning take, and what merging saves in the encoder.

    python benchmarks/luvc.py

What it answers is a matter of `visiontrim eval --ablation luvc-language,luvc-vision,luvc`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import visiontrim as vt
from visiontrim.core.budget import mean_per_layer
from visiontrim.methods.schedule import counts

COST = Path(__file__).parent / "results" / "luvc-cost.json"


def work() -> None:
    """Print how much less vision tokens times layers the default schedule does."""
    for layers in (28, 32, 36):
        method = vt.LUVC()
        plan = method.plan(layers)
        left = counts(plan, layers, 576, None)
        language = 576 / mean_per_layer(576, [layer for layer, _ in plan], left, layers)
        print(f"{layers} layers: {language:.2f} x less with SPU alone, {language / method.merged:.2f} x with OIM")


class Spent:
    """Processor seconds of this thread under a name: shared machines make wall time useless. Serves as a clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - start


@torch.inference_mode()
def spu_cost(tokens: int, repeats: int, layers: int = 32) -> dict:
    """SPU's three stages beside the prefill of a 7B-shaped stack: 32 times one layer of width 4096, float32."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)
    config._attn_implementation = "sdpa"
    layer, rotary = LlamaDecoderLayer(config, 0).eval(), LlamaRotaryEmbedding(config)
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)
    timed = min(tokens, 576)
    hidden = torch.randn(1, timed, 4096)
    places = rotary(hidden, torch.arange(timed)[None])
    scale = (weights * tokens + 2 * 4096 * tokens**2) / (weights * timed + 2 * 4096 * timed**2)  # 1 where it was timed
    method, side = vt.LUVC(stages="language"), math.isqrt(tokens)
    stages = zip(method.steps_for(vt.Layers(0, layers)), ((0, 1.0), *method.plan(layers)), strict=False)
    views = []
    for step, (_, share) in stages:
        features = torch.randn(1, round(share * tokens), 4096)
        place = torch.zeros(*features.shape[:2], 3).long()
        normed = vt.DecoderSignals(next_normed=features)
        views.append((step, vt.View(features, place, (1, side, side), tokens, layers, decoder=normed)))
    ratios = []
    for _ in range(repeats + 1):
        spent = Spent()
        with spent("layer"):
            layer(hidden, position_embeddings=places)
        with spent("spu"):
            for step, view in views:
                step.select(view)
        ratios.append(spent.seconds["spu"] / (layers * scale * spent.seconds["layer"]))
    share = statistics.median(ratios[1:])  # the first one warms up
    how = "timed" if tokens == timed else f"scaled by FLOPs from {timed} tokens"
    print(f"SPU, {tokens:6} tokens: {share:.3%} of the prefill of {layers} layers ({how})", flush=True)
    return {"tokens": tokens, "share_of_prefill": share, "all": ratios[1:], "layer": how}


@torch.inference_mode()
def oim_cost(repeats: int) -> dict[str, dict]:
    """OIM in the encoder of LLaVA-1.5 (CLIP ViT-L/14 at 336), random weights, float32: ratios to the plain encoder."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, image_seq_length=576)
    model = LlavaForConditionalGeneration(config).eval()
    inputs = {
        "input_ids": torch.tensor([[1] + [4] * 576 + [5] * 4]),
        "pixel_values": torch.randn(1, 3, 336, 336),
    }
    tower = model.model.vision_tower
    methods = ("none", "luvc:stages=vision", "luvc:stages=vision,calls=2", "tome:keep=288")
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    flops: dict[str, int] = {}
    encode = tower.forward
    for _, method in itertools.product(range(repeats), methods):
        spent = Spent()
        tower.forward = lambda *args, spent=spent, **kwargs: _timed(spent, encode, *args, **kwargs)
        with vt.trim(model, method, clock=spent), FlopCounterMode(display=False) as counter:
            model(**inputs)
        runs[method].append(spent.seconds)
        counts = counter.get_flop_counts()
        flops[method] = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith("vision_tower"))
    del tower.forward
    result = {}
    for method in methods[1:]:
        pairs = list(zip(runs[method], runs["none"], strict=True))
        result[method] = {
            "flops": flops[method] / flops["none"],
            "time": statistics.median(ours["encoder"] / plain["encoder"] for ours, plain in pairs),
            "method": statistics.median(ours.get("method", 0.0) / plain["encoder"] for ours, plain in pairs),
        }
        print(method, {name: f"{value:.2%}" for name, value in result[method].items()}, flush=True)
    return result


def _timed(spent: Spent, function: Callable, *args, **kwargs):
    with spent("encoder"):
        return function(*args, **kwargs)


def cost(repeats: int) -> None:
    """Time SPU and OIM on one thread, and write the ratios down."""
    torch.set_num_threads(1)
    result = {
        "unit": "processor time of one thread on a CPU, float32, as a ratio; median of interleaved repeats",
        "repeats": repeats,
        "spu": [spu_cost(576, repeats), spu_cost(16384, repeats)],
        "oim": oim_cost(repeats),
    }
    COST.parent.mkdir(exist_ok=True)
    COST.write_text(json.dumps(result, indent=2) + "\n")
    print(COST)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of every timing")
    work()
    cost(parser.parse_args().repeats)
