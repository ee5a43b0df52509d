"""The numbers of the published VisionTrim code (tests/golden/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from visiontrim.core.errors import TrimError
from visiontrim.core.signals import EncoderSignals, Text, TextSignals
from visiontrim.core.view import View
from visiontrim.methods import VisionTrim
from visiontrim.ops.affinity import local_affinity
from visiontrim.ops.attention import attention_received, attention_rows
from visiontrim.ops.complement import complement
from visiontrim.ops.fusion import fuse
from visiontrim.ops.select import gather, leftovers, top_k

GOLDEN = Path(__file__).parent / "golden"


def load(path):
    with np.load(GOLDEN / path) as arrays:
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def coordinates(side, batch):
    return torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side)).expand(batch, -1, -1)


def close(ours, golden):
    torch.testing.assert_close(ours, golden, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=["release_small", "release_576"])
def release(request):
    """A case, and what a tiny CLIP model gives for it: hidden states, queries and keys, text features."""
    case = load(f"{request.param}/case.npz")
    model = CLIPModel.from_pretrained(GOLDEN / request.param, attn_implementation="eager").eval()
    attention = model.vision_model.encoder.layers[-2].self_attn
    heads = {}

    def split(name):
        def hook(module, args, output):
            heads[name] = output.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

        return hook

    attention.q_proj.register_forward_hook(split("query"))
    attention.k_proj.register_forward_hook(split("key"))
    with torch.no_grad():
        vision = model.vision_model(case["pixel_values"], output_hidden_states=True)
        features = vision.hidden_states[-2][:, 1:]
        text = model.text_projection(model.text_model(case["input_ids"]).last_hidden_state)
        joint = model.visual_projection(features)
    batch, tokens = features.shape[:2]
    view = View(
        features=features,
        coordinates=coordinates(round(tokens**0.5), batch),
        grid=(1, round(tokens**0.5), round(tokens**0.5)),
        entered=tokens,
        num_layers=32,
        encoder=EncoderSignals(
            cls_attention=attention_rows(heads["query"][:, :, :1], heads["key"])[..., 0, 1:].mean(1),
            received_attention=attention_received(heads["query"], heads["key"], chunk=100),
        ),
        text=TextSignals(
            joint=joint,
            question=Text(text, torch.ones(text.shape[:2], dtype=torch.bool), model.logit_scale.exp().item()),
        ),
    )
    return case, view


def test_inputs_of_the_release(release):
    case, view = release
    close(view.features, case["hidden"][:, 1:])
    close(view.text.question.tokens, case["text_projection"])


def test_attention_of_the_release(release):
    """Relative precision: the values themselves are about 1 / N."""
    case, view = release
    torch.testing.assert_close(view.encoder.cls_attention, case["cls_attention"], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(view.encoder.received_attention, case["received_attention"], rtol=1e-4, atol=1e-8)


def test_vision_stage_of_the_release(release):
    case, view = release
    dominant, added = int(case["K"]), int(case["R"])
    method = VisionTrim(keep=dominant + added, split=dominant / (dominant + added), variant="release")
    (step,) = method.steps()
    keep = step.select(view)

    assert torch.equal(keep.index[:, :dominant], case["dominant_index"])
    rest = leftovers(case["dominant_index"], view.total)
    assert torch.equal(keep.index[:, dominant:], gather(rest, case["complement_index_in_rest"]))
    close(step.score(view), case["metric"])
    assert torch.equal(keep.features[:, :dominant], gather(view.features, keep.index[:, :dominant]))
    close(keep.features[:, dominant:], case["complement"])
    close(keep.features, case["final"])
    assert method.positions == "compact"
    assert torch.equal(keep.complement, (torch.arange(dominant + added) >= dominant).expand_as(keep.index))


def test_rounds_of_the_release(release):
    """The golden cases have the three rounds of the released code, whatever ours are."""
    case, _ = release
    assert int(case["T"]) == 3
    with pytest.raises(TrimError, match="variant='release' has no iterations=2"):
        VisionTrim(variant="release", iterations=2)


@pytest.fixture(scope="module", params=["visiontrim_small", "visiontrim_576"])
def rows(request):
    return load(f"{request.param}.npz")


def release_affinity(features):
    side = round(features.shape[1] ** 0.5)
    return local_affinity(
        features, coordinates(side, len(features)), (1, side, side), sigma="entries", centre=True, border="window"
    )


def test_local_affinity_of_the_release(rows):
    torch.testing.assert_close(release_affinity(rows["features"]), rows["ltam_mean"], rtol=1e-5, atol=1e-5)
    close(release_affinity(rows["features"]).softmax(-1), rows["ltam_softmax"])


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ("fused_adaptive", "adaptive"),
        ("fused_geometric", "geometric"),
        ("fused_max", "max"),
        ("fused_weighted_sum", "mean"),
        ("fused_harmonic", "harmonic"),
    ],
)
def test_fusion_of_the_release(rows, row, rule):
    """The release softmaxes the local score a second time: its local input is softmax(mean kernel)."""
    ours = fuse(rows["cls_attention"], release_affinity(rows["features"]).softmax(-1), rule)
    torch.testing.assert_close(ours, rows[row], rtol=1e-4, atol=1e-8)


def test_dominant_tokens_by_the_fused_score_of_the_release(rows):
    fused = fuse(rows["cls_attention"], release_affinity(rows["features"]).softmax(-1), "adaptive")
    assert torch.equal(top_k(fused, rows["dominant_index"].shape[1]), rows["dominant_index"])


def test_complement_of_the_release(rows):
    rest = gather(rows["features"], leftovers(rows["dominant_index"], rows["features"].shape[1]))
    text = rows["text_features"]
    ours = complement(
        rest,
        rest @ rows["visual_projection"].T,
        text,
        torch.ones(text.shape[:2], dtype=torch.bool),
        rows["complement_index_in_rest"].shape[1],
        scale=rows["logit_scale"].exp().item(),
        scores="raw",
        merge="uniform",
    )
    assert torch.equal(ours.centres, rows["complement_index_in_rest"])
    close(ours.features, rows["complement_tokens"])
