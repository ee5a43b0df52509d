"""Tensor functions against double loops in float64, and the properties that every input has."""

import itertools
from statistics import pstdev

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from visiontrim.ops import affinity, complement
from visiontrim.ops.affinity import local_affinity, nearest_affinity
from visiontrim.ops.attention import attention_received, attention_rows
from visiontrim.ops.fusion import fuse
from visiontrim.ops.select import even_stride, gather, leftovers, top_k, uniform_stride

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
sides = st.integers(1, 6)
RULES = ["adaptive", "max", "mean", "geometric", "harmonic"]


def places(t, h, w, batch=1):
    return torch.cartesian_prod(*map(torch.arange, (t, h, w))).expand(batch, -1, -1)


def survivors(seed, grid, count, batch=2, dim=5):
    """Features, and ``count`` distinct places of ``grid`` in any order."""
    generator = torch.Generator().manual_seed(seed)
    total = grid[0] * grid[1] * grid[2]
    index = torch.stack([torch.randperm(total, generator=generator)[:count] for _ in range(batch)])
    return torch.randn(batch, count, dim, generator=generator), gather(places(*grid, batch), index)


def test_no_value_decides_the_course():
    """A fake tensor has no values: what runs on it never waits for the device to learn one."""
    with FakeTensorMode():
        features, grid = torch.rand(2, 12, 5), (1, 4, 6)
        coordinates = torch.zeros(2, 12, 3, dtype=torch.long)
        text, mask = torch.rand(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)
        for sigma in ("pairs", "entries"):
            score = local_affinity(features, coordinates, grid, sigma=sigma)
            nearest_affinity(features, coordinates, sigma=sigma)
        for rule in RULES:
            index = top_k(fuse(score, score, rule), 4)
        rest = gather(features, leftovers(index, 12))
        for scores, merge in (("softmax", "add"), ("softmax", "mean"), ("raw", "uniform")):
            complement.complement(rest, rest, text, mask, 2, scale=1.0, scores=scores, merge=merge)
        query = torch.rand(2, 2, 12, 4)
        attention_rows(query, query, index, causal=True, key_mask=torch.ones(2, 12, dtype=torch.bool), softcap=3.0)
        attention_received(query, query, chunk=5)


# affinity


