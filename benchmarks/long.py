"""Long inputs: the largest tensor that a run makes beside those of the plain model.

    python benchmarks/long.py --tokens 16384

A Qwen2.5-VL with random weights and narrow layers gets one image of so many vision tokens (four patches each). Counted
are the elements of the largest tensor that any operation returned. No attention map may appear: it would be patches
squared. Elements, not seconds, so the numbers do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import visiontrim as vt

IMAGE = 4


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation returns, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and not func.is_view:
                # an expanded tensor holds fewer elements than it has
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


def model() -> Qwen2_5_VLForConditionalGeneration:
    """Depth 2 on both sides; window attention in the encoder's first layer, full attention in its second."""
    torch.manual_seed(0)
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_heads": 4}
    vision |= {"fullatt_block_indexes": [1]}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 40000}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
    tokens = {"image_token_id": IMAGE, "video_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def prompt(tokens: int) -> dict[str, torch.Tensor]:
    """One image of about so many vision tokens on a square, and a few words."""
    side = 2 * round(math.sqrt(tokens))
    ids = torch.tensor([[1, 6, *[IMAGE] * (side * side // 4), 7, 20, 21, 22]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(side * side, 14 * 14 * 3 * 2, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


@torch.inference_mode()
def largest(tokens: int, keep: int) -> dict[str, int]:
    """Elements of the largest tensor of the plain model and of VisionTrim at ``keep``, and of an attention map."""
    network, inputs = model(), prompt(tokens)
    with Largest() as plain:
        network(**inputs, logits_to_keep=1)
    with vt.trim(network, "visiontrim", keep=keep) as run, Largest() as trimmed:
        network(**inputs, logits_to_keep=1)
    assert run.report.kept_tokens == keep
    patches = len(inputs["pixel_values"])
    return {
        "vision_tokens": patches // 4,
        "plain": plain.elements,
        "visiontrim": trimmed.elements,
        "attention_map": patches**2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="vision tokens of the image")
    parser.add_argument("--keep", type=int, default=64)
    options = parser.parse_args()
    print(json.dumps(largest(options.tokens, options.keep)))


if __name__ == "__main__":
    main()
