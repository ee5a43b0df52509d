"""Model types that have no row of their own in tests/families.py: tiny models from their default configurations."""

from __future__ import annotations

import warnings

import pytest
import torch

import visiontrim as vt
from model_types import RUN_SHRUNK
from releases import CACHE, cache_of
from shrunk import CHANGES, END, LAYERS, START, VIDEO, built, difference, hidden_of, prompts, together
from shrunk_images import of_row, pixels_of
from tiny import Masked, close, generate
from visiontrim.models import family_of

pytestmark = pytest.mark.usefixtures("no_grad")

VISION = vt.Random(keep=0.5)
BOTH = VISION | vt.Random(keep=0.5, layer=3)
OWN_LAYOUT = (
    *("apertus1p5", "cohere_compass", "cosmos3_edge", "deepseek_ocr2", "emu3", "ernie4_5_vl_moe", "fuyu"),
    *("granite_docling", "hunyuan_vl", "idefics2", "molmo2"),
)
"""Types with layouts of their own, which also go through batches and turns here."""


@pytest.mark.parametrize("name", RUN_SHRUNK)
def test_what_is_removed_is_unseen(name):
    """A padded batch with three images, of two shapes where the type takes any: as masked, or fed what is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = built(name)
        family = family_of(model)
        batch = together(model, prompts(model))
        plain = generate(model, batch, max_new_tokens=2)
        with vt.trim(model, VISION if family.bidirectional else BOTH) as run:
            ours = generate(model, batch, max_new_tokens=2)
        assert difference(model, family, batch, ours, run.trace) < 2e-5
        with vt.trim(model, vt.Random(keep=1.0)):
            whole = generate(model, batch, max_new_tokens=2)
    assert all(a.equal(b) for a, b in zip(whole.logits, plain.logits, strict=True))
    assert (ours.logits[0] - plain.logits[0]).abs().max() > 0.01
    stay = 2 if name == "hunyuan_vl" else 0  # where an image begins and ends
    half = [stay + max(1, round(image.total / 2)) for image in run.trace.images]
    assert [image.per_layer[0] for image in run.trace.images] == half
    assert len({image.number for image in run.trace.images}) == 3
    last = half if family.bidirectional else [stay + max(1, round(image.total / 4)) for image in run.trace.images]
    assert [image.per_layer[LAYERS - 1] for image in run.trace.images] == last
    if family.attentions("image"):
        with vt.trim(model, vt.VisionTrim(keep=0.5, stages="vision")) as run:
            answer = generate(model, batch, max_new_tokens=1)
        assert [image.per_layer[0] for image in run.trace.images] == half
        assert torch.isfinite(answer.logits[0]).all()


@pytest.mark.parametrize("name", OWN_LAYOUT)
def test_a_batch_equals_its_rows_and_goes_on_from_its_cache(name):
    model = built(name)
    family, rows = family_of(model), prompts(model)
    plan = VISION if family.bidirectional else BOTH
    with vt.trim(model, plan) as run:
        both = generate(model, together(model, rows), max_new_tokens=2)
        alone = [generate(model, together(model, [row]), max_new_tokens=2) for row in rows]
        for number, first in enumerate(alone):
            if name == "hunyuan_vl" and number:  # counts its images over all rows of a batch, also when it is plain
                continue
            for ours, single in zip(both.logits, first.logits, strict=True):
                close(ours[number], single[0], 2e-5)
        row, first = rows[-1], alone[-1]
        hidden = hidden_of(model, family, row["input_ids"], run.trace)
        asked = torch.cat([first.sequences, torch.tensor([[50, 51, 52]])], 1)
        whole = together(model, [row | {"input_ids": asked}]) | {"attention_mask": torch.ones_like(asked)}
        later = {key: value for key, value in whole.items() if not key.startswith("pixel_values")}
        second = generate(model, later | {CACHE: cache_of(first)}, max_new_tokens=2)
    with Masked(model, torch.ones_like(row["input_ids"]), hidden):
        reference = generate(model, whole, max_new_tokens=2)
    for ours, masked in zip(second.logits, reference.logits, strict=True):
        close(ours, masked, 2e-5)


@pytest.mark.parametrize("name", ["cohere_compass", "cosmos3_edge", "ernie4_5_vl_moe"])
def test_a_video_beside_an_image(name):
    model, generator = built(name), torch.Generator().manual_seed(5)
    vision = model.config.vision_config
    values = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    sizes = {"image": (1, 4, 4), "video": (4, 2, 8)}
    inputs = {f"{kind}_grid_thw": torch.tensor([size]) for kind, size in sizes.items()}
    for key, patches in (("pixel_values", 16), ("pixel_values_videos", 64)):
        inputs[key] = torch.randn(patches, values, generator=generator)
    frame = [START, *[VIDEO] * 4, END]
    video = [START, *[VIDEO] * 8, END] if name == "ernie4_5_vl_moe" else [*frame, 11, *frame, 12, *frame, 13, *frame]
    inputs["input_ids"] = torch.tensor([[1, 20, START, 3, 3, 3, 3, END, 21, *video, 22, 23]])
    batch = together(model, [inputs])
    with vt.trim(model, BOTH) as run:
        ours = generate(model, batch, max_new_tokens=2)
    grids = [image.grid for image in run.trace.images]
    assert grids == [(1, 2, 2), (2 if name == "ernie4_5_vl_moe" else 4, 1, 4)]
    assert [image.per_layer[LAYERS - 1] for image in run.trace.images] == [1, grids[1][0]]
    assert difference_of_kinds(model, batch, ours, run.trace) < 2e-5
    with vt.trim(model, vt.VisionTrim(keep=0.5, stages="vision")) as run:
        generate(model, batch, max_new_tokens=1)
    assert [len(image.stages[0].index) for image in run.trace.images] == [2, 2 * grids[1][0]]


def difference_of_kinds(model, batch, ours, trace) -> float:
    """How far the logits are from the masked model's; placeholders of images come before those of videos."""
    ids, hidden = batch["input_ids"], {}
    for image, token in zip(trace.images, (3, VIDEO), strict=True):
        block = (ids[0] == token).nonzero()[:, 0]
        for stage in image.stages:
            gone = torch.ones(image.total, dtype=torch.bool)
            gone[stage.index] = False
            layer = getattr(stage.site, "index", 0)
            hidden.setdefault(layer, torch.zeros_like(ids, dtype=torch.bool))[0, block[gone]] = True
    with Masked(model, batch["attention_mask"], dict(sorted(hidden.items()))):
        reference = generate(model, batch, max_new_tokens=len(ours.logits))
    return float((torch.stack(ours.logits) - torch.stack(reference.logits)).abs().max())


