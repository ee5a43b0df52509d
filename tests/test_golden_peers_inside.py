"""Methods in the encoder, for videos and in the language model equal their authors' code (tests/golden/peers)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import visiontrim as vt
from goldens import close, load, setting, view_of
from visiontrim.calibrate import _Listening  # pyright: ignore[reportPrivateUsage]
from visiontrim.core.method import Layers
from visiontrim.core.signals import Sides, Text
from visiontrim.core.view import Glance, Keep
from visiontrim.methods.dymu import DyMU
from visiontrim.ops.attention import attention_rows

FILES: set[str] = set()
"""What the tests here read."""


def golden(*names: str):
    """A test for each file, with its inputs and answers and its setting."""
    FILES.update(names)
    return pytest.mark.parametrize("name", names)


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    arrays = load(name)
    inputs = {key.removeprefix("in_"): value for key, value in arrays.items() if key.startswith("in_")}
    answers = {key.removeprefix("out_"): value for key, value in arrays.items() if key.startswith("out_")}
    return inputs, answers, setting(name)


def text(length: int) -> Text:
    return Text(torch.zeros(1, length, 1), torch.ones(1, length, dtype=torch.bool), 1.0)


def stage(method: vt.Method, view: vt.View, number: int = 0) -> Keep:
    return method.steps_for(Layers(24, 32))[number].select(view)


def same(index: Tensor, golden: Tensor) -> None:
    assert index[0].tolist() == golden.tolist()


# Before a decoder layer


@golden("fastv", "holitom_inner")
def test_golden_by_the_last_position(name):
    given, expected, how = read(name)
    rows = given["attention_last_row"].mean(0)[None]
    features = given.get("features", rows[0, :, None])[None]
    method = vt.FastV(keep=(how["keep"],)) if name == "fastv" else vt.HoliTomInner(keep=(how["keep"],))
    kept = stage(method, view_of(features, decoder_last_attention=rows))
    same(kept.index, expected["index"])
    if "features" in expected:
        close(kept.features[0], expected["features"])


def sparsevlm(name: str) -> tuple[Keep, dict[str, Tensor]]:
    given, expected, how = read(name)
    release = "v1.5" if name.endswith("v15") else "v2.0"
    signals = {
        "decoder_embeddings": Sides(given["vision_embeddings"][None], given["text_embeddings"][None]),
        "decoder_text_attention": given["text_attention"][None],
        "text_question": text(len(given["text_embeddings"])),
    }
    if release == "v2.0":
        signals["decoder_rotary"] = Sides(given["rotary_vision"][None], given["rotary_text"][None])
    kept = stage(vt.SparseVLM(keep=tuple(how["keep"]), version=release), view_of(given["features"][None], **signals))
    return kept, expected


@golden("sparsevlm_v15")
def test_golden_sparsevlm_with_recycling(name):
    kept, expected = sparsevlm(name)
    count = len(expected["index"])
    same(kept.index[:, :count], expected["index"])
    clusters = kept.features[0, count:]
    close(clusters[clusters[:, 0].argsort()], expected["clusters"])


@golden("sparsevlm_v20")
def test_golden_sparsevlm_plus(name):
    kept, expected = sparsevlm(name)
    same(kept.index, expected["index"])


@golden("pyramiddrop")
def test_golden_pyramiddrop(name):
    given, expected, how = read(name)
    rows = attention_rows(given["queries"][None], given["keys"][None], slice(-1, None), causal=True)[:, :, 0].mean(1)
    image = rows[:, how["start"] : how["start"] + how["tokens"]]
    kept = stage(vt.PyramidDrop(keep=tuple(how["keep"])), view_of(image[..., None], decoder_next_attention=image))
    same(kept.index, expected["index"])


@golden("v2drop")
def test_golden_v2drop(name):
    given, expected, how = read(name)
    method = vt.V2Drop(keep=tuple(how["keep"]))
    for number in range(3):
        seen = view_of(given[f"after_{number}"][None], decoder_previous=given[f"before_{number}"][None])
        same(stage(method, seen, number).index, expected[f"index_{number}"])


@golden("dart")
def test_golden_dart(name):
    given, expected, how = read(name)
    hidden = given["vision_hidden"][None]
    view = view_of(
        hidden,
        decoder_keys=Sides(given["vision_keys"][None], given["text_keys"][None]),
        decoder_normed=Sides(hidden, given["text_hidden"][None]),
        text_question=text(len(given["text_hidden"])),
    )
    same(stage(vt.DART(keep=(how["keep"],)), view).index, expected["index"])


@golden("ficoco_l_filter")
def test_golden_ficoco_l(name):
    given, expected, how = read(name)
    heads = Sides(given["vision_heads"][None], given["text_heads"][None])
    view = view_of(
        given["features"][None],
        decoder_queries=heads,
        decoder_keys=heads,
        text_question=text(given["text_heads"].shape[1]),
    )
    same(stage(vt.FiCoCoL(r=how["r"], beta=how["beta"]), view).index, expected["index"])


@golden("mustdrop_stage")
def test_golden_mustdrop_stage(name):
    given, expected, how = read(name)
    attention = given["text_attention"][None]
    view = view_of(
        torch.zeros(1, attention.shape[-1], 1),
        decoder_text_attention=attention,
        text_question=text(attention.shape[2]),
    )
    marked = torch.zeros(1, attention.shape[-1], dtype=torch.bool).scatter(1, given["key_set"][None], True)
    object.__setattr__(view, "marked", marked)
    kept = stage(vt.MustDrop(keep=None, thresholds=tuple(how["thresholds"]), stages="language"), view, 1)
    same(kept.index, expected["index"])


@golden("mustdrop_key")
def test_golden_mustdrop_key_set(name):
    given, expected, _ = read(name)
    attention = given["cls_attention"][None]
    signals = {"encoder_cls_attention__-1": attention}
    kept = stage(vt.MustDrop(stages="language"), view_of(attention[..., None], **signals))
    assert kept.marked[0].nonzero()[:, 0].tolist() == expected["index"].tolist()


@golden("mustdrop_windows")
def test_golden_mustdrop_windows(name):
    given, expected, how = read(name)
    kept = stage(vt.MustDrop(keep=None, similar=how["similar"]), view_of(given["features"][None], how["grid"]))
    rows = kept.features[0]
    assert len(rows) == int(expected["count"])
    close(rows[rows[:, 0].argsort()], expected["rows"])


@golden("dycoke_decoding")
def test_golden_dycoke_in_decoding(name):
    given, expected, how = read(name)
    attention = given["attention"][None]
    decoding = vt.DyCoke(view_layer=3, view_drop=how["drop"]).decoding
    shown = decoding.select(Glance(attention, torch.ones_like(attention, dtype=torch.bool)))
    assert shown[0].nonzero()[:, 0].tolist() == expected["index"].tolist()


# In the vision encoder


def encoded(given: dict[str, Tensor]) -> vt.View:
    names = ("keys", "mass", "cls_attention", "column_attention")
    return view_of(given["features"][None], **{f"encoder_{key}": given[key][None] for key in names if key in given})


@golden("tome", "turbo", "crossget", "dymu")
def test_golden_merging(name):
    given, expected, how = read(name)
    view = encoded(given)
    if name == "dymu":
        method = DyMU(keep=None, thresholds=(how["threshold"],))
        count = method.count(view, 1, 1)
        assert count == int(expected["count"])
    else:
        build = {"tome": vt.ToMe, "turbo": lambda: vt.Turbo(alpha=how["alpha"]), "crossget": vt.CrossGET}
        method, count = build[name](), how["r"]
    merged = method.merged(view, count)
    # the release lists outputs in another order: compare by the token that stands for each
    ours, theirs = merged.index[0].tolist(), expected["index"].tolist()
    assert sorted(ours) == sorted(theirs)
    order = torch.tensor([ours.index(token) for token in theirs])
    close(merged.features[0, order], expected["features"])
    stands_for = merged.index[0][merged.assignment[0]]
    assert stands_for.tolist() == expected["index"][expected["assignment"]].tolist()


@golden("dymu_threshold")
def test_golden_dymu_calibration(name):
    given, expected, how = read(name)
    keys = given["keys"][:, None]
    listening = _Listening(keep=keys.shape[2] - how["r"])
    listening.count(view_of(torch.zeros(*keys.shape[::2], 1), encoder_keys=keys), 1, 1)
    close(listening.heard[1][0], expected["threshold"])


@golden("ficoco_v_filter")
def test_golden_ficoco_v(name):
    given, expected, how = read(name)
    means, cls = given["row_means"], given["cls_logits"]
    # queries and keys with these row means and this row of [CLS]
    queries = torch.stack([means, torch.zeros_like(means)], 1)
    keys = torch.stack([torch.ones_like(cls), cls], 1)
    view = view_of(
        means[None, :, None],
        (1, 24, 24),
        encoder_queries=queries[None, None],
        encoder_keys=keys[None, None],
        encoder_cls_query=torch.tensor([0.0, 1.0]).view(1, 1, 1, 2),
    )
    same(vt.FiCoCoV(lamb=how["lamb"]).merged(view, how["r"]).index, expected["index"])


@golden("pixelprune", "pixelprune_tau", "pixelprune_sliding")
def test_golden_pixelprune(name):
    given, expected, how = read(name)
    units = given["units"][None, :, None]
    method = vt.PixelPrune(tau=how["tau"], metric=how["metric"], rule=how["rule"], minimum=1)
    signal = "encoder_colours" if how["tau"] else "encoder_pixels"
    same(method.select(view_of(units[:, :, 0], how["grid"], **{signal: units})).index, expected["index"])


# Videos


def video(method: vt.Method, given: dict[str, Tensor], how: dict) -> Keep:
    tokens = given["tokens"][None]
    signals = {"encoder_projected": tokens}
    if "attention" in given:
        signals |= {
            "encoder_column_attention": given["attention"].view(1, -1),
            "encoder_cls_attention": given["attention"].view(1, -1),
        }
    return method.steps()[0].select(view_of(tokens, how["grid"], **signals))


@golden("dycoke", "vidcom2", "evs")
def test_golden_videos_without_merging(name):
    given, expected, how = read(name)
    keep = how["keep"]
    method = {
        "dycoke": vt.DyCoke(keep=keep, variant="release"),
        "vidcom2": vt.VidCom2(keep=keep),
        "evs": vt.EVS(keep=keep),
    }[name]
    same(video(method, given, how).index, expected["index"])


@golden("holitom", "holitom_choice", "holitom_few_clusters")
def test_golden_holitom(name):
    given, expected, how = read(name)
    method = vt.HoliTom(keep=how["keep"], threshold=how["threshold"], beta=how["beta"])
    kept = video(method, given, how)
    same(kept.index, expected["index"])
    close(kept.projected[0], expected["tokens"])


@golden("fastvid", "fastvid_others", "fastvid_others_counts")
def test_golden_fastvid(name):
    given, expected, how = read(name)
    options = {option: how[option] for option in ("keep", "context", "segments", "members")}
    kept = video(vt.FastVID(**options, threshold=float(how["threshold"])), given, how)
    same(kept.index, expected["index"])
    close(kept.projected[0], expected["tokens"])


@golden("stgridpool")
def test_golden_stgridpool(name):
    given, expected, how = read(name)
    kept = video(vt.STGridPool(keep=how["keep"], gridding=how["gridding"], norm=how["norm"]), given, how)
    close(kept.projected[0], expected["tokens"])
