"""The decoder, a stock Llama: its shape, its start, and a forward that can lose its vision tokens on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from visiontrim.zoo.questions import WORDS
from visiontrim.zoo.training.packing import IGNORED, IMAGE_START, PREFIX, Packed, attention_mask
from visiontrim.zoo.training.symbolic import PAD, WORD_ID, VisionTokens, word_embeddings


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the decoder. Its 8 layers of the default size have 2.4 M weights, 4.7 MB in float16."""

    layers: int = 8
    hidden: int = 192
    heads: int = 3
    mlp: int = 256


def new_decoder(shape: DecoderShape, generator: torch.Generator, vocabulary: Sequence[str] = WORDS) -> LlamaForCausalLM:
    """A decoder that begins with what the token space makes useful: heads that find alike tokens and copy them.

    The rows of W_q = W_k are orthonormal (words attend to tokens that hold them), W_o W_v is a multiple of the
    identity (a head adds what it looks at). Embeddings, which stay fixed, and the head start as ``word_embeddings``.
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.hidden // shape.heads,
            max_position_embeddings=1024,
            pad_token_id=PAD,
            bos_token_id=WORD_ID["<s>"],
            eos_token_id=WORD_ID["</s>"],
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def orthogonal() -> Tensor:
        return torch.linalg.qr(noise(shape.hidden, shape.hidden))[0]

    width = shape.hidden // shape.heads
    embeddings = word_embeddings(shape.hidden, len(vocabulary))
    llama: Any = model.model
    with torch.no_grad():
        for layer in llama.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                linear.weight.copy_(0.02 * noise(*linear.weight.shape))
            attention = layer.self_attn
            match = 0.7 * torch.cat([orthogonal()[:width] for _ in range(shape.heads)])
            copy = 0.4**0.5 * orthogonal()
            for linear, weight in (
                (attention.q_proj, match),
                (attention.k_proj, match),
                (attention.v_proj, copy),
                (attention.o_proj, copy.T),
            ):
                linear.weight.copy_(weight + 0.02 * noise(*weight.shape))
        llama.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.copy_(embeddings)
    llama.embed_tokens.requires_grad_(False)
    return model


@dataclass(frozen=True, eq=False, slots=True)
class Pass:
    """One forward over packed questions."""

    states: list[Float[Tensor, "scenes all hidden"]]
    """The input of every decoder layer, then the output of the last one."""
    logits: Float[Tensor, "scenes text words"]
    mask: Bool[Tensor, "scenes 1 all all"]
    rotary: tuple[Tensor, Tensor]


def forward(model: LlamaForCausalLM, vision: VisionTokens, packed: Packed, seen_by: int | None = None) -> Pass:
    """Run the decoder's own layers over <s> USER:, the vision tokens at the positions of their patches, and the text.

    The vision tokens are there for the first ``seen_by`` layers only, for all of them by default: from then on nothing
    looks at them, which is what dropping them comes to.
    """
    llama: Any = model.model
    scenes, tokens = vision.patch.shape
    start = torch.tensor([WORD_ID[word] for word in PREFIX]).expand(scenes, -1)
    hidden = torch.cat([llama.embed_tokens(start), vision.features, llama.embed_tokens(packed.ids)], dim=1)
    before = torch.arange(IMAGE_START).expand(scenes, -1)
    position = torch.cat([before, IMAGE_START + vision.patch, packed.position], dim=1)
    rotary = llama.rotary_emb(hidden, position_ids=position)
    image_end = IMAGE_START + tokens
    mask = attention_mask(packed.conversation, image_end)
    blind = mask.clone()
    blind[:, :, image_end:, IMAGE_START:image_end] = False

    states = [hidden]
    for number, layer in enumerate(llama.layers):
        seen = seen_by is None or number < seen_by
        hidden = layer(hidden, attention_mask=mask if seen else blind, position_embeddings=rotary)
        states.append(hidden)
    return Pass(states, model.lm_head(llama.norm(hidden[:, image_end:])), mask, rotary)


def answered(logits: Float[Tensor, "scenes text words"], packed: Packed) -> list[list[bool]]:
    """For each question whether every word of its answer and the end is the most likely one: greedy exact match."""
    wrong = (logits.argmax(dim=-1) != packed.labels) & (packed.labels != IGNORED)
    misses = torch.zeros(len(wrong), 1 + max(map(len, packed.questions)), dtype=torch.long)  # first column: padding
    misses.scatter_add_(1, packed.number + 1, wrong.long())
    return [
        [count == 0 for count in row[1 : 1 + len(asked)]]
        for row, asked in zip(misses.tolist(), packed.questions, strict=True)
    ]
