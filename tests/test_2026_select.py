"""Methods of 2026 that select at the encoder's output, against slow references and answers by hand."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import visiontrim as vt
from families import Prompts, build
from peers import answer, cosines, make_view, ranked, rows
from views import changed, showing
from visiontrim.core.registry import load_method
from visiontrim.core.signals import Text
from visiontrim.models import family_of
from visiontrim.ops.diverse import max_min_picks
from visiontrim.ops.greedy import covering_picks

EVERY = [
    vt.MMR(),
    vt.MMR(score="norm", scale="rank", at_once=3),
    vt.SCOPE(),
    vt.SCOPE(combine="add"),
    vt.HoloV(),
    vt.HoloV(variant="code"),
    vt.LiteLVLM(),
    vt.ZOOPrune(),
    vt.ZOOPrune(centred=True),
    vt.DivPrune(centred=True),
    vt.VCAST(),
    vt.VCAST(variant="code"),
]
SEEDS = range(3)


def sensitive(seed: int = 0, **options) -> vt.View:
    view = make_view(seed, **options)
    noise = torch.rand(view.features.shape[:2], generator=torch.Generator().manual_seed(seed + 9))
    return changed(view, {"encoder.sensitivity": noise})


# ------------------------------------------------------------------------------------------------ what all promise


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_promises(method):
    """Exact counts in raster order, nothing read beside the needs, a batch equals its images, half precision, one
    colour."""
    view = sensitive()
    for keep in (1, 2, 7, 16, 41, 0.5):
        kept = answer(dataclasses.replace(method, keep=keep), view)
        count = keep if isinstance(keep, int) else 21
        assert kept.index.shape == (2, count)
        assert all(sorted(set(row)) == row and row[0] >= 0 and row[-1] < 42 for row in kept.index.tolist())
    method, before = dataclasses.replace(method, keep=12), copy.deepcopy(view)
    kept = answer(method, view)
    assert torch.equal(kept.index, answer(method, showing(view, method.steps()[0].needs)).index)
    assert torch.equal(view.features, before.features)
    for b in range(2):
        assert torch.equal(answer(method, rows(view, [b])).index, kept.index[[b]])
    half = {"encoder.projected": view.encoder.projected.bfloat16()}
    assert answer(method, changed(view, half, features=view.features.bfloat16())).index.shape == (2, 12)
    flat = {
        f"encoder.{name}": torch.full_like(view.encoder[name], 0.02)
        for name in ("projected", "cls_attention", "sensitivity")
    }
    flat |= {
        ("encoder.cls_attention_wide", -1): torch.full((2, 42), 0.02),
        "text.joint_normalised": torch.ones(2, 42, 6),
    }
    even = answer(method, changed(view, flat, features=torch.ones_like(view.features)))
    assert all(len(set(row)) == 12 for row in even.index.tolist())
    everything = answer(dataclasses.replace(method, keep=1.0), view)
    assert torch.equal(everything.index, torch.arange(42).expand(2, -1))
    assert load_method(str(method)) == load_method(method.to_dict()) == method


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vt.MMR(balance=1.5), "balance=1.5 is no share"),
        (lambda: vt.MMR(at_once=0), "at_once=0"),
        (lambda: vt.SCOPE(alpha=-1.0), "alpha=-1.0"),
        (lambda: vt.HoloV(strips=0), "strips=0"),
        (lambda: vt.HoloV(weight=-0.1), "weight=-0.1"),
        (lambda: vt.HoloV(variant="release"), "is no choice"),
        (lambda: vt.LiteLVLM(sign=0), "sign=0"),
        (lambda: vt.VCAST(temperature=0.0), "temperature=0.0"),
        (lambda: vt.ZOOPrune(score="grad"), "is no choice"),
    ],
)
def test_options_are_checked(build, message):
    with pytest.raises(vt.TrimError, match=message):
        build()


# ------------------------------------------------------------------------------------------------ MMR


def scaled(score: torch.Tensor) -> list[float]:
    score = score.double()
    return ((score - score.min()) / (score.max() - score.min())).tolist()


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("at_once", [1, 4])
def test_mmr(balance, at_once):
    view = make_view(1)
    kept = answer(vt.MMR(keep=12, balance=balance, at_once=at_once), view)
    for b in range(2):
        score, cosine = scaled(view.encoder.cls_attention[b]), cosines(view.features[b])
        taken = [ranked(score)[0]]
        while len(taken) < 12:
            worth = [
                -math.inf if i in taken else balance * score[i] - (1 - balance) * max(cosine[i][j] for j in taken)
                for i in range(42)
            ]
            taken += ranked(worth)[: min(at_once, 12 - len(taken))]
        assert kept.index[b].tolist() == sorted(taken)


def test_mmr_by_hand():
    """A copy of the best costs what its look-alike costs; with all weight on the score it comes second."""
    view = make_view(grid=(1, 1, 4), batch=1, dim=3)
    x = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]])
    view = changed(view, {"encoder.cls_attention": torch.tensor([[0.4, 0.39, 0.2, 0.0]])}, features=x)
    assert answer(vt.MMR(keep=2), view).index.tolist() == [[0, 2]]  # .49 - .5 < .25
    assert answer(vt.MMR(keep=2, balance=1.0), view).index.tolist() == [[0, 1]]
    assert answer(vt.MMR(keep=2, balance=0.8), view).index.tolist() == [[0, 1]]  # .78 - .2 > .4
    outlier = changed(view, {"encoder.cls_attention": torch.tensor([[40.0, 0.39, 0.38, 0.0]])})
    assert answer(vt.MMR(keep=3, scale="rank"), outlier).index.tolist() == [[0, 2, 3]]  # .33, then .5 x 0 > .33 - .5


# ------------------------------------------------------------------------------------------------ SCOPE


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("combine", ["multiply", "add"])
def test_scope(alpha, combine):
    view = make_view(2)
    kept = answer(vt.SCOPE(keep=9, alpha=alpha, combine=combine), view)
    for b in range(2):
        attention, cosine = view.encoder.cls_attention[b].double().tolist(), cosines(view.features[b])
        covered, taken = [0.0] * 42, []
        for _ in range(9):
            worth = []
            for i in range(42):
                gain = sum(max(0.0, cosine[u][i] - covered[u]) for u in range(42))
                value = gain + attention[i] ** alpha if combine == "add" else gain * attention[i] ** alpha
                worth.append(-math.inf if i in taken else value)
            taken.append(ranked(worth)[0])
            before, covered = covered, [max(covered[u], cosine[u][taken[-1]]) for u in range(42)]
            assert all(new >= old for new, old in zip(covered, before, strict=True))
        assert kept.index[b].tolist() == sorted(taken)


def test_scope_by_hand():
    """One of each group of copies; what is covered adds nothing, so then attention decides; much alpha is top-k."""
    x = torch.eye(3)[[0, 0, 1, 1, 2, 2]][None]
    attention = torch.tensor([[0.1, 0.3, 0.2, 0.05, 0.05, 0.3]])
    view = changed(make_view(grid=(1, 2, 3), batch=1), {"encoder.cls_attention": attention}, features=x)
    assert answer(vt.SCOPE(keep=3, alpha=0.0), view).index.tolist() == [[0, 2, 4]]
    assert answer(vt.SCOPE(keep=3), view).index.tolist() == [[1, 2, 5]]
    assert answer(vt.SCOPE(keep=4), view).index.tolist() == [[0, 1, 2, 5]]  # .1 is what is left of attention
    assert answer(vt.SCOPE(keep=2, alpha=40.0), view).index.tolist() == [[1, 5]]
    picks = covering_picks(x, attention, 5)[0].tolist()
    assert len(set(picks)) == 5
    assert picks[3:] == [0, 3]


def test_scope_covers_a_video_frame_by_frame():
    view = make_view(3, grid=(3, 4, 4), batch=1)
    kept = answer(vt.SCOPE(keep=8), view)
    frames = [[i for i in kept.index[0].tolist() if i // 16 == f] for f in range(3)]
    assert [len(frame) for frame in frames] == [2, 3, 3]
    for f, frame in enumerate(frames):
        of_frame = slice(16 * f, 16 * f + 16)
        attention = {"encoder.cls_attention": view.encoder.cls_attention[:, of_frame]}
        alone = changed(make_view(grid=(1, 4, 4), batch=1), attention, features=view.features[:, of_frame])
        assert [i - 16 * f for i in frame] == answer(vt.SCOPE(keep=len(frame)), alone).index[0].tolist()


# ------------------------------------------------------------------------------------------------ HoloV


def slow_holov(view, b, count, strips, weight, variant):
    attention, tokens = view.encoder.cls_attention[b].double().tolist(), view.features.shape[1]
    lengths = [tokens // strips + (s < tokens % strips) for s in range(strips)]
    starts = [sum(lengths[:s]) for s in range(strips)]
    groups = [list(range(a, a + n)) for a, n in zip(starts, lengths, strict=True)]
    cosine, variance = cosines(view.features[b]), {}
    for group in groups:
        for i in group:
            row = [0.0 if i == j else cosine[i][j] for j in group]
            mean = sum(row) / (len(group) - 1)
            variance[i] = sum((value - mean) ** 2 for value in row) / (len(group) - 1)
    means = []
    for group in groups:
        over = group if variant == "code" else range(tokens)
        scale = sum(attention[i] for i in over) / (sum(variance[i] for i in over) + 1e-6 * len(over))
        means.append(sum(attention[i] + weight * variance[i] * scale for i in group) / len(group))
    ideal = [count * mean / sum(means) for mean in means]
    quota = [min(math.floor(share), n) for share, n in zip(ideal, lengths, strict=True)]
    while sum(quota) < count:  # by largest remainder where there is room
        room = [s for s in range(strips) if quota[s] < lengths[s]]
        quota[max(room, key=lambda s: (ideal[s] - quota[s], -s))] += 1
    kept = []
    for group, number in zip(groups, quota, strict=True):
        kept += sorted(group, key=lambda i: (-attention[i], i))[:number]
    return sorted(kept), quota


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize(("count", "strips"), [(12, 6), (13, 5), (30, 4)])
@pytest.mark.parametrize("weight", [0.09, 10.0])
def test_holov(variant, count, strips, weight):
    view = make_view(4)
    kept = answer(vt.HoloV(keep=count, strips=strips, weight=weight, variant=variant), view)
    for b in range(2):
        assert kept.index[b].tolist() == slow_holov(view, b, count, strips, weight, variant)[0]


def test_what_the_variance_of_holov_changes():
    """As released nothing, whatever its weight; as the paper has it, quotas."""
    view = make_view(5, grid=(1, 8, 8), batch=1)
    index = {
        (variant, weight): answer(vt.HoloV(keep=16, variant=variant, weight=weight, strips=8), view).index.tolist()
        for variant in ("paper", "code")
        for weight in (0.0, 0.09, 10.0)
    }
    assert index["code", 10.0] == index["code", 0.09] == index["code", 0.0] == index["paper", 0.0]
    assert index["paper", 10.0] != index["paper", 0.0]
    for strips, expected in ((1, 16), (64, 16)):
        kept = answer(vt.HoloV(keep=16, strips=strips, variant="code"), view).index[0].tolist()
        assert len(kept) == expected
    top = sorted(ranked(view.encoder.cls_attention[0])[:16])
    assert answer(vt.HoloV(keep=16, strips=1), view).index[0].tolist() == top


def test_holov_shares_out_what_a_strip_cannot_hold():
    attention = torch.tensor([[0.9, 0.9, 0.01, 0.02, 0.03, 0.01]])
    view = changed(make_view(grid=(1, 2, 3), batch=1), {"encoder.cls_attention": attention})
    kept = answer(vt.HoloV(keep=4, strips=3, variant="code"), view)
    assert kept.index.tolist() == [[0, 1, 3, 4]]
    flat = changed(view, {"encoder.cls_attention": torch.full((1, 6), 0.1)})
    assert answer(vt.HoloV(keep=3, strips=3, variant="code"), flat).index.tolist() == [[0, 2, 4]]


# ------------------------------------------------------------------------------------------------ LiteLVLM


def test_litelvlm_with_one_phrase_is_the_lowest_cosines():
    view = make_view(6)
    kept = answer(vt.LiteLVLM(keep=10), view)
    for b in range(2):
        end = view.text.question.tokens[b][view.text.question.ends[b]][0].double()
        patches = F.normalize(view.text.joint_normalised[b].double(), dim=-1)
        assert kept.index[b].tolist() == sorted(ranked(-(patches @ F.normalize(end, dim=-1)))[:10])
    assert answer(vt.LiteLVLM(keep=10, sign=1), view).index.tolist() != kept.index.tolist()


def test_litelvlm_with_phrases_that_overlap():
    """Three phrases ask for three patches each; attention fills up what they share. The last image has one phrase."""
    view = make_view(7, words=6)
    ends = torch.zeros(2, 6, dtype=torch.bool)
    ends[0, [1, 3, 5]], ends[1, 2] = True, True
    tokens = view.text.question.tokens.clone()
    tokens[0, 3] = tokens[0, 1]  # the same phrase twice
    view = changed(view, {"text.question": Text(tokens, torch.ones_like(ends), 14.0, ends)})
    kept = answer(vt.LiteLVLM(keep=11), view)
    patches = F.normalize(view.text.joint_normalised.double(), dim=-1)
    unit = F.normalize(tokens.double(), dim=-1)
    chosen = set()
    for word in (1, 3, 5):
        chosen |= set(ranked(-(patches[0] @ unit[0, word]))[:3])
    assert 3 <= len(chosen) < 9
    context = [i for i in ranked(view.encoder["cls_attention_wide", -1][0]) if i not in chosen]
    assert kept.index[0].tolist() == sorted([*chosen, *context[: 11 - len(chosen)]])
    assert kept.index[1].tolist() == sorted(ranked(-(patches[1] @ unit[1, 2]))[:11])


def test_litelvlm_by_other_guidance():
    view = make_view(8)
    words = changed(view, {"text.question": dataclasses.replace(view.text.question, ends=None)})
    kept = answer(vt.LiteLVLM(keep=10), words)
    cosine = F.normalize(view.text.joint_normalised, dim=-1) @ F.normalize(view.text.question.tokens, dim=-1).mT
    for b in range(2):
        score = cosine[b][:, view.text.question.mask[b]].mean(-1)
        assert kept.index[b].tolist() == sorted(ranked(score)[:10])
    silent = changed(view, {"text.question": None, ("encoder.cls_attention_wide", -1): None})
    for b, row in enumerate(answer(vt.LiteLVLM(keep=10), silent).index.tolist()):
        assert row == sorted(ranked(view.encoder["cls_attention", -1][b])[:10])


# ------------------------------------------------------------------------------------------------ ZOO-Prune


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("centred", [False, True])
def test_zoo_prune(seed, centred):
    view = sensitive(seed)
    kept = answer(vt.ZOOPrune(keep=12, centred=centred), view)
    for b in range(2):
        projected = view.encoder.projected[b].double()
        cosine = cosines(projected - projected.mean(0) if centred else projected)
        score = scaled(view.encoder.sensitivity[b])
        taken = [ranked(score)[0]]
        while len(taken) < 12:
            worth = [-math.inf if i in taken else score[i] * (1 - max(cosine[i][j] for j in taken)) for i in range(42)]
            taken.append(ranked(worth)[0])
        assert kept.index[b].tolist() == sorted(taken)


def test_zoo_prune_without_differences_is_far_from_the_first():
    view = changed(sensitive(1), {"encoder.sensitivity": torch.full((2, 42), 3.0) + 1e-4 * torch.rand(2, 42)})
    kept = answer(vt.ZOOPrune(keep=9), view)
    for b in range(2):
        cosine, taken = cosines(view.encoder.projected[b]), [0]
        while len(taken) < 9:
            taken.append(ranked([-math.inf if i in taken else -max(cosine[i][j] for j in taken) for i in range(42)])[0])
        assert kept.index[b].tolist() == sorted(taken)
    bare = changed(view, {"encoder.sensitivity": None})
    norm = answer(vt.ZOOPrune(keep=9, score="norm"), view)
    assert torch.equal(answer(vt.ZOOPrune(keep=9), bare).index, norm.index)
    assert norm.index.tolist() != kept.index.tolist()


def test_divprune_of_patches_without_what_they_have_in_common():
    view = make_view(2)
    projected = view.encoder.projected
    shifted = changed(view, {"encoder.projected": projected + 50})
    centred = vt.DivPrune(keep=9, centred=True)
    expected = max_min_picks(projected - projected.mean(1, keepdim=True), 9).sort(1).values
    assert torch.equal(answer(centred, view).index, expected)
    assert torch.equal(answer(centred, shifted).index, expected)
    assert not torch.equal(answer(vt.DivPrune(keep=9), shifted).index, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_sensitivity_is_that_of_the_projector(dtype):
    """Against the exact derivative, in both precisions, from inside a run; a linear projector is equally sensitive."""
    model, seen = build("llava", dtype=dtype), []

    @dataclasses.dataclass(frozen=True)
    class Spy(vt.ZOOPrune):
        def choose(self, view, count):
            seen.append(view)
            return super().choose(view, count)

    inputs = Prompts("llava", (3, "image", 5)).batch()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with vt.trim(model, Spy(keep=6)):
        model(**inputs)
    (view,) = seen
    projector = family_of(copy.deepcopy(model).float()).projector
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(projector, x) for x in view.features[0].float()]  # [tokens, out, in]
    )
    units = F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    exact = torch.einsum("toi,ui->tuo", jacobian, units).norm(dim=-1).mean(1)
    torch.testing.assert_close(view.encoder.sensitivity[0], exact, rtol=2e-3, atol=1e-3)
    assert exact.std() > 0.01 * exact.mean()
    assert len(model.state_dict()) == len(build("llava").state_dict())


# ------------------------------------------------------------------------------------------------ V-CAST


def slow_vcast(view, b, count, variant):
    frames, rows_, columns = view.grid
    x = view.encoder.projected[b].double().view(frames, rows_ * columns, -1)
    whole = [F.normalize(x[f].mean(0), dim=0) for f in range(frames)]
    bend = [1.0] * frames
    for f in range(1, frames - 1):
        a, c = whole[f] - whole[f - 1], whole[f + 1] - whole[f]
        bend[f] = 1 - float(a @ c / a.norm() / c.norm())
    weight = [math.exp(c / 0.7) for c in bend]
    ideal = [1 + w / sum(weight) * (count - frames) for w in weight]
    quota = [min(math.floor(share), rows_ * columns) for share in ideal]
    fraction = [share - math.floor(share) for share in ideal]
    while sum(quota) < count:
        room = [f for f in range(frames) if quota[f] < rows_ * columns]
        best = max(room, key=lambda f: (fraction[f] if variant == "code" else ideal[f] - quota[f], -f))
        quota[best] += 1
    kept = []
    for f in range(frames):
        norm = x[f].norm(dim=-1)
        scale = (norm - norm.min()) / (norm.max() - norm.min())
        score = 1 - F.normalize(x[f], dim=-1) @ whole[f] + scale
        kept += [f * rows_ * columns + i for i in ranked(score)[: quota[f]]]
    return sorted(kept), quota


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("count", [7, 20, 55, 70])
def test_vcast(variant, count):
    view = make_view(5, grid=(7, 3, 4))
    kept = answer(vt.VCAST(keep=count, variant=variant), view)
    for b in range(2):
        index, quota = slow_vcast(view, b, count, variant)
        assert kept.index[b].tolist() == index
        assert min(quota) >= 1


def test_vcast_by_hand():
    """A steady pan has its ends alone; a turn back the most; a still stretch as much as an end; a few tokens do."""
    angle = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.2, 0.2, 0.2])
    frames = torch.stack([angle.cos(), angle.sin()], -1)
    tokens = torch.cat([frames, torch.zeros(7, 1)], -1)[None, :, None].expand(1, 7, 100, 3).reshape(1, 700, 3)
    view = changed(make_view(grid=(7, 10, 10), batch=1, width=3), {"encoder.projected": tokens.contiguous()})
    kept = answer(vt.VCAST(keep=140), view).index[0] // 100
    counts = torch.bincount(kept, minlength=7).tolist()
    # c = 1, 0, 0, 2, 1, 1, 1, as good as: the steps go along a circle
    assert counts[3] > counts[0] > counts[1]
    assert counts[1] == counts[2]
    assert max(counts[0], *counts[4:]) - min(counts[0], *counts[4:]) <= 1  # 16 or 17, by what is left over
    assert sum(counts) == 140
    two = make_view(grid=(2, 4, 4), batch=1)
    assert torch.bincount(answer(vt.VCAST(keep=10), two).index[0] // 16).tolist() == [5, 5]
    for variant in ("paper", "code"):
        assert answer(vt.VCAST(keep=3, variant=variant), view).index.shape == (1, 3)
    assert answer(vt.VCAST(keep=3), make_view()).index.shape == (2, 3)  # an image
