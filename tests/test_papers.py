"""Every call of docs/papers.md can be written as it stands there, and keeps what it says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from language import left_by, mean
from peers import make_view
from views import changed
from visiontrim.core.budget import mean_per_layer
from visiontrim.core.method import EncoderLayer, Layers, VisionOutput
from visiontrim.core.registry import list_methods, load_method
from visiontrim.core.view import View
from visiontrim.methods.matching import Matching
from visiontrim.methods.twostage import TwoStage

PAPERS = (Path(__file__).parent.parent / "docs" / "papers.md").read_text()


def rows(section: str, cells: str) -> list[tuple[str, ...]]:
    """The calls of a section, with what stands in the cells after them."""
    text = PAPERS[PAPERS.index(f"\n## {section}\n") + 1 :].split("\n## ")[0]
    return re.findall(rf"^\| .+? \| `([^`]+)` \| {cells} \|$", text, re.MULTILINE)


INSIDE = rows("Inside the vision encoder", r"(\d+|by image) \| (\d+|by image)")
ROWS = rows("At the vision encoder's output", r"([^|]+?)(?: \| ([^|]+))?")
VIDEOS = rows("Video", r"(\d+) x (\d+) x (\d+) \| (\d+)")
LANGUAGE = rows("Inside the language model", r"([\d, .]+) \| ([\d.]+)")


@pytest.fixture(scope="module")
def llava_image() -> View:
    view = make_view(grid=(1, 24, 24), batch=1, dim=32)
    signals = {f"encoder.{name}": view.encoder[name] for name in ("cls_attention", "column_attention", "keys")}
    signals["encoder.cls_attention_wide"] = view.encoder.cls_attention
    of_layers = {(name, layer): signals[name] for name in signals for layer in range(-24, 24)}
    blots = (view.features[:, :, :2] > 1).float()[:, :, None]
    return changed(view, of_layers | {"encoder.pixels": blots, "encoder.colours": blots})


@pytest.mark.parametrize(("call", "count", "parts"), ROWS, ids=[row[0] for row in ROWS])
def test_calls_keep_what_the_page_says(call, count, parts, llava_image):
    view, method = llava_image, load_method(call)
    first, *later = method.steps()
    assert first.site == VisionOutput()
    kept = first.select(view)
    entered = kept.index.shape[1]
    if count == "by image":
        assert 1 <= entered < 576
    elif "->" in parts:
        remaining = later[0].method.remaining(dataclasses.replace(view, entered=entered)) if later else entered
        assert parts == f"{entered} -> {remaining}"
        first_layers = later[0].site.index if later else 16
        assert int(count) == round((first_layers * entered + (32 - first_layers) * remaining) / 32)
    else:
        assert entered == int(count)
    if "+" in parts:
        clusters = int(kept.complement.sum())
        assert parts == f"{entered - clusters} + {clusters}"


def first_tokens(view: View, count: int, entered: int = 576) -> View:
    """The first tokens of ``view``, without signals."""
    return View(view.features[:, :count], view.coordinates[:, :count], view.grid, entered, view.num_layers)


@pytest.mark.parametrize(("call", "tokens", "last"), INSIDE, ids=[row[0] for row in INSIDE])
def test_calls_inside_the_encoder_leave_what_the_page_says(call, tokens, last, llava_image):
    method = load_method(call)
    steps = method.steps_for(Layers(encoder=23, decoder=32))
    if isinstance(method, Matching):
        left = 576
        for number in range(1, len(steps) + 1):
            left -= method.count(first_tokens(llava_image, left), number, len(steps))
        assert (left, len(steps)) == (int(tokens), int(last))
        return
    first, *rest = steps
    entered = first.select(llava_image).index.shape[1]
    if not rest:  # PixelPrune
        assert entered < 576
        assert (tokens, first.site) == ("by image", EncoderLayer(int(last)))
        return
    stage = rest[-1]
    if tokens == "by image":
        assert entered < 576
        assert (576 - entered) % 8 == 0  # windows of nine became one token
        return
    assert entered == int(tokens)
    counts = [entered]
    for number in range(len(stage.layers)):
        now = first_tokens(llava_image, counts[-1], entered)
        counts.append(method.count(now, number, stage.layers))
    assert abs(mean_per_layer(entered, stage.layers, counts[1:], 32) - int(last)) <= 0.5


@pytest.mark.parametrize(("call", "left", "per_layer"), LANGUAGE, ids=[row[0] for row in LANGUAGE])
def test_calls_inside_the_language_model_leave_what_the_page_says(call, left, per_layer):
    method = load_method(call)
    sites = [step.site.index for step in method.steps()]
    counts = left_by(method)
    wanted = [int(count) for count in re.findall(r"\d+", left)]
    ours = [counts[site] for site in sites]
    assert (ours[:1] + ours[-1:] if "..." in left else ours) == wanted
    assert mean(method) == pytest.approx(float(per_layer), abs=0.051)


@pytest.mark.parametrize(("call", "frames", "height", "width", "count"), VIDEOS, ids=[row[0] for row in VIDEOS])
def test_calls_for_videos_keep_what_the_page_says(call, frames, height, width, count):
    view = make_view(grid=(int(frames), int(height), int(width)), batch=1)
    view = changed(view, {("encoder.cls_attention", 5): view.encoder.cls_attention})
    method = load_method(call.replace("\\|", "|"))
    first, *later = method.steps()
    assert first.select(view).index.shape == (1, int(count))
    assert len(later) == call.count("|") or isinstance(method, TwoStage)


def test_no_paper_is_forgotten():
    """Every method of the page is known, and every published method is on it or has a page of its own."""
    written = {re.split("[: ]", call)[0] for call, *_ in INSIDE + ROWS + VIDEOS + LANGUAGE}
    methods = list_methods()
    assert written <= set(methods)
    published = {name for name, method in methods.items() if method.paper != "control"}
    assert published - written <= {"luvc"}


def test_links_lead_to_sections():
    headings = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall("^#+ (.+)$", PAPERS, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAPERS)) <= headings
