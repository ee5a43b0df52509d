"""PixelPrune: the predictive rule against a double loop, and units that are gone before the encoder's first layer."""

from __future__ import annotations

import functools
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

import families
import tiny
import visiontrim as vt
from families import Prompts, squares_of
from predictive import encode
from tiny import both_attentions, close
from visiontrim.measure.counting import Counting
from visiontrim.models import family_of

pytestmark = pytest.mark.usefixtures("no_grad")

model_of = functools.cache(families.build)
generate = functools.partial(tiny.generate, max_new_tokens=3)

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CASES = [(name, kind) for name in QWEN for kind in ("image", "video")]
every_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])

# ------------------------------------------------------------------------------------------------ the method


def view_of(colours: Tensor) -> vt.View:
    """A picture [rows, columns] of units of one channel and one pixel."""
    rows, columns = colours.shape
    total = rows * columns
    pixels = colours.view(1, total, 1, 1)
    places = torch.zeros(1, total, 3, dtype=torch.long)
    return vt.View(
        torch.zeros(1, total, 2),
        places,
        (1, rows, columns),
        total,
        4,
        encoder=vt.EncoderSignals(pixels=pixels, colours=pixels),
    )


def kept_of(colours: Tensor, **options) -> list[int]:
    return vt.PixelPrune(**options).select(view_of(colours)).index[0].tolist()


def test_a_bound_keeps_the_units_farthest_from_their_predictions():
    line = torch.tensor([[0.0, 0.3, 0.3, 0.4, 0.4, 0.9]])
    assert kept_of(line, minimum=1) == [0, 1, 3, 5]
    assert kept_of(line, minimum=1, keep=3) == kept_of(line, minimum=1, keep=0.5) == [0, 1, 5]
    assert kept_of(line, minimum=1, keep=1) == [0]
    assert kept_of(line, minimum=1, keep=64) == [0, 1, 3, 5]  # it is no more than a bound
    assert kept_of(line, minimum=5) == [0, 1, 2, 3, 5]
    assert kept_of(line, keep=4) == [0, 1, 3, 5]


def test_a_flat_picture_keeps_the_minimum():
    flat = torch.full((8, 8), 0.5)
    assert len(kept_of(flat)) == 16
    assert kept_of(flat, minimum=1) == [0]
    assert kept_of(flat, minimum=4) == [0, 7, 56, 63]
    assert kept_of(torch.zeros(2, 3)) == list(range(6))


def test_a_distance_on_the_border_is_within_it():
    """Steps of exactly two levels of 255, of values that were normalised and back."""
    levels = torch.tensor([[10, 12, 14, 17]]) / 255
    restored = (levels - 0.48145466) / 0.26862954 * 0.26862954
    assert kept_of(restored, tau=2 / 255, rule="sliding", minimum=1) == [0, 3]
    assert kept_of(restored, tau=2 / 255, minimum=1) == [0, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -0.1}, r"tau=-0.1 is no distance of colours: give 0"),
        ({"tau": 4.0}, r"tau=4.0 is no distance"),
        ({"metric": "psnr"}, "metric='psnr' is no choice"),
        ({"rule": "loose"}, "rule='loose' is no choice"),
        ({"minimum": 0}, "minimum=0: the first unit of a picture always stays"),
        ({"keep": 0}, "keep=0 keeps nothing"),
        ({"layer": -1}, "layer=-1: an encoder stage stands before encoder layer 0"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(vt.TrimError, match=message):
        vt.PixelPrune(**options)


# ------------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize(("name", "side"), [("llava", 14), ("internvl", 28)])
def test_pixels_of_square_pictures(name, side):
    pixels = Prompts(name, (3, "image", 5, "image", 2)).batch()["pixel_values"]
    ours = family_of(model_of(name)).pixels("image", {"pixels": pixels})
    assert torch.equal(ours, torch.stack([patch for picture in pixels for patch in squares_of(picture, side)]))


# ------------------------------------------------------------------------------------------------ the engine


def painted(name: str, kind: str = "image", seed: int = 0, colours: int = 2) -> tuple[Prompts, list[list[Tensor]]]:
    """A row with a picture, one with two of which one has the first one's size, one without; units of few colours.

    Also the units [frames, rows, columns, 1] of each row's pictures.
    """
    rows = Prompts(name, (3, kind, 5), (1, kind, 2, kind, 7), (6,))
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for _, visuals in rows.rows:
        pictures.append([])
        for visual in visuals:
            (key,) = (key for key in visual.pixels if key.startswith("pixel_values"))
            pixels = visual.pixels[key]
            if name.startswith("qwen"):
                grid = visual.pixels[f"{kind}_grid_thw"][0] // torch.tensor([1, 2, 2])
                textures = torch.randn(colours, 4, 3, 1, 14 * 14, generator=generator).expand(-1, -1, -1, 2, -1)
            else:
                grid = torch.tensor([len(pixels), 4, 4])
                textures = torch.randn(colours, 3, 14, 14, generator=generator)
            units = torch.randint(0, colours, grid.tolist(), generator=generator)
            painting = textures[units]
            if not name.startswith("qwen"):  # frames, rows, columns, channels, 14, 14
                painting = painting.permute(0, 3, 1, 4, 2, 5)
            visual.pixels[key] = painting.reshape(pixels.shape)
            pictures[-1].append(units[..., None].float())
    return rows, pictures


def expected(units: Tensor) -> list[int]:
    """Raster indices that are kept of a picture, frame by frame."""
    return torch.tensor([encode(frame) for frame in units]).flatten().nonzero()[:, 0].tolist()


@contextmanager
def masked_encoder(model, inputs, trace: vt.Trace, kind: str, attention: str):
    """The plain model, in whose encoder nothing attends to the units that are gone."""
    family = family_of(model)
    alive = []
    for image in trace.images:
        alive.append(torch.zeros(image.total, dtype=torch.bool))
        alive[-1][image.stages[0].index] = True
    order = family.packing(kind, [image.grid for image in trace.images]).order
    seen = torch.cat(alive)[order].repeat_interleave(4)
    place = 0

    def attend(module, query, key, value, attention_mask, **kwargs):
        nonlocal place  # chunks of the sequence come one after the other
        mask = seen[place : place + key.shape[2]]
        place = (place + key.shape[2]) % len(seen)
        mask = mask | ~mask.any()  # what is seen of a window without units reaches nobody
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask[None], scale=kwargs["scaling"])
        return out.transpose(1, 2), None

    AttentionInterface.register("masked_units", attend)
    config = model.model.visual.config
    config._attn_implementation_internal = "masked_units"
    try:
        yield
    finally:
        config._attn_implementation_internal = attention
    assert place == 0