def slow_affinity(features, coordinates, neighbours, w1, w2, w3, sigma, centre, divisor):
    """Eq. 4 by loops over the pairs of one image; ``neighbours[i]`` are the neighbours of token i."""
    features, place = features.double(), coordinates[:, 1:].double()
    pairs = [(i, j) for i, others in enumerate(neighbours) for j in others]
    feature = {(i, j): (features[i] - features[j]).norm().item() for i, j in pairs}
    position = {(i, j): (place[i] - place[j]).norm().item() for i, j in pairs}
    if sigma == "pairs":
        sigmas = [pstdev(norms.values()) if norms else 0.0 for norms in (feature, position)]
    else:
        sigmas = [features.flatten().std().item(), place.flatten().std().item()]
    sigma_f, sigma_p = (value if value > 1e-9 else float("inf") for value in sigmas)
    kernel = {p: -((feature[p] / (w1 * sigma_f)) ** 2) - w3 * (position[p] / (w2 * sigma_p)) ** 2 for p in pairs}
    result = []
    for i, others in enumerate(neighbours):
        total, count = sum(kernel[i, j] for j in others), len(others) + centre
        result.append(total / divisor if divisor else total / count if others else None)
    known = [value for value in result if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    return torch.tensor([mean if value is None else value for value in result])


def window_neighbours(coordinates, window):
    places = coordinates.tolist()
    return [
        [j for j, (g, s, d) in enumerate(places) if j != i and f == g and max(abs(r - s), abs(c - d)) <= window // 2]
        for i, (f, r, c) in enumerate(places)
    ]


@few
@given(
    seeds,
    st.tuples(st.integers(1, 2), sides, sides),
    st.floats(0.2, 1),
    st.sampled_from([3, 5]),
    st.sampled_from(["pairs", "entries"]),
    st.booleans(),
    st.sampled_from(["valid", "window"]),
)
def test_local_affinity_is_the_double_loop(seed, grid, share, window, sigma, centre, border):
    total = grid[0] * grid[1] * grid[2]
    features, coordinates = survivors(seed, grid, max(1, round(share * total)))
    options = {"w1": 0.7, "w2": 1.3, "w3": 0.4, "sigma": sigma, "centre": centre}
    ours = local_affinity(features, coordinates, grid, window=window, border=border, **options)
    divisor = window**2 - (not centre) if border == "window" else None
    for image in range(2):
        neighbours = window_neighbours(coordinates[image], window)
        expected = slow_affinity(features[image], coordinates[image], neighbours, **options, divisor=divisor)
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(ours[image], expected.float(), rtol=2e-4, atol=1e-4)


@few
@given(seeds, st.tuples(st.integers(1, 2), sides, sides), st.floats(0.2, 1), st.integers(1, 8))
def test_nearest_affinity_is_the_double_loop(seed, grid, share, count):
    total = grid[0] * grid[1] * grid[2]
    features, coordinates = survivors(seed, grid, max(1, round(share * total)))
    options = {"w1": 0.7, "w2": 1.3, "w3": 0.4, "sigma": "pairs"}
    ours = nearest_affinity(features, coordinates, neighbours=count, **options)
    for image in range(2):
        tokens = coordinates[image].tolist()
        neighbours = []
        for i, (f, r, c) in enumerate(tokens):
            others = [((r - s) ** 2 + (c - d) ** 2, j) for j, (g, s, d) in enumerate(tokens) if j != i and g == f]
            neighbours.append([j for _, j in sorted(others)[:count]])
        expected = slow_affinity(features[image], coordinates[image], neighbours, **options, centre=False, divisor=None)
        torch.testing.assert_close(ours[image], expected.float(), rtol=2e-4, atol=1e-4)


def test_nearest_affinity_in_chunks(monkeypatch):
    features, coordinates = survivors(0, (2, 6, 7), 40)
    whole = nearest_affinity(features, coordinates)
    monkeypatch.setattr(affinity, "PAIRS", 500)
    assert torch.equal(nearest_affinity(features, coordinates), whole)


@few
@given(seeds, st.tuples(st.integers(1, 2), st.integers(2, 6), st.integers(2, 6)))
def test_affinity_goes_with_its_token(seed, grid):
    """The order of the tokens is no input: neighbours are found by coordinates."""
    total = grid[0] * grid[1] * grid[2]
    features = torch.randn(1, total, 4, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed + 1))
    dense = local_affinity(features, places(*grid), grid)
    shuffled = local_affinity(features[:, order], places(*grid)[:, order], grid)
    torch.testing.assert_close(shuffled, dense[:, order], rtol=1e-5, atol=1e-5)


def test_affinity_of_a_batch_is_that_of_its_images():
    features, coordinates = survivors(3, (1, 5, 7), 20, batch=3)
    batch = local_affinity(features, coordinates, (1, 5, 7))
    for image in range(3):
        alone = local_affinity(features[image : image + 1], coordinates[image : image + 1], (1, 5, 7))
        torch.testing.assert_close(batch[image : image + 1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sigma", ["pairs", "entries"])
def test_constant_features_leave_only_positions(sigma):
    """A sigma of 0 drops its term: neither NaN nor infinity."""
    features = torch.full((1, 12, 4), 0.1)
    ours = local_affinity(features, places(1, 3, 4), (1, 3, 4), sigma=sigma)
    only_positions = local_affinity(torch.randn(1, 12, 4), places(1, 3, 4), (1, 3, 4), sigma=sigma, w1=1e9)
    torch.testing.assert_close(ours, only_positions)
    assert torch.equal(local_affinity(features, places(1, 3, 4), (1, 3, 4), sigma=sigma, w3=0.0), torch.zeros(1, 12))
    assert torch.equal(nearest_affinity(features, places(1, 3, 4), sigma=sigma, w3=0.0), torch.zeros(1, 12))


def test_token_without_neighbours_gets_the_mean_of_the_others():
    coordinates = torch.tensor([[[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 5, 5]]])
    ours = local_affinity(torch.randn(1, 4, 3), coordinates, (1, 6, 6))
    torch.testing.assert_close(ours[0, 3], ours[0, :3].mean())
    assert local_affinity(torch.randn(1, 1, 3), coordinates[:, :1], (1, 6, 6)).item() == 0
    assert nearest_affinity(torch.randn(1, 1, 3), coordinates[:, :1]).item() == 0


def test_half_precision_is_computed_in_float32():
    features, coordinates = survivors(1, (1, 6, 6), 36)
    half = features.bfloat16()
    assert torch.equal(
        local_affinity(half, coordinates, (1, 6, 6)), local_affinity(half.float(), coordinates, (1, 6, 6))
    )


@pytest.mark.parametrize("window", [1, 2, 4])
def test_window_without_a_ring_is_refused(window):
    with pytest.raises(ValueError, match=f"window={window}"):
        local_affinity(torch.randn(1, 4, 3), places(1, 2, 2), (1, 2, 2), window=window)


# fusion


@few
@given(seeds, st.sampled_from(RULES), st.sampled_from(["softmax", "z-scores"]), st.sampled_from(["lower", "higher"]))
def test_fusion_in_float64(seed, rule, normalise, weight):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, 30, generator=generator), torch.randn(2, 30, generator=generator) * 3
    a, b = first.double(), second.double()
    if normalise == "z-scores":
        a, b = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0) for x in (a, b))
    a, b = a.softmax(1), b.softmax(1)
    va, vb = a.var(1, keepdim=True), b.var(1, keepdim=True)
    expected = {
        "adaptive": ((vb * a + va * b) if weight == "lower" else (va * a + vb * b)) / (va + vb),
        "max": torch.maximum(a, b),
        "mean": (a + b) / 2,
        "geometric": (a * b).sqrt(),
        "harmonic": 2 / (1 / a + 1 / b),
    }[rule]
    torch.testing.assert_close(fuse(first, second, rule, normalise, weight), expected.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_fusion_of_constant_scores_is_finite(rule):
    constant, peaked = torch.full((1, 9), 0.3), torch.tensor([[0.0] * 8 + [-3e38]])
    for pair in itertools.product([constant, peaked], repeat=2):
        assert torch.isfinite(fuse(*pair, rule)).all()


def test_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="'sum' is unknown: choose from adaptive"):
        fuse.__wrapped__(torch.rand(1, 3), torch.rand(1, 3), "sum")  # past the type checker of the tests


