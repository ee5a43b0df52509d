"""Methods for videos: what all promise, hand-computed answers, slow references written from their specifications."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator

import pytest
import torch
import torch.nn.functional as F

import families
import visiontrim as vt
from families import Prompts
from peers import answer, make_view, ranked, rows
from views import changed
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Layers
from visiontrim.core.registry import load_method
from visiontrim.methods import EVS, DyCoke, FastVID, HoliTom, HoliTomInner, STGridPool, VidCom2
from visiontrim.ops.frames import cut_at_changes, static_windows, temporal_gridding
from visiontrim.ops.groups import nearest_counts
from visiontrim.ops.merge import merge_into_nearest
from visiontrim.ops.pool import pool_by_weight
from visiontrim.ops.select import gather

METHODS = [
    DyCoke(),
    DyCoke(variant="release"),
    EVS(),
    FastVID(),
    FastVID(segments=2, threshold=-1.0, members="others"),
    HoliTom(),
    HoliTom(threshold=-0.2),  # much is static
    STGridPool(),
    STGridPool(norm="raw", gridding=False),
    VidCom2(),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)
SEEDS = range(3)


def video_view(seed=0, grid=(4, 3, 4), batch=2, dim=8):
    """A video whose frames change a little: each place drifts by a speed of its own."""
    view = make_view(seed, grid, batch, dim)
    generator = torch.Generator().manual_seed(seed + 100)
    frames, places = grid[0], grid[1] * grid[2]
    start = torch.randn(batch, 1, places, 9, generator=generator)
    speed = 2 * torch.rand(batch, 1, places, 1, generator=generator).square()
    drift = torch.randn(batch, frames, places, 9, generator=generator).cumsum(1)
    return changed(view, {"encoder.projected": (start + speed * drift).flatten(1, 2)})


def cosine(a, b):
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1))


# What all promise


@every_method
@pytest.mark.parametrize("keep", [1, 2, 5, 11, 12, 13, 20, 30, 36, 47, 0.1, 0.5])
def test_budget_is_exact_and_the_answer_whole(method, keep):
    view = video_view()
    kept = answer(dataclasses.replace(method, keep=keep), view)
    count = keep if isinstance(keep, int) else round(keep * 48)
    assert kept.index.shape == (2, count)
    assert all(len(set(row)) == count and row == sorted(row) and min(row) >= 0 for row in kept.index.tolist())
    assert int(kept.index.max()) < 48
    assert method.merges == (kept.projected is not None)
    if kept.projected is not None:
        assert kept.projected.shape == (2, count, 9)
        assert torch.isfinite(kept.projected).all()
    if kept.assignment is not None:
        assert torch.equal(gather(kept.assignment, kept.index), torch.arange(count).expand(2, -1))
        assert kept.assignment.min() >= -1


@every_method
def test_keeping_everything_changes_nothing(method):
    for keep in (1.0, 48):
        kept = answer(dataclasses.replace(method, keep=keep), video_view())
        assert torch.equal(kept.index, torch.arange(48).expand(2, -1))
        assert kept.features is kept.projected is kept.assignment is kept.complement is None


@every_method
@pytest.mark.parametrize("keep", [7, 29])
def test_a_batch_equals_its_videos_and_twice_is_once(method, keep):
    view, method = video_view(batch=3), dataclasses.replace(method, keep=keep)
    kept = answer(method, view)
    again = answer(method, view)
    for video in range(3):
        alone = answer(method, rows(view, [video]))
        assert torch.equal(alone.index, kept.index[[video]])
        assert torch.equal(again.index, kept.index)
        if kept.projected is not None:
            torch.testing.assert_close(alone.projected, kept.projected[[video]])
            assert torch.equal(again.projected, kept.projected)


@every_method
def test_images_and_odd_numbers_of_frames(method):
    for grid in ((1, 3, 4), (3, 1, 5), (5, 2, 2), (9, 2, 3)):
        view = video_view(grid=grid)
        kept = answer(dataclasses.replace(method, keep=0.5), view)
        assert kept.index.shape == (2, round(0.5 * math.prod(grid)))


@every_method
def test_a_video_that_stands_still(method):
    view = video_view()
    still = view.encoder.projected[:, :12].repeat(1, 4, 1)
    half = changed(view, {"encoder.projected": still.bfloat16()}, features=view.features.bfloat16())
    for keep in (3, 20, 40):
        kept = answer(dataclasses.replace(method, keep=keep), half)
        assert all(len(set(row)) == keep for row in kept.index.tolist())
        assert kept.projected is None or kept.projected.dtype == torch.bfloat16


@every_method
def test_methods_can_be_written_down(method):
    assert load_method(method.to_dict()) == method
    assert load_method(str(method)) == method
    assert method.positions == ("keep" if method.name in ("evs", "fastvid") else "compact")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VidCom2(temperature=0.0), "temperature=0.0"),
        (lambda: HoliTom(beta=1.5), "beta=1.5 is no share"),
        (lambda: FastVID(context=-0.1), "context=-0.1 is no share"),
        (lambda: FastVID(segments=0), "segments=0"),
        (lambda: DyCoke(variant="code"), "variant='code' is no choice"),
        (lambda: EVS(keep=0), "keep=0 keeps nothing"),
    ],
)
def test_options_are_checked(build, message):
    with pytest.raises(TrimError, match=message):
        build()


# EVS


@pytest.mark.parametrize("keep", [12, 13, 30, 44])
@pytest.mark.parametrize("seed", SEEDS)
def test_evs(seed, keep):
    view = video_view(seed)
    kept = answer(EVS(keep=keep), view)
    for b, x in enumerate(view.encoder.projected):
        change = [255.0] * 12 + [1 - cosine(x[i], x[i - 12]) for i in range(12, 48)]
        assert kept.index[b].tolist() == sorted(ranked(change)[:keep])


def test_evs_of_a_still_video_keeps_the_first_frame_and_the_earliest_ties():
    view = video_view()
    still = changed(view, {"encoder.projected": torch.eye(9)[torch.arange(12) % 9].repeat(4, 1).expand(2, -1, -1)})
    assert answer(EVS(keep=15), still).index[0].tolist() == list(range(15))
    assert answer(EVS(keep=2), still).index[0].tolist() == [5, 7]  # a lattice of the first frame


# DyCoke


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("frames", [4, 5, 7, 8])
def test_dycoke(variant, frames):
    view, share = video_view(grid=(frames, 3, 4)), 4
    expected = [[], []]
    for b, x in enumerate(view.encoder.projected.view(2, frames, 12, 9)):
        for frame in range(frames):
            first = frame - frame % 4
            third_is_pruned = variant == "paper" or first in range(0, frames - 4, 4)
            if frame % 4 == 0 or (frame % 4 == 2 and not third_is_pruned):
                expected[b] += [12 * frame + p for p in range(12)]
                continue
            other = frame - 1 if frame % 2 else first
            lowest = ranked([-cosine(x[frame, p], x[other, p]) for p in range(12)])[:share]
            expected[b] += sorted(12 * frame + p for p in lowest)
    kept = answer(DyCoke(keep=len(expected[0]), variant=variant), view)
    assert kept.index.tolist() == expected


def test_dycoke_counts_of_the_release():
    view = video_view(grid=(32, 14, 14), batch=1)
    for variant, keep in (("paper", 2960), ("release", 3098)):
        kept = answer(DyCoke(keep=keep, variant=variant), view).index[0]
        per_frame = torch.bincount(kept // 196, minlength=32).tolist()
        assert per_frame[:28] == [196, 58, 58, 58] * 7
        assert per_frame[28:] == [196, 58, 58 if variant == "paper" else 196, 58]


def test_dycoke_below_a_frame_of_four_is_a_lattice_of_those():
    assert answer(DyCoke(keep=2), video_view(grid=(8, 3, 4))).index[0].tolist() == [6, 4 * 12 + 6]


# VidCom2


@pytest.mark.parametrize("keep", [5, 12, 31])
@pytest.mark.parametrize("seed", SEEDS)
def test_vidcom2(seed, keep):
    view = video_view(seed)
    kept = answer(VidCom2(keep=keep), view)
    for b in range(2):
        x = view.encoder.projected[b].double()
        variance = [float(x[:, c].var(correction=0)) for c in range(9)]
        steady = sorted(range(9), key=lambda c: variance[c])[:4]
        x = F.normalize(x[:, steady], dim=-1)

        def likeness(token, centre):
            return sum(math.exp(-float((token - centre).square().sum()) / (2 * a)) for a in (0.125, 0.25, 0.5, 1, 2))

        v = [likeness(x[i], x.mean(0)) for i in range(48)]
        f = [likeness(x[i], x[i // 12 * 12 : i // 12 * 12 + 12].mean(0)) for i in range(48)]
        u = [-sum(v[12 * t : 12 * t + 12]) / 12 for t in range(4)]
        e = [math.exp((value - max(u)) / 0.01) for value in u]
        share = [min(12.0, keep / 4 * (1 + value / sum(e) - 1 / 4)) for value in e]
        counts = best_counts(share, [12] * 4, keep)
        expected = []
        for t in range(4):
            order = sorted(range(12 * t, 12 * t + 12), key=lambda i: v[i] + f[i])
            expected += sorted(order[: counts[t]])
        assert kept.index[b].tolist() == expected


def test_vidcom2_moves_at_most_one_frames_worth():
    """Eight frames, one of them unlike the others: .469 of it and .219 of the others stay at R = .25."""
    generator = torch.Generator().manual_seed(0)
    common, other = torch.randn(2, 16, generator=generator)
    x = (common + 0.1 * torch.randn(8, 64, 16, generator=generator)).clone()
    x[3] = other + 0.1 * torch.randn(64, 16, generator=generator)
    view = changed(make_view(grid=(8, 8, 8), batch=1, width=16), {"encoder.projected": x.view(1, 512, 16)})
    kept = answer(VidCom2(keep=0.25), view).index[0]
    assert torch.bincount(kept // 64).tolist() == [14, 14, 14, 30, 14, 14, 14, 14]
    assert torch.equal(
        answer(VidCom2(keep=0.25), changed(view, {"encoder.projected": 7 * view.encoder.projected})).index[0], kept
    )


def test_vidcom2_gives_equal_frames_equal_counts():
    view = video_view()
    still = changed(view, {"encoder.projected": view.encoder.projected[:, :12].repeat(1, 4, 1)})
    kept = answer(VidCom2(keep=20), still).index.view(2, 4, 5)
    assert torch.equal(kept, kept[:, :1] + 12 * torch.arange(4)[:, None])


def best_counts(targets, sizes, count):
    """Of all whole numbers with this sum, 1 at least, those nearest to ``targets``."""
    options = itertools.product(*(range(1, size + 1) for size in sizes))
    return min(
        (option for option in options if sum(option) == count),
        key=lambda option: sum((a - b) ** 2 for a, b in zip(option, targets, strict=True)),
    )


def test_nearest_counts():
    sizes = torch.tensor([[5, 5, 2]])
    assert nearest_counts(torch.tensor([[1.5, 1.5, 1.0]]), sizes, 4).tolist() == [[2, 1, 1]]
    assert nearest_counts(torch.tensor([[1.0, 1.0, 9.0]]), sizes, 11).tolist() == [[5, 4, 2]]
    assert nearest_counts(torch.tensor([[2.9, 0.1, 0.0]]), sizes, 3, least=1).tolist() == [[1, 1, 1]]
    for targets in ([2.1, 3.4, 1.5], [0.4, 6.0, 0.6]):
        ours = nearest_counts(torch.tensor([targets]), sizes, 7, least=1)[0].tolist()
        assert ours == list(best_counts(targets, [5, 5, 2], 7))


# HoliTom


def saving(static, segments):
    return sum(int(static[a:b].all(0).sum()) * (b - a) for a, b in segments if b > a)


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_static_windows_save_most(seed, frames):
    generator = torch.Generator().manual_seed(seed)
    static = torch.rand(frames - 1, 6, generator=generator) < torch.rand(frames - 1, 1, generator=generator)
    segments = static_windows(static)
    assert [i for a, b in segments for i in range(a, b + 1)] == list(range(frames))
    best = 0
    for cuts in itertools.product([False, True], repeat=frames - 1):
        ends = [*(i for i, cut in enumerate(cuts) if cut), frames - 1]
        best = max(best, saving(static, list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))))
    assert saving(static, segments) == best


def test_nothing_static_stands_alone():
    assert static_windows(torch.zeros(3, 5, dtype=torch.bool)) == [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("keep", [10, 24])
def test_holitom_by_hand(keep):
    """Three frames of 2 x 4 places; six places stand still in all, places 6 and 7 change."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.eye(16)
    still = (basis[:6] + 0.05 * torch.randn(6, 16, generator=generator)).expand(3, -1, -1)
    still = still + 0.01 * torch.randn(3, 6, 16, generator=generator)
    moving = basis[6:12].view(3, 2, 16)
    x = torch.cat([still, moving], 1)
    score = torch.rand(3, 8, generator=generator) / 8
    signals = {"encoder.projected": x.view(1, 24, 16), "encoder.column_attention": score.view(1, 24)}
    view = changed(make_view(grid=(3, 2, 4), batch=1, width=16), signals)
    kept = answer(HoliTom(keep=keep), view)
    if keep == 24:
        assert kept.projected is None
        return
    # M = 6 static + 6 dynamic tokens; 10 / 12 of each: 5 static and 5 dynamic, 2 + 2 + 1 by frames (ties go forward)
    mean = x[:, :6].double().mean(0)
    distance = torch.cdist(mean, mean) / 4
    density = [math.exp(-float(row.sort().values[:5].square().mean())) for row in distance]  # as many as centres
    delta = [
        min((float(distance[i, j]) for j in range(6) if density[j] > density[i]), default=float(distance.max()))
        for i in range(6)
    ]
    centres = sorted(ranked([a * b for a, b in zip(density, delta, strict=True)])[:5])
    (left,) = set(range(6)) - set(centres)
    nearest = min(centres, key=lambda c: float(distance[left, c]))
    lowest = min((6, 7), key=lambda p: float(score[2, p]))
    dynamic = [6, 7, 14, 15, 16 + 13 - lowest]
    assert kept.index[0].tolist() == centres + dynamic
    expected = mean[centres].clone()
    where = centres.index(nearest)
    expected[where] = 0.6 * mean[nearest] + 0.4 * mean[left]
    torch.testing.assert_close(kept.projected[0, :5].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept.projected[0, 5:], view.encoder.projected[0, dynamic])
    ordinal = {token: number for number, token in enumerate(centres + dynamic)}
    of_static = [ordinal.get(centre, where) for centre in range(6)]
    of_frames = [[*of_static, ordinal.get(8 * t + 6, -1), ordinal.get(8 * t + 7, -1)] for t in range(3)]
    assert kept.assignment[0].tolist() == functools.reduce(operator.iadd, of_frames, [])
    assert kept.complement[0].tolist() == [True] * 5 + [False] * 5


