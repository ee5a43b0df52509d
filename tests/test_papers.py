"""Every call of docs/papers.md can be written as it stands there, and keeps what it says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from peers import make_view
from visiontrim.core.method import VisionOutput
from visiontrim.core.registry import list_methods, load_method
from visiontrim.core.view import View

PAPERS = (Path(__file__).parent.parent / "docs" / "papers.md").read_text()
AT_THE_ENCODER = PAPERS[PAPERS.index("## At the vision encoder's output") :].split("\n## ")[0]
ROWS = re.findall(r"^\| [^|]+ \| `([^`]+)` \| ([^|]+) \|(?: ([^|]+) \|)?$", AT_THE_ENCODER, re.MULTILINE)


@pytest.fixture(scope="module")
def llava_image() -> View:
    view = make_view(grid=(1, 24, 24), batch=1, dim=32)
    signals = {name: getattr(view, name) for name in ("cls_attention", "column_attention", "encoder_keys")}
    signals["cls_attention_wide"] = view.cls_attention
    return dataclasses.replace(view, at={(name, layer): signals[name] for name in signals for layer in range(-24, 24)})


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
        assert int(count) == (16 * entered + 16 * remaining) / 32
    else:
        assert entered == int(count)
    if "+" in parts:
        clusters = int(kept.complement.sum())
        assert parts == f"{entered - clusters} + {clusters}"


def test_no_paper_is_forgotten():
    """Every method of the page is known, and those of the encoder's output are all there."""
    written = {call.split(":")[0] for call, _, _ in ROWS}
    methods = list_methods()
    assert written <= set(methods)
    at_the_encoder = {
        name
        for name, cls in methods.items()
        if cls.paper != "control" and cls().steps() and cls().steps()[0].site == VisionOutput()
    }
    assert at_the_encoder - written <= {"visiontrim"}
