"""SparseVLM against its specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import visiontrim as vt
from language import left_by, mean, random, seen_by
from tiny import close, generate, llava, prompts
from views import changed
from visiontrim.core.signals import Sides, Text
from visiontrim.methods.sparsevlm import raters
from visiontrim.ops.recycle import density_peaks

no_grad = pytest.mark.usefixtures("no_grad")


# ------------------------------------------------------------------------------------------------ SparseVLM


@pytest.mark.parametrize(
    ("version", "keep", "counts", "published"),
    [
        ("v1.5", (300, 200, 110), (309, 204, 113), 206.5),
        ("v1.5", (303, 110, 36), (312, 117, 39), 145.4),
        ("v1.5", (238, 48, 26), (249, 55, 27), 114.1),
        ("v1.5", (66, 30, 17), (82, 32, 18), 82.3),
        ("v2.0", (300, 200, 118), (300, 200, 118), 206.8),
        ("v2.0", (238, 108, 60), (238, 108, 60), 144.1),
        ("v2.0", (246, 54, 28), (246, 54, 28), 113.9),
        ("v2.0", (66, 34, 20), (66, 34, 20), 81.8),
    ],
)
def test_sparsevlm_budgets(version, keep, counts, published):
    first, second, third = counts
    method = vt.SparseVLM(keep=keep, version=version)
    assert left_by(method) == [576] * 3 + [first] * 4 + [second] * 9 + [third] * 16
    assert mean(method) == pytest.approx(published, abs=0.051)


def test_sparsevlm_192_as_its_authors_log_it():
    """A pruning layer counted with what it leaves: 2 layers of 576, then 309 from layer 2 on, and so on."""
    counts = left_by(vt.SparseVLM())
    assert sum(counts[1:] + counts[-1:]) / 32 == 192.03125
    assert mean(vt.SparseVLM()) == 206.5


@pytest.mark.parametrize("keep", [64, 100, 192, 300, 575])
def test_sparsevlm_counts_clusters_into_a_mean(keep):
    assert abs(mean(vt.SparseVLM(keep=keep)) - keep) <= 0.25


def test_raters_by_hand():
    # two vision tokens; words along the axes: the first word fits both, the second one of them, the third none
    vision = torch.tensor([[[2.0, 0.0], [2.0, 2.0]]])
    words = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, True, False]])
    table = torch.tensor([[2.0, 0.0, -2.0], [2.0, 2.0, -4.0]]).softmax(-1)
    rating = table.mean(0)
    wanted = [*(rating > rating.mean()).tolist(), False]
    assert wanted == [True, False, False, False]
    assert raters(Sides(vision, words), Text(words, mask, 1.0)).tolist() == [wanted]
    alike = torch.ones(1, 4, 2)
    assert raters(Sides(vision, alike), Text(alike, mask, 1.0)).equal(mask)


def test_sparsevlm_scores_are_the_raters_rows():
    step = vt.SparseVLM(keep=(4, 2, 1)).steps()[0]
    view = seen_by(step, 9, images=2)
    rating = raters(view.decoder.embeddings, view.text.question)
    score = step.method.score(view)
    for image in range(2):
        rows = [view.decoder.text_attention[image, :, t].double().mean(0) for t in range(7) if rating[image, t]]
        close(score[image].double(), torch.stack(rows).mean(0), 1e-6)


def test_sparsevlm_plus_divides_by_what_positions_give():
    step = vt.SparseVLM(keep=(4, 2, 1), version="v2.0", heads=1).steps()[0]
    angles = torch.tensor([1.0, 0.1])

    def rotary(places: Tensor) -> Tensor:
        turned = (places[:, None] * angles).repeat(1, 2)
        return torch.cat([turned.cos(), turned.sin()], -1)[None]

    view = seen_by(step, 9)
    both = Sides(rotary(torch.arange(9.0)), rotary(torch.arange(10.0, 17.0)))
    view = changed(view, {"decoder.rotary": both})
    rows = raters(view.decoder.embeddings, view.text.question)[0].nonzero()[:, 0].tolist()
    corrected = torch.zeros(2, 9, dtype=torch.float64)
    for head in range(2):
        for v in range(9):
            for t in rows:
                # an all-ones query and key, rotated: 2 cos(angle (10 + t - v)) for each pair of dimensions
                by_position = sum(2 * math.cos(angle * (10 + t - v)) for angle in (1.0, 0.1)) / math.sqrt(4)
                corrected[head, v] += float(view.decoder.text_attention[0, head, t, v]) / by_position / len(rows)
    wanted = corrected[corrected.sum(1).argmax()]
    torch.testing.assert_close(step.method.score(view)[0].double(), wanted, rtol=1e-3, atol=1e-4)
    assert step.select(view).features is None


def test_density_peaks_against_double_loops():
    features = random(2, 14, 3) * torch.tensor([1.0, 2.0, 3.0])
    count = neighbours = 3
    found = density_peaks(features, count, neighbours)
    for image in range(2):
        points = features[image].double()
        distance = [[float((a - b).norm()) / math.sqrt(3) for b in points] for a in points]
        density = [math.exp(-sum(d * d for d in sorted(row)[:neighbours]) / neighbours) for row in distance]
        largest = max(map(max, distance))
        delta = []
        for i, row in enumerate(distance):
            denser = [row[j] for j in range(14) if density[j] > density[i]]
            delta.append(min(denser) if denser else largest)
        ranked = sorted(range(14), key=lambda i: -density[i] * delta[i])
        centres = sorted(ranked[:count])
        assert found.centres[image].tolist() == centres
        went = [
            centres.index(i) if i in centres else min(range(3), key=lambda c: distance[i][centres[c]])
            for i in range(14)
        ]
        assert found.assignment[image].tolist() == went
        for c in range(count):
            members = [points[i] for i in range(14) if went[i] == c]
            close(found.features[image, c].double(), torch.stack(members).mean(0), 1e-5)


def test_density_peaks_of_equal_points():
    found = density_peaks(torch.ones(1, 5, 2), 2, 2)
    assert found.centres.tolist() == [[0, 1]]
    assert found.assignment.tolist() == [[0, 1, 0, 0, 0]]
    assert torch.equal(found.features, torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="6 centres"):
        density_peaks(torch.ones(1, 5, 2), 6, 2)


def test_sparsevlm_recycles_behind_the_kept_tokens():
    method = vt.SparseVLM(keep=(300, 200, 110))
    step = method.steps()[0]
    view = seen_by(step)
    keep = step.select(view)
    score = method.score(view)[0]
    kept = score.topk(300).indices.sort().values
    assert keep.index[0, :300].equal(kept)
    assert torch.equal(keep.features[0, :300], view.features[0, kept])
    assert keep.complement[0].tolist() == [False] * 300 + [True] * 9
    others = torch.tensor([i for i in range(576) if i not in set(kept.tolist())])
    recycled = others[score[others].topk(83).indices.sort().values]
    merged = density_peaks(view.features[:, recycled], 9, 9)
    assert torch.equal(keep.features[0, 300:], merged.features[0])
    assert keep.index[0, 300:].equal(recycled[merged.centres[0]])
    went = keep.assignment[0]
    assert went[kept].equal(torch.arange(300))
    assert went[recycled].equal(300 + merged.assignment[0])
    assert int((went < 0).sum()) == 576 - 300 - 83


@no_grad
def test_positions_of_the_versions():
    """v1.5 goes on at consecutive positions, in every layer after what it caches; v2.0 at the original ones."""
    assert (vt.SparseVLM().positions, vt.SparseVLM(version="v2.0").positions) == ("compact", "keep")
    model, inputs, turned = llava(), prompts((3, "image", 5)), {0: [], 4: []}
    table = model.model.language_model.rotary_emb(torch.zeros(1), torch.arange(40)[None])[0][0]

    def watch(layer):
        def hook(module, args, kwargs):
            cosines = kwargs["position_embeddings"][0][0]
            turned[layer].append([int((table - row).abs().sum(-1).argmin()) for row in cosines])

        return hook

    layers = model.model.language_model.layers
    for version in ("v1.5", "v2.0"):
        with vt.trim(model, vt.SparseVLM(keep=(9, 6, 3), version=version)) as run:
            handles = [layers[index].register_forward_pre_hook(watch(index), with_kwargs=True) for index in turned]
            generate(model, inputs, max_new_tokens=2)
        for handle in handles:
            handle.remove()
        width = run.trace.widths[4]
        prompt, decoded = turned[4][-2:]
        if version == "v1.5":
            assert prompt == list(range(width))
            assert decoded == [width]
        else:
            assert decoded == [25]
            assert prompt[:4] == [0, 1, 2, 3]
            assert prompt[-5:] == [20, 21, 22, 23, 24]
