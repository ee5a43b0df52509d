"""Pixels and colours as the bundled Qwen2.5-VL's own processor gives them, and distances of PixelPrune in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from PIL import Image

import visiontrim as vt
from families import squares_of
from tiny import close
from visiontrim import zoo
from visiontrim.core.method import EncoderLayer

pytestmark = pytest.mark.usefixtures("no_grad")


def test_pixels_of_the_processor_of_qwen():
    """Every token has the pixels of its cell of the picture, in levels once the normalisation is undone."""
    bundle = zoo.load_qwen()
    levels = torch.randint(0, 256, (3, 96, 132), generator=torch.Generator().manual_seed(0)).byte()
    picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
    inputs = bundle.processor(images=picture, text="<image> ?", return_tensors="pt")
    seen = {}

    @dataclass(frozen=True)
    class Look(vt.Step):
        name: ClassVar[str] = "look"
        needs: ClassVar[frozenset] = frozenset({"encoder.pixels", "encoder.colours"})  # pyright: ignore[reportIncompatibleMethodOverride]
        site: ClassVar[EncoderLayer] = EncoderLayer(0)  # pyright: ignore[reportIncompatibleMethodOverride]

        def select(self, view: vt.View) -> vt.Keep:
            seen.update(view=view)
            return vt.Keep.everything(view)

    with vt.trim(bundle.model, Look(), processor=bundle.processor):
        bundle.model(**inputs)
    view, expected = seen["view"], torch.stack(squares_of(levels, 12))
    assert view.grid == (1, 8, 11)
    restored = ((view.encoder.colours[0] + 0.5) * 255).view(88, 3, 2, 2, 6, 6)  # with the mean; patch by patch
    restored = restored.transpose(3, 4).reshape(88, 3, 144)
    close(restored, expected.float(), 1e-3)
    close(view.encoder.colours[0], view.encoder.pixels[0] * (64 / 255), 1e-6)


def test_a_distance_is_one_of_colours():
    """Cells of the bundled model's picture that differ by three levels, then by two; the processor knows the scale."""
    bundle = zoo.load_qwen()
    rows = torch.tensor([100, 103, 105, 105, 150, 150, 150, 150]).byte().repeat_interleave(12)
    picture = Image.fromarray(rows[:, None, None].expand(96, 96, 3).contiguous().numpy())
    inputs = bundle.processor(images=picture, text="<image> ?", return_tensors="pt")
    kept = {}
    for tau in (0.0, 2 / 255, 3 / 255, 5 / 255):
        with vt.trim(bundle.model, vt.PixelPrune(tau=tau, minimum=1), processor=bundle.processor) as run:
            bundle.model(**inputs)
        kept[tau] = [place // 8 for place in run.trace.images[0].stages[0].index.tolist()]
    assert list(kept.values()) == [[0, 1, 2, 4], [0, 1, 4], [0, 2, 4], [0, 4]]
