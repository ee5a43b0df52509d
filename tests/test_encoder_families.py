"""Merging inside the encoders of InternVL and Qwen-VL: whole units of patches, and windows on the merged grid."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import AttentionInterface

import families
import tiny
import visiontrim as vt
from families import Prompts
from releases import CACHE, cache_of
from tiny import both_attentions, close
from visiontrim.core.method import EncoderLayer
from visiontrim.models import family_of

pytestmark = pytest.mark.usefixtures("no_grad")

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # its sparse sibling has the same encoder
NAMES = ("internvl", *QWEN)
every_name = pytest.mark.parametrize("name", NAMES)
CASES = [(name, "image") for name in NAMES] + [(name, "video") for name in QWEN[1:]]
every_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])

model_of = functools.cache(families.build)
generate = functools.partial(tiny.generate, max_new_tokens=3)


@dataclass(frozen=True)
class Columns(vt.Step):
    """Merges columns 0 and 1, 2 and 3, ... of the grid."""

    layer: int = 1
    name: ClassVar[str] = "columns"

    @property
    def site(self) -> EncoderLayer:
        return EncoderLayer(self.layer)

    def select(self, view: vt.View) -> vt.Keep:
        frames, rows, columns = view.encoder.lattice
        mean = view.features.view(len(view.features), -1, 2, view.features.shape[-1]).mean(2)
        pairs = torch.arange(frames * rows * columns // 2).expand(len(mean), -1)
        return vt.Keep(2 * pairs, mean, pairs.repeat_interleave(2, 1), lattice=(frames, rows, columns // 2))


def units(patches: Tensor, side: int) -> Tensor:
    """Patches [rows * columns, dim] in raster order as units [units, 4, dim] of 2 x 2, by a loop."""
    grid = patches.view(side, side, -1)
    return torch.stack(
        [
            torch.stack([grid[row + down, column + right] for down in (0, 1) for right in (0, 1)])
            for row in range(0, side, 2)
            for column in range(0, side, 2)
        ]
    )


def embeds_of(model, inputs, plan) -> tuple[Tensor, vt.Trace]:
    """What the language model gets for the vision tokens that are left, and the trace."""
    seen = {}
    with vt.trim(model, plan) as run:
        hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, args: seen.update(got=args[0]))
        model(**inputs)
        hook.remove()
    return seen["got"], run.trace


# ------------------------------------------------------------------------------------------------ towers run by hand


@both_attentions
def test_shuffled_units_are_those_of_a_hand_run_tower(attention):
    model, inputs = model_of("internvl", attention), Prompts("internvl", (3, "image", 5)).batch()
    tower = model.model.vision_tower
    expected = []
    for tile in inputs["pixel_values"]:
        hidden = tower.embeddings(tile[None])
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        hidden = tower.encoder.layer[0](hidden)
        pairs = units(hidden[0, 1:], 4).view(2, 2, 4, -1).mean(1)  # of 2 x 2 units the columns
        hidden = torch.cat([hidden[:, :1], pairs.reshape(1, 8, -1)], 1)
        for layer in tower.encoder.layer[1:]:
            hidden = layer(hidden)
        merged = tower.layernorm(hidden)[0, 1:].reshape(2, -1)
        expected.append(model.model.multi_modal_projector(merged))
    embeds, trace = embeds_of(model, inputs, Columns())
    assert [image.stages[-1].index.tolist() for image in trace.images] == [[0, 2]] * 2
    close(embeds[0, 5:9], torch.cat(expected), 1e-4)


def turned(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a head of 8 by the definition: frequencies 1 and 10000^-1/2 of the row, then the column."""
    angles = torch.stack([rows, rows / 100, columns, columns / 100] * 2, -1)
    return angles.cos(), angles.sin()


