"""What was made cheaper answers as the plain form does: short loops over everything, on small and awkward inputs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import visiontrim as vt
from visiontrim.ops import coverage, diverse, matching, recycle
from visiontrim.ops.groups import principal_loadings, rank_within, suppressed
from visiontrim.ops.spreading import _quantile  # pyright: ignore[reportPrivateUsage]

SEEDS = range(4)
every_seed = pytest.mark.parametrize("seed", SEEDS)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alike(batch, tokens, dim, seed):
    """Tokens of which many are equal or nearly so."""
    values = random(batch, tokens, dim, seed=seed)
    few = values[:, torch.randint(tokens // 3, (tokens,), generator=torch.Generator().manual_seed(seed))]
    return few + (torch.arange(tokens) % 2)[:, None] * 1e-5 * values


def covering(coverage, count):
    """The greedy choice by every row again at every pick, in float64; of what ties the lowest index."""
    table, picks = coverage.double(), []
    covered = torch.zeros(len(table), 1, dtype=torch.float64)
    for _ in range(count):
        gain = table.maximum(covered).sum(0)
        gain[picks] = -1
        picks.append(int((gain >= gain.max() - 1e-12 * table.sum(0).max()).nonzero()[0]))
        covered = table[:, picks].amax(1, keepdim=True)
    return picks


@every_seed
@pytest.mark.parametrize("count", [1, 7, 90])
@pytest.mark.parametrize("kind", ["random", "alike", "equal", "flat", "zero"])
def test_coverage_by_what_a_pick_changes(seed, count, kind):
    """The choice of a plain loop in float64, also where many gains are within what float32 can tell apart."""
    values = alike(2, 90, 30, seed) if kind == "alike" else random(2, 90, 30, seed=seed)
    if kind == "equal":
        values = values[:, torch.randint(20, (90,), generator=torch.Generator().manual_seed(seed))]
    elif kind == "flat":
        values = values[:, :1] + 1e-3 * values
    elif kind == "zero":
        values[:, ::3] = 0
    unit = F.normalize(values, dim=-1)
    rows = (unit @ unit.mT / 0.2).softmax(-1)
    rows = torch.cat([(9 * random(2, 5, 90, seed=seed + 7)).softmax(-1), rows], 1)  # a few rows with all to gain
    for picks in (coverage.coverage_picks(rows, count), coverage._all_rows(rows, count)):
        assert picks.tolist() == [covering(of_image, count) for of_image in rows]


def test_coverage_once_all_is_covered():
    assert coverage.coverage_picks(torch.zeros(1, 5, 9), 4).tolist() == [[0, 1, 2, 3]]
    rows = torch.eye(9)[3:5].repeat(40, 1)  # two tokens cover everything
    assert coverage.coverage_picks(rows[None], 5).tolist() == [[3, 4, 0, 1, 2]]


@every_seed
def test_nearest_similarities_in_strips(seed, monkeypatch):
    monkeypatch.setattr(diverse, "SIMILARITIES", 7 * 2 * 50)
    unit = F.normalize(alike(2, 50, 6, seed), dim=-1)
    full = unit @ unit.mT
    full.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    torch.testing.assert_close(diverse.nearest_similarity(unit), full.amax(-1))
    seen = torch.zeros(50, 50)
    for start, part in diverse.later_similarities(unit):
        seen[start : start + part.shape[1], start:] += 1
    assert bool((seen + seen.mT >= 1).all())


@every_seed
@pytest.mark.parametrize("length", [130, 131])
def test_thinning_by_the_nearest_is_thinning_by_all(seed, length, monkeypatch):
    """In float64, with few known neighbours and with so few that some are missed."""
    values = alike(2, length, 8, seed).double()
    order = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(seed)) for _ in range(2)])
    expected = diverse.thin_out(values, order, 9)
    unit = F.normalize(values[torch.arange(2)[:, None], order], dim=-1)
    monkeypatch.setattr(diverse, "SHORT", 16)
    for known in (40, 1):
        monkeypatch.setattr(diverse, "NEAREST", known)
        _, missed = diverse._thinned_by_nearest(unit, 9, 8)
        assert bool(missed) == (known == 1)
        assert torch.equal(diverse.thin_out(values, order, 9), expected)


@every_seed
@pytest.mark.parametrize("held", [1 << 24, 60])
def test_complete_graph_matching_in_strips(seed, held, monkeypatch):
    monkeypatch.setattr(diverse, "SIMILARITIES", held)
    monkeypatch.setattr(matching, "SIMILARITIES", held)
    metric, importance = random(2, 45, 6, seed=seed), random(2, 45, seed=seed + 9)
    source, target = matching.match_any(metric, importance, 12)
    best, other = matching.edges(metric)
    for b in range(2):
        unit = F.normalize(metric[b].double(), dim=-1)
        cosine = (unit @ unit.mT).fill_diagonal_(-2)
        torch.testing.assert_close(best[b].double(), cosine[::2, 1::2].amax(1), rtol=0, atol=1e-6)
        assert other[b].tolist() == cosine[::2, 1::2].argmax(1).tolist()
        order = sorted(range(45), key=lambda i: (-round(float(cosine[i].max()), 6), i))
        rank = {token: place for place, token in enumerate(order)}
        score = {
            i: float(importance[b, i]) - max((float(cosine[i, j]) for j in range(45) if rank[j] > rank[i]), default=-9)
            for i in range(45)
        }
        taken = sorted(order, key=lambda i: score[i])[:12]
        assert source[b].tolist() == taken
        free = [j for j in range(45) if j not in taken]
        assert target[b].tolist() == [max(free, key=lambda j: float(cosine[i, j])) for i in taken]


def matched(metric, importance, count):
    """Complete-graph matching with all cosines at once."""
    unit = F.normalize(metric, dim=-1)
    cosine = (unit @ unit.mT).fill_diagonal_(-torch.inf)
    cosine = torch.maximum(cosine, cosine.mT)
    order = cosine.amax(-1).sort(descending=True, stable=True).indices
    rank = order.argsort()
    later = cosine.masked_fill(rank <= rank[:, None], -torch.inf).amax(-1)
    source = order[(importance - later)[order].sort(stable=True).indices[:count]]
    cosine[:, source] = -torch.inf
    return source.tolist(), cosine.argmax(-1)[source].tolist()


@every_seed
@pytest.mark.parametrize("held", [1 << 24, 3000])
@pytest.mark.parametrize("kind", ["random", "star"])
def test_complete_graph_matching_by_those_that_may_be_taken(seed, held, kind, monkeypatch):
    """Also where what a token is most like says little: many are like one that ranks before all of them."""
    monkeypatch.setattr(diverse, "SIMILARITIES", held)
    monkeypatch.setattr(matching, "SIMILARITIES", held)
    metric, importance = random(2, 300, 200, seed=seed), random(2, 300, seed=seed + 9).abs() / 20
    if kind == "star":
        centre, importance = 1.5 * 14 * F.normalize(random(2, 1, 200, seed=seed + 5), dim=-1), importance / 100
        pairs = metric[:, 1:21] + 0.9 * metric[:, 21:41]  # cosines of .74; those to the centre are .83, .69 without it
        metric = torch.cat([centre, pairs, metric[:, 1:21], metric[:, 41:] + centre], 1)
    seen, asked = matching.gather, []
    monkeypatch.setattr(matching, "gather", lambda values, index: asked.append(index.shape[1]) or seen(values, index))
    source, target = matching.match_any(metric, importance, 5)
    for b in range(2):
        assert (source[b].tolist(), target[b].tolist()) == matched(metric[b], importance[b], 5)
    assert (sum(asked) > 300 + 84 + 5) == (kind == "star")  # once all, 84 that may be taken, 5 that are


@every_seed
@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("threshold", [-0.5, 0.2, 0.7])
def test_suppression_in_rounds(seed, groups, threshold):
    """Also in one group, whose chains are long, and in groups of which one is far larger than the others."""
    unit = F.normalize(random(2, 60, 4, seed=seed), dim=-1)
    score = random(2, 60, seed=seed + 1).round(decimals=1)  # with ties
    group = (random(2, 60, seed=seed + 2).abs() * groups / 2).long().clamp(max=groups - 1)
    ours = suppressed(unit, group, score, torch.tensor([threshold, threshold + 0.1]))
    for b in range(2):
        kept: list[int] = []
        for i in sorted(range(60), key=lambda i: (-float(score[b, i]), i)):
            rivals = [j for j in kept if group[b, j] == group[b, i]]
            if not any(float(unit[b, i] @ unit[b, j]) > threshold + 0.1 * b for j in rivals):
                kept.append(i)
        assert (~ours[b]).nonzero()[:, 0].tolist() == sorted(kept)
    assert int(rank_within(group, score).max()) > 5


@every_seed
@pytest.mark.parametrize(("tokens", "dim"), [(30, 50), (50, 30), (50, 3)])
def test_principal_loadings_on_the_shorter_side(seed, tokens, dim):
    values = random(2, tokens, dim, seed=seed)
    ours = principal_loadings(values, 6)
    for b in range(2):
        u, s, _ = torch.linalg.svd(values[b].double())
        expected = F.pad(u[:, : min(6, len(s))].abs(), (0, max(0, 6 - len(s))))
        torch.testing.assert_close(ours[b].double(), expected, rtol=1e-3, atol=1e-3)


@every_seed
@pytest.mark.parametrize("held", [1 << 24, 70])
def test_density_peaks_in_parts(seed, held, monkeypatch):
    monkeypatch.setattr(recycle, "HELD", held)
    values = alike(2, 48, 5, seed)
    found = recycle.density_peaks(values, 9, 4)
    for b in range(2):
        x = values[b].double()
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / 5**0.5
        density = (-distance.sort(1).values[:, :4].square().mean(1)).exp()
        near = (distance[:, found.centres[b]] - distance[:, found.centres[b]].amin(1, keepdim=True)) <= 1e-6
        others = [i for i in range(48) if i not in found.centres[b].tolist()]
        assert all(bool(near[i, found.assignment[b, i]]) for i in others)
        assert float(density.max()) <= 1
    whole = recycle.density_peaks(values, 9, 4)
    monkeypatch.undo()
    again = recycle.density_peaks(values, 9, 4)
    assert torch.equal(whole.centres, again.centres)
    assert torch.equal(whole.assignment, again.assignment)


def test_equal_tokens_are_at_no_distance_and_near_ones_are_not():
    tokens = 100 + torch.tensor([[[0.0, 0.0], [0.0, 0.0], [1e-4, 0.0], [3.0, 4.0]]])
    (distance,) = recycle._distances(tokens)
    direct = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") * 2**-0.5
    torch.testing.assert_close(distance, direct, rtol=1e-4, atol=0)
    assert distance[0, 0, 1] == 0
    assert distance[0, 0, 2] > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.998, 1.0])
@pytest.mark.parametrize("columns", [1, 2, 57])
def test_quantiles_by_the_largest(share, columns):
    values = random(2, 5, columns)
    torch.testing.assert_close(_quantile(values, share), values.quantile(share, dim=-1, keepdim=True))


@pytest.fixture(scope="module")
def selection():
    path = Path(__file__).parent.parent / "benchmarks" / "selection.py"
    spec = importlib.util.spec_from_file_location("selection", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STOPS = {"fastvid": 1, "holitom": 3, "pixelprune": 1, "prunesid": 1}
"""How often methods ask in a selection what was found. HoliTom and FastVID ask of what they copied to the host at once,
and copies and lists, which PyTorch makes of a tensor by itself, are not seen on the CPU."""


@pytest.mark.parametrize(
    "name", ["crossget", "divprune", "evs", "fastvid", "fastv", "holitom", "mmtok", "pixelprune", "prunesid", "vscan"]
)
def test_the_table_of_costs(name, selection, monkeypatch):
    monkeypatch.setattr(selection, "KEEP", 20)
    torch.manual_seed(0)
    with torch.no_grad():
        row = selection.measured(name, 196, 1, 0.0)
    assert row["tokens"] == 196
    assert row["operations"] > 0
    assert row["stops"] <= STOPS.get(name, 0)
    assert row["pays_from"] > 0
    assert selection.table([row]).count("\n") == 2


def test_work_is_counted_as_it_is(selection):
    a, b = random(1, 8, 4), random(1, 4, 6)
    with torch.no_grad(), selection.Counted() as counted:
        torch.bmm(a, b)
        a[:, ::2].contiguous().gather(1, torch.zeros(1, 2, 4, dtype=torch.long))
    assert counted.flops == 2 * 8 * 4 * 6
    assert counted.operations == counted.launches + 1  # the slice is a view
    sizes = [4 * (32 + 24 + 48), 4 * (16 + 16), 8 * 8, 4 * (8 + 8)]  # a product, a copy, zeros, and what is gathered
    assert counted.bytes == sum(sizes)
    assert counted.largest == 4 * 48
    rows = [{"tokens": size, "bytes": size**2, "flops": 0} for size in (10, 100)]
    assert selection.exponent(rows, "bytes") == pytest.approx(2)
    assert selection.exponent(rows, "flops") == 0


RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "selection.jsonl"


@pytest.fixture(scope="module")
def stored():
    rows: dict[str, list[dict]] = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["method"], []).append(row)
    return rows


def test_the_stored_table_is_whole(stored, selection):
    assert list(stored) == sorted(set(vt.list_methods()) - {"none"})
    for name, rows in stored.items():
        sizes = [196 * frames for frames in (4, 16, 64, 128)] if name in selection.VIDEO else [576, 2304, 9216, 16384]
        assert [row["tokens"] for row in rows] == sizes, name
    printed = (RESULTS.parents[2] / "docs" / "results" / "bench.md").read_text()
    assert selection.table([row for rows in stored.values() for row in rows]) in printed


def test_what_grows_faster_than_the_tokens_says_so(stored, selection):
    """A method whose bytes or FLOPs grow with a power above 1.1 gives its reason in its docstring."""
    above = {
        name
        for name, rows in stored.items()
        if max(selection.exponent(rows, what) for what in ("bytes", "flops")) > 1.1
    }
    assert {"mmtok", "divprune", "crossget", "ppe"} <= above
    for name in sorted(above):
        module = sys.modules[type(vt.load_method(name)).__module__]
        text = " ".join(module.__doc__.split())
        assert re.search("grows? with the (square|product) of|grow with the product|above linear", text), name
