"""LUVC: vision tokens that go until none is left, spectra, schedules, and merging along the axes of the grid."""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

import tiny
import visiontrim as vt
from releases import CACHE
from tiny import (
    ROWS,
    Masked,
    both_attentions,
    close,
    every_batch,
    generate,
    hidden_places,
    keeps_everything,
    llava,
    prompts,
    sample,
)
from visiontrim.methods.schedule import counts, stages
from visiontrim.ops import spectrum

pytestmark = pytest.mark.usefixtures("no_grad")


@dataclass(frozen=True)
class Gone(vt.Step):
    """Drops every token at a decoder layer."""

    layer: int = 3
    name: ClassVar[str] = "gone"

    @property
    def site(self) -> vt.DecoderLayer | vt.VisionOutput:
        return vt.DecoderLayer(self.layer)

    def select(self, view: vt.View) -> vt.Keep:
        return vt.Keep(torch.empty(view.features.shape[0], 0, dtype=torch.long))


EMPTYING = {
    "from layer 3": Gone(),
    "last layer": Gone(layer=4),
    "after others": vt.Random(keep=9) | vt.Random(keep=5, layer=1) | Gone(layer=2),
    "before another": vt.Random(keep=6, layer=1) | Gone(layer=2) | vt.VisionTrim(stages="language", layer=4, keep=1.0),
}
every_emptying = pytest.mark.parametrize("plan", EMPTYING.values(), ids=EMPTYING)

# ------------------------------------------------------------------------------------------------ no token left


@every_emptying
@every_batch
@both_attentions
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_no_token_left_equals_masking(plan, rows, attention, options):
    model, inputs = llava(attention), prompts(*rows)
    with vt.trim(model, plan) as run:
        logits = model(**inputs).logits
        ours = generate(model, inputs, **options)
    assert [image.stages[-1].index.numel() for image in run.trace.images] == [0] * len(run.trace.images)
    hidden = hidden_places(inputs, run.trace)
    alive = inputs["attention_mask"].bool() & (inputs["input_ids"] != tiny.IMAGE)
    with Masked(model, inputs["attention_mask"], hidden):
        close(logits[alive], model(**inputs).logits[alive])
        reference = generate(model, inputs, **options)
    assert torch.equal(ours.sequences, reference.sequences)
    close(torch.stack(ours.logits), torch.stack(reference.logits))


@every_emptying
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_a_batch_with_no_token_left_equals_its_samples(plan, positions):
    model, inputs = llava(), prompts(*ROWS["batch"])
    with vt.trim(model, plan, positions=positions):
        batch = torch.stack(generate(model, inputs).logits, 1)
        for row in range(len(batch)):
            close(batch[row], torch.stack(generate(model, sample(inputs, row)).logits, 1)[0])


def test_a_layer_without_vision_tokens_caches_text_alone():
    model, inputs = llava(), prompts((3, "image", 5, "image", 2))
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, EMPTYING["after others"]) as run:
        model(**(inputs | {CACHE: cache}))
    text = 1 + 3 + 5 + 2
    assert [layer.keys.shape[-2] for layer in cache.layers] == [text + 18, text + 10, text, text, text]
    assert run.report.per_layer == (9, 5, 0, 0, 0)
    assert run.report.stages[-1]["dominant"] == 0
    assert "(16 -> 9 vision tokens each), mean 2.8 per layer and image" in str(run.report)


def test_the_picture_shows_the_last_tokens_that_were_left():
    model, inputs = llava(), prompts((3, "image", 5))
    image = Image.new("RGB", (56, 56), "red")
    with vt.trim(model, vt.Random(keep=6) | Gone()) as run:
        model(**inputs)
    with vt.trim(model, vt.Random(keep=6)) as alone:
        model(**inputs)
    assert run.picture(image).tobytes() == alone.picture(image).tobytes()
    with vt.trim(model, Gone()) as run:
        model(**inputs)
    assert run.picture(image).size == alone.picture(image).size


def test_a_prompt_of_nothing_but_an_image_cannot_lose_it():
    model = llava()
    inputs = {
        "input_ids": torch.full((1, tiny.PATCHES), tiny.IMAGE),
        "pixel_values": prompts(("image",))["pixel_values"],
    }
    with vt.trim(model, Gone()), pytest.raises(vt.TrimError, match=r"images alone.*add text"):
        model(**inputs)


