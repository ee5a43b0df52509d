"""Methods that select, against slow references, written from their specifications with loops and in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from peers import answer, cosines, make_view, ranked
from views import changed
from visiontrim.core.signals import Text
from visiontrim.core.view import View
from visiontrim.methods import CDPruner, DivPrune, FasterVLM, HiPrune, MMTok, PruneSID, VisPruner
from visiontrim.methods.prunesid import pick_from_groups
from visiontrim.ops.coverage import coverage_picks
from visiontrim.ops.diverse import determinant_picks, max_min_picks, thin_out
from visiontrim.ops.groups import quotas

SEEDS = range(4)


# FasterVLM, VisPruner


def test_fastervlm():
    view = make_view()
    kept = answer(FasterVLM(keep=12), view)
    for b in range(2):
        assert kept.index[b].tolist() == sorted(ranked(view.encoder.cls_attention[b])[:12])


def slow_thin_out(cosine, order, count):
    residual = list(order)
    while len(residual) > count:
        a, b = residual[::2], residual[1::2]
        likeness = [max(cosine[i][j] for j in b) for i in a]
        by_likeness = [a[i] for i in ranked(likeness)]
        residual = by_likeness[min(8, len(residual) - count, len(a)) :] + b
    return residual


@pytest.mark.parametrize(
    ("grid", "keep", "important"), [((1, 8, 8), 16, 0.5), ((1, 7, 9), 16, 0.75), ((1, 8, 8), 5, 0.5)]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_vispruner(grid, keep, important, seed):
    view = make_view(seed, grid=grid, dim=16)
    kept = answer(VisPruner(keep=keep, important=important), view)
    for b in range(2):
        order = ranked(view.encoder.cls_attention[b])
        first = int(keep * important)
        diverse = slow_thin_out(cosines(view.features[b]), order[first:], keep - first)
        assert kept.index[b].tolist() == sorted(order[:first] + diverse)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 28, 29])
def test_thinning_by_rounds(count):
    features = torch.randn(1, 29, 6, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(29, generator=torch.Generator().manual_seed(4))
    assert thin_out(features, order[None], count)[0].tolist() == slow_thin_out(
        cosines(features[0]), order.tolist(), count
    )


def test_vispruner_of_important_tokens_alone_is_fastervlm():
    view = make_view()
    assert torch.equal(answer(VisPruner(keep=12, important=1.0), view).index, answer(FasterVLM(keep=12), view).index)
    same = dataclasses.replace(view, features=torch.ones_like(view.features))
    assert answer(VisPruner(keep=12, important=0.0), same).index.shape == (2, 12)


# CDPruner


def slow_relevance(view: View, b: int):
    joint = F.normalize(view.text.joint_normalised[b].double(), dim=-1)
    end = F.normalize(view.text.question.tokens[b][view.text.question.ends[b]].double(), dim=-1)
    score = -(joint @ end.mT).mean(-1)
    return (score - score.min() + 1e-6) / (score.max() - score.min())


@pytest.mark.parametrize("seed", SEEDS)
def test_cdpruner_maximises_the_determinant_greedily(seed):
    view = make_view(seed, grid=(1, 5, 5), dim=12, width=16)
    kept = answer(CDPruner(keep=8), view)
    for b in range(2):
        relevance = slow_relevance(view, b)
        unit = F.normalize(view.encoder.projected[b].double(), dim=-1)
        kernel = relevance[:, None] * (unit @ unit.mT) * relevance
        taken: list[int] = []
        for _ in range(8):
            options = [i for i in range(25) if i not in taken]
            taken.append(max(options, key=lambda i: float(torch.det(kernel[[*taken, i]][:, [*taken, i]]))))
        assert kept.index[b].tolist() == sorted(taken)


def test_cdpruner_relevance():
    view = make_view()
    for b in range(2):
        torch.testing.assert_close(
            CDPruner().relevance(view)[b].double(), slow_relevance(view, b), rtol=1e-4, atol=1e-5
        )
    assert torch.equal(CDPruner(sign=-1).relevance(view), CDPruner().relevance(view))
    # one patch: the most relevant one
    assert torch.equal(answer(CDPruner(keep=1), view).index[:, 0], CDPruner().relevance(view).argmax(1))
    # word embeddings have no end token: the mean over words, and a high cosine is relevant
    words = changed(view, {"text.question": dataclasses.replace(view.text.question, ends=None)})
    cosine = F.normalize(view.text.joint_normalised, dim=-1) @ F.normalize(view.text.question.tokens, dim=-1).mT
    for b in range(2):
        score = cosine[b][:, view.text.question.mask[b]].mean(-1)
        expected = (score - score.min() + 1e-6) / (score.max() - score.min())
        torch.testing.assert_close(CDPruner().relevance(words)[b], expected)


def test_cdpruner_without_a_question_or_with_equal_relevance_is_diversity_alone():
    view = make_view()
    plain = determinant_picks(F.normalize(view.encoder.projected, dim=-1), 12).sort(1).values
    assert torch.equal(answer(CDPruner(keep=12), changed(view, {"text.question": None})).index, plain)
    same = changed(view, {"text.joint_normalised": torch.ones_like(view.text.joint)})
    assert torch.equal(answer(CDPruner(keep=12), same).index, plain)


def test_determinants_beat_random_subsets_and_survive_dependent_vectors():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 40, 20, generator=generator).double()
    picks = determinant_picks(vectors.float(), 10)[0]
    volume = torch.logdet(vectors[0, picks] @ vectors[0, picks].mT)
    for _ in range(50):
        some = torch.randperm(40, generator=generator)[:10]
        assert volume >= torch.logdet(vectors[0, some] @ vectors[0, some].mT)
    flat = torch.randn(1, 9, 2, generator=generator) @ torch.randn(2, 5, generator=generator)  # of rank 2
    picks = determinant_picks(flat, 9)[0].tolist()
    assert sorted(picks) == list(range(9))
    assert picks[2:] == sorted(picks[2:])  # nothing is left outside their plane: by index


# DivPrune


@pytest.mark.parametrize("seed", SEEDS)
def test_divprune(seed):
    view = make_view(seed)
    order = max_min_picks(view.encoder.projected, 12)
    kept = answer(DivPrune(keep=12), view)
    for b in range(2):
        cosine = cosines(view.encoder.projected[b])
        distance = [[1 - c for c in row] for row in cosine]
        lonely = [sorted(distance[i][j] for j in range(42) if j != i)[0] for i in range(42)]
        taken = [ranked(lonely)[0]]
        while len(taken) < 12:
            reach = [-1.0 if i in taken else min(distance[i][j] for j in taken) for i in range(42)]
            taken.append(ranked(reach)[0])
        assert order[b].tolist() == taken
        assert kept.index[b].tolist() == sorted(taken)


def test_duplicates_are_taken_once():
    distinct = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    copies = torch.cat([distinct, distinct, distinct], 1)
    assert sorted((max_min_picks(copies, 6)[0] % 6).tolist()) == list(range(6))


# PruneSID


def slow_prunesid(x, group, score, count, factor):
    """Ranked groups and their quotas, as loops over lists."""
    cosine, n = cosines(x), len(x)
    pairs = [cosine[i][j] for i in range(n) for j in range(i + 1, n)]
    threshold = factor * sum(pairs) / len(pairs)
    ranks, survivors, groups = [], [], max(1, count // 4)
    for g in range(groups):
        order = [i for i in ranked(score) if group[i] == g]
        kept, gone = [], []
        for i in order:
            (gone if any(cosine[i][j] > threshold for j in kept) else kept).append(i)
        ranks.append(kept + gone)
        survivors.append(len(kept))
    sizes = [len(rank) for rank in ranks]
    lower = [min(1, c) for c in sizes]
    upper = [min(5 * math.ceil(count / 64), c, k) for c, k in zip(sizes, survivors, strict=True)]
    while sum(upper) < count:
        upper = [min(u + 1, c) for u, c in zip(upper, sizes, strict=True)]
    free, quota, given, so_far = max(0, count - sum(lower)), [], 0, 0
    for k, low, up in zip(survivors, lower, upper, strict=True):
        so_far += k
        target = round(free * so_far / sum(survivors))
        quota.append(min(low + target - given, up))
        given = target
    for g in ranked(survivors):
        quota[g] += min(upper[g] - quota[g], count - sum(quota))
    return [rank[:q] for rank, q in zip(ranks, quota, strict=True)]


@pytest.mark.parametrize("count", [1, 5, 12, 24, 41])
@pytest.mark.parametrize("seed", SEEDS)
def test_prunesid_picks_from_groups(count, seed):
    view = make_view(seed)
    group = torch.randint(max(1, count // 4), (2, 42), generator=torch.Generator().manual_seed(seed))
    kept = pick_from_groups(view.features, group, view.encoder.cls_attention, count, factor=count / 32, by_group=True)
    raster = pick_from_groups(
        view.features, group, view.encoder.cls_attention, count, factor=count / 32, by_group=False
    )
    for b in range(2):
        groups = slow_prunesid(view.features[b], group[b].tolist(), view.encoder.cls_attention[b], count, count / 32)
        assert kept.index[b].tolist() == [i for rank in groups for i in rank]
        assert raster.index[b].tolist() == sorted(kept.index[b].tolist())
        assert all(len(rank) >= 1 for g, rank in enumerate(groups) if g in group[b])


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_prunesid_groups_by_principal_components(variant):
    view = make_view(dim=64)
    kept = answer(PruneSID(keep=12, variant=variant), view)
    for b in range(2):
        squashed = view.features[b].double().sigmoid()
        centred = squashed - squashed.mean(1 if variant == "release" else 0, keepdim=True)
        loading = torch.linalg.svd(centred.mT)[2][:3].abs()  # rows: directions over the 42 patches
        score = view.encoder.cls_attention[b] if variant == "release" else loading.amax(0)
        factor = 12 / 32 if variant == "release" else 18 * 12 / 42
        groups = slow_prunesid(view.features[b], loading.argmax(0).tolist(), score, 12, factor)
        index = [i for rank in groups for i in rank]
        assert kept.index[b].tolist() == (index if variant == "release" else sorted(index))


def test_prunesid_of_one_group_without_suppression_is_fastervlm():
    view = make_view()
    alike = dataclasses.replace(view, features=view.features + 1000)  # a mean cosine of 1, so a threshold above 1
    kept = pick_from_groups(
        alike.features, torch.zeros(2, 42).long(), view.encoder.cls_attention, 36, factor=36 / 32, by_group=False
    )
    assert torch.equal(kept.index, answer(FasterVLM(keep=36), view).index)


def test_quotas_by_hand():
    sizes, survivors = torch.tensor([[10, 4, 0, 6]]), torch.tensor([[6, 1, 0, 2]])
    # limits 5, 1, 0, 2 hold 8: one each to those with tokens, 5 free ones as 3, 1, 0, 1, the second group is cut off
    assert quotas(sizes, survivors, 8, cap=5).tolist() == [[5, 1, 0, 2]]
    # 12 need limits 7, 3, 0, 4: 9 free ones as 6, 1, 0, 2 of the survivors
    assert quotas(sizes, survivors, 12, cap=5).tolist() == [[7, 2, 0, 3]]
    assert quotas(sizes, survivors, 20, cap=5).tolist() == [[10, 4, 0, 6]]


# HiPrune


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_hiprune(variant, share, seed):
    view = make_view(seed)
    kept = answer(HiPrune(keep=20, middle=1, share=share, variant=variant), view)
    for b in range(2):
        anchors = ranked(view.encoder["column_attention", 1][b])[: round(20 * share / 5)]
        protected = set(anchors)
        for i in anchors:
            if variant == "release":
                protected |= {min(max(i + step, 0), 41) for step in (-1, 1, -7, 7)}
            else:
                row, column = divmod(i, 7)
                around = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
                protected |= {r * 7 + c for r, c in around if 0 <= r < 6 and 0 <= c < 7}
        deep = view.encoder.column_attention[b].clone()
        deep[list(protected)] -= 1
        registers = ranked(deep)[: 20 - len(protected)]
        assert kept.index[b].tolist() == sorted([*protected, *registers])


def test_anchors_of_hiprune_at_the_published_budgets():
    columns = torch.zeros(1, 576)
    columns[0, [30, 100, 300, 500, 550]] = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])
    middle, deep = ("encoder.column_attention", 8), "encoder.column_attention"
    view = changed(make_view(grid=(1, 24, 24), batch=1), {middle: columns, deep: torch.zeros(1, 576)})
    for keep, anchors in ((192, 4), (128, 3), (64, 1)):
        kept = set(answer(HiPrune(keep=keep), view).index[0].tolist())
        for anchor in (30, 100, 300, 500)[:anchors]:
            assert {anchor, anchor - 1, anchor + 1, anchor - 24, anchor + 24} <= kept
        assert (500 in kept) == (anchors == 4)
    corner = torch.zeros(1, 576)
    corner[0, 23] = 1.0  # the end of the first row: 24 begins the second
    view = changed(view, {middle: corner, deep: -torch.arange(576.0)[None] / 576})
    assert answer(HiPrune(keep=8, share=0.6), view).index[0].tolist() == [0, 1, 2, 3, 4, 22, 23, 47]
    assert answer(HiPrune(keep=8, share=0.6, variant="release"), view).index[0].tolist() == [0, 1, 2, 3, 22, 23, 24, 47]


# MMTok


def slow_coverage(view: View, b: int, weight: float):
    def rows(left, right, temperature):
        cosine = F.normalize(left.double(), dim=-1) @ F.normalize(right.double(), dim=-1).mT
        return (cosine / temperature).softmax(-1) / len(left)

    of_patches = weight * rows(view.features[b], view.features[b], 0.2)
    if "words" not in view.text:
        return of_patches
    return torch.cat(
        [rows(view.text.words.tokens[b][view.text.words.mask[b]], view.encoder.projected[b], 0.02), of_patches]
    )


def covered(coverage, chosen):
    return float(coverage[:, list(chosen)].amax(1).sum()) if chosen else 0.0


@pytest.mark.parametrize("weight", [0.5, 0.0, 100.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_mmtok(weight, seed):
    """Each pick adds the most coverage; gains never grow."""
    view = make_view(seed)
    keep = 4 if weight == 0 else 10
    kept = answer(MMTok(keep=keep, image_weight=weight), view)
    for b in range(2):
        coverage, chosen, gains = slow_coverage(view, b, weight), [], []
        for _ in range(keep):
            options = {i: covered(coverage, [*chosen, i]) for i in range(42) if i not in chosen}
            best = max(options, key=options.__getitem__)
            gains.append(options[best] - covered(coverage, chosen))
            chosen.append(best)
        assert kept.index[b].tolist() == sorted(chosen)
        assert all(0 <= later <= earlier + 1e-12 for earlier, later in itertools.pairwise(gains))


def test_mmtok_without_a_question_covers_the_image():
    view = make_view()
    silent = answer(MMTok(keep=12), changed(view, {"text.words": None}))
    heavy = answer(MMTok(keep=12, image_weight=1e6), view)
    assert torch.equal(silent.index, heavy.index)
    assert not torch.equal(silent.index, answer(MMTok(keep=12), view).index)
    empty = Text(view.text.words.tokens, torch.zeros_like(view.text.words.mask), 100.0)
    assert torch.equal(silent.index, answer(MMTok(keep=12), changed(view, {"text.words": empty})).index)


def test_coverage_by_hand_and_near_the_best():
    coverage = torch.tensor([[[0.5, 0.5, 0.0, 0.4], [0.3, 0.3, 0.0, 0.0], [0.0, 0.0, 0.6, 0.6]]])
    # 1.0 of the last; then the two twins add 0.1 + 0.3 each, the first of them goes, the other adds nothing any more
    assert coverage_picks(coverage, 4).tolist() == [[3, 0, 1, 2]]
    rows = torch.rand(1, 6, 10, generator=torch.Generator().manual_seed(0))
    greedy = covered(rows[0], coverage_picks(rows, 3)[0].tolist())
    assert greedy >= (1 - 1 / math.e) * max(covered(rows[0], some) for some in itertools.combinations(range(10), 3))
