"""Training through methods that merge: sums have gradients, what they are weighted by has none."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import Tensor

import visiontrim as vt
from families import Prompts, build
from peers import make_view
from test_matrix import KINDS, REFUSED, small
from tiny import IMAGE, llava, prompts
from views import changed
from visiontrim.core.method import Layers, Step
from visiontrim.core.view import Keep, View
from visiontrim.engine import encoder, select, vision

BY_HAND = {
    "visiontrim": lambda view: vt.VisionTrim(keep=12).steps()[0].select(view),
    "visiontrim, release": lambda view: vt.VisionTrim(keep=12, variant="release").steps()[0].select(view),
    "luvc": lambda view: vt.LUVC(keep=0.4, stages="vision").steps_for(Layers(4, 5))[0].select(view),
    "luvc, pooling": lambda view: vt.LUVC(spectrum="pooling").choose(view, 12),
    "fade": lambda view: vt.load_method("fade:operator=average").choose(view, 12),
    "mustdrop": lambda view: vt.MustDrop(keep=0.5, merged=0.5).steps_for(Layers(4, 5))[0].select(view),
}
"""Methods that need more than a tiny model has, each on a hand-made view."""
MERGING = [
    *(
        small(name)
        for name, method in vt.list_methods().items()
        if method.merges and name != "apet" and name not in {key.partition(",")[0] for key in BY_HAND}
    ),
    vt.ApET(keep=0.5, variant="code"),  # the paper's selects only
    vt.VisionZip(keep=0.5, variant="release"),
    vt.PruMerge(keep=0.5, variant="release"),
    vt.FastVID(keep=0.5, members="others"),
]


def seen(method: vt.Method, family: str, kind: str) -> list[tuple[Step, View, Keep]]:
    """What the steps of ``method`` saw and answered in one pass of a tiny model in training."""
    calls: list[tuple[Step, View, Keep]] = []

    def checked_select(step: Step, view: View) -> Keep:
        keep = original(step, view)
        calls.append((step, view, keep))
        return keep

    original = select.checked_select
    model, inputs = functools.cache(build)(family), Prompts(family, (3, kind, 5), (1, kind, 2, kind, 7)).batch()
    with ExitStack() as stack:
        for part in (vision, encoder, select):
            stack.enter_context(mock.patch.object(part, "checked_select", checked_select))
        stack.enter_context(vt.trim(model, method))
        model(**inputs)
    return calls


def with_leaves(view: View) -> tuple[View, list[Tensor]]:
    """``view`` with the same content, that gradients can be asked of."""
    content = view.content.detach().clone().requires_grad_()
    leaves, groups = [content], {}
    if "projected" in view.encoder:
        projected = view.projected_content.detach().clone().requires_grad_()
        leaves.append(projected)
        values = {key: view.encoder.given(key) for key in view.encoder} | {"projected": projected}
        groups["encoder"] = type(view.encoder)(values)
    return dataclasses.replace(view, features=content, content=content, **groups), leaves


def check_sums(keep: Keep, leaves: list[Tensor]) -> int:
    """How many outputs there are: sums W x of the leaves x.

    With constant weights the gradient g W meets <g W, x> = <g, W x>; parts without gradient break that.
    """
    outputs = [output for output in (keep.features, keep.projected) if output is not None]
    for output in outputs:
        assert output.requires_grad, "sums without gradients"
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        parts = output * weight
        gradients = torch.autograd.grad(parts.sum(), leaves, allow_unused=True)
        with torch.no_grad():
            pairs = zip(gradients, leaves, strict=True)
            found = sum(float((g * x).sum()) for g, x in pairs if g is not None)
            assert abs(found - float(parts.sum())) <= 1e-4 * float(parts.abs().sum())
    return len(outputs)


@pytest.mark.parametrize("method", MERGING, ids=str)
def test_outputs_are_sums_of_what_was_given_with_weights_that_do_not_change(method):
    for family, kind in KINDS:
        if (method.name, family, kind) in REFUSED:
            continue
        sums = 0
        for step, view, _ in seen(method, family, kind):
            view, leaves = with_leaves(view)
            sums += check_sums(step.select(view), leaves)
        if sums:
            return
    pytest.fail(f"{method} never merged anything here")


@pytest.mark.parametrize("name", BY_HAND)
def test_outputs_of_hand_made_views_are_sums(name):
    view = make_view()
    total = view.total
    signals = {"encoder.mass": torch.ones(2, total), "encoder.lattice": view.grid, "encoder.unit": 1}
    view, leaves = with_leaves(changed(view, signals))
    assert check_sums(BY_HAND[name](view), leaves)


AT_THE_OUTPUT = [
    vt.VisionZip(keep=8),
    vt.VisionZip(keep=8, variant="release"),
    vt.AvgPool(keep=4),
    vt.PruMerge(keep=6, neighbours=4),
    vt.PruMergePlus(keep=8, neighbours=4),
    vt.PPE(keep=7),
    vt.VScan(keep=8, stages="vision", window=2, shallow=1),
    vt.FastVID(keep=8, members="others"),
]


@pytest.mark.parametrize("method", AT_THE_OUTPUT, ids=str)
def test_losses_and_gradients_are_those_of_the_model_fed_the_same_sums(method):
    model = llava().train()
    inputs = prompts((3, "image", 5))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    labels[0, first + 16] = -100  # what follows the image is said at its last place, which may be gone

    answers: list[tuple[View, Keep]] = []
    original = vision.checked_select

    def checked_select(step: Step, view: View) -> Keep:
        keep = original(step, view)
        answers.append((view, keep))
        return keep

    with mock.patch.object(vision, "checked_select", checked_select), vt.trim(model, method, positions="compact"):
        loss = model(**inputs, labels=labels).loss
        ((view, keep),) = answers
        projected = keep.projected is not None
        output = keep.projected if projected else keep.features
        source = view.projected_content if projected else view.content
        rows = [torch.autograd.grad(value, source, retain_graph=True)[0][0, :, 0] for value in output[0, :, 0]]
        weights = torch.stack(rows)[None]
    ours = gradients_of(model, loss)
    assert bool((weights.count_nonzero(dim=-1) > 1).any()), "nothing was merged"

    model.zero_grad()
    core = model.model
    features = core.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    if projected:
        kept = weights @ core.multi_modal_projector(features)
    else:
        kept = core.multi_modal_projector(weights @ features)
    text = core.get_input_embeddings()(inputs["input_ids"])
    embeds = torch.cat([text[:, :first], kept, text[:, first + 16 :]], 1)
    shorter = torch.cat([labels[:, :first], labels.new_full((1, kept.shape[1]), -100), labels[:, first + 16 :]], 1)
    by_hand = model(inputs_embeds=embeds, labels=shorter).loss
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-6)
    theirs = gradients_of(model, by_hand)
    assert ours.keys() == theirs.keys()
    assert any("vision_tower" in name for name in ours)
    for name, gradient in ours.items():
        scale = max(float(theirs[name].abs().max()), 0.1)  # a key's bias has no gradient but rounding
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5 * scale, msg=name)


def gradients_of(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
