"""What attention does, against eager attention maps of the stock model."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from visiontrim.analyze.attention import BINS, POINTS, observe
from visiontrim.ask import load
from visiontrim.cli import main
from visiontrim.evaluate.asking import encode
from visiontrim.evaluate.suites import shapes


@pytest.fixture(scope="module")
def speaker():
    return load()


def test_sums_equal_the_published_definitions_on_eager_maps(speaker):
    """By a plain loop over the positions, as FasterVLM's programs define the four kinds."""
    items = list(itertools.islice(shapes("standard"), 2))
    found = observe(speaker, items)
    assert found.prompts == 2
    model = speaker.model
    model.set_attn_implementation("eager")
    try:
        expected: dict[str, np.ndarray] = {}
        for item in items:
            inputs = encode(speaker, [item])
            with torch.no_grad():
                output = model(**inputs, output_attentions=True)
            image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
            first, end = int(image[0]), int(image[-1]) + 1
            maps = torch.stack([layer[0].mean(0) for layer in output.attentions]).double().numpy()
            length, tokens, behind = maps.shape[-1], end - first, maps.shape[-1] - end
            see = tokens - np.arange(tokens)
            rows = {
                "last": (maps[:, -1:], 1, 1),
                "text": (maps[:, end : length - 1], behind, behind - 1),
                "image": (maps[:, first:end], see, tokens),
                "all": (maps[:, first:], see + behind, tokens + behind),
            }
            for kind, (attention, divisor, queries) in rows.items():
                raw = attention[:, :, first:end].sum(1) / divisor
                every = attention.sum(1) / queries
                parts = [every[:, :first].sum(1), every[:, first:end].sum(1), every[:, end:].sum(1)]
                values = {"raw": raw, "maps": (raw / raw.sum(1, keepdims=True)).reshape(-1, 24, 24)}
                for name, value in (values | {"shares": np.stack(parts, 1)}).items():
                    expected[f"{kind} {name}"] = expected.get(f"{kind} {name}", 0) + value / len(items)
    finally:
        model.set_attn_implementation("sdpa")
    for key, values in expected.items():
        kind, name = key.split()
        ours = np.stack([getattr(source, name) for source in found.decoder[kind]]) / found.prompts
        np.testing.assert_allclose(ours, values, atol=1e-6, err_msg=key)
    assert not np.allclose(expected["all raw"], expected["image raw"])


def test_the_histogram_is_of_values_over_the_largest_of_all_prompts(speaker):
    found = observe(speaker, shapes("standard"), 2)
    source = found.decoder["last"][1]
    values = np.concatenate(source.values)
    assert len(values) == 2 * 576
    share = source.histogram
    assert len(share) == len(BINS) - 1 == 200
    assert share.sum() == pytest.approx(1.0)
    assert share[0] == pytest.approx(np.mean(values < values.max() / 200))
    assert found.encoder.histogram.sum() == pytest.approx(1.0)


def test_curves_and_histograms_are_what_their_names_say(speaker):
    found = observe(speaker, shapes("standard"), 1).to_dict()
    sources = [found["encoder"], *found["decoder"]["last"], *found["decoder"]["all"]]
    for source in sources:
        curve = source["cumulative"]
        assert len(curve) == POINTS
        assert curve == sorted(curve)
        assert curve[-1] == pytest.approx(1.0)
        assert 0 <= source["entropy"] <= 1
        assert 0 <= source["height"] <= 1
    assert found["encoder"]["overlap"] == 1.0
    assert sum(found["decoder"]["last"][0]["shares"]) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["shift", "dispersion", "layers"])
def test_pictures_and_numbers_of_a_file(kind, tmp_path, monkeypatch):
    item = next(shapes("standard"))
    item.pictures()[0].save(tmp_path / "a.png")
    turns = [{"from": "human", "value": f"<image>\n{item.question}"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns}) + "\n")
    arguments = ["analyze", kind, "--data", tmp_path / "q.jsonl", "--out", tmp_path / "seen"]
    monkeypatch.setattr(sys, "argv", ["visiontrim", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert json.loads((tmp_path / "seen.json").read_text())["prompts"] == 1
    assert Image.open(tmp_path / "seen.png").width > 500
    assert (tmp_path / "seen-bars.png").exists() == (kind == "shift")
