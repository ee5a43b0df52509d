"""Methods at the vision encoder's output equal their authors' code on the same tensors (tests/golden/peers)."""

from __future__ import annotations

import pytest
import torch

import visiontrim as vt
from goldens import PEERS, close, load, view_of
from test_golden_peers_inside import FILES as INSIDE
from visiontrim.core.signals import Text
from visiontrim.core.view import Keep
from visiontrim.methods.prunesid import PruneSID
from visiontrim.ops.groups import first_members

FILES = {
    "cdpruner",
    "divprune",
    "fastervlm",
    "hiprune",
    "mmtok",
    "ppe",
    "prumerge",
    "prunesid",
    "visionzip",
    "vispruner",
    "visiontrim",
    "vscan",
}
"""What the tests here read."""


def test_every_golden_file_has_a_test():
    assert {path.stem for path in PEERS.glob("*.npz")} == FILES | INSIDE | {"tower"}


def select(method: vt.Method, view: vt.View) -> Keep:
    return method.steps()[0].select(view)


def words(tokens: torch.Tensor, scale: float = 100.0, ends: bool = False) -> Text:
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return Text(tokens, mask, scale, mask if ends else None)


@pytest.mark.parametrize("size", ["published", "small"])
def test_golden_visiontrim(size):
    case = load("visiontrim", size)
    dominant, added = case["dominant_complement"].tolist()
    view = view_of(
        case["features"],
        case["grid"],
        encoder_cls_attention=case["cls_attention"],
        encoder_received_attention=case["received_attention"],
        text_joint=case["joint"],
        text_question=words(case["text"], float(case["scale"])),
    )
    kept = select(vt.VisionTrim(keep=dominant + added, split=dominant / (dominant + added), variant="release"), view)
    assert torch.equal(kept.index[:, :dominant], case["dominant_index"])
    close(kept.features, case["tokens"])


@pytest.mark.parametrize("size", ["published", "small"])
def test_golden_visionzip(size):
    case = load("visionzip", size)
    dominant, contextual = case["dominant_contextual"].tolist()
    view = view_of(
        case["features"],
        case["grid"],
        encoder_cls_attention=case["cls_attention"],
        encoder_keys=case["encoder_keys"],
    )
    total = dominant + contextual
    kept = select(vt.VisionZip(keep=total, split=dominant / total, variant="release"), view)
    assert torch.equal(kept.index[:, :dominant], case["dominant_index"])
    close(kept.features, case["tokens"])


def test_golden_fastervlm():
    case = load("fastervlm")
    view = view_of(case["cls_attention"][..., None], case["grid"], encoder_cls_attention=case["cls_attention"])
    for count in (144, 58, 29):
        assert torch.equal(select(vt.FasterVLM(keep=count), view).index, case[f"index_{count}"])


@pytest.mark.parametrize("name", ["a", "b"])
def test_golden_vispruner(name):
    """In float64: a swap of two near-equal cosines changes most later picks."""
    case = load("vispruner", name)
    view = view_of(case["features"].double(), case["grid"], encoder_cls_attention=case["cls_attention"].double())
    method = vt.VisPruner(keep=int(case["keep"]), important=float(case["important"]))
    assert torch.equal(select(method, view).index, case["index"])


@pytest.mark.parametrize("size", ["published", "small"])
def test_golden_cdpruner(size):
    case = load("cdpruner", size)
    view = view_of(
        case["projected"],
        case["grid"],
        encoder_projected=case["projected"],
        text_joint_normalised=case["patch_embeddings"],
        text_question=words(case["text_embeddings"][None], ends=True),
    )
    assert torch.equal(select(vt.CDPruner(keep=int(case["keep"])), view).index, case["index"])


@pytest.mark.parametrize("size", ["published", "small"])
def test_golden_divprune(size):
    case = load("divprune", size)
    view = view_of(case["projected"], case["grid"], encoder_projected=case["projected"])
    assert torch.equal(select(vt.DivPrune(keep=float(case["ratio"])), view).index, case["index"])


def test_golden_vscan():
    case = load("vscan")
    view = view_of(
        case["projected"],
        case["grid"],
        encoder_cls_attention=case["deep_attention"],
        encoder_cls_attention__5=case["shallow_attention"],
        encoder_projected=case["projected"],
    )
    for count in (96, 64):
        kept = select(vt.VScan(keep=count, stages="vision"), view)
        assert torch.equal(kept.index, case[f"index_{count}"])
        close(kept.projected, case[f"tokens_{count}"])


def prumerge_view(case):
    signals = {"encoder_cls_attention_wide__-1": case["cls_attention_wide"], "encoder_keys__-1": case["encoder_keys"]}
    return view_of(case["features"], case["grid"], **signals)


@pytest.mark.parametrize(("method", "tokens"), [(vt.PruMerge, "tokens_plain"), (vt.PruMergePlus, "tokens_plus")])
def test_golden_prumerge(method, tokens):
    case = load("prumerge")
    kept = select(method(keep=None, variant="release"), prumerge_view(case))
    assert method is vt.PruMergePlus or kept.index.shape[1] == int(case["outliers"]) + 1
    close(kept.features, case[tokens])


@pytest.mark.parametrize("size", ["published", "small"])
def test_golden_prunesid(size):
    case = load("prunesid", size)
    view = view_of(case["features"], case["grid"], encoder_cls_attention=case["cls_attention"])
    assert torch.equal(select(PruneSID(keep=int(case["keep"]), variant="release"), view).index, case["index"])


@pytest.mark.parametrize(("count", "share"), [(192, 0.1), (128, 0.1), (64, 0.1), (64, 0.6)])
def test_golden_hiprune(count, share):
    case = load("hiprune")
    expected = case[f"index_{count}_{round(100 * share)}"]
    view = view_of(
        case["deep_columns"][..., None],
        case["grid"],
        encoder_column_attention=case["deep_columns"],
        encoder_column_attention__8=case["middle_columns"],
    )
    assert torch.equal(select(vt.HiPrune(keep=count, share=share, variant="release"), view).index, expected)


@pytest.mark.parametrize("model", ["llava", "qwen"])
def test_golden_mmtok(model):
    case = load("mmtok", model)
    view = view_of(case["features"], case["grid"], encoder_projected=case["projected"], text_words=words(case["words"]))
    method = vt.MMTok(keep=int(case["keep"]), text_temperature=float(case["text_temperature"]))
    assert torch.equal(select(method, view).index, case["index"])


@pytest.mark.parametrize("name", ["image", "frames"])
def test_golden_ppe(name):
    case = load("ppe", name)
    view = view_of(case["projected"], case["grid"], encoder_projected=case["projected"])
    kept = select(vt.PPE(keep=int(case["keep"])), view)
    place = torch.arange(view.total)
    first = [int(place[kept.assignment[0] == cluster].min()) for cluster in kept.assignment[0].tolist()]
    assert first == case["first_member"].tolist()
    by_first = torch.tensor(sorted(set(first)))
    order = kept.assignment[0][by_first]
    close(kept.projected[0, order], case["tokens"])
    # the released code's rule of members: the last ones first, begun anew
    members = first_members(kept.assignment, place[None].float(), int(case["keep"]), 8)
    assert torch.equal(members[0, order], case["members"])
