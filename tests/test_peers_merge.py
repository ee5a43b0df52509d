"""Methods that merge, against slow references, written from their specifications with loops and in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from peers import answer, cosines, image, make_view, ranked
from views import changed
from visiontrim.core.signals import DecoderSignals
from visiontrim.core.view import View
from visiontrim.methods import AvgPool, PruMerge, PruMergePlus, VisionZip, VScan
from visiontrim.ops.merge import merge_into_nearest
from visiontrim.ops.pool import pool_cells

SEEDS = range(4)


# VisionZip


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("seed", SEEDS)
def test_visionzip(variant, seed):
    view = make_view(seed, grid=(1, 8, 8), dim=16)
    kept = answer(VisionZip(keep=32, variant=variant), view)
    for b in range(2):
        parts = image(view, b)
        x, keys = parts["features"], cosines(parts["keys"].mean(0))
        dominant = sorted(ranked(parts["cls_attention"])[:27])
        rest = [i for i in range(64) if i not in dominant]
        step = max(1, len(rest) // 5)
        targets = [rest[step * j] for j in range(5)]
        expected = [x[i] for i in dominant]
        for target in targets:
            members = [
                i for i in rest if i not in targets and max(targets, key=lambda t: keys[i][t]) == target
            ]  # max takes the first of equals
            total = sum((x[i] for i in members), torch.zeros(16).double())
            if variant == "paper":
                expected.append((x[target] + total) / (1 + len(members)))
            else:
                expected.append(x[target] + total / max(1, len(members)))
        assert kept.index[b].tolist() == dominant + targets
        assert kept.complement[b].tolist() == [False] * 27 + [True] * 5
        torch.testing.assert_close(kept.features[b].double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert torch.equal(kept.features[b, :27], view.features[b, dominant])


def test_visionzip_splits_the_published_budgets():
    view = make_view(grid=(1, 24, 24))
    for keep, dominant in ((192, 162), (128, 108), (64, 54), (32, 27)):
        kept = answer(VisionZip(keep=keep), view)
        assert (~kept.complement).sum(1).tolist() == [dominant] * 2


def test_a_centre_without_members_stays_and_equals_merge_to_themselves():
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
    index = torch.tensor([[0, 1]])
    for rule, first in (("mean", [2.0, 0.0]), ("add", [4.0, 0.0])):
        merged = merge_into_nearest(features, features, index, rule)
        assert merged.features[0].tolist() == [first, [0.0, 1.0]]
        assert merged.assignment.tolist() == [[0, 1, 0]]
        assert merged.members.tolist() == [[1, 0]]
    same = torch.full((1, 5, 2), 0.75)
    assert torch.equal(merge_into_nearest(same, same, index, "mean").features, same[:, :2])


# VScan


@pytest.mark.parametrize(
    ("grid", "keep", "share"), [((1, 12, 12), 16, 2), ((1, 12, 12), 22, 3), ((1, 13, 8), 21, 5), ((1, 6, 6), 7, 3)]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_vscan(grid, keep, share, seed):
    """Windows of 6 x 6, the last of an axis with what is left over; at most ``share`` of the local patches in each."""
    view = make_view(seed, grid=grid, dim=8)
    kept = answer(VScan(keep=keep, stages="vision", shallow=1), view)
    _, height, width = grid
    for b in range(2):
        shallow, deep = view.encoder["cls_attention", 1][b].tolist(), view.encoder.cls_attention[b].tolist()
        down, across = max(1, height // 6), max(1, width // 6)
        local = []
        for i, j in itertools.product(range(down), range(across)):
            rows = range(6 * i, height if i == down - 1 else 6 * i + 6)
            columns = range(6 * j, width if j == across - 1 else 6 * j + 6)
            inside = [r * width + c for r in rows for c in columns]
            local += sorted(inside, key=lambda n: (-shallow[n], n))[:share]
        local = sorted(local, key=lambda n: (-shallow[n], n))[: keep // 2]
        assert len(local) == keep // 2
        taken = [0.0 if n in local else score for n, score in enumerate(deep)]
        index = sorted(local + ranked(taken)[: keep - len(local)])
        assert kept.index[b].tolist() == index
        x, cosine = view.encoder.projected[b].double(), cosines(view.encoder.projected[b])
        for output, centre in enumerate(index):
            cluster = [
                n
                for n in range(height * width)
                if n not in index and index[ranked([cosine[n][k] for k in index])[0]] == centre
            ]
            expected = (x[centre] + sum(x[n] for n in cluster)) / (1 + len(cluster))
            torch.testing.assert_close(kept.projected[b, output].double(), expected, rtol=1e-5, atol=1e-5)
            assert sorted((kept.assignment[b] == output).nonzero()[:, 0].tolist()) == sorted([centre, *cluster])
            assert bool(kept.complement[b, output]) == bool(cluster)


@pytest.mark.parametrize(("mean", "counts"), [(192, (288, 96)), (128, (192, 64)), (64, (96, 32))])
def test_budget_of_vscan(mean, counts):
    view = make_view(grid=(1, 24, 24))
    method = VScan(keep=mean, shallow=1)
    kept = answer(method, view)
    assert kept.index.shape[1] == counts[0]
    later = View(
        view.features[:, : counts[0]],
        view.coordinates[:, : counts[0]],
        view.grid,
        entered=counts[0],
        num_layers=32,
        decoder=DecoderSignals(next_attention=view.encoder.cls_attention[:, : counts[0]]),
    )
    second = method.steps()[1].select(later)
    assert second.index.shape[1] == counts[1]
    assert second.index[0].tolist() == sorted(ranked(later.decoder.next_attention[0])[: counts[1]])
    assert (16 * counts[0] + 16 * counts[1]) / 32 == mean
    assert answer(VScan(keep=counts, shallow=1), view).index.shape[1] == counts[0]
    # 16 windows of 6 x 6: 3 local patches each for 96
    if mean == 64:
        rows, columns = kept.index[0] // 24 // 6, kept.index[0] % 24 // 6
        assert torch.bincount(rows * 4 + columns, minlength=16).min() >= 3


# PruMerge


def slow_prumerge(view: View, b: int, index: list[int], attention, k: int, release: bool):
    x, a = view.features[b].double(), attention[b].double()
    keys = view.encoder["keys", -1][b]
    cosine = cosines(keys.transpose(0, 1).flatten(1))
    rows = []
    for i in index:
        near = sorted((j for j in range(len(x)) if j != i), key=lambda j: -cosine[i][j])[:k]
        added = sum(a[j] * x[j] for j in near)
        rows.append(x[i] + added if release else (a[i] * x[i] + added) / (a[i] + sum(a[j] for j in near)))
    if release:
        rows.append(sum(a[j] * x[j] for j in range(len(x)) if j not in index))
    return torch.stack(rows)


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("seed", SEEDS)
def test_prumerge(cls, release, seed):
    view = make_view(seed)
    kept = answer(cls(keep=13, neighbours=5, variant="release" if release else "paper"), view)
    attention = view.encoder["cls_attention_wide" if release else "cls_attention", -1]
    places = 12 if release else 13
    for b in range(2):
        order = ranked(attention[b])
        index = order[:places]
        if cls is PruMergePlus:
            others = sorted(order[3:])
            index = order[:3] + [others[(2 * j + 1) * 39 // (2 * (places - 3))] for j in range(places - 3)]
        if not release:
            index = sorted(index)
        expected = slow_prumerge(view, b, index, attention, 5, release)
        torch.testing.assert_close(kept.features[b].double(), expected, rtol=1e-5, atol=1e-5)
        assert kept.index[b, :places].tolist() == index
        gone = [i for i in order if i not in index]
        if release:
            assert kept.index[b, -1] == gone[0]
            assert (kept.assignment[b, gone] == 12).all()
            assert kept.complement[b].tolist() == [False] * 12 + [True]
        else:
            assert (kept.assignment[b, gone] == -1).all()


def test_prumerge_counts_outliers_like_numpy():
    attention = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.13, 0.30, 0.21, 0.02])
    # quartiles at places 2.75 and 8.25 of the sorted twelve: 0.0275 and 0.0925, so outliers lie above 0.19
    view = make_view(grid=(1, 3, 4), batch=1)
    alike = {("encoder.keys", -1): torch.ones(1, 2, 12, 4)}
    view = changed(view, alike | {("encoder.cls_attention", -1): attention[None]})
    assert answer(PruMerge(keep=None), view).index.tolist() == [[9, 10]]
    # a lattice with a third of 12 / 2 as stride, without the last patch, behind the outliers
    plus = answer(PruMergePlus(keep=None), view).index[0].tolist()
    assert plus == sorted({9, 10, 0, 2, 4, 6, 8})
    flat = changed(view, {("encoder.cls_attention", -1): torch.full((1, 12), 0.08)})
    assert answer(PruMerge(keep=None), flat).index.tolist() == [[0]]
    released = changed(view, {("encoder.cls_attention_wide", -1): attention[None]})
    kept = answer(PruMergePlus(keep=None, variant="release"), released)
    assert kept.index.tolist() == [[9, 10, 0, 2, 4, 6, 8, 7]]  # the best of the dropped stands for them


# average pooling


def test_average_pooling_of_squares():
    view = make_view(grid=(1, 6, 8))
    kept = answer(AvgPool(keep=12), view)
    expected = F.avg_pool2d(view.features.view(2, 6, 8, 8).permute(0, 3, 1, 2), 2).flatten(2).mT
    torch.testing.assert_close(kept.features, expected)
    assert kept.index[0].tolist() == [0, 2, 4, 6, 16, 18, 20, 22, 32, 34, 36, 38]


@pytest.mark.parametrize("grid", [(1, 6, 7), (3, 4, 5), (1, 1, 9)])
def test_cells_of_any_number(grid):
    total = math.prod(grid)
    for count in range(1, total + 1):
        cells, middles = pool_cells(grid, count)
        assert torch.bincount(cells, minlength=count).min() >= 1
        assert cells.max() == count - 1
        assert torch.equal(cells[middles], torch.arange(count))
        assert torch.equal(middles, middles.sort().values)
    with pytest.raises(ValueError, match="cannot be pooled"):
        pool_cells(grid, total + 1)
