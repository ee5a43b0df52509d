"""Which encoder layer each signal comes from: a whole LLaVA with CLIP's 24 layers, against the authors' code."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel

import visiontrim as vt
from goldens import load
from visiontrim.engine.entrance import Entrance

CASES = {
    "fastervlm_58": vt.FasterVLM(keep=58),
    "hiprune_64": vt.HiPrune(keep=64, variant="release"),
    "vscan_96": vt.VScan(keep=96, stages="vision"),
    "visionzip_64": vt.VisionZip(keep=64, split=54 / 64, variant="release"),
    "prunesid_20": vt.PruneSID(keep=20, variant="release"),
    "divprune_56": vt.DivPrune(keep=56),
    "prumerge": vt.PruMerge(keep=None, variant="release"),
    "prumerge-plus": vt.PruMergePlus(keep=None, variant="release"),
}


@pytest.fixture(scope="module")
def tower():
    arrays = load("tower")
    width, heads, intermediate, patch = arrays["width_heads_intermediate_patch"].tolist()
    language = int(arrays["language_width"])
    side = arrays["pixel_values"].shape[-1]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            patch_size=patch,
            image_size=side,
            num_hidden_layers=24,
            projection_dim=width,
        ),
        text_config=LlamaConfig(
            vocab_size=40, hidden_size=language, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ),
        image_token_id=4,
    )
    model = LlavaModel(config).eval()
    weights = {}
    for name, value in arrays.items():
        if "#" in name:
            weights |= {name.replace("#", str(layer)): part for layer, part in enumerate(value)}
        elif "." in name:
            weights[name] = value
    own = model.state_dict()
    # a release of transformers may have one module more between the tower and its layers
    inner = {
        name.replace("vision_tower.vision_model.", "vision_tower."): name for name in own if name[:8] != "language"
    }
    assert set(inner) - {"vision_tower.embeddings.position_ids"} == set(weights)
    model.load_state_dict({inner[name]: value for name, value in weights.items()}, strict=False)
    return model, arrays


@pytest.mark.parametrize("name", CASES)
def test_golden_tower(name, tower):
    model, arrays = tower
    with torch.no_grad():
        (entered,) = Entrance(model, CASES[name])(pixel_values=arrays["pixel_values"])
    expected = arrays[f"expected_{name}_tokens"]
    assert entered.features.shape == expected.shape
    if name == "visionzip_64":
        assert set(arrays[f"expected_{name}_dominant"].tolist()) < set(entered.index.tolist())
    elif f"expected_{name}_index" in arrays:
        assert sorted(entered.index.tolist()) == sorted(arrays[f"expected_{name}_index"].tolist())
    torch.testing.assert_close(entered.features, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