def run_blocks(encoder, hidden: Tensor, places: Tensor, lattice: tuple[int, int, int], layers: range) -> Tensor:
    """Blocks on units [units, 4, dim] at patch coordinates [units, 4, 2], one call for every window or frame."""
    frames, rows, columns = lattice
    grid = torch.arange(len(hidden)).view(lattice)
    full = getattr(encoder, "fullatt_block_indexes", range(99))
    for layer in layers:
        side = 99 if layer in full else 2  # windows of 56 pixels are 2 units of 28
        after = torch.empty_like(hidden)
        for frame in range(frames):
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    window = grid[frame, top : top + side, left : left + side].flatten()
                    patches = hidden[window].flatten(0, 1)
                    rotary = turned(*places[window].flatten(0, 1).unbind(-1))
                    ends = torch.tensor([0, len(patches)], dtype=torch.int32)
                    after[window] = encoder.blocks[layer](patches, cu_seqlens=ends, position_embeddings=rotary).view_as(
                        hidden[window]
                    )
        hidden = after
    return hidden


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("kind", ["image", "video"])
@both_attentions
def test_merged_units_are_those_of_a_hand_run_tower(name, kind, attention):
    """Pictures of two sizes in one sequence, each run by itself, window by window."""
    model, inputs = model_of(name, attention), Prompts(name, (3, kind, 5, "image", 2)).batch()
    encoder = model.model.visual
    expected = []
    pixels = {key: inputs[key] for key in inputs if key.startswith("pixel_values")}
    for key in sorted(pixels, key=lambda key: kind not in key and "video" not in key):
        of = "video" if "video" in key else "image"
        sizes = inputs[f"{of}_grid_thw"].tolist()
        for part, (frames, rows, columns) in zip(
            pixels[key].split([a * b * c for a, b, c in sizes]), sizes, strict=True
        ):
            grid = (frames, rows // 2, columns // 2)
            hidden = encoder.patch_embed(part).view(-1, 4, encoder.config.hidden_size if name != "qwen2_vl" else 32)
            corner = torch.cartesian_prod(*(torch.arange(side) for side in grid))[:, None, 1:]
            places = (2 * corner + torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])).float()
            hidden = run_blocks(encoder, hidden, places, grid, range(1))
            hidden = hidden.view(-1, 2, 4, hidden.shape[-1]).mean(1)
            places = places.view(-1, 2, 4, 2).mean(1)
            half = (frames, grid[1], grid[2] // 2)
            hidden = run_blocks(encoder, hidden, places, half, range(1, len(encoder.blocks)))
            expected.append(encoder.merger(hidden.flatten(0, 1)))
    embeds, _ = embeds_of(model, inputs, Columns())
    assert sorted(map(len, expected)) == [4, 8]
    first, second = expected
    close(embeds[0, 5 : 5 + len(first)], first, 1e-4)  # after BOS, text and the start mark
    close(embeds[0, 12 + len(first) : 12 + len(first) + len(second)], second, 1e-4)  # end mark, text, start mark


# ------------------------------------------------------------------------------------------------ LUVC


def luvc(**options) -> vt.LUVC:
    """One call, since the tiny towers are shallow and their grids small; down to two tokens at times, whose distances
    from their mean are a tie: exact along the tokens, but rounding decides along the channels."""
    return vt.LUVC(calls=1, spectrum="tokens", **options)


def rows_of(name: str, kind: str) -> Prompts:
    """A row with a picture, one with two of different size, one without."""
    return Prompts(name, (3, kind, 5), (1, kind, 2, "image", 7), (6,))


@every_case
@both_attentions
def test_a_padded_batch_equals_its_rows(name, kind, attention):
    model, rows = model_of(name, attention), rows_of(name, kind)
    with vt.trim(model, luvc()):
        together = generate(model, rows.batch())
        for row in range(2):
            alone = generate(model, rows.batch(row))
            for a, b in zip(together.logits, alone.logits, strict=True):
                close(a[row], b[0], 2e-5)
    plain = generate(model, rows.batch())
    assert (plain.logits[0][:2] - together.logits[0][:2]).abs().max() > 0.01


@every_case
@both_attentions
def test_ratios_of_one_are_bit_identical(name, kind, attention):
    model, inputs = model_of(name, attention), rows_of(name, kind).batch()
    plain = generate(model, inputs)
    for plan in (luvc(keep=1.0), luvc(stages="vision", merged=1.0), luvc(stages="language", keep=1.0)):
        with vt.trim(model, plan) as run:
            ours = generate(model, inputs)
        assert run.report.kept_tokens == run.report.input_tokens
        assert all(a.equal(b) for a, b in zip(ours.logits, plain.logits, strict=True))


def tokens(name: str, model, inputs) -> tuple[int, int]:
    """Vision tokens of a prompt, and everything else."""
    vision = int(family_of(model).placeholders(inputs["input_ids"]).sum())
    return vision, inputs["input_ids"].numel() - vision


def per_layer(*traces: vt.Trace) -> list[int]:
    """Vision tokens of all pictures that each decoder layer processes."""
    images = [image for trace in traces for image in trace.images]
    return [sum(image.per_layer[layer] for image in images) for layer in range(families.LAYERS)]


@every_case
def test_every_layer_caches_what_the_schedule_leaves_and_the_last_one_nothing(name, kind):
    model, inputs = model_of(name), Prompts(name, (3, kind, 5)).batch()
    vision, text = tokens(name, model, inputs)
    with vt.trim(model, luvc()) as run:
        cache = cache_of(generate(model, inputs, max_new_tokens=1))
    parts = len(run.trace.images)
    entering = vision // parts // 2
    # 0.45 and 0.45^2 of what entered, per tile or picture, rounded half up
    expected = [entering, entering, int(0.45 * entering + 0.5), int(0.2025 * entering + 0.5), 0]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [text + parts * count for count in expected]
    assert run.report.per_layer[-1] == 0


@every_name
def test_a_second_turn_equals_decoding_it_token_by_token(name):
    model, inputs = model_of(name), Prompts(name, (3, "image", 5)).batch()
    _, text = tokens(name, model, inputs)
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, luvc()) as run:
        first = model.generate(**(inputs | {CACHE: cache}), max_new_tokens=3, do_sample=False)
        held = [layer.keys.shape[-2] for layer in cache.layers]
        again = copy.deepcopy(cache)
        asked = torch.randint(10, families.VOCABULARY, (1, 5), generator=torch.Generator().manual_seed(3))
        ids = torch.cat([first, asked], 1)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 3}
        out = model.generate(
            input_ids=ids, **{CACHE: cache}, output_logits=True, return_dict_in_generate=True, **options
        )
        for end in range(first.shape[1], ids.shape[1] + 1):
            step = model.generate(
                input_ids=ids[:, :end],
                **{CACHE: again},
                output_logits=True,
                return_dict_in_generate=True,
                **options | {"attention_mask": torch.ones_like(ids[:, :end]), "max_new_tokens": 1},
            )
    close(out.logits[0], step.logits[0])
    assert held == [text + 2 + count for count in per_layer(run.trace)]