# selection


@few
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_top_k_is_exact_ordered_and_stable(values, data):
    count = data.draw(st.integers(0, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    assert top_k(torch.tensor([values], dtype=torch.float32), count).tolist() == [expected]


@few
@given(seeds, st.integers(1, 50), st.floats(0, 1))
def test_leftovers_are_the_complement(seed, tokens, share):
    taken = torch.rand(3, tokens, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, : round(share * tokens)]
    for row, rest in zip(taken.tolist(), leftovers(taken, tokens).tolist(), strict=True):
        assert rest == sorted(set(range(tokens)) - set(row))


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="5 of 4"):
        top_k(torch.rand(1, 4), 5)
    with pytest.raises(ValueError, match="5 of 4"):
        even_stride(4, 5)
    with pytest.raises(ValueError, match="5 of 4"):
        uniform_stride((1, 2, 2), 5)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(1, 13), st.integers(1, 13), st.data())
def test_uniform_stride_is_exact_and_even(frames, rows, columns, data):
    count = data.draw(st.integers(0, frames * rows * columns))
    index = uniform_stride((frames, rows, columns), count)
    assert len(index) == count
    assert index.tolist() == sorted(set(index.tolist()) & set(range(frames * rows * columns)))
    shares = []
    for frame in range(frames):
        mine = index[(index >= frame * rows * columns) & (index < (frame + 1) * rows * columns)] % (rows * columns)
        per_row = mine.div(columns, rounding_mode="floor").bincount()
        used = per_row[per_row > 0]
        assert len(mine) == 0 or used.max() - used.min() <= 1
        shares.append(len(mine))
    assert max(shares) - min(shares) <= 1