@every_case
@both_attentions
@pytest.mark.parametrize("colours", [2, 1])
def test_removing_units_equals_masking_them(name, kind, attention, colours):
    """In the encoder and in every decoder layer; of one colour, whole windows are gone."""
    model, (rows, pictures) = model_of(name, attention), painted(name, kind, colours=colours)
    for row in range(2):
        inputs = rows.batch(row)
        with vt.trim(model, vt.PixelPrune(minimum=1)) as run:
            ours = model(**inputs).logits
        assert [image.stages[0].index.tolist() for image in run.trace.images] == [expected(p) for p in pictures[row]]
        hidden = families.hidden_places(name, inputs, run.trace)
        assert hidden[0].any()
        with (
            masked_encoder(model, inputs, run.trace, kind, attention),
            tiny.Masked(model, inputs["attention_mask"], hidden),
        ):
            reference = model(**inputs).logits
        stays = ~hidden[0][0]
        close(ours[0, stays], reference[0, stays], 3e-5)
        plain = model(**inputs).logits
        assert (plain[0, -1] - ours[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "kind"), [*CASES, ("llava", "image"), ("internvl", "image")])
@both_attentions
def test_nothing_to_drop_is_bit_identical(name, kind, attention):
    model, inputs = model_of(name, attention), Prompts(name, (3, kind, 5), (1, kind, 2, kind, 7), (6,)).batch()
    plain = generate(model, inputs)
    processor = SimpleNamespace(tokenizer=None, image_processor=SimpleNamespace(image_std=[0.5, 0.5, 0.5]))
    for tau in (0.0, 1e-4):
        with vt.trim(model, vt.PixelPrune(tau=tau, minimum=1), processor=processor) as run:
            ours = generate(model, inputs)
        assert run.report.kept_tokens == run.report.input_tokens
        assert all(a.equal(b) for a, b in zip(ours.logits, plain.logits, strict=True))


@every_case
@both_attentions
def test_a_padded_batch_equals_its_rows(name, kind, attention):
    """Pictures of two sizes, each with a count of its own, also those of one size."""
    model, (rows, pictures) = model_of(name, attention), painted(name, kind, seed=3)
    plan = vt.PixelPrune(minimum=1)
    counts = {}
    for steps in (plan, plan | vt.VisionTrim(keep=0.4), plan | vt.Random(keep=0.5, layer=2)):
        with vt.trim(model, steps) as run:
            together = generate(model, rows.batch())
            for image in run.trace.images:
                counts.setdefault(image.grid, set()).add(len(image.stages[0].index))
            for row in range(2):
                alone = generate(model, rows.batch(row))
                for a, b in zip(together.logits, alone.logits, strict=True):
                    close(a[row], b[0], 3e-5)
        with vt.trim(model, steps, remember=1):
            for _ in range(2):  # the second time from memory
                again = generate(model, rows.batch())
                assert all(a.equal(b) for a, b in zip(again.logits, together.logits, strict=True))
    kept = [len(expected(units)) for row in pictures for units in row]
    assert any(len(values) > 1 for values in counts.values()), kept


@pytest.mark.parametrize("name", QWEN)
def test_positions_are_those_of_the_full_grid(name):
    model, (rows, _) = model_of(name), painted(name)
    inputs, seen = rows.batch(1), []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"][0]), with_kwargs=True
    )
    model(**inputs)
    with vt.trim(model, vt.PixelPrune(minimum=1)) as run:
        model(**inputs)
    hook.remove()
    stays = ~families.hidden_places(name, inputs, run.trace)[0][0]
    plain, ours = seen
    assert ours.shape[-2] < plain.shape[-2]
    assert torch.equal(ours, plain[..., stays, :])


