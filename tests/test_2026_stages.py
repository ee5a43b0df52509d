"""Methods of 2026 that act at the encoder's output and once more between decoder layers, against slow references."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import visiontrim as vt
from language import seen_by
from peers import make_view, ranked
from views import changed
from visiontrim.core.method import DecoderLayer, VisionOutput
from visiontrim.core.signals import Text


def cosine(a, b) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / a.norm() / b.norm())


# ------------------------------------------------------------------------------------------------ both stages


@pytest.mark.parametrize(
    ("method", "counts"),
    [
        (vt.Nuwa(keep=192), (336, 48)),
        (vt.Nuwa(keep=128), (224, 32)),
        (vt.Nuwa(keep=64), (112, 16)),
        (vt.Nuwa(keep=(300, 20)), (300, 20)),
        (vt.ApET(keep=192), (288, 96)),
        (vt.ApET(keep=128), (192, 64)),
        (vt.ApET(keep=64), (96, 32)),
    ],
    ids=str,
)
def test_published_counts_of_both_stages(method, counts):
    view = make_view(grid=(1, 24, 24), batch=1)
    vision, language = method.steps()
    assert (vision.site, language.site) == (VisionOutput(), DecoderLayer(16))
    assert vision.select(view).index.shape == (1, counts[0])
    assert method.remaining(dataclasses.replace(view, entered=counts[0])) == counts[1]


def test_counts_of_stages_are_checked():
    for options, message in (
        ({"keep": (4, 8)}, "no pair of counts"),
        ({"keep": (8, 4), "stages": "vision"}, "there is one"),
        ({"layer": 0}, "no layers|cannot be passed"),
        ({"keep": 0}, "keeps nothing"),
    ):
        with pytest.raises(vt.TrimError, match=message):
            vt.Nuwa(**options)
    assert len(vt.Nuwa(stages="vision", keep=9).steps()) == 1
    everything = vt.Nuwa(keep=1.0).steps()[0].select(make_view())
    assert everything.index.shape == (2, 42)
    assert everything.features is None


# ------------------------------------------------------------------------------------------------ Nüwa


def slow_nuwa(view: vt.View, b: int, count: int, radius: float, pillars: float, variant: str):
    _, rows, columns = view.grid
    tokens = rows * columns
    score = view.encoder.cls_attention[b].double()
    if variant == "paper":
        score = score * view.encoder.keys[b].double().square().sum((0, 2)).sqrt()
    score = score.tolist()
    cells: dict[tuple[int, int], list[int]] = {}
    for i in range(tokens):
        cells.setdefault((i // columns // 2, i % columns // 2), []).append(i)
    each = math.ceil(count / len(cells))
    candidates = [i for cell in cells.values() for i in sorted(cell, key=lambda i: (-score[i], i))[:each]]
    kept = sorted(sorted(candidates, key=lambda i: (-score[i], i))[:count])
    border = float(torch.tensor([score[i] for i in kept], dtype=torch.float64).quantile(pillars))
    x, outputs = view.features[b].double(), []
    largest = math.hypot(rows - 1, columns - 1)
    for i in kept:
        if score[i] >= border:
            outputs.append(x[i])
            continue
        weights = []
        for j in range(tokens):
            apart = math.hypot(i // columns - j // columns, i % columns - j % columns)
            weights.append(max(0.0, cosine(x[i], x[j])) * max(0.0, 1 - apart / (radius * largest)))
        share = [w / sum(weights) for w in weights]
        if variant == "code":
            share[i] = 1.0
        outputs.append(sum(w * x[j] for j, w in enumerate(share)))
    return kept, torch.stack(outputs)


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize(("grid", "count"), [((1, 6, 6), 9), ((1, 6, 6), 14), ((1, 5, 7), 12)])
def test_nuwa_against_a_slow_reference(variant, grid, count):
    view = make_view(1, grid=grid)
    kept = vt.Nuwa(keep=count, stages="vision", variant=variant).steps()[0].select(view)
    for b in range(2):
        index, features = slow_nuwa(view, b, count, 0.514, 0.55, variant)
        assert kept.index[b].tolist() == index
        torch.testing.assert_close(kept.features[b].double(), features, rtol=1e-4, atol=1e-5)


def test_nuwa_by_hand():
    """Equal scores take the first of each cell; a pillar stays for any radius; a radius of nothing gathers nothing."""
    view = make_view(grid=(1, 4, 4), batch=1)
    flat = changed(view, {"encoder.cls_attention": torch.full((1, 16), 1 / 16)})
    first = vt.Nuwa(keep=4, stages="vision", variant="code").steps()[0].select(flat)
    assert first.index.tolist() == [[0, 2, 8, 10]]
    two = vt.Nuwa(keep=8, stages="vision", variant="code").steps()[0].select(flat)
    assert two.index.tolist() == [[0, 1, 2, 3, 8, 9, 10, 11]]
    tiny = vt.Nuwa(keep=6, stages="vision", radius=1e-3).steps()[0].select(view)
    torch.testing.assert_close(tiny.features, view.features[0, tiny.index[0]][None])
    wide = vt.Nuwa(keep=6, stages="vision", radius=5.0).steps()[0].select(view)
    alone = ~wide.complement[0]
    assert alone.sum() == 3  # of six, those from the 55 % quantile on
    assert torch.equal(wide.features[0, alone], view.features[0, wide.index[0, alone]])
    assert not torch.equal(wide.features, tiny.features)


def test_nuwa_gathers_a_uniform_picture_into_itself_or_twice_itself():
    view = make_view(grid=(1, 4, 4), batch=1)
    same = dataclasses.replace(view, features=torch.ones_like(view.features))
    for variant, low, high in (("paper", 1.0, 1.0), ("code", 1.5, 2.0)):
        kept = vt.Nuwa(keep=6, stages="vision", variant=variant).steps()[0].select(same)
        gathered = kept.features[0, kept.complement[0]]
        assert len(gathered) == 3
        assert (gathered >= low - 1e-5).all()
        assert (gathered <= high + 1e-5).all()


def test_nuwa_never_takes_more_of_a_cell_than_its_share_nor_gathers_from_other_frames():
    view = make_view(3, grid=(2, 4, 6), batch=1)
    kept = vt.Nuwa(keep=14, stages="vision").steps()[0].select(view)
    _, rows, columns = view.grid
    cell = [(f, r // 2, c // 2) for f in range(2) for r in range(rows) for c in range(columns)]
    taken = [cell[i] for i in kept.index[0].tolist()]
    assert max(taken.count(of) for of in taken) <= math.ceil(14 / 12)  # 12 cells
    other = view.features.clone()
    other[:, 24:] = 0
    other[:, 24:, 0] = 9.0
    again = vt.Nuwa(keep=14, stages="vision").steps()[0].select(dataclasses.replace(view, features=other))
    first = kept.index[0] < 24
    assert torch.equal(again.index, kept.index)
    torch.testing.assert_close(again.features[0, first], kept.features[0, first])


def test_nuwa_ranks_by_the_text_or_by_the_last_row():
    step = vt.Nuwa(keep=(4, 2)).steps()[1]
    view = seen_by(step, 4, entered=4)
    words = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-9.0, -9.0]]])
    mask = torch.tensor([[True, True, False]])
    tokens = torch.tensor([[[3.0, 3.0], [-1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]])
    view = changed(view, {"text.question": Text(words, mask, 1.0)}, features=tokens)
    assert step.select(view).index.tolist() == [[0, 2]]  # mean cosines .71, -.5, .5, 0
    step = vt.Nuwa(keep=(4, 2), variant="code").steps()[1]
    view = changed(seen_by(step, 4, entered=4), {"decoder.last_attention": torch.tensor([[0.1, 0.4, 0.2, 0.3]])})
    assert step.select(view).index.tolist() == [[1, 3]]


def test_gradients_reach_what_was_gathered():
    view = make_view(grid=(1, 4, 4), batch=1)
    features = view.features.clone().requires_grad_()
    kept = vt.Nuwa(keep=4, stages="vision").steps()[0].select(dataclasses.replace(view, features=features))
    kept.features.sum().backward()
    assert (features.grad[0].abs().sum(-1) > 0).sum() > 4
    assert ranked(view.encoder.cls_attention[0])  # the score itself has none


# ------------------------------------------------------------------------------------------------ ApET


def slow_errors(x: torch.Tensor, size: int, ridge: float):
    """The basis by farthest-point sampling, and the norm of the residual of each row."""
    x = x.double()
    basis = [max(range(len(x)), key=lambda i: float((x[i] - x.mean(0)).norm()))]
    while len(basis) < size:
        rest = [i for i in range(len(x)) if i not in basis]
        basis.append(max(rest, key=lambda i: min(float((x[i] - x[j]).norm()) for j in basis)))
    rows = x[basis]
    weights = x @ rows.T @ torch.linalg.inv(rows @ rows.T + ridge * torch.eye(size, dtype=x.dtype))
    return basis, (x - weights @ rows).norm(dim=-1)


@pytest.mark.parametrize(("count", "size"), [(12, 4), (6, 5), (3, 5), (20, 1)])
@pytest.mark.parametrize("blend", [1.0, 0.5])
def test_apet_against_a_slow_reference(count, size, blend):
    view = make_view(2, grid=(1, 6, 6))
    options = {"keep": count, "stages": "vision", "basis": size}
    paper = vt.ApET(**options).steps()[0].select(view)
    code = vt.ApET(**options, variant="code", blend=blend).steps()[0].select(view)
    for b in range(2):
        x = view.features[b].double()
        _, error = slow_errors(x, size, 0.0)
        assert paper.index[b].tolist() == sorted(ranked(error)[:count])
        basis, error = slow_errors(x, size, 1e-5)
        kept = ranked(error)[:count]
        given = min(size, count - 1)
        own, taken = kept[: count - given], kept[count - given :]
        value = {slot: blend * x[row] + (1 - blend) * x[slot] for slot, row in zip(taken, basis, strict=False)}
        members = {i: [x[i]] for i in own}
        for j in set(range(36)) - set(kept):
            members[max(sorted(own), key=lambda i: cosine(x[i], x[j]))].append(x[j])
        value |= {i: torch.stack(rows).mean(0) for i, rows in members.items()}
        assert code.index[b].tolist() == sorted(kept)
        expected = torch.stack([value[i] for i in sorted(kept)])
        torch.testing.assert_close(code.features[b].double(), expected, rtol=1e-5, atol=1e-6)
    assert paper.features is None


def test_apet_by_hand():
    """What the basis spans has no error, and what is orthogonal to it has its whole norm."""
    view = make_view(grid=(1, 2, 3), batch=1)
    x = torch.zeros(1, 6, 8)
    x[0, 0, 0], x[0, 1, 0], x[0, 2, 0], x[0, 3, 1], x[0, 4, 2] = 9.0, 1.0, 2.0, 0.5, 0.25
    view = dataclasses.replace(view, features=x)
    options = {"stages": "vision", "basis": 1}
    assert vt.ApET(keep=1, **options).steps()[0].select(view).index.tolist() == [[3]]
    assert vt.ApET(keep=2, **options).steps()[0].select(view).index.tolist() == [[3, 4]]
    norms = vt.ApET(keep=2, stages="vision", basis=0).steps()[0].select(view)
    assert norms.index.tolist() == [[0, 2]]
    # every error is 0: the lower indices; basis and one own token, all others merged into it
    flat = dataclasses.replace(view, features=torch.ones(1, 6, 8))
    kept = vt.ApET(keep=2, **options, variant="code").steps()[0].select(flat)
    assert kept.features.shape == (1, 2, 8)
    torch.testing.assert_close(kept.features, torch.ones(1, 2, 8))


def test_apet_keeps_the_sum_of_what_it_merges():
    view = make_view(4, grid=(1, 6, 6), batch=1)
    kept = vt.ApET(keep=12, stages="vision", basis=4, variant="code").steps()[0].select(view)
    sizes = torch.bincount(kept.assignment[0][kept.assignment[0] >= 0], minlength=12).float()
    own = torch.isclose(kept.features[0], view.features[0, kept.index[0]]).all(-1) | (sizes > 1)
    total = (sizes[:, None] * kept.features[0])[own].sum(0)
    belongs = torch.isin(kept.assignment[0], own.nonzero()[:, 0])
    torch.testing.assert_close(total, view.features[0, belongs].sum(0), rtol=1e-4, atol=1e-4)
    assert (sizes > 1).any()


def test_apet_prunes_hidden_states_by_the_same_rule():
    step = vt.ApET(keep=(20, 6), basis=3).steps()[1]
    assert step.needs == frozenset()
    view = seen_by(step, 20, entered=20)
    _, error = slow_errors(view.features[0], 3, 0.0)
    assert step.select(view).index[0].tolist() == sorted(ranked(error)[:6])