@every_name
def test_a_picture_in_the_second_turn(name):
    model, first, second = model_of(name), Prompts(name, (3, "image", 5)), Prompts(name, (4, "image", 2), seed=2)
    inputs, more = first.batch(), second.batch()
    (_, text), (_, text_more) = tokens(name, model, inputs), tokens(name, model, more)
    cache = DynamicCache(config=model.config.text_config)
    with vt.trim(model, luvc()) as run:
        model(**(inputs | {CACHE: cache}))
        once = run.trace
        past, length = cache.get_seq_length(), more["input_ids"].shape[1]
        del more["attention_mask"]
        positions = torch.arange(past, past + length).expand(3 if name in QWEN else 1, 1, length)
        model(**more, **{CACHE: cache}, position_ids=positions if name in QWEN else positions[0])
        left = per_layer(once, run.trace)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [text + text_more + count for count in left]
    assert left[-1] == 0 < left[0]


@every_case
def test_later_layers_and_the_merger_see_fewer_patches(name, kind):
    model, inputs = model_of(name), Prompts(name, (3, kind, 5)).batch()
    family = family_of(model)
    seen: dict[str, list[int]] = {"layers": [], "merger": []}
    handles = [
        layer.register_forward_hook(lambda m, args, output: seen["layers"].append(args[0].numel()))
        for layer in family.encoder_layers("image")
    ]
    handles.append(
        family.mergers("image")[0].register_forward_hook(lambda m, a, o: seen["merger"].append(a[0].numel()))
    )
    for method in ("none", Columns()):
        with vt.trim(model, method):
            model(**inputs)
    for handle in handles:
        handle.remove()
    depth = len(family.encoder_layers("image"))
    plain, ours = seen["layers"][:depth], seen["layers"][depth:]
    special = family.special_tokens * len(inputs["pixel_values"]) * 32 if family.special_tokens else 0
    assert ours[0] == plain[0]
    assert [2 * (count - special) for count in ours[1:]] == [count - special for count in plain[1:]]
    assert seen["merger"][1] * 2 == seen["merger"][0]


