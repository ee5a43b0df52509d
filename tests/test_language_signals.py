"""What a step between decoder layers sees is what the model computed: against the eager model's own attention maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tiny
import visiontrim as vt
from releases import CACHE
from tiny import both_attentions, close, every_batch, generate, llava, prompts
from visiontrim.core.signals import DecoderSignals, Signal

pytestmark = pytest.mark.usefixtures("no_grad")

EVERYTHING: frozenset[Signal] = frozenset({f"decoder.{name}" for name in DecoderSignals.names} | {"text.question"})
LAYER = 2


@dataclass(frozen=True)
class Spy(vt.Random):
    """Notes the views that it is shown."""

    asks: frozenset[Signal] = EVERYTHING
    seen: list[vt.View] = field(default_factory=list, compare=False)
    name: ClassVar[str] = "spy"

    @property
    def needs(self) -> frozenset[Signal]:
        return self.asks

    def select(self, view: vt.View) -> vt.Keep:
        self.seen.append(view)
        return super().select(view)


class Reference:
    """What the eager model with the same weights computes on the whole prompt, nothing removed."""

    def __init__(self, inputs: dict[str, Tensor], **options) -> None:
        model = llava("eager")
        self.norm = model.model.language_model.norm
        self.hidden: list[Tensor] = []
        """What enters each decoder layer."""
        self.rotary: list[Tensor] = []

        def note(module, args, kwargs):
            self.hidden.append(args[0])
            self.rotary.append(torch.cat(kwargs["position_embeddings"], -1).expand(len(args[0]), -1, -1))

        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(note, with_kwargs=True)
        self.attention = model(**inputs, output_attentions=True, **options).attentions


def images_of(inputs: dict[str, Tensor]) -> list[tuple[int, Tensor]]:
    """(row, columns) of every image of the batch."""
    is_image = inputs["input_ids"] == tiny.IMAGE
    return [
        (row, block)
        for row in range(len(is_image))
        for block in is_image[row].nonzero()[:, 0].split(tiny.PATCHES)
        if len(block)
    ]


def text_after(inputs: dict[str, Tensor], row: int, block: Tensor) -> Tensor:
    columns = torch.arange(inputs["input_ids"].shape[1])
    return columns[(columns > block[-1]) & (inputs["input_ids"][row] != tiny.IMAGE)]


def of_text(view: vt.View, image: int, values: Tensor) -> Tensor:
    return values[view.text.question.mask[image]]


@both_attentions
@every_batch
def test_signals_are_those_of_the_eager_model(rows, attention):
    inputs, spy, model = prompts(*rows), Spy(keep=6, layer=LAYER), llava(attention)
    with vt.trim(model, spy):
        model(**inputs)
    (view,) = spy.seen
    seen = Reference(inputs)
    for image, (row, block) in enumerate(images_of(inputs)):
        text = text_after(inputs, row, block)
        before, after = seen.attention[LAYER - 1], seen.attention[LAYER]
        close(view.decoder.last_attention[image], before[row, :, -1, block].mean(0), 1e-6)
        close(view.decoder.next_attention[image], after[row, :, -1, block].mean(0), 1e-6)
        rows_of_text = view.decoder.text_attention[image][:, view.text.question.mask[image]]
        close(rows_of_text, before[row][:, text][:, :, block], 1e-6)
        close(view.decoder.previous[image], seen.hidden[LAYER - 1][row, block])
        close(view.features[image], seen.hidden[LAYER][row, block])
        close(view.decoder.embeddings.tokens[image], seen.hidden[0][row, block])
        close(of_text(view, image, view.decoder.embeddings.text[image]), seen.hidden[0][row, text])
        norm = seen.norm(seen.hidden[LAYER][row])
        close(view.decoder.normed.tokens[image], norm[block])
        close(of_text(view, image, view.decoder.normed.text[image]), norm[text])
        rotary = seen.rotary[LAYER][row]
        close(view.decoder.rotary.tokens[image], rotary[block])
        close(of_text(view, image, view.decoder.rotary.text[image]), rotary[text])


@both_attentions
@every_batch
def test_queries_and_keys_give_the_attention_of_the_layer(rows, attention):
    inputs, spy, model = prompts(*rows), Spy(keep=6, layer=LAYER), llava(attention)
    with vt.trim(model, spy):
        model(**inputs)
    (view,), seen = spy.seen, Reference(inputs)
    heads = view.decoder.queries.tokens.shape[1] // view.decoder.keys.tokens.shape[1]
    for image, (row, block) in enumerate(images_of(inputs)):
        text = text_after(inputs, row, block)
        query = of_text(view, image, view.decoder.queries.text[image].transpose(0, 1)).transpose(0, 1)
        logits = query @ view.decoder.keys.tokens[image].repeat_interleave(heads, 0).mT
        # a softmax is known up to a constant of each row
        wanted = seen.attention[LAYER - 1][row][:, text][:, :, block].log()
        close(logits - logits[..., :1], wanted - wanted[..., :1], 1e-4)
        own = of_text(view, image, view.decoder.keys.text[image].transpose(0, 1)).transpose(0, 1)
        last = query[:, -1:] @ own.repeat_interleave(heads, 0).mT
        wanted = seen.attention[LAYER - 1][row][:, -1:, text].log()
        close(last - last[..., :1], wanted - wanted[..., :1], 1e-4)


@every_batch
def test_after_an_earlier_stage_only_survivors_are_seen(rows):
    inputs, first, second = prompts(*rows), vt.Random(keep=9, layer=1), Spy(keep=4, layer=3)
    model = llava("eager")
    with vt.trim(model, first | second) as run:
        model(**inputs)
    hidden = tiny.hidden_places(inputs, run.trace)
    reference = llava("eager")
    with tiny.Masked(reference, inputs["attention_mask"], {1: hidden[1]}):
        maps = reference(**inputs, output_attentions=True).attentions
    (view,) = second.seen
    for image, (row, block) in enumerate(images_of(inputs)):
        left = block[run.trace.images[image].stages[0].index]
        text = text_after(inputs, row, block)
        close(view.decoder.last_attention[image], maps[2][row, :, -1, left].mean(0), 1e-5)
        close(view.decoder.next_attention[image], maps[3][row, :, -1, left].mean(0), 1e-5)
        ours = view.decoder.text_attention[image][:, view.text.question.mask[image]]
        close(ours, maps[2][row][:, text][:, :, left], 1e-5)
        assert view.decoder.embeddings.tokens.shape[1] == tiny.PATCHES, "the embeddings are those of all that entered"
        assert int(view.text.question.mask[image].sum()) == len(text)


def test_after_the_vision_stage_the_embeddings_are_those_that_entered():
    inputs, spy, model = prompts(*tiny.ROWS["batch"]), Spy(keep=4, layer=3), llava()
    entered: list[Tensor] = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with vt.trim(model, vt.Random(keep=9) | vt.Random(keep=6, layer=1) | spy) as run:
        model(**inputs)
    handle.remove()
    (view,) = spy.seen
    assert view.decoder.embeddings.tokens.shape[1] == 9
    assert torch.isfinite(view.decoder.embeddings.tokens).all()
    for image in range(len(view.features)):
        states = entered[0][run.trace.images[image].sample]
        for side in (view.decoder.embeddings.tokens[image], of_text(view, image, view.decoder.embeddings.text[image])):
            assert (side[:, None] == states[None]).all(-1).any(1).all(), "each is one of those that entered"


@both_attentions
def test_second_turn_with_an_image_sees_the_first(attention):
    model, first, second = (
        llava(attention),
        prompts((3, "image", 5), (6, "image")),
        prompts((2, "image", 4), ("image", 6)),
    )
    cache, spy = DynamicCache(config=model.config.text_config), Spy(keep=1.0, layer=LAYER)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    past = first["input_ids"].shape[1]
    model(**first, position_ids=places[:, :past], **{CACHE: cache})
    with vt.trim(model, spy):
        turn = {"input_ids": second["input_ids"], "pixel_values": second["pixel_values"]}
        model(**turn, attention_mask=mask, position_ids=places[:, past:], **{CACHE: cache})
    order = [first["pixel_values"][0], second["pixel_values"][0], first["pixel_values"][1], second["pixel_values"][1]]
    whole = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "attention_mask": mask,
        "pixel_values": torch.stack(order),
    }
    seen = Reference(whole, position_ids=places, use_cache=False)
    (view,) = spy.seen
    for image, (row, block) in enumerate(images_of(second)):
        text = text_after(second, row, block) + past
        close(view.decoder.last_attention[image], seen.attention[1][row, :, -1, block + past].mean(0), 1e-6)
        close(view.decoder.next_attention[image], seen.attention[2][row, :, -1, block + past].mean(0), 1e-6)
        ours = view.decoder.text_attention[image][:, view.text.question.mask[image]]
        close(ours, seen.attention[1][row][:, text][:, :, block + past], 1e-6)
    assert all(layer.keys.shape[-2] == mask.shape[1] for layer in cache.layers), "nothing was cached twice"


@both_attentions
def test_second_turn_after_removal_sees_what_the_cache_holds(attention):
    """Row of the last position over a cache from which tokens are missing: those of a masked conversation."""
    model, first, second = llava(attention), prompts((3, "image", 5)), prompts((2, "image", 4))
    cache, spy = DynamicCache(config=model.config.text_config), Spy(keep=4, layer=LAYER)
    whole = torch.cat([first["input_ids"], second["input_ids"]], 1)
    past, traces = first["input_ids"].shape[1], []
    with vt.trim(model, vt.Random(keep=5, layer=1) | spy) as run:
        model(**first, **{CACHE: cache})
        traces.append(run.trace)
        model(input_ids=second["input_ids"], pixel_values=second["pixel_values"], **{CACHE: cache})
        traces.append(run.trace)
    early, late = tiny.hidden_places(first, traces[0]), tiny.hidden_places(second, traces[1])
    gone = {layer: torch.cat([early[layer], late[layer]], 1) for layer in early}
    reference = llava("eager")
    with tiny.Masked(reference, torch.ones_like(whole), gone):
        pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
        maps = reference(input_ids=whole, pixel_values=pixels, output_attentions=True, use_cache=False).attentions
    (_, view), ((_, block),) = spy.seen, images_of(second)
    left = block[traces[1].images[0].stages[0].index] + past
    close(view.decoder.last_attention[0], maps[1][0, :, -1, left].mean(0), 1e-5)
    # the layer to come, asked before the second turn's removal there, sees what the first turn left there
    shorter = {1: gone[1], 2: torch.cat([early[2], torch.zeros_like(late[2])], 1)}
    with tiny.Masked(reference, torch.ones_like(whole), shorter):
        maps = reference(input_ids=whole, pixel_values=pixels, output_attentions=True, use_cache=False).attentions
    close(view.decoder.next_attention[0], maps[2][0, :, -1, left].mean(0), 1e-5)


def test_beams_see_what_their_sample_sees():
    inputs, model = prompts(*tiny.ROWS["batch"]), llava()
    plain, beams = Spy(keep=6, layer=LAYER), Spy(keep=6, layer=LAYER)
    with vt.trim(model, plain):
        generate(model, inputs, max_new_tokens=2)
    with vt.trim(model, beams):
        generate(model, inputs, max_new_tokens=2, num_beams=2)
    (one,), (two,) = plain.seen, beams.seen
    order = [0, 0, 1, 2, 1, 2]  # copies of a row stand side by side, each with all images of the row
    for name in ("last_attention", "next_attention", "text_attention", "previous"):
        close(two.decoder[name], one.decoder[name][order], 1e-6)
    close(two.decoder.embeddings.tokens, one.decoder.embeddings.tokens[order], 1e-6)


def test_the_rows_are_those_of_the_prompt_without_guesses_of_assisted_decoding():
    inputs, model = prompts((3, "image", 9)), llava()
    inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -8:-4]
    spy = Spy(keep=6, layer=LAYER)
    with vt.trim(model, spy):
        generate(model, inputs, max_new_tokens=3)
        model.generate(**inputs, max_new_tokens=3, do_sample=False, prompt_lookup_num_tokens=3)
    greedy, assisted = spy.seen
    close(assisted.decoder.last_attention, greedy.decoder.last_attention, 1e-6)
    close(assisted.decoder.next_attention, greedy.decoder.next_attention, 1e-6)


@both_attentions
@every_batch
def test_listening_changes_nothing(attention, rows):
    inputs, model = prompts(*rows), llava(attention)
    plain = generate(model, inputs)
    with vt.trim(model, Spy(keep=1.0, layer=LAYER) | Spy(keep=1.0, layer=LAYER + 1)):
        ours = generate(model, inputs)
    assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))
    assert torch.equal(torch.stack(generate(model, inputs).logits), torch.stack(plain.logits))


def test_only_the_prefill_is_listened_to():
    inputs, model, spy = prompts((3, "image", 5)), llava(), Spy(keep=6, layer=LAYER)
    with vt.trim(model, spy):
        generate(model, inputs, max_new_tokens=5)
    assert len(spy.seen) == 1
    with vt.trim(model, Spy(keep=6, layer=LAYER, asks=frozenset())) as run:
        probed = [layer.self_attn.config is not model.config.text_config for layer in model.model.language_model.layers]
        model(**inputs)
    assert not any(probed)
    silent = run.method.steps()[0]
    assert isinstance(silent, Spy)
    (view,) = silent.seen
    assert not [*view.decoder, *view.text]


@dataclass(frozen=True)
class DropsEverything(vt.Random):
    """No vision token goes on."""

    name: ClassVar[str] = "drops-everything"

    def select(self, view: vt.View) -> vt.Keep:
        return vt.Keep(torch.empty(len(view.features), 0, dtype=torch.long))


@both_attentions
@every_batch
def test_a_language_stage_may_drop_everything(rows, attention):
    inputs, model = prompts(*rows), llava(attention)
    with vt.trim(model, DropsEverything(layer=2) | Spy(keep=6, layer=3)) as run:
        logits = model(**inputs).logits
        ours = generate(model, inputs)
    assert run.report.per_layer == (16, 16, 0, 0, 0)
    hidden = tiny.hidden_places(inputs, run.trace)
    alive = inputs["attention_mask"].bool() & ~hidden[2]
    with tiny.Masked(model, inputs["attention_mask"], hidden):
        close(logits[alive], model(**inputs).logits[alive])
        reference = generate(model, inputs)
    close(torch.stack(ours.logits), torch.stack(reference.logits))
    with pytest.raises(vt.TrimError, match="between 1 and 16"), vt.trim(model, DropsEverything()):
        model(**inputs)