def test_small_gemma_4_takes_the_last_token_alone_through_layers_that_share():
    """As E2B and E4B do: these layers use keys and values of earlier ones, and every layer has inputs of its own."""
    kinds = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    shares = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "layer_types": kinds}
    model = built("gemma4", CHANGES["gemma4"] | {"text_config": shares})
    batch = together(model, prompts(model))
    plain = generate(model, batch, max_new_tokens=3)
    with vt.trim(model, VISION) as run:
        ours = generate(model, batch, max_new_tokens=3)
        single = model(**batch, logits_to_keep=2).logits
    assert difference(model, family_of(model), batch, ours, run.trace) < 2e-5
    assert (ours.logits[0] - plain.logits[0]).abs().max() > 0.01
    close(single[:, -1], ours.logits[0], 2e-5)
    with vt.trim(model, vt.Random(keep=1.0)):
        whole = generate(model, batch, max_new_tokens=3)
    assert all(a.equal(b) for a, b in zip(whole.logits, plain.logits, strict=True))


def test_tokens_behind_the_rows_of_molmo_2_go_with_their_grid():
    """They are text, but attend as image tokens do, and mean nothing once the grid is gone."""
    model, column = built("molmo2"), 9
    given = [pixels_of(model, number) for number in (0, 1)]
    grid = [START, *[3, 3, column] * 2, END]
    ids = torch.tensor([[1, 20, *grid, 21, *grid, *grid, 22, 23]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {key: of_row(key, given) for key in given[0]}
    inputs["mm_token_type_ids"] = torch.isin(ids, torch.tensor([3, column])).long()
    plain = generate(model, inputs, max_new_tokens=2)
    with vt.trim(model, vt.Random(keep=1.0)) as run:
        whole = generate(model, inputs, max_new_tokens=2)
    assert all(a.equal(b) for a, b in zip(whole.logits, plain.logits, strict=True))
    assert [image.per_layer[0] for image in run.trace.images] == [6, 6, 6]
    with vt.trim(model, VISION) as run:
        ours = generate(model, inputs, max_new_tokens=2)
    assert [image.per_layer[0] for image in run.trace.images] == [2, 2, 2]
    hidden = ids == column
    for image, block in zip(run.trace.images, (ids[0] == 3).nonzero()[:, 0].split(4), strict=True):
        gone = torch.ones(4, dtype=torch.bool)
        gone[image.stages[0].index] = False
        hidden[0, block[gone]] = True
    with Masked(model, inputs["attention_mask"], {0: hidden}):
        reference = generate(model, inputs, max_new_tokens=2)
    for a, b in zip(ours.logits, reference.logits, strict=True):
        close(a, b, 2e-5)