def test_uniform_stride_of_a_square_is_the_lattice():
    rows = torch.tensor([1, 4, 7, 10, 13, 16, 19, 22])
    assert uniform_stride((1, 24, 24), 64).tolist() == (rows[:, None] * 24 + rows).flatten().tolist()
    assert uniform_stride((2, 3, 3), 2).tolist() == [4, 13]


@few
@given(st.integers(1, 60), st.data())
def test_even_stride(tokens, data):
    count = data.draw(st.integers(1, tokens))
    index = even_stride(tokens, count)
    gaps = index.diff()
    assert len(index) == count
    assert index[0] >= 0
    assert index[-1] < tokens
    assert count == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


# complement


def slow_complement(features, joint, text, count, scale, cosine, merge, iterations):
    """Eq. 7-10 for one image by loops; ``text`` without padding."""
    features, joint, text = features.double(), joint.double(), text.double()

    def similarity(a, b):
        if cosine:
            a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        return scale * a @ b.T

    relevance = similarity(text, joint).softmax(1).mean(0)
    centres = sorted(sorted(range(len(joint)), key=lambda i: -relevance[i])[:count])
    c, cj = [features[i].clone() for i in centres], [joint[i].clone() for i in centres]
    grown, assignment = [1] * count, {}
    for _ in range(iterations):
        scaled = [1 / g if merge == "mean" else 1.0 for g in grown]
        now = torch.stack([v * s for v, s in zip(cj, scaled, strict=True)])
        a = similarity(joint, text).softmax(1) @ similarity(text, now).softmax(1)
        assignment = {i: int(a[i].argmax()) for i in range(len(joint)) if i not in centres}
        for j in range(count):
            members = [i for i, to in assignment.items() if to == j]
            if members:
                weights = [1.0 if merge == "uniform" else a[i, j].item() for i in members]
                total = sum(weights)
                c[j] = c[j] + sum(w / total * features[i] for w, i in zip(weights, members, strict=True))
                cj[j] = cj[j] + sum(w / total * joint[i] for w, i in zip(weights, members, strict=True))
                grown[j] += 1
    if merge == "mean":
        c = [v / g for v, g in zip(c, grown, strict=True)]
    assignment |= {i: j for j, i in enumerate(centres)}
    return torch.stack(c), centres, [assignment.get(i, -1) for i in range(len(joint))]


def complement_case(seed, leftover, words, batch=2):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, leftover, 6, generator=generator)
    projection = torch.randn(6, 4, generator=generator)
    text = torch.randn(batch, words, 4, generator=generator)
    return features, features @ projection, text


@few
@given(
    seeds,
    st.integers(2, 15),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(["add", "mean", "uniform"]),
    st.integers(0, 4),
    st.sampled_from([1.0, -1.0]),
    st.data(),
)
def test_complement_is_the_loop(seed, leftover, words, cosine, merge, iterations, sign, data):
    count = data.draw(st.integers(1, leftover))
    padding = data.draw(st.integers(0, 3))
    features, joint, text = complement_case(seed, leftover, words)
    padded = torch.cat([text, 1e4 * torch.ones(2, padding, 4)], 1)  # padding must not matter, however large
    mask = torch.arange(words + padding).expand(2, -1) < words
    scale = sign * (3.0 if cosine else 0.5)
    ours = complement.complement(
        features, joint, padded, mask, count, scale=scale, cosine=cosine, merge=merge, iterations=iterations
    )
    for image in range(2):
        merged, centres, assignment = slow_complement(
            features[image], joint[image], text[image], count, scale, cosine, merge, iterations
        )
        assert ours.centres[image].tolist() == centres
        assert ours.assignment[image].tolist() == assignment
        torch.testing.assert_close(ours.features[image], merged.float(), rtol=1e-4, atol=1e-5)