@every_name
def test_a_vision_stage_after_the_merges(name):
    model, rows = model_of(name), rows_of(name, "image")
    plan = Columns() | vt.VisionTrim(keep=0.25)
    with vt.trim(model, plan) as run:
        together = generate(model, rows.batch())
        for image in run.trace.images:
            assert [len(stage.index) for stage in image.stages] == [image.total // 2, max(1, image.total // 4)]
        for row in range(2):
            for a, b in zip(together.logits, generate(model, rows.batch(row)).logits, strict=True):
                close(a[row], b[0], 2e-5)
    with vt.trim(model, plan, remember=1):
        for _ in range(2):  # the second time from memory
            ours = generate(model, rows.batch())
            assert all(a.equal(b) for a, b in zip(ours.logits, together.logits, strict=True))


def test_signals_are_means_over_the_patches_of_a_merged_unit():
    @dataclass(frozen=True)
    class Listener(vt.Step):
        name: ClassVar[str] = "listener"
        needs: ClassVar[frozenset] = frozenset({"encoder.keys"})  # pyright: ignore[reportIncompatibleMethodOverride]

        @property
        def site(self) -> vt.VisionOutput:
            return vt.VisionOutput()

        def select(self, view: vt.View) -> vt.Keep:
            heard.append(view.encoder.keys)
            return vt.Keep.everything(view)

    heard, seen = [], {}
    model, inputs = model_of("internvl"), Prompts("internvl", (3, "image", 5)).batch()
    keys = model.model.vision_tower.encoder.layer[-1].attention.k_proj
    hook = keys.register_forward_hook(lambda m, args, output: seen.update(keys=output))
    with vt.trim(model, Columns() | Listener()):
        model(**inputs)
    hook.remove()
    expected = seen["keys"][:, 1:].view(2, 2, 4, 4, 8).mean(2).transpose(1, 2)  # tiles, units, patches, heads, dim
    close(torch.cat(heard), expected)


@pytest.mark.parametrize("name", QWEN)
def test_frames_may_have_budgets_of_their_own(name):
    model, inputs = model_of(name), Prompts(name, (3, "video", 5)).batch()
    with vt.trim(model, luvc(stages="vision", keep=4), per="frame") as run:
        generate(model, inputs)
    assert [image.grid for image in run.trace.images] == [(1, 4, 2)] * families.FRAMES
    assert [len(image.stages[-1].index) for image in run.trace.images] == [4] * families.FRAMES


@pytest.mark.parametrize("name", ["internvl", "qwen2_vl", "qwen3_vl"])
def test_tome_merges_units(name):
    model, rows = model_of(name), Prompts(name, (3, "image", 5), (1, "image", 2, "image", 7))
    with vt.trim(model, vt.ToMe(keep=0.5, proportional=False)) as run:
        together = generate(model, rows.batch())
        assert {len(image.stages[-1].index) / image.total for image in run.trace.images} == {0.5}
        close(together.logits[0][1], generate(model, rows.batch(1)).logits[0][0], 2e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_flash_attention_gets_the_borders_of_merged_chunks(name):
    """A stand-in for flash attention, which gets the whole sequence at once with its borders."""
    model, inputs = families.build(name), rows_of(name, "image").batch()
    plan = Columns() | vt.VisionTrim(keep=0.25)
    with vt.trim(model, plan):
        expected = model(**inputs).logits

    def fake_flash(module, query, key, value, attention_mask, **kwargs):
        ends = kwargs["cu_seq_lens_q"]
        lengths = ends.diff().tolist()
        assert ends.dtype == torch.int32
        assert kwargs["max_length_q"] == max(lengths)
        parts = zip(*(side.split(lengths, dim=2) for side in (query, key, value)), strict=True)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([sdpa(*part) for part in parts], 2).transpose(1, 2), None

    AttentionInterface.register("fake_flash", fake_flash)
    model.model.visual.config._attn_implementation_internal = "fake_flash"
    with vt.trim(model, plan):
        close(model(**inputs).logits, expected, 2e-5)


# ------------------------------------------------------------------------------------------------ places and refusals


def test_calls_stand_behind_layers_that_see_the_whole_picture():
    """A third and two thirds of 32 layers are 11 and 21; behind 7, 15 and 23 stand 8, 16 and 24."""
    assert vt.LUVC(calls=3).places(vt.Layers(32, 28, whole=(7, 15, 23, 31))) == (8, 16, 24)
    assert vt.LUVC(calls=2).places(vt.Layers(32, 28, whole=(7, 15, 23, 31))) == (8, 24)
    assert vt.LUVC(calls=2).places(vt.Layers(32, 28)) == (11, 21)
    assert vt.LUVC(calls=5).places(vt.Layers(3, 28)) == (1, 2)
    assert vt.LUVC(calls=4).places(vt.Layers(32, 28, whole=(7, 15, 23, 31))) == (6, 13, 19, 26)


def test_rotary_places_of_whole_numbers_are_the_models_own():
    model, inputs = model_of("qwen2_5_vl"), Prompts("qwen2_5_vl", (3, "image", 5, "image", 2)).batch()
    seen = {}
    hook = model.model.visual.blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    family = family_of(model)
    places = []
    for _, rows, columns in inputs["image_grid_thw"].tolist():
        corners = torch.cartesian_prod(torch.arange(0, rows, 2), torch.arange(0, columns, 2))
        places.append(corners[:, None] + torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]))
    packing = family.packing("image", [(1, 4, 4), (1, 4, 2)])
    ours = family.rotary("image", torch.cat(places)[packing.order].flatten(0, 1).float())
    for mine, own in zip(ours, seen["position_embeddings"], strict=True):
        assert torch.equal(mine, own)