@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name in (*QWEN, "llava") for layer in (0, 1)])
def test_every_layer_from_there_on_sees_kept_units_alone(name, layer):
    model, (rows, pictures) = model_of(name), painted(name)
    inputs, family = rows.batch(0), family_of(model)
    lengths = []
    handles = [
        module.register_forward_hook(lambda m, args, output: lengths.append(args[0].shape[-2]))
        for module in family.encoder_layers("image")
    ]
    with vt.trim(model, vt.PixelPrune(minimum=1, layer=layer)) as run:
        model(**inputs)
    for handle in handles:
        handle.remove()
    left = family.factor**2 * len(expected(pictures[0][0])) + family.special_tokens
    whole = family.factor**2 * 16 + family.special_tokens
    assert left < whole
    assert lengths == [whole] * layer + [left] * (len(lengths) - layer)
    assert run.report.kept_tokens == len(expected(pictures[0][0]))


def test_a_picture_of_a_clip_tower_run_by_hand():
    model, (rows, pictures) = model_of("llava"), painted("llava")
    inputs, kept = rows.batch(0), expected(pictures[0][0])
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(inputs["pixel_values"]))
    hidden = hidden[:, [0, *(1 + place for place in kept)]]
    for layer in tower.encoder.layers[:3]:  # the last but one is projected
        hidden = layer(hidden, None)
    seen = {}
    with vt.trim(model, vt.PixelPrune(minimum=1)):
        hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, args: seen.update(got=args[0]))
        model(**inputs)
        hook.remove()
    close(seen["got"][0, 4 : 4 + len(kept)], model.model.multi_modal_projector(hidden[0, 1:]))


def test_frames_may_have_bounds_of_their_own():
    model, (rows, pictures) = model_of("qwen2_5_vl"), painted("qwen2_5_vl", "video", colours=4)
    with vt.trim(model, vt.PixelPrune(minimum=1, keep=3), per="frame") as run:
        generate(model, rows.batch(0))
    assert all(len(expected(frame[None])) > 3 for frame in pictures[0][0])
    assert [(image.grid, image.entered) for image in run.trace.images] == [((1, 4, 2), 3)] * 2


# ------------------------------------------------------------------------------------------------ refusals


def test_distances_need_a_processor():
    with pytest.raises(vt.TrimError, match=r"compares colours in \[0, 1\].*pass processor="):
        vt.trim(model_of("qwen2_vl"), vt.PixelPrune(tau=0.02))


def test_before_the_first_layer_there_is_no_attention():
    @dataclass(frozen=True)
    class Keys(vt.PixelPrune):
        needs: ClassVar[frozenset] = frozenset({"encoder.keys"})  # pyright: ignore[reportIncompatibleMethodOverride]

    with pytest.raises(
        vt.TrimError, match=r"reads encoder\.keys, which there is none of before the first encoder layer"
    ):
        vt.trim(model_of("qwen2_vl"), Keys())


def test_it_comes_first():
    model, inputs = model_of("qwen2_vl"), painted("qwen2_vl")[0].batch()
    with (
        vt.trim(model, vt.PixelPrune(minimum=1) | vt.PixelPrune(layer=1)),
        pytest.raises(vt.TrimError, match=r"pixelprune compares all 16 units, of which \d+ are left: put it first"),
    ):
        model(**inputs)


def test_rows_of_a_batch_need_equal_counts():
    model, (rows, pictures) = model_of("llava"), painted("llava", seed=3)
    counts = [len(expected(units)) for row in pictures for units in row]
    assert len(set(counts)) > 1
    with (
        vt.trim(model, vt.PixelPrune(minimum=1)),
        pytest.raises(vt.TrimError, match=r"encoder as one batch.*or pass one picture at a time"),
    ):
        model(**rows.batch())
    with vt.trim(model, vt.PixelPrune(minimum=1)) as run:
        model(**rows.batch(0))
    assert run.report.kept_tokens == counts[0]


def test_more_pictures_take_one_stop_each_and_no_more_copies():
    """Each keeps its own number, which is read; where they stand goes to the device at once."""
    model = model_of("qwen2_5_vl")

    def beside_plain(pictures):
        inputs, found = Prompts("qwen2_5_vl", *[(3, "image", 5)] * pictures).batch(), []
        for around in (vt.trim(model, "pixelprune"), nullcontext()):
            with around, Counting() as counts:
                model.generate(**inputs, max_new_tokens=1)
            found.append(counts)
        ours, plain = found
        return ours.copies - plain.copies, ours.stops["__int__"] - plain.stops["__int__"]

    model.generate(**Prompts("qwen2_5_vl", (3, "image", 5)).batch(), max_new_tokens=1)
    (copies, stops), (more_copies, more_stops) = beside_plain(1), beside_plain(3)
    assert more_copies == copies
    assert more_stops == stops + 2