def test_holitom_above_what_merging_leaves_keeps_absorbed_tokens_beside():
    view = video_view()
    still = changed(view, {"encoder.projected": view.encoder.projected[:, :12].repeat(1, 4, 1)})
    kept = answer(HoliTom(keep=15), still)
    for b in range(2):
        beside = [12 + i for i in ranked(view.encoder.column_attention[b, 12:])[:3]]
        assert kept.index[b].tolist() == [*range(12), *sorted(beside)]
    torch.testing.assert_close(kept.projected, gather(still.encoder.projected, kept.index))


def test_holitom_without_static_places_keeps_what_receives_most():
    view = video_view()
    kept = answer(HoliTom(keep=20, threshold=1.01), view)
    for b in range(2):
        expected = [
            12 * t + i
            for t in range(4)
            for i in sorted(ranked(view.encoder.column_attention[b, 12 * t : 12 * t + 12])[:5])
        ]
        assert kept.index[b].tolist() == expected
    assert torch.equal(kept.projected, gather(view.encoder.projected, kept.index))


def test_inner_merging_halves_in_turn():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 20, 6, generator=generator)
    index = torch.tensor([[1, 5, 8, 19], [0, 2, 3, 4]])
    merged = merge_into_nearest(x, x, index, "halve")
    for b in range(2):
        kept = {i: x[b, i].double() for i in index[b].tolist()}
        goes = {}
        for i in range(20):
            if i not in kept:
                goes[i] = max(kept, key=lambda k: cosine(x[b, i], x[b, k]))
        for i, target in goes.items():
            kept[target] = (kept[target] + x[b, i]) / 2
        torch.testing.assert_close(merged.features[b].double(), torch.stack(list(kept.values())), rtol=1e-5, atol=1e-6)
        assert merged.assignment[b].tolist() == [index[b].tolist().index(goes.get(i, i)) for i in range(20)]