def test_the_vision_stage_cannot_drop_everything():
    @dataclass(frozen=True)
    class GoneEarly(Gone):
        @property
        def site(self):
            return vt.VisionOutput()

    model = llava()
    with vt.trim(model, GoneEarly()), pytest.raises(vt.TrimError, match="between 1 and 16 tokens"):
        model(**prompts((3, "image", 5)))


# ------------------------------------------------------------------------------------------------ schedules


def test_the_cascade_by_hand():
    """A third of 32 layers is 10.7, two thirds are 21.3; 0.45 x 576 = 259.2, and again x 0.45 = 116.6."""
    assert stages("cascade", 32, every=4, eliminate=True) == ((11, 0.45), (21, 0.45**2), (31, 0.0))
    plan = stages("cascade", 32, every=4, eliminate=True)
    assert counts(plan, 32, 576, None) == (259, 117, 0)
    assert 576 * 32 / (11 * 576 + 10 * 259 + 10 * 117) > 1.8


def test_the_linear_schedule_by_hand():
    plan = stages("linear", 9, every=2, eliminate=True)
    assert plan == ((2, 0.75), (4, 0.5), (6, 0.25), (8, 0.0))
    assert counts(plan, 9, 16, None) == (12, 8, 4, 0)
    assert stages("linear", 9, every=3, eliminate=False) == ((3, 1 - 3 / 8), (6, 1 - 6 / 8))


def test_layers_that_coincide_are_one_stage():
    assert stages("cascade", 3, every=4, eliminate=True) == ((1, 0.45), (2, 0.0))
    assert stages("cascade", 2, every=4, eliminate=True) == ((1, 0.0),)
    assert stages("cascade", 1, every=4, eliminate=True) == ()


@pytest.mark.parametrize("name", ["cascade", "linear"])
@pytest.mark.parametrize(("layers", "entered"), [(5, 16), (28, 321), (32, 576)])
def test_a_mean_is_met_within_half_a_token(name, layers, entered):
    plan = stages(name, layers, every=4, eliminate=True)
    before = plan[0][0]
    least = entered * before + plan[-1][0] - before  # a token in every layer but the last
    for mean in range(math.ceil(least / layers), entered + 1):
        left = counts(plan, layers, entered, mean)
        starts = [layer for layer, _ in plan] + [layers]
        spent = before * entered + sum(n * (starts[i + 1] - starts[i]) for i, n in enumerate(left))
        assert abs(spent / layers - mean) <= 0.5, (mean, left)
        assert all(a >= b for a, b in zip((entered, *left), left, strict=False))
        assert left[-1] == 0 or all(n == entered for n in left[:-1]), "the last layer gives up its rest last"
    assert counts(plan, layers, entered, entered) == (entered,) * len(plan)


def test_one_factor_scales_the_shares():
    """Before layer 2 of 6: 10 tokens. 6 x 5 - 20 = 10 token-layers for shares 0.5 and 0.25 over 2 + 1 layers: x 0.8."""
    assert counts(((2, 0.5), (4, 0.25), (5, 0.0)), 6, 10, 5) == (4, 2, 0)
    with pytest.raises(vt.TrimError, match=r"mean of 3 .* 10 tokens in the first 2 of 6 layers already need a"):
        counts(((2, 0.5), (4, 0.25), (5, 0.0)), 6, 10, 3)


# ------------------------------------------------------------------------------------------------ spectra


def transform(signal: list[complex], sign: int) -> list[complex]:
    length = len(signal)
    angle = sign * 2j * math.pi / length
    return [sum(signal[n] * cmath.exp(angle * k * n) for n in range(length)) for k in range(length)]


def filtered(signal: list[float], highest: int) -> list[float]:
    """Low pass by an explicit discrete Fourier transform and back, without the mean."""
    length = len(signal)
    spectrum = transform([complex(value) for value in signal], -1)
    passed = [value if 0 < min(k, length - k) <= highest else 0 for k, value in enumerate(spectrum)]
    return [value.real / length for value in transform(passed, 1)]


