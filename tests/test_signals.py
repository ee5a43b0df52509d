"""What a method sees is what the model computed, read without changing its attention implementation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import tiny
import visiontrim as vt
from tiny import close, llava, prompts
from visiontrim.core.signals import Signal

pytestmark = pytest.mark.usefixtures("no_grad")
every_tower = pytest.mark.parametrize("tower", ["clip", "siglip"])


@dataclass(frozen=True)
class Spy(vt.Random):
    """Notes the views that it is shown."""

    asks: frozenset[Signal] = frozenset()
    seen: list[vt.View] = field(default_factory=list, compare=False)
    name: ClassVar[str] = "spy"

    @property
    def needs(self) -> frozenset[Signal]:
        return self.asks

    def select(self, view: vt.View) -> vt.Keep:
        self.seen.append(view)
        return super().select(view)


def spy(model, inputs, *asks: Signal, layer: int | None = None, **options) -> vt.View:
    step = Spy(keep=6, layer=layer, asks=frozenset(asks))
    with vt.trim(model, step, **options):
        model(**inputs)
    (view,) = step.seen
    return view


@every_tower
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_features_and_attention_of_the_projected_layer(tower, attention):
    inputs, model = prompts((3, "image", 5), (1, "image", 2, "image", 7)), llava(attention, tower=tower)
    special = 1 if tower == "clip" else 0
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    view = spy(model, inputs, "encoder.cls_attention", "encoder.received_attention")
    assert view.features.equal(states[-2][:, special:])
    layer = llava("eager", tower=tower).model.vision_tower.encoder.layers[-2]  # the same weights, and it tells its map
    attention_map = layer.self_attn(layer.layer_norm1(states[-3]), attention_mask=None)[1].mean(1)
    patches = attention_map[:, special:, special:].clone()
    patches.diagonal(dim1=1, dim2=2).zero_()
    close(view.encoder.received_attention, patches.sum(1) / (tiny.PATCHES - 1), 1e-6)
    if special:
        close(view.encoder.cls_attention, attention_map[:, 0, 1:], 1e-6)
    else:
        assert "cls_attention" not in view.encoder
    raster = torch.cartesian_prod(torch.arange(1), torch.arange(tiny.SIDE), torch.arange(tiny.SIDE))
    assert torch.equal(view.coordinates, raster.expand(3, -1, -1))
    assert (view.grid, view.total, view.entered, view.num_layers) == ((1, 4, 4), 16, 16, tiny.LAYERS)


def test_nothing_is_computed_that_was_not_asked_for():
    view = spy(llava(), prompts((3, "image", 5)))
    assert not [*view.encoder, *view.decoder, *view.text]


def test_an_encoder_without_cls_gives_attention_received_instead():
    inputs = prompts((3, "image", 5))
    view = spy(llava(tower="siglip"), inputs, "encoder.cls_attention")
    assert "cls_attention" not in view.encoder
    with vt.trim(llava(tower="siglip"), "visiontrim:variant=lean", keep=6) as run:
        run.model(**inputs)
    top = view.encoder.received_attention[0].topk(6).indices.sort().values
    assert torch.equal(run.trace.images[0].stages[0].index, top)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_language_stage_sees_hidden_states_of_its_layer(attention):
    inputs = prompts((3, "image", 5), (6, "image", 2))
    model = llava(attention)
    view = spy(model, inputs, "decoder.query", "text.question", layer=3)
    hidden: list[Tensor] = []
    handle = model.model.language_model.layers[3].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    model(**inputs)
    handle.remove()
    is_image = inputs["input_ids"] == tiny.IMAGE
    for row in range(2):
        last = int(is_image[row].nonzero().max())
        assert view.features[row].equal(hidden[0][row, is_image[row]])
        assert view.decoder.query[row].equal(hidden[0][row, -1])
        assert view.text.question.tokens[row][view.text.question.mask[row]].equal(hidden[0][row, last + 1 :])


def test_text_is_the_last_position_when_the_prompt_ends_with_the_image():
    inputs = prompts((3, "image"))
    view = spy(llava(), inputs, "decoder.query", "text.question", layer=1)
    assert view.text.question.mask.sum() == 1
    assert view.text.question.tokens[0][view.text.question.mask[0]].equal(view.decoder.query)
