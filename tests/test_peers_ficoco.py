"""FiCoCo-L against its specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import visiontrim as vt
from language import left_by, mean, random, seen_by
from tiny import close
from views import changed
from visiontrim.core.signals import Text
from visiontrim.ops.spreading import absorb

no_grad = pytest.mark.usefixtures("no_grad")


# ------------------------------------------------------------------------------------------------ FiCoCo-L


def test_ficoco_budgets():
    counts = left_by(vt.FiCoCoL())
    assert counts == [576] * 6 + [576 - 14 * step for step in range(1, 27)]
    assert mean(vt.FiCoCoL()) == pytest.approx(422.4, abs=0.051)
    assert mean(vt.FiCoCoL(r=21)) == pytest.approx(345.7, abs=0.051)
    for keep in (334, 400, 500):
        assert abs(mean(vt.FiCoCoL(keep=keep)) - keep) <= 0.5
    with pytest.raises(vt.TrimError, match="raise keep to 334"):
        mean(vt.FiCoCoL(keep=300))


def slow_ficoco(view: vt.View, image: int, r: int, beta=0.6, gamma=0.6, eps=0.998) -> tuple[list[int], Tensor]:
    words = [t for t in range(view.text.question.mask.shape[1]) if view.text.question.mask[image, t]]
    n, m = view.features.shape[1], len(words)

    def logits(queries, keys, i, j):
        share = queries.shape[1] // keys.shape[1]
        products = [
            float(queries[image, h, i].double() @ keys[image, h // share, j].double()) for h in range(queries.shape[1])
        ]
        return sum(products) / len(products)

    q, k = view.decoder.queries, view.decoder.keys
    inner = [[logits(q.tokens, k.tokens, i, j) for j in range(n)] for i in range(n)]
    asked = [[logits(q.text, k.tokens, t, j) for j in range(n)] for t in words]
    redundancy = [beta * sum(inner[i]) / n - (1 - beta) * sum(asked[t][i] for t in range(m)) / m for i in range(n)]
    dropped = sorted(range(n), key=lambda i: -redundancy[i])[:r]
    kept = [i for i in range(n) if i not in dropped]

    def softmax(values):
        top = max(values)
        exps = [math.exp(value - top) for value in values]
        return [e / sum(exps) for e in exps]

    onward = [softmax(asked[t] + [logits(q.text, k.text, words[t], u) for u in words]) for t in range(m)]
    outputs = {j: (view.features[image, j].double(), 1.0) for j in kept}
    for i in dropped:
        row = softmax(inner[i] + [logits(q.tokens, k.text, i, t) for t in words])
        c = [gamma * row[j] + (1 - gamma) / m * sum(row[n + t] * onward[t][j] for t in range(m)) for j in kept]
        ordered, place = sorted(c), eps * (len(kept) - 1)
        low = ordered[int(place)]
        threshold = low + (ordered[min(int(place) + 1, len(kept) - 1)] - low) * (place - int(place))
        chosen = {j: value for j, value in zip(kept, c, strict=True) if value >= threshold - 1e-12}
        for j, value in chosen.items():
            alpha = value / sum(chosen.values())
            total, weight = outputs[j]
            outputs[j] = total + alpha * view.features[image, i].double(), weight + alpha
    return kept, torch.stack([outputs[j][0] / outputs[j][1] for j in kept])


@pytest.mark.parametrize("eps", [0.998, 0.8])
def test_ficoco_against_a_slow_reference(eps):
    step = vt.FiCoCoL(r=5, eps=eps).steps()[0]
    view = seen_by(step, 24, images=2)
    mask = view.text.question.mask.clone()
    mask[0, :3] = False
    view = changed(view, {"text.question": Text(view.text.question.tokens, mask, 1.0)})
    keep = step.select(view)
    for image in range(2):
        kept, outputs = slow_ficoco(view, image, 5, eps=eps)
        assert keep.index[image].tolist() == kept
        close(keep.features[image].double(), outputs, 1e-5)
        assert (keep.assignment[image] >= 0).all()


def test_a_token_merged_into_its_equal_changes_nothing():
    x = random(1, 1, 8)
    close(absorb(x, x, torch.tensor([[[0.3]]]), 0.998), x, 1e-6)
    both = absorb(random(1, 2, 8, seed=2), x, torch.tensor([[[0.75, 0.25]]]), 0.0)
    close(both[0, 0], (random(1, 2, 8, seed=2)[0, 0] + 0.75 * x[0, 0]) / 1.75, 1e-6)
    close(both[0, 1], (random(1, 2, 8, seed=2)[0, 1] + 0.25 * x[0, 0]) / 1.25, 1e-6)
