"""Which tokens merge: pairs of neighbours along an axis, and bipartite matching."""

from __future__ import annotations

import itertools

import pytest
import torch

import visiontrim as vt
from tiny import close
from visiontrim.methods.luvc import box, sizes
from visiontrim.methods.matching import left_after
from visiontrim.ops.matching import best_pairs, fixed_pairs, match, merge_axis, merge_into

# ------------------------------------------------------------------------------------------------ pairs along an axis


def test_a_line_of_four_by_hand():
    """Neighbours at 0, 10 and 80 degrees to each other: one pair merges, the first; its mean weighs 3 to 1."""
    angles = torch.deg2rad(torch.tensor([0.0, 0.0, 10.0, 90.0]))
    features = torch.stack([angles.cos(), angles.sin()], -1)[None] * torch.tensor([1.0, 5.0, 1.0, 1.0])[:, None]
    mass = torch.tensor([[3.0, 1.0, 1.0, 1.0]])
    merged = merge_axis(features, mass, (1, 1, 4), 2, 1)
    assert merged.index.tolist() == [[0, 2, 3]]
    assert merged.assignment.tolist() == [[0, 0, 1, 2]]
    close(merged.features[0, 0], torch.tensor([(3 * 1 + 1 * 5) / 4, 0.0]))
    assert torch.equal(merged.features[:, 1:], features[:, 2:])


def test_two_pairs_need_both_ends():
    """The most similar gap is the middle one, but two disjoint pairs leave it out."""
    similarity = torch.tensor([[0.1, 0.9, 0.2]])
    assert best_pairs(similarity, 1).tolist() == [[False, True, False]]
    assert best_pairs(similarity, 2).tolist() == [[True, False, True]]
    assert fixed_pairs(similarity, 1).tolist() == [[False, False, True]]


@pytest.mark.parametrize("gaps", [1, 4, 7])
def test_the_best_pairs_are_those_of_an_exhaustive_search(gaps):
    similarity = torch.rand(6, gaps, generator=torch.Generator().manual_seed(gaps))
    for count in range((gaps + 1) // 2 + 1):
        disjoint = [
            chosen
            for chosen in itertools.combinations(range(gaps), count)
            if all(b - a > 1 for a, b in itertools.pairwise(chosen))
        ]
        for row, line in zip(best_pairs(similarity, count), similarity, strict=True):
            best = max(disjoint, key=lambda chosen, line=line: float(line[list(chosen)].sum()))
            assert row.nonzero()[:, 0].tolist() == list(best)


def test_equal_similarities_take_the_lower_gaps():
    assert best_pairs(torch.ones(1, 5), 2).tolist() == [[True, False, True, False, False]]
    assert best_pairs(torch.ones(1, 4), 0).tolist() == [[False] * 4]


def test_along_the_rows_tokens_keep_their_columns():
    """Two columns of three rows: in the first rows 0 and 1 are alike, in the second rows 1 and 2."""
    features = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1]])[None]
    merged = merge_axis(features, torch.ones(1, 6), (1, 3, 2), 1, 1)
    assert merged.index.tolist() == [[0, 1, 4, 3]]
    assert merged.assignment.tolist() == [[0, 1, 0, 3, 2, 3]]
    assert merged.features[0].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_similarity_is_that_of_the_means_of_units():
    """Units of two patches: as a whole token 0 resembles neither neighbour, its mean that of token 1."""
    patches = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]], [[1, 0], [1, 0]]])
    merged = merge_axis(patches.flatten(1)[None], torch.ones(1, 3), (1, 1, 3), 2, 1, unit=2)
    assert merged.assignment.tolist() == [[0, 0, 1]]
    close(merged.features[0, 0], torch.full((4,), 0.5))