# FastVID


def test_cut_at_changes():
    similarity = torch.tensor([0.95, 0.99, 0.7, 0.92, 0.98])
    assert cut_at_changes(similarity, 1, 0.9) == [(0, 2), (3, 5)]
    assert cut_at_changes(similarity, 3, 0.9) == [(0, 2), (3, 3), (4, 5)]
    assert cut_at_changes(similarity, 3, 0.96) == [(0, 0), (1, 2), (3, 3), (4, 5)]
    assert cut_at_changes(similarity, 8, 0.9) == [(i, i) for i in range(6)]
    assert cut_at_changes(similarity[:0], 8, 0.9) == [(0, 0)]


@pytest.mark.parametrize("members", ["all", "others"])
@pytest.mark.parametrize("frames", [1, 4, 7, 10])
def test_fastvid(members, frames):
    """One segment of ``frames``; five tokens a frame, three salient and two for the segment."""
    view, keep = video_view(grid=(frames, 3, 4)), 5 * frames
    kept = answer(FastVID(keep=keep, segments=1, threshold=-1.0, members=members), view)
    used = [t for t in range(frames) if (frames - 1 - t) % 4 == 0]
    for b in range(2):
        x, a = view.encoder.projected[b].double().view(frames, 12, 9), view.encoder.cls_attention[b].view(frames, 12)
        salient = {(t, p) for t in range(frames) for p in ranked(a[t])[:3]}
        wanted = [2 * frames // len(used) + (place < 2 * frames % len(used)) for place in range(len(used))]
        wanted = wanted[::-1] if members == "others" else wanted  # what does not divide goes to the last frames
        anchors = {
            t: dense(x[t], [p for p in range(12) if (t, p) not in salient], n)
            for t, n in zip(used, wanted, strict=True)
        }
        going = [(t, p) for t in range(frames) for p in range(12) if (t, p) not in salient]
        expected = {place: x[place] for place in salient}
        for t in used:
            taken = {p: [] for p in anchors[t]}
            for place in going:
                if members == "others" and place[0] == t and place[1] in anchors[t]:
                    continue  # a frame's own stay out, those of other frames do not
                taken[max(taken, key=lambda p: cosine(x[place], x[t, p]))].append(x[place])
            for p, absorbed in taken.items():
                w = max(1 / (len(absorbed) + 1), 0.6)
                mean = sum(absorbed) / len(absorbed) if absorbed else 0.0
                expected[t, p] = w * x[t, p] + (1 - w) * mean
        places = sorted(expected)
        assert kept.index[b].tolist() == [12 * t + p for t, p in places]
        torch.testing.assert_close(
            kept.projected[b].double(), torch.stack([expected[place] for place in places]), rtol=1e-5, atol=1e-6
        )
        assert kept.complement[b].tolist() == [place not in salient for place in places]


def dense(x, rest, count):
    """The ``count`` tokens of ``rest`` with the highest density x distance to a denser one, ascending."""
    distance = {(i, j): float((x[i] - x[j]).norm()) / 3 for i in rest for j in rest}
    density = {i: math.exp(-sum(sorted(distance[i, j] ** 2 for j in rest)[:4]) / 4) for i in rest}
    far = max(distance.values())
    delta = {i: min((distance[i, j] for j in rest if density[j] > density[i]), default=far) for i in rest}
    return sorted(sorted(rest, key=lambda i: -density[i] * delta[i])[:count])


def test_fastvid_published_counts_and_limits():
    view = video_view(grid=(32, 14, 14), batch=1)
    kept = answer(FastVID(keep=608), view)
    assert int(kept.complement.sum()) == 32 * 7
    only = answer(FastVID(keep=20, context=0.0), video_view())
    for b in range(2):
        a = video_view().encoder.cls_attention[b].view(4, 12)
        assert only.index[b].tolist() == [12 * t + p for t in range(4) for p in sorted(ranked(a[t])[:5])]
    assert torch.equal(only.projected, gather(video_view().encoder.projected, only.index))
    selected = answer(FastVID(keep=20, beta=1.0), video_view())
    assert torch.equal(selected.projected, gather(video_view().encoder.projected, selected.index))


def test_fastvid_of_a_still_video_absorbs_equals():
    """One token a place: every anchor absorbs only tokens equal to itself."""
    frame = torch.eye(9)[torch.arange(9)]
    view = changed(make_view(grid=(4, 3, 3), batch=1), {"encoder.projected": frame.repeat(4, 1)[None]})
    scores = view.encoder.cls_attention.view(4, 9)[:1].repeat(4, 1).view(1, 36)
    view = changed(view, {"encoder.cls_attention": scores})
    kept = answer(FastVID(keep=20, segments=1, context=1.0), view)
    last = kept.index[0] // 9 == 3
    assert int((kept.complement[0] & last).sum()) == 9  # the one anchor frame has no room for more
    torch.testing.assert_close(kept.projected, gather(view.encoder.projected, kept.index))


# ST-GridPool


def test_gridding_by_hand():
    """Features that are the number of the frame."""
    numbers = torch.arange(64.0).view(1, 64, 1, 1, 1).expand(1, 64, 27, 27, 1)
    first = temporal_gridding(numbers, (2,))[0, ..., 0]
    assert [t for t in range(64) if not (first[t] == t).all()] == list(range(7, 64, 8))
    assert [first[7, i, j].item() for i in (0, 26) for j in (0, 26)] == [1, 3, 5, 7]
    assert (first[7, :14, :14] == 1).all()
    assert (first[7, 14:, 14:] == 7).all()
    both = temporal_gridding(numbers, (2, 4))[0, ..., 0]
    assert [both[15, i, j].item() for i in (0, 26) for j in (0, 26)] == [3, 3, 11, 15]  # 7 holds 1, 3, 5, 7
    assert set(both[15, :14, 14:].unique().tolist()) >= {1, 3, 5, 7}
    whole = temporal_gridding(numbers)[0, ..., 0]
    assert sum(not torch.equal(whole[t], numbers[0, t, ..., 0]) for t in range(64)) == 8
    assert set(whole[31].round().unique().tolist()) >= {1, 9, 17, 25}


@pytest.mark.parametrize("frames", [1, 7])
def test_short_videos_have_no_grids(frames):
    x = torch.randn(2, frames, 3, 5, 4)
    assert torch.equal(temporal_gridding(x), x)


def test_gridding_shrinks_by_area():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 4, 4, 3, generator=generator)
    grids = temporal_gridding(x, (2,))[0, 7]
    for number, frame in enumerate((1, 3, 5, 7)):
        i, j = divmod(number, 2)
        for r, c in itertools.product(range(2), range(2)):
            mean = x[0, frame, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].double().mean((0, 1))
            torch.testing.assert_close(grids[2 * i + r, 2 * j + c].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["rms", "raw"])