@pytest.mark.parametrize("tokens", [7, 12])
@pytest.mark.parametrize("highest", [1, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_token_energy_is_that_of_the_double_loop(tokens, highest, residual):
    values = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = spectrum.token_energy(values, highest, residual=residual)
    for row in range(2):
        energy = [0.0] * tokens
        for channel in values[row].T:
            low = filtered(channel.tolist(), highest)
            for token in range(tokens):
                part = channel[token].item() - channel.mean().item() - low[token] if residual else low[token]
                energy[token] += part**2
        close(ours[row].double(), torch.tensor(energy, dtype=torch.float64))


def test_channel_energy_is_that_of_the_double_loop():
    values = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centred = values - values.mean(1, keepdim=True)
    ours = spectrum.channel_energy(values, 2)
    for row in range(2):
        for token in range(5):
            channels = centred[row, token]
            low = filtered(channels.tolist(), 2)
            energy = sum((value + channels.mean().item()) ** 2 for value in low)
            close(ours[row, token].double(), torch.tensor(energy, dtype=torch.float64))


def test_grid_energy_by_hand():
    """A wave along the columns passes a filter that lets columns wave; a checkerboard does not."""
    columns = torch.tensor([1.0, 0.0, -1.0, 0.0]).expand(4, 4)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)
    values = (3 * columns + board).reshape(1, 16, 1)
    places = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4))[None]
    energy = spectrum.grid_energy(values, places, (1, 4, 4), (1, 1))
    close(energy[0], (3 * columns).square().flatten())
    part = torch.tensor([[1, 6, 11, 12]])
    some = spectrum.grid_energy(values[:, part[0]], places[:, part[0]], (1, 4, 4), (2, 2))
    rest = values[:, part[0]] - values[:, part[0]].mean()
    close(some, rest.square().sum(-1))  # nothing is filtered, and the empty places are the mean


def test_spectral_pooling_samples_slow_waves():
    places = torch.arange(12) / 12
    wave = 2 + torch.sin(2 * math.pi * places) + torch.cos(4 * math.pi * places)
    coarse = torch.arange(6) / 6
    expected = 2 + torch.sin(2 * math.pi * coarse) + torch.cos(4 * math.pi * coarse)
    close(spectrum.resample(wave[None, :, None], 6)[0, :, 0], expected)


def test_the_cutoff_is_what_the_tokens_to_come_can_carry():
    assert spectrum.cutoff(259, 576, 576) == round(259 / 576 * 288)
    assert spectrum.cutoff(1, 576, 576) == 1
    assert spectrum.cutoff(3, 4, 4) == 2  # a half is rounded up


# ------------------------------------------------------------------------------------------------ pruning by spectrum

SCHEDULED = {
    "tokens": vt.LUVC(stages="language", spectrum="tokens"),
    "channels": vt.LUVC(stages="language", spectrum="channels"),
    "grid": vt.LUVC(stages="language", spectrum="grid"),
    "residual": vt.LUVC(stages="language", spectrum="residual", schedule="linear", every=1),
    "exact": vt.LUVC(stages="language", keep=9),
    "after visiontrim": vt.VisionTrim(keep=9) | vt.LUVC(stages="language"),
    "random": vt.Fade(seed=3),
    "uniform": vt.Fade(operator="uniform"),
}
MERGING = {"pooling": vt.LUVC(stages="language", spectrum="pooling"), "average": vt.Fade(operator="average")}
every_scheduled = pytest.mark.parametrize("plan", SCHEDULED.values(), ids=SCHEDULED)
every_luvc = pytest.mark.parametrize("plan", (SCHEDULED | MERGING).values(), ids=SCHEDULED | MERGING)


@every_scheduled
@every_batch
def test_pruning_by_schedule_equals_masking(plan, rows):
    model, inputs = llava(), prompts(*rows)
    with vt.trim(model, plan) as run:
        ours = generate(model, inputs, num_beams=2)
    with Masked(model, inputs["attention_mask"], hidden_places(inputs, run.trace)):
        reference = generate(model, inputs, num_beams=2)
    assert torch.equal(ours.sequences, reference.sequences)
    close(torch.stack(ours.logits), torch.stack(reference.logits))


@every_luvc
@both_attentions
def test_a_batch_equals_its_samples(plan, attention):
    model, inputs = llava(attention), prompts(*ROWS["batch"])
    with vt.trim(model, plan):
        batch = torch.stack(generate(model, inputs).logits, 1)
        for row in range(len(batch)):
            close(batch[row], torch.stack(generate(model, sample(inputs, row)).logits, 1)[0])