def lines(raster: torch.Tensor, axis: int) -> torch.Tensor:
    return raster.movedim(axis, -1).reshape(-1, raster.shape[axis])


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("best", [True, False])
def test_merging_along_an_axis_is_that_of_the_loop(axis, best):
    generator = torch.Generator().manual_seed(axis)
    lattice = (2, 4, 6)
    features, mass = torch.randn(3, 48, 5, generator=generator), torch.randint(1, 4, (3, 48), generator=generator)
    merged = merge_axis(features, mass.float(), lattice, axis, 2, best=best)
    left = list(lattice)
    left[axis] -= 2
    raster, after = torch.arange(48).view(lattice), torch.arange(left[0] * left[1] * left[2]).view(left)
    for image in range(3):
        for old, new in zip(lines(raster, axis), lines(after, axis), strict=True):
            line = features[image, old].double()
            similarity = torch.cosine_similarity(line[1:], line[:-1], dim=-1).float()[None]
            pairs = (best_pairs if best else fixed_pairs)(similarity, 2)[0].tolist()
            place, token = 0, 0
            while token < len(old):
                members = [token, token + 1] if token < len(pairs) and pairs[token] else [token]
                weights = mass[image, old[members]].double()
                mean = (line[members] * weights[:, None]).sum(0) / weights.sum()
                close(merged.features[image, new[place]].double(), mean)
                assert merged.index[image, new[place]] == old[token]
                assert (merged.assignment[image, old[members]] == new[place]).all()
                place, token = place + 1, token + len(members)
            assert place == left[axis]


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (5, 9), (1, 7), (16, 3)])
def test_boxes_are_within_reach(rows, columns, calls):
    for target in range(1, rows * columns + 1):
        height, width = box(rows, columns, target, calls)
        for start, end, turns in ((columns, width, (calls + 1) // 2), (rows, height, calls // 2)):
            if turns:
                lengths = [start, *sizes(start, end, turns)]
                assert lengths[-1] == end
                assert all(a >= b >= (a + 1) // 2 for a, b in itertools.pairwise(lengths))
            else:
                assert start == end
    assert box(rows, columns, rows * columns, calls) == (rows, columns)


def test_half_of_the_tokens_of_llava():
    assert box(24, 24, 288, 2) == (18, 16)
    assert box(24, 24, 144, 2) == (12, 12)
    assert box(24, 24, 10, 2) == (12, 12)
    layers = vt.Layers(encoder=23, decoder=32)
    assert [str(step.site) for step in vt.LUVC(stages="vision").steps_for(layers)] == [
        "encoder layer 5",
        "encoder layer 9",
        "encoder layer 14",
        "encoder layer 18",
    ]


# ------------------------------------------------------------------------------------------------ bipartite matching


def test_matching_is_that_of_the_loop():
    generator = torch.Generator().manual_seed(0)
    metric, penalty = torch.randn(2, 9, 4, generator=generator), torch.rand(2, 9, generator=generator)
    for given in (None, penalty):
        source, target = match(metric, 3, given)
        for row in range(2):
            unit = torch.nn.functional.normalize(metric[row].double(), dim=-1)
            best = []
            for a in range(0, 9, 2):
                similarity, partner = max((float(unit[a] @ unit[b]), -b) for b in range(1, 9, 2))
                best.append((similarity - (0 if given is None else float(given[row, a])), a, -partner))
            top = sorted(best, reverse=True)[:3]
            assert source[row].tolist() == [a for _, a, _ in top]
            assert target[row].tolist() == [b for _, _, b in top]


def test_several_sources_share_a_target():
    features = torch.tensor([[[1.0], [2.0], [6.0], [10.0]]])
    mass = torch.tensor([[1.0, 2.0, 3.0, 1.0]])
    merged = merge_into(features, mass, torch.tensor([[0, 2]]), torch.tensor([[1, 1]]))
    assert merged.index.tolist() == [[1, 3]]
    assert merged.assignment.tolist() == [[0, 0, 0, 1]]
    close(merged.features[0, :, 0], torch.tensor([(1 + 4 + 18) / 6, 10.0]))


@pytest.mark.parametrize(("last", "total"), [(2, 16), (22, 576), (4, 576)])
def test_equal_numbers_merge_and_none_more_than_half(last, total):
    for keep in range(-(-total // 2**last), total + 1):
        counts = [total, *(left_after(layer, last, total, keep) for layer in range(1, last + 1))]
        assert counts[-1] == keep
        assert all(b <= a <= 2 * b for a, b in itertools.pairwise(counts[1:]))