def test_mean_merging_takes_the_clusters_of_add_at_the_scale_of_a_feature():
    features, joint, text = complement_case(5, 40, 6, batch=1)
    mask = torch.ones(1, 6, dtype=torch.bool)
    add, mean = (
        complement.complement(features, joint, text, mask, 3, scale=4.0, merge=merge) for merge in ("add", "mean")
    )
    assert torch.equal(add.assignment, mean.assignment)
    torch.testing.assert_close(F.normalize(add.features, dim=-1), F.normalize(mean.features, dim=-1))
    assert mean.features.norm(dim=-1).max() <= features.norm(dim=-1).max() < add.features.norm(dim=-1).max()


def test_constant_leftovers_and_an_empty_text_are_finite():
    constant = torch.ones(1, 10, 4)
    for mask in (torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)):
        ours = complement.complement(constant, torch.zeros(1, 10, 4), torch.zeros(1, 3, 4), mask, 2, scale=100.0)
        assert ours.centres.tolist() == [[0, 1]]  # ties go to the lower index
        assert torch.isfinite(ours.features).all()


def test_complement_keeps_the_dtype():
    features, joint, text = complement_case(0, 9, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    ours = complement.complement(features.bfloat16(), joint.bfloat16(), text.bfloat16(), mask, 2, scale=1.0)
    assert ours.features.dtype == torch.bfloat16


def test_raw_scores_are_no_weights():
    features, joint, text = complement_case(0, 9, 3)
    with pytest.raises(ValueError, match="merge='uniform'"):
        complement.complement(features, joint, text, torch.ones(2, 3, dtype=torch.bool), 2, scale=1.0, scores="raw")


# attention


def full_attention(query, key, scaling, causal=False, key_mask=None, softcap=None):
    """The whole map in float64, [batch, heads, queries, keys]."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.mT * scaling
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    allowed = torch.ones(logits.shape, dtype=torch.bool)
    if causal:
        allowed &= torch.ones(logits.shape[2:], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    if key_mask is not None:
        allowed &= key_mask[:, None, None]
    return torch.where(allowed, logits, float("-inf")).softmax(-1)


@few
@given(
    seeds, st.integers(1, 7), st.integers(0, 5), st.sampled_from([1, 2]), st.booleans(), st.sampled_from([None, 2.0])
)
def test_attention_rows(seed, queries, cached, groups, causal, softcap):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key = torch.randn(2, 4 // groups, queries + cached, 8, generator=generator)
    key_mask = torch.arange(queries + cached).expand(2, -1) >= torch.tensor([[0], [min(cached, 2)]])
    whole = full_attention(query, key, 0.3, causal, key_mask, softcap).float()
    options = {"scaling": 0.3, "causal": causal, "key_mask": key_mask, "softcap": softcap}
    rows = torch.randint(queries, (2, 3), generator=generator)
    ours = attention_rows(query, key, rows, **options)
    for image in range(2):
        torch.testing.assert_close(ours[image], whole[image, :, rows[image]], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attention_rows(query, key, slice(-1, None), **options), whole[:, :, -1:])


def test_attention_row_that_sees_nothing_is_zero():
    query = key = torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[False, True, True]])
    ours = attention_rows(query, key, causal=True, key_mask=mask)
    assert torch.equal(ours[0, 0, 0], torch.zeros(3))
    torch.testing.assert_close(ours[0, 0, 1:].sum(-1), torch.ones(2))


@few
@given(seeds, st.integers(1, 20), st.integers(0, 2), st.sampled_from([1, 2]), st.integers(1, 30))
def test_attention_received_is_the_double_loop(seed, patches, skip, groups, chunk):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, patches + skip, 8, generator=generator) * 2
    key = torch.randn(2, 4 // groups, patches + skip, 8, generator=generator)
    whole = full_attention(query, key, 8**-0.5).mean(1)
    expected = torch.zeros(2, patches, dtype=torch.float64)
    for giver, receiver in itertools.permutations(range(patches), 2):
        expected[:, receiver] += whole[:, giver + skip, receiver + skip] / (patches - 1)
    ours = attention_received(query, key, chunk=chunk, skip=skip)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-6)