@every_luvc
def test_caches_hold_what_the_schedule_leaves(plan):
    model, inputs = llava(), prompts((3, "image", 5, "image", 2))
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, plan) as run:
        model(**(inputs | {CACHE: cache}))
        first = run.trace
        # a second turn with one more image, on the same cache
        more = prompts((4, "image", 2), seed=2)
        ids, past = more["input_ids"], cache.get_seq_length()
        positions = torch.arange(past, past + ids.shape[1])[None]
        model(input_ids=ids, pixel_values=more["pixel_values"], position_ids=positions, **{CACHE: cache})
    wanted = {
        "after visiontrim": [9, 9, 4, 2, 0],  # 0.45 x 9 = 4.05, 0.45^2 x 9 = 1.8
        "residual": [16, 12, 8, 4, 0],
        "exact": [16, 16, 9, 4, 0],  # 45 - 32 = 13 = 9 + 4
    }
    name = next(name for name, known in (SCHEDULED | MERGING).items() if known is plan)
    per_layer = wanted.get(name, [16, 16, 7, 3, 0])  # 7.2 and 3.24
    assert list(run.report.per_layer) == per_layer
    assert list(first.cache_lengths) == [11 + 2 * count for count in per_layer]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [11 + 7 + 3 * count for count in per_layer]


@pytest.mark.parametrize("plan", [p for p in (SCHEDULED | MERGING).values() if not isinstance(p, vt.Plan)], ids=str)
@every_batch
@both_attentions
def test_keeping_everything_is_the_plain_model(plan, rows, attention):
    keeps_everything(plan, llava(attention), prompts(*rows))


def test_the_largest_energy_after_the_input_norm_goes_on():
    """The same ranking, made by hand from what the plain model's layer norm gives."""
    model, inputs = llava(), prompts((3, "image", 5))
    model.model.language_model.layers[2].input_layernorm.weight.data.uniform_(0.1, 2.0)
    seen = {}
    norm = model.model.language_model.layers[2].input_layernorm
    handle = norm.register_forward_hook(lambda _, args, output: seen.setdefault("normed", output))
    model(**inputs)
    handle.remove()
    image = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    values = seen["normed"][0, image].double()
    energy = torch.zeros(16, dtype=torch.float64)
    for channel in values.T:
        energy += torch.tensor(filtered(channel.tolist(), 4)).square()  # round(7 / 16 x 8) = 4: half up from 3.5
    with vt.trim(model, vt.LUVC(stages="language", spectrum="tokens")) as run:
        model(**inputs)
    kept = energy.argsort(descending=True)[:7].sort().values
    assert run.trace.images[0].stages[0].index.tolist() == kept.tolist()


def test_an_average_stands_for_the_tokens_nearest_to_it():
    """On a row of five the lattice of two holds 1 and 3; the middle is as near to both and goes to the first."""
    features = torch.tensor([[[1.0], [2.0], [6.0], [10.0], [20.0]]])
    places = torch.tensor([[[0, 0, column] for column in range(5)]])
    view = vt.View(features, places, (1, 1, 5), entered=5, num_layers=9)
    keep = vt.Fade(operator="average").choose(view, 2)
    assert keep.index.tolist() == [[1, 3]]
    assert keep.assignment is not None
    assert keep.features is not None
    assert keep.assignment.tolist() == [[0, 0, 0, 1, 1]]
    assert keep.features.tolist() == [[[3.0], [15.0]]]


def test_pooled_tokens_take_the_places_that_others_go_to():
    view = vt.View(torch.randn(2, 9, 4), torch.zeros(2, 9, 3).long(), (1, 1, 9), entered=9, num_layers=9)
    keep = vt.LUVC(stages="language", spectrum="pooling").choose(view, 3)
    assert keep.index[0].tolist() == [1, 4, 7]
    assert keep.assignment is not None
    assert keep.assignment[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("luvc:spectrum=rows", "spectrum='rows' is no choice"),
        ("luvc:every=0", "every=0 is no number of layers"),
        ("luvc:keep=0", "keep=0 keeps nothing"),
        ("fade:operator=max", "operator='max' is no choice"),
    ],
)
def test_options_that_cannot_work(spec, message):
    with pytest.raises(vt.TrimError, match=message):
        vt.load_method(spec)


def test_a_mean_that_cannot_be_reached():
    model = llava()
    with (
        vt.trim(model, "luvc:stages=language", keep=4),
        pytest.raises(vt.TrimError, match="16 tokens in the first 2 of 5 layers"),
    ):
        model(**prompts((3, "image", 5)))


def test_stages_of_two_schedules_cannot_share_a_layer():
    with pytest.raises(vt.TrimError, match="order them from the vision encoder"):
        vt.trim(llava(), vt.LUVC(stages="language") | vt.Fade())