def test_norm_pooling(norm):
    view = video_view(grid=(3, 4, 4))
    kept = answer(STGridPool(keep=12, norm=norm, beta=2.0), view)
    for b, cell in itertools.product(range(2), range(12)):
        frame, row, column = cell // 4, cell % 4 // 2 * 2, cell % 2 * 2
        members = [16 * frame + 4 * r + c for r in (row, row + 1) for c in (column, column + 1)]
        x = view.encoder.projected[b, members].double()
        weight = (2 * x.norm(dim=-1) / (3 if norm == "rms" else 1)).softmax(0)
        torch.testing.assert_close(kept.projected[b, cell].double(), weight @ x, rtol=1e-5, atol=1e-6)
        assert kept.assignment[b, members].tolist() == [cell] * 4


def test_norm_pooling_of_equal_tokens_averages_and_odd_grids_lose_nothing():
    assert answer(STGridPool(keep=169), video_view(grid=(1, 27, 27))).index.shape == (2, 169)
    view = video_view(grid=(2, 4, 4))
    plain = answer(STGridPool(keep=0.25, beta=0.0), view).projected
    means = view.encoder.projected.view(2, 2, 2, 2, 2, 2, 9).mean((3, 5)).view(2, 8, 9)
    torch.testing.assert_close(plain, means)
    cells = torch.tensor([0, 0, 1, 1, 1])
    values, logits = torch.arange(5.0).view(1, 5, 1), torch.tensor([[0.0, math.log(3.0), 5.0, 5.0, 5.0]])
    torch.testing.assert_close(pool_by_weight(values, logits, cells, 2)[0, :, 0], torch.tensor([0.75, 3.0]))


