"""Methods of 2026 for videos that merge, against slow references and answers by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import visiontrim as vt
from language import seen_by
from peers import make_view, ranked, rows
from views import changed
from visiontrim.core.method import DecoderLayer
from visiontrim.ops.recycle import density_peaks
from visiontrim.ops.select import even_shares
from visiontrim.ops.transport import sinkhorn
from visiontrim.ops.trees import temporal_trees


def vision(method, view):
    return method.steps()[0].select(view)


# ------------------------------------------------------------------------------------------------ trees


def slow_trees(tokens, free, threshold, least, passed_on):
    tokens = tokens.double()
    frames, places, _ = tokens.shape
    unit = F.normalize(tokens, dim=-1)
    joins = {}
    for f in range(1, frames):
        for p in range(places):
            options = [q for q in range(places) if free[f - 1][q]]
            if free[f][p] and options:
                best = max(options, key=lambda q: float(unit[f, p] @ unit[f - 1, q]))
                joins[f, p] = best, float(unit[f, p] @ unit[f - 1, best])
    joins = {node: pair for node, pair in joins.items() if pair[1] > threshold}
    total = sum(map(sum, free))
    while joins and total - len(joins) < least:
        del joins[min(joins, key=lambda node: (joins[node][1], node))]
    value = {(f, p): tokens[f, p] for f in range(frames) for p in range(places)}
    count = dict.fromkeys(value, 1)
    root = {}
    for f in range(frames - 1, 0, -1):
        for p in range(places):
            if (f, p) in joins:
                parent = f - 1, joins[f, p][0]
                value[parent] = value[parent] + value[f, p]
                count[parent] += count[f, p] if passed_on else 1
    for f in range(frames):
        for p in range(places):
            root[f, p] = root[f - 1, joins[f, p][0]] if (f, p) in joins else (f, p)
    return {node: value[node] / count[node] for node in value}, root


@pytest.mark.parametrize("passed_on", [True, False])
@pytest.mark.parametrize(("threshold", "least"), [(0.3, 1), (0.3, 18), (0.9, 1), (-1.0, 5)])
def test_trees(passed_on, threshold, least):
    generator = torch.Generator().manual_seed(least)
    tokens = torch.randn(4, 6, 5, generator=generator)
    free = torch.rand(4, 6, generator=generator) < 0.8
    found = temporal_trees(tokens, free, threshold, least, passed_on=passed_on)
    values, root = slow_trees(tokens, free.tolist(), threshold, least, passed_on)
    for (f, p), (g, q) in root.items():
        assert int(found.root[f, p]) == (g * 6 + q if free[f, p] else -1)
        if free[f, p] and (f, p) == (g, q):
            torch.testing.assert_close(found.features[f, p].double(), values[f, p], rtol=1e-4, atol=1e-5)


def test_trees_of_equal_frames():
    """One tree a place, which is the token; as released of twice its length."""
    tokens = torch.eye(3)[None].expand(4, 3, 3)
    free = torch.ones(4, 3, dtype=torch.bool)
    mean, long = (temporal_trees(tokens, free, 0.8, 1, passed_on=passed_on) for passed_on in (True, False))
    assert mean.root.tolist() == [[0, 1, 2]] * 4
    assert torch.equal(mean.features[0], torch.eye(3))
    assert torch.equal(long.features[0], 2 * torch.eye(3))


# ------------------------------------------------------------------------------------------------ FlashVID


def slow_chosen(view, b, counts, segments, events):
    """Indices that are chosen in each frame, by largest minimal distance, weighted."""
    frames, places = view.grid[0], view.grid[1] * view.grid[2]
    x = view.encoder.projected[b].double().view(frames, places, -1)
    unit, score = F.normalize(x, dim=-1), view.encoder.cls_attention[b].double().view(frames, places)
    whole = F.normalize(x.mean(1), dim=-1)
    result = []
    for f in range(frames):
        (first, last) = next(segment for segment in segments if segment[0] <= f <= segment[1])
        weight = score[f].clone()
        if events:
            weight *= torch.stack([unit[f] @ whole[g] for g in range(first, last + 1)]).mean(0)
        distance = (1 - unit[f] @ unit[f].T) * weight
        second = [sorted(distance[i, j] for i in range(places) if i != j)[0] for j in range(places)]
        taken = ranked(second)[:1] if counts[f] else []
        while len(taken) < counts[f]:
            nearest = [-math.inf if j in taken else min(distance[i, j] for i in taken) for j in range(places)]
            taken.append(ranked(nearest)[0])
        result.append(taken)
    return result


def slow_flashvid(view, b, count, method):
    frames, places = view.grid[0], view.grid[1] * view.grid[2]
    x = view.encoder.projected[b].view(frames, places, -1)
    whole = F.normalize(x.double().mean(1), dim=-1)
    likeness = [float(whole[f] @ whole[f + 1]) for f in range(frames - 1)]
    lowest = sorted(range(frames - 1), key=lambda f: (likeness[f], f))[: method.segments - 1]
    cuts = sorted({*lowest, *(f for f in range(frames - 1) if likeness[f] < method.threshold)})
    segments = list(zip([0, *(cut + 1 for cut in cuts)], [*cuts, frames - 1], strict=True))
    quota = even_shares(count, frames)
    chosen = slow_chosen(view, b, [math.ceil(method.alpha * n) for n in quota], segments, method.events)
    outputs = {f * places + p: x[f, p].double() for f in range(frames) for p in chosen[f]}
    for first, last in segments:
        span = range(first, last + 1)
        wanted = sum(quota[f] - len(chosen[f]) for f in span)
        free = [[p not in chosen[f] for p in range(places)] for f in span]
        values, root = slow_trees(x[first : last + 1], free, method.joins, wanted, method.variant == "paper")
        roots = {f: [p for p in range(places) if free[f][p] and root[f, p] == (f, p)] for f in range(len(span))}
        total = sum(map(len, roots.values()))
        ideal = {f: len(own) * wanted / total for f, own in roots.items()}
        counts = {f: min(math.floor(share), len(roots[f])) for f, share in ideal.items()}
        while sum(counts.values()) < wanted:
            best = max((f for f in counts if counts[f] < len(roots[f])), key=lambda f: (ideal[f] - counts[f], -f))
            counts[best] += 1
        for f, own in roots.items():
            if counts[f]:
                rows_ = torch.stack([values[f, p] for p in own])[None]
                found = density_peaks(rows_, counts[f], min(counts[f], 7, len(own)))  # tested by itself
                for centre, value in zip(found.centres[0].tolist(), found.features[0], strict=True):
                    outputs[(first + f) * places + own[centre]] = value
    return outputs


@pytest.mark.parametrize(
    "options",
    [
        {"segments": 2, "joins": 0.2, "threshold": -1.0},
        {"segments": 2, "joins": 0.2, "threshold": -1.0, "variant": "code"},
        {"segments": 1, "joins": -0.5, "threshold": -1.0, "events": False},
        {"segments": 8, "alpha": 0.3},
        {"segments": 3, "alpha": 1.0},
        {"segments": 1, "alpha": 0.0, "joins": 0.1, "threshold": -1.0},
    ],
    ids=str,
)
def test_flashvid(options):
    view = make_view(3, grid=(6, 3, 4), dim=6)
    method = vt.FlashVID(keep=32, stages="vision", **options)
    kept = vision(method, view)
    for b in range(2):
        outputs = slow_flashvid(view, b, 32, method)
        assert kept.index[b].tolist() == sorted(outputs)
        expected = torch.stack([outputs[i] for i in sorted(outputs)])
        torch.testing.assert_close(kept.projected[b].double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_the_budget_of_flashvid():
    """Its published settings are means, on 28 layers and on 36."""
    view = make_view(grid=(16, 4, 4), batch=1)
    for method, layers in ((vt.FlashVID(keep=0.25), 28), (vt.FlashVID(keep=0.25, layer=28 / 36, retention=0.1), 36)):
        view = dataclasses.replace(view, num_layers=layers)
        entered = method.entering(view)
        assert entered == 80  # 1.25 x 0.25 x 256
        left = method.remaining(dataclasses.replace(view, entered=entered))
        place = method.place(layers)
        assert place == {28: 20, 36: 28}[layers]
        assert (place * entered + (layers - place) * left) / layers == 64
        assert vision(method, view).index.shape == (1, 80)
    step = vt.FlashVID(keep=(6, 2)).steps()[1]
    assert step.site == DecoderLayer(23)
    row = changed(seen_by(step, 6, entered=6), {"decoder.last_attention": torch.tensor([[0.1, 0.4, 0.2, 0.3, 0, 0]])})
    assert step.select(row).index.tolist() == [[1, 3]]


def test_flashvid_of_a_still_video_and_of_a_picture():
    view = make_view(1, grid=(1, 4, 4), batch=1)
    still = {
        "encoder.projected": view.encoder.projected.repeat(1, 4, 1),
        "encoder.cls_attention": view.encoder.cls_attention.repeat(1, 4),
    }
    video = changed(make_view(grid=(4, 4, 4), batch=1), still)
    kept = vision(vt.FlashVID(keep=28, stages="vision", segments=1), video)
    trees = kept.index[0, kept.complement[0]]
    assert (trees < 16).all(), "every tree has its root in the first frame"
    chosen = kept.index[0, ~kept.complement[0]]
    assert len(set((chosen % 16).tolist())) == 5, "the same in every frame"
    assert vision(vt.FlashVID(keep=5, stages="vision"), view).index.shape == (1, 5)
    assert len(set(vision(vt.FlashVID(keep=1, stages="vision"), view).index[0].tolist())) == 1


@pytest.mark.parametrize("method", [vt.FlashVID(keep=20, stages="vision"), vt.AOT(keep=20, shallow=1)], ids=str)
def test_promises_of_those_that_merge(method):
    view = make_view(2, grid=(5, 3, 3))
    kept = vision(method, view)
    if kept.assignment is not None:
        assert torch.equal(kept.assignment.gather(1, kept.index), torch.arange(20).expand(2, -1))
    for b in range(2):
        alone = vision(method, rows(view, [b]))
        assert torch.equal(alone.index, kept.index[[b]])
        torch.testing.assert_close(alone.projected, kept.projected[[b]])
    half = changed(view, {"encoder.projected": view.encoder.projected.bfloat16()})
    assert vision(method, half).projected.dtype == torch.bfloat16
    flat = {"encoder.projected": torch.ones(2, 45, 9), "encoder.cls_attention": torch.full((2, 45), 0.02)}
    flat[("encoder.cls_attention", 1)] = flat["encoder.cls_attention"]
    even = vision(method, changed(view, flat))
    assert all(len(set(row)) == 20 for row in even.index.tolist())
    torch.testing.assert_close(even.projected, torch.ones(2, 20, 9))
    given = view.encoder.projected.clone().requires_grad_()
    vision(method, changed(view, {"encoder.projected": given})).projected.sum().backward()
    reached = (given.grad.abs().sum(-1) > 0).sum(1)
    assert (reached > 20).all(), "also what was merged"


# ------------------------------------------------------------------------------------------------ AOT


def slow_plan(cost, eps=0.1, iterations=100):
    kernel = (-cost.double() / eps).exp()
    rows_, columns = cost.shape
    down, across = torch.ones(rows_).double(), torch.ones(columns).double()
    for _ in range(iterations):
        down = 1 / rows_ / (kernel @ across)
        across = 1 / columns / (kernel.T @ down)
    return down[:, None] * kernel * across


def test_transport():
    cost = torch.rand(2, 7, 4, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn(cost)
    for b in range(2):
        torch.testing.assert_close(plan[b].double(), slow_plan(cost[b]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plan.sum(1), torch.full((2, 4), 1 / 4))
    torch.testing.assert_close(plan.sum(2), torch.full((2, 7), 1 / 7), rtol=1e-3, atol=1e-4)
    # a permutation of cheap pairs, at a temperature at which exp(-cost / eps) is nothing
    cheap = 1 - torch.eye(5)[[3, 1, 4, 0, 2]]
    assert torch.equal((sinkhorn(cheap[None] * 5, eps=0.01) * 5).round()[0], 1 - cheap)


def slow_aot(view, b, count, method):
    frames, rows_, columns = view.grid
    places = rows_ * columns
    x = view.encoder.projected[b].double().view(frames, places, -1)
    deep = view.encoder.cls_attention[b].view(frames, places).tolist()
    local = view.encoder["cls_attention", method.shallow][b].view(frames, places).tolist()
    quota, outputs, begin = even_shares(count, frames), {}, 0
    for length in even_shares(frames, max(1, round(frames / method.length))):
        wanted = sum(quota[begin : begin + length])
        size = min(places, math.ceil(wanted / (1 + method.residual * (length - 1))))
        anchors, values = [], []
        for f in range(begin, begin + length):
            first = ranked(local[f])[: size // 2]  # one window: the frame is smaller than 9 x 9
            rest = [p for p in ranked(deep[f]) if p not in first]
            at = sorted(first + rest[: size - len(first)])
            others = [p for p in range(places) if p not in at]
            unit = F.normalize(x[f], dim=-1)

            def apart(p, q):
                return math.hypot(
                    (p // columns - q // columns) / (rows_ - 1), (p % columns - q % columns) / (columns - 1)
                )

            if others:
                cost = torch.tensor([[1 - float(unit[p] @ unit[a]) + 0.5 * apart(p, a) for a in at] for p in others])
                plan = slow_plan(cost)
                moved = (x[f, at] + plan.T @ x[f, others]) / (1 + plan.sum(0)[:, None])
                groups = {a: [a] for a in at}
                for p in others:
                    groups[max(at, key=lambda a: float(unit[p] @ unit[a]))].append(p)
                mean = torch.stack([x[f, group].mean(0) for group in groups.values()])
                values.append(0.9 * moved + 0.1 * mean)
            else:
                values.append(x[f, at])
            anchors.append([f * places + a for a in at])
        total, load = values[0].clone(), torch.zeros(size).double()
        for dt, share in enumerate(even_shares(wanted - size, max(1, length - 1)), start=1):
            if dt == length:
                break
            cost = 1 - F.normalize(values[dt], dim=-1) @ F.normalize(values[0], dim=-1).T
            plan = slow_plan((cost - cost.min()) * (1 - math.exp(-(dt**2) / 4.5)))
            plan = plan / plan.sum(1, keepdim=True)
            alone = ranked(-plan.max(1).values)[:share]
            for r in range(size):
                if r in alone:
                    outputs[anchors[dt][r]] = values[dt][r]
                else:
                    total += plan[r][:, None] * values[dt][r]
                    load += plan[r]
        outputs |= dict(zip(anchors[0], total / (1 + load[:, None]), strict=True))
        begin += length
    return outputs


@pytest.mark.parametrize(
    ("count", "options"),
    [(30, {"length": 3}), (31, {"length": 6, "residual": 0.1}), (40, {"length": 1}), (66, {"length": 3})],
)
def test_aot(count, options):
    view = make_view(4, grid=(6, 3, 4), dim=6)
    method = vt.AOT(keep=count, shallow=1, **options)
    kept = vision(method, view)
    for b in range(2):
        outputs = slow_aot(view, b, count, method)
        assert kept.index[b].tolist() == sorted(outputs)
        expected = torch.stack([outputs[i] for i in sorted(outputs)])
        torch.testing.assert_close(kept.projected[b].double(), expected, rtol=1e-3, atol=1e-4)


def test_aot_of_a_uniform_video_and_of_a_picture():
    flat = {"encoder.projected": torch.ones(2, 45, 9)}
    kept = vision(vt.AOT(keep=20, shallow=1), changed(make_view(grid=(5, 3, 3)), flat))
    torch.testing.assert_close(kept.projected, torch.ones(2, 20, 9))
    assert vision(vt.AOT(keep=9, shallow=1), make_view()).index.shape == (2, 9)
    for few in (1, 2, 3):
        assert vision(vt.AOT(keep=few, shallow=1, length=1), make_view(grid=(5, 3, 3))).index.shape == (2, few)
    for options, message in (({"residual": 2.0}, "residual=2.0 is no share"), ({"length": 0}, "length=0")):
        with pytest.raises(vt.TrimError, match=message):
            vt.AOT(**options)