def test_an_encoder_with_windows_needs_a_grid():
    model, inputs = model_of("qwen2_5_vl"), Prompts("qwen2_5_vl", (3, "image", 5)).batch()
    with (
        vt.trim(model, vt.ToMe(keep=0.5, proportional=False)),
        pytest.raises(vt.TrimError, match=r"left no grid of the 1 x 4 x 4 tokens.*such as luvc"),
    ):
        model(**inputs)


def test_tiles_of_a_batch_need_equal_numbers():
    model, inputs = model_of("internvl"), Prompts("internvl", (3, "image", 5)).batch()
    with (
        vt.trim(model, vt.ToMe(keep=5, proportional=False)),
        pytest.raises(vt.TrimError, match=r"leave 3 and 4 tokens of tiles.*or per='tile'"),
    ):
        model(**inputs)
    with vt.trim(model, vt.ToMe(keep=3, proportional=False), per="tile") as run:
        model(**inputs)
    assert [len(image.stages[-1].index) for image in run.trace.images] == [3, 3]


@every_name
def test_layers_without_a_mask_cannot_weigh_by_mass(name):
    with pytest.raises(vt.TrimError, match=r"which the encoder of \w+ cannot do: set proportional=false"):
        vt.trim(model_of(name), "tome", keep=0.5)
