"""What every published method at the vision encoder's output promises: exact budgets, order, purity, batches, ties."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch

from peers import EVERY, answer, make_view, rows
from views import changed, showing, signals_of
from visiontrim.core.errors import TrimError
from visiontrim.core.method import DecoderLayer, VisionOutput
from visiontrim.core.registry import load_method
from visiontrim.core.signals import MissingSignal, Signal
from visiontrim.methods import (
    CDPruner,
    HiPrune,
    MMTok,
    PruMerge,
    PruMergePlus,
    PruneSID,
    VisionZip,
    VisPruner,
    VScan,
)
from visiontrim.ops.select import gather

every_method = pytest.mark.parametrize("method", EVERY, ids=str)
RASTER = {"avgpool", "cdpruner", "divprune", "fastervlm", "hiprune", "mmtok", "vscan", "vispruner"}


def keeping(method, keep):
    return dataclasses.replace(method, keep=keep)


@every_method
@pytest.mark.parametrize("keep", [1, 2, 3, 7, 16, 31, 41, 0.25, 0.5])
def test_budget_is_exact_and_the_answer_whole(method, keep):
    view = make_view()
    kept = answer(keeping(method, keep), view)
    batch, tokens, dim = view.features.shape
    count = keep if isinstance(keep, int) else round(keep * tokens)
    assert kept.index.shape == (batch, count)
    assert all(len(set(row)) == count and min(row) >= 0 and max(row) < tokens for row in kept.index.tolist())
    if method.name in RASTER or (method.variant == "paper" and method.name != "visionzip"):
        assert torch.equal(kept.index, kept.index.sort(1).values) or method.name == "prumerge-plus"
    assert method.merges == (kept.features is not None or kept.projected is not None) or (
        method.name == "visionzip" and count < 4  # none of so few is contextual
    )
    if kept.features is not None:
        assert kept.features.shape == (batch, count, dim)
        assert torch.isfinite(kept.features).all()
    if kept.assignment is not None:
        ordinals = torch.arange(count).expand(batch, -1)
        assert torch.equal(gather(kept.assignment, kept.index), ordinals)
        assert kept.assignment.max() == count - 1
        assert kept.assignment.min() >= -1


@every_method
def test_keeping_everything_changes_nothing(method):
    view = make_view()
    for keep in (1.0, 42):
        kept = answer(keeping(method, keep), view)
        assert torch.equal(kept.index, torch.arange(42).expand(2, -1))
        assert kept.features is kept.projected is kept.assignment is kept.complement is None


@every_method
def test_answer_is_pure_and_reads_what_it_needs(method):
    view, method = make_view(), keeping(method, 12)
    before = copy.deepcopy(view)
    kept = answer(method, view)
    assert same(kept, answer(method, showing(view, method.steps()[0].needs)))
    assert torch.equal(view.features, before.features)
    for name in ("projected", "cls_attention"):
        assert torch.equal(view.encoder[name], before.encoder[name])


@every_method
def test_a_batch_equals_its_images(method):
    view, method = make_view(batch=3), keeping(method, 12)
    kept = answer(method, view)
    for image in range(3):
        alone = answer(method, rows(view, [image]))
        assert torch.equal(alone.index, kept.index[[image]])
        for name in ("features", "projected"):
            if getattr(kept, name) is not None:
                torch.testing.assert_close(getattr(alone, name), getattr(kept, name)[[image]])


@every_method
def test_half_precision_gives_half_precision(method):
    view = make_view()
    half = changed(view, {"encoder.projected": view.encoder.projected.bfloat16()}, features=view.features.bfloat16())
    kept = answer(keeping(method, 12), half)
    assert all(part is None or part.dtype == torch.bfloat16 for part in (kept.features, kept.projected))


@every_method
def test_images_of_one_colour(method):
    """All patches and scores equal: exact count, nothing but numbers, and the lower index where only ties decide."""
    view = make_view()

    def flat(value):
        return torch.full_like(value, 0.02)

    signals = {signal: flat(value) for signal, value in signals_of(view).items() if isinstance(value, torch.Tensor)}
    view = changed(view, signals, features=flat(view.features))
    kept = answer(keeping(method, 12), view)
    assert all(len(set(row)) == 12 for row in kept.index.tolist())
    assert kept.features is None or torch.isfinite(kept.features).all()
    if method.name in ("fastervlm", "divprune", "cdpruner"):
        assert kept.index[0].tolist() == list(range(12))


@every_method
def test_methods_can_be_written_down(method):
    assert load_method(method.to_dict()) == method
    assert load_method(str(method)) == method
    assert method.positions == "compact"
    assert method.steps()[0].site == VisionOutput()


@pytest.mark.parametrize("name", ["fastervlm", "visionzip", "vispruner", "prumerge"])
def test_without_cls_the_attention_received_ranks(name):
    view = make_view()
    instead: dict[Signal, object] = {"encoder.received_attention": view.encoder.cls_attention}
    instead[("encoder.received_attention", -1)] = view.encoder["cls_attention", -1]
    none: dict[Signal, object] = {"encoder.cls_attention": None, ("encoder.cls_attention", -1): None}
    bare = changed(view, none | instead)
    method = load_method(name, keep=12)
    assert same(answer(method, bare), answer(method, view))
    with pytest.raises(TrimError, match=r"does not give the signal .*'encoder\.cls_attention'"):
        answer(method, changed(bare, dict.fromkeys(instead)))


def test_missing_signals_are_named():
    for method, signal in (
        (VisionZip(keep=12), "encoder.keys"),
        (CDPruner(keep=12), "encoder.projected"),
        (PruMerge(keep=12, variant="release"), ("encoder.cls_attention_wide", -1)),
    ):
        with pytest.raises(MissingSignal, match=re.escape(repr(signal))):
            answer(method, changed(make_view(), {signal: None}))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VisionZip(split=0.0), "split=0.0 is no share"),
        (lambda: VisPruner(important=1.5), "important=1.5 is no share"),
        (lambda: CDPruner(sign=2), "sign=2"),
        (lambda: HiPrune(share=-0.1), "share=-0.1"),
        (lambda: MMTok(image_weight=-1.0), "image_weight=-1.0"),
        (lambda: MMTok(text_temperature=0.0), "text_temperature=0.0"),
        (lambda: PruMerge(neighbours=0), "neighbours=0"),
        (lambda: PruneSID(variant="code"), "variant='code' is no choice"),
        (lambda: VScan(window=0), "window=0"),
        (lambda: VScan(keep=(4, 8)), "no pair of counts"),
        (lambda: VScan(keep=(8, 4), stages="vision"), "there is one"),
        (lambda: VScan(layer=0), "layer=0"),
        (lambda: VisionZip(keep=0), "keep=0 keeps nothing"),
    ],
)
def test_options_are_checked(build, message):
    with pytest.raises(TrimError, match=message):
        build()


def test_prumerge_adapts_to_one_image_only():
    with pytest.raises(TrimError, match="2 images share a batch"):
        answer(PruMergePlus(keep=None), make_view())


def test_stages_of_vscan():
    vision, language = VScan(keep=64).steps()
    assert (vision.site, language.site) == (VisionOutput(), DecoderLayer(16))
    assert VScan(stages="vision").steps() == (dataclasses.replace(vision, method=VScan(stages="vision")),)
    assert language.needs == {"decoder.next_attention"}


def same(a, b) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)