# On real families


model_of = functools.cache(families.build)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "video_llava", "llava_onevision"])
@pytest.mark.parametrize("method", [EVS(), DyCoke(), VidCom2(), FastVID(), HoliTom(), STGridPool()], ids=str)
def test_models_keep_what_was_promised(name, method):
    model, inputs = model_of(name), Prompts(name, (3, "video", 5)).batch()
    with vt.trim(model, method, keep=0.6, positions="keep") as run:
        ours = model(**inputs)
    (video,) = run.trace.images
    assert video.grid[0] == families.FRAMES
    assert len(video.stages[0].index) == round(0.6 * video.total)
    assert torch.isfinite(ours.logits).all()


@pytest.mark.usefixtures("no_grad")
def test_both_parts_of_holitom():
    model, inputs = model_of("llava_onevision"), Prompts("llava_onevision", (3, "video", 5)).batch()
    with vt.trim(model, HoliTom(keep=0.75) | HoliTomInner(layer=3)) as run:
        ours = model(**inputs)
    (video,) = run.trace.images
    assert [len(stage.index) for stage in video.stages] == [6, 3]
    assert torch.isfinite(ours.logits).all()
    assert [step.site.index for step in HoliTomInner().steps_for(Layers(encoder=0, decoder=28))] == [18]
