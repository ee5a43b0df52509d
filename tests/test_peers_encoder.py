"""Methods that merge inside the vision encoder, against hand-computed answers and loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import visiontrim as vt
from tiny import PATCHES, ROWS, close, generate, llava, prompts, sample
from views import changed
from visiontrim.calibrate import dymu
from visiontrim.core.method import Layers
from visiontrim.methods.matching import left_after
from visiontrim.ops.attention import attention_columns
from visiontrim.ops.matching import edges, match, match_any
from visiontrim.ops.windows import penalise_peaks, windows

pytestmark = pytest.mark.usefixtures("no_grad")

SMALL = {
    "tome": vt.ToMe(keep=5),
    "turbo": vt.Turbo(keep=5),
    "crossget": vt.CrossGET(keep=5),
    "ficoco-v": vt.FiCoCoV(keep=5, start=1, eps=0.8),
    "dymu": vt.DyMU(keep=5),
}
every_method = pytest.mark.parametrize("method", SMALL.values(), ids=SMALL)


def view_of(seed: int = 0, grid=(1, 4, 6), batch: int = 2, dim: int = 5, heads: int = 2) -> vt.View:
    """Tokens between two encoder layers, with every signal there is."""
    generator = torch.Generator().manual_seed(seed)
    total = math.prod(grid)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return vt.View(
        features=noise(batch, total, dim),
        coordinates=torch.cartesian_prod(*map(torch.arange, grid)).expand(batch, -1, -1),
        grid=grid,
        entered=total,
        num_layers=32,
        encoder=vt.EncoderSignals(
            mass=torch.randint(1, 5, (batch, total), generator=generator).float(),
            cls_attention=(2 * noise(batch, total)).softmax(-1),
            received_attention=noise(batch, total).softmax(-1),
            column_attention=noise(batch, total).softmax(-1),
            keys=noise(batch, heads, total, 4),
            queries=noise(batch, heads, total, 4),
            cls_query=noise(batch, heads, 1, 4),
        ),
    )


def keys(view: vt.View, image: int) -> Tensor:
    mean = view.encoder.keys[image].double().mean(0)
    return mean / mean.norm(dim=-1, keepdim=True)


def weighted(view: vt.View, image: int) -> tuple[Tensor, Tensor]:
    mass = view.encoder.mass[image].double()
    return view.features[image].double() * mass[:, None], mass


# ------------------------------------------------------------------------------------------------ Turbo


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("count", [1, 5, 12])
def test_turbo_against_a_slow_reference(alpha, count):
    view = view_of()
    merged = vt.Turbo(alpha=alpha).merged(view, count)
    for image in range(2):
        unit, attention = keys(view, image), view.encoder.cls_attention[image].double()
        best = []
        for a in range(0, 24, 2):
            cosine, b = max((float(unit[a] @ unit[b]), -b) for b in range(1, 24, 2))
            best.append((cosine - 30 * alpha * float(attention[a]), -a, -b))
        pairs = {-a: b for _, a, b in sorted(best, reverse=True)[:count]}
        kept = [token for token in range(24) if token not in pairs]
        assert merged.index[image].tolist() == kept
        total, mass = weighted(view, image)
        for place, token in enumerate(kept):
            members = [token, *(a for a, b in pairs.items() if b == token)]
            close(merged.features[image, place].double(), total[members].sum(0) / mass[members].sum())
            assert [t for t in range(24) if merged.assignment[image, t] == place] == sorted(members)


def test_turbo_without_its_term_is_tome():
    view = view_of()
    ours, tome = vt.Turbo(alpha=0.0).merged(view, 7), vt.ToMe().merged(view, 7)
    assert torch.equal(ours.index, tome.index)
    assert torch.equal(ours.features, tome.features)


def test_turbo_spares_what_cls_attends_to():
    """With a weight beyond any cosine the sources are those of least attention."""
    view = view_of()
    index = vt.Turbo(alpha=1e4).merged(view, 4).index
    for image in range(2):
        gone = sorted(set(range(24)) - set(index[image].tolist()))
        sources = view.encoder.cls_attention[image, ::2]
        assert gone == sorted((2 * sources.argsort()[:4]).tolist())


# ------------------------------------------------------------------------------------------------ CrossGET


def slow_graph(unit: Tensor, importance: Tensor, count: int) -> list[tuple[int, int]]:
    """Pairs (source, target) of complete-graph soft matching."""
    n = len(unit)
    cosine = [[float(unit[i] @ unit[j]) if i != j else -math.inf for j in range(n)] for i in range(n)]
    order = sorted(range(n), key=lambda i: (-max(cosine[i]), i))
    value = {
        i: float(importance[i]) - max((cosine[i][j] for j in order[rank + 1 :]), default=-math.inf)
        for rank, i in enumerate(order)
    }
    sources = sorted(order, key=lambda i: (value[i], order.index(i)))[:count]
    rest = [j for j in range(n) if j not in sources]
    return [(i, max(rest, key=lambda j: (cosine[i][j], -j))) for i in sources]


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("count", [1, 6, 12])
def test_crossget_against_a_slow_reference(count, cls):
    view = view_of(seed=count)
    view = view if cls else changed(view, {"encoder.cls_attention": None})
    merged = vt.CrossGET().merged(view, count)
    for image in range(2):
        importance = view.encoder.column_attention[image].double()
        if cls:
            importance = importance + view.encoder.cls_attention[image].double()
        pairs = slow_graph(keys(view, image), importance, count)
        total, mass = weighted(view, image)
        sums, masses = total.clone(), mass.clone()
        for source, target in pairs:
            one, other = importance[source].exp(), importance[target].exp()
            sums[target] += 2 * one / (one + other) * total[source] + (2 * other / (one + other) - 1) * total[target]
            masses[target] += mass[source]
        kept = [token for token in range(24) if token not in dict(pairs)]
        assert merged.index[image].tolist() == kept
        close(merged.features[image].double(), (sums / masses[:, None])[kept])
        for source, target in pairs:
            assert merged.assignment[image, source] == kept.index(target)


def test_a_complete_graph_pairs_neighbours_that_a_bipartite_one_cannot():
    """Tokens 0 and 2 are equal; ToMe has both on the side of the sources."""
    metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]]])
    source, target = match_any(metric, torch.zeros(1, 4), 1)
    assert (source.tolist(), target.tolist()) == ([[0]], [[2]])
    assert match(metric, 1)[1].tolist() != [[2]]
    # an important one stays, and its twin, of later rank, has no partner left that is as near
    source, _ = match_any(metric, torch.tensor([[3.0, 0.0, 0.0, 0.0]]), 1)
    assert source.tolist() != [[0]]


def test_column_means_are_those_of_the_whole_map():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 7, 4, generator=generator) for _ in range(2))
    bias = torch.rand(2, 7, generator=generator)
    whole = (query.double() @ key.double().mT / 2 + bias.double()[:, None, None]).softmax(-1)
    for skip in (0, 1):
        ours = attention_columns(query, key, skip=skip, bias=bias, chunk=3)
        close(ours.double(), whole.mean((1, 2))[:, skip:])


# ------------------------------------------------------------------------------------------------ FiCoCo-V


def slow_penalty(score: list[float], view: vt.View, image: int) -> list[float]:
    _, rows, columns = view.grid
    best: dict[tuple[int, int], int] = {}
    for token, (_, row, column) in enumerate(view.coordinates[image].tolist()):
        window = min(row // 2, rows // 2 - 1), min(column // 2, columns // 2 - 1)
        if window not in best or score[token] > score[best[window]]:
            best[window] = token
    return [s if n not in best.values() else (2 * s if s > 0 else s / 2) for n, s in enumerate(score)]


def test_the_local_penalty_by_hand():
    """One row of windows: the peak of the first is positive, that of the second negative, ties go left."""
    places = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(4))[None]
    score = torch.tensor([[1.0, 3.0, -4.0, -2.0, 3.0, 0.0, -2.0, -8.0]])
    ours = penalise_peaks(score, *windows(places, (1, 2, 4), 2))
    assert ours.tolist() == [[1.0, 6.0, -4.0, -1.0, 3.0, 0.0, -2.0, -8.0]]


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("eps", [0.998, 0.7])
@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 5, 5)])
def test_ficoco_v_against_a_slow_reference(cls, eps, grid):
    view, lamb, count = view_of(grid=grid), 0.35, 6
    view = view if cls else changed(view, {"encoder.cls_query": None})
    merged = vt.FiCoCoV(eps=eps).merged(view, count)
    n = math.prod(grid)
    for image in range(2):
        query, key = view.encoder.queries[image].double(), view.encoder.keys[image].double()
        logit = [[sum(float(query[h, i] @ key[h, j]) for h in range(2)) / 2 for j in range(n)] for i in range(n)]
        if cls:
            of_cls = [
                sum(float(view.encoder.cls_query[image, h, 0].double() @ key[h, j]) for h in range(2)) / 2
                for j in range(n)
            ]
        else:
            flat = torch.stack([torch.cat([key[h, j] for h in range(2)]) for j in range(n)])
            of_cls = torch.cosine_similarity(flat, flat.mean(0)[None], dim=-1).tolist()
        score = [lamb * sum(logit[i]) / n - (1 - lamb) * of_cls[i] for i in range(n)]
        score = slow_penalty(score, view, image)
        dropped = sorted(sorted(range(n), key=lambda i: (-score[i], i))[:count])
        kept = [i for i in range(n) if i not in dropped]
        assert merged.index[image].tolist() == kept
        total, weight = view.features[image, kept].double(), torch.ones(len(kept), dtype=torch.float64)
        for i in dropped:
            row = torch.tensor([math.exp(logit[i][j]) for j in kept], dtype=torch.float64)
            row = row * (row >= row.quantile(eps))
            alpha = row / row.sum()
            total = total + alpha[:, None] * view.features[image, i].double()
            weight = weight + alpha
        close(merged.features[image].double(), total / weight[:, None], 1e-5)


def test_ficoco_v_steps_and_counts_of_the_release():
    """Eleven steps in CLIP-L of LLaVA; r = 35, 41 and 46 leave 191, 125 and 70 patches."""
    layers = Layers(encoder=23, decoder=32)
    sites = [step.site.index for step in vt.FiCoCoV().steps_for(layers)]
    assert sites == list(range(12, 23))
    for r in (35, 41, 46):
        keep = 576 - 11 * r
        assert [left_after(step, 11, 576, keep) for step in range(1, 12)] == [576 - r * step for step in range(1, 12)]


# ------------------------------------------------------------------------------------------------ DyMU


def test_dymu_merges_every_edge_above_its_threshold():
    view = view_of(batch=1)
    best = edges(view.encoder.keys.mean(1))[0][0]
    for threshold in (-1.0, 0.2, 0.6, math.inf):
        method = vt.DyMU(keep=None, thresholds=(threshold,))
        (step,) = method.steps_for(Layers(encoder=2, decoder=4))
        assert step.select(view).index.shape[1] == 24 - int((best > threshold).sum())


def test_dymu_calibrated_on_an_image_merges_as_it_was_calibrated():
    """Of one image the threshold lies at the first edge that did not merge, so as many merge again."""
    model = llava()
    inputs = prompts((3, "image", 5))
    method = dymu(model, [inputs], keep=7)
    assert len(method.thresholds) == 2
    with vt.trim(model, method) as run:
        model(**inputs)
    assert run.report.kept_tokens == 7
    again = vt.load_method(str(method))
    assert again == method


def test_dymu_thresholds_are_pooled_over_a_batch_and_averaged_over_batches():
    model = llava()
    batches = [prompts((3, "image", 5, "image", 2)), prompts((1, "image", 4), seed=2)]
    method = dymu(model, iter(batches), keep=12)
    values = []
    for inputs in batches:
        seen = {}
        projection = model.model.vision_tower.encoder.layers[0].self_attn.k_proj
        handle = projection.register_forward_hook(lambda m, a, output, seen=seen: seen.update(keys=output))
        with vt.trim(model, "none"):
            model(**inputs)
        handle.remove()
        images = len(seen["keys"])
        metric = seen["keys"][:, 1:].view(images, PATCHES, 4, 8).mean(2)
        # two of 16 merge after the first layer
        pooled = sorted((float(e) for e in edges(metric)[0].flatten()), reverse=True)
        values.append(max(0.0, pooled[2 * images]))
    assert method.thresholds[0] == pytest.approx(sum(values) / 2, abs=1e-6)


def test_dymu_refuses_pictures_that_disagree():
    model = llava()
    inputs = prompts((3, "image", 5), (3, "image", 5))
    method = dymu(model, [sample(inputs, 0)], keep=7)
    with vt.trim(model, method), pytest.raises(vt.TrimError, match="pass one image at a time"):
        model(**inputs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vt.DyMU(keep=5, thresholds=(0.5,)), "give a count, or keep=None"),
        (lambda: vt.DyMU(keep=None), "give a count, or keep=None"),
        (lambda: vt.Turbo(alpha=-1.0), "would merge what"),
        (lambda: vt.FiCoCoV(eps=2.0), "eps=2.0 is no weight"),
        (lambda: vt.FiCoCoV(start=1.5), "cannot be passed"),
        (lambda: dymu(llava(), [], keep=5), "pass at least one batch"),
        (
            lambda: vt.trim(llava(), vt.DyMU(keep=None, thresholds=(0.5,))).attach().model(**prompts((1, "image", 1))),
            "1 thresholds for 2",
        ),
    ],
)
def test_options_are_checked(build, message):
    with pytest.raises(vt.TrimError, match=message):
        build()


# ------------------------------------------------------------------------------------------------ all of them


@every_method
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_counts_are_exact_and_a_batch_equals_its_samples(method, tower):
    model, inputs = llava(tower=tower), prompts(*ROWS["batch"])
    with vt.trim(model, method) as run:
        batch = torch.stack(generate(model, inputs).logits, 1)
        assert {image.per_layer for image in run.trace.images} == {(5,) * 5}
        for row in range(len(batch)):
            close(batch[row], torch.stack(generate(model, sample(inputs, row)).logits, 1)[0])


@every_method
def test_keeping_everything_is_bit_identical(method):
    model, inputs = llava(), prompts(*ROWS["batch"])
    plain = model(**inputs).logits
    with vt.trim(model, vt.load_method(method, keep=1.0)):
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("method", [vt.ToMe(), vt.Turbo(), vt.DyMU()], ids=str)
def test_merging_preserves_the_weighted_sum(method):
    """Mass and mass-weighted features of the image are the same before and after."""
    view = view_of()
    merged = method.merged(view, 9)
    mass = torch.zeros(2, 15).scatter_add(1, merged.assignment, view.encoder.mass)
    assert torch.equal(mass.sum(1), view.encoder.mass.sum(1))
    close((merged.features * mass[..., None]).sum(1), (view.features * view.encoder.mass[..., None]).sum(1), 1e-4)
