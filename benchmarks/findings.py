"""Shows findings of docs/findings.md, each by the rule in question, rebuilt in a few lines.

    python benchmarks/findings.py            # all
    python benchmarks/findings.py holov      # one of them

It knows the rules from their published descriptions and code, none of which is copied; it does not run that code. Where
tests/golden/peers holds what the code itself answered, the tests compare with that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import visiontrim as vt
from visiontrim.methods.prunesid import pick_from_groups
from visiontrim.ops.diverse import determinant_picks, max_min_picks

PEERS = Path(__file__).parent.parent / "tests" / "golden" / "peers"


def recorded(name: str) -> dict[str, Tensor]:
    with np.load(PEERS / f"{name}.npz") as arrays:
        return {
            key: torch.from_numpy(np.asarray(value)).float()
            for key, value in arrays.items()
            if value.dtype.kind in "fiu"
        }


def common(a: Tensor, b: Tensor) -> int:
    return len(set(a.flatten().tolist()) & set(b.flatten().tolist()))


def visiontrim() -> None:
    """The release and the paper, with its own fusion and merging, on the recorded tensors."""
    case = recorded("visiontrim")
    features = case["published_features"]
    mask = torch.ones(case["published_text"].shape[:2], dtype=torch.bool)
    view = vt.View(
        features=features,
        coordinates=torch.cartesian_prod(torch.arange(1), torch.arange(24), torch.arange(24))[None],
        grid=(1, 24, 24),
        entered=576,
        num_layers=32,
        encoder=vt.EncoderSignals(
            cls_attention=case["published_cls_attention"], received_attention=case["published_received_attention"]
        ),
        text=vt.TextSignals(
            joint=case["published_joint"],
            question=vt.Text(case["published_text"], mask, float(case["published_scale"])),
        ),
    )
    release = vt.VisionTrim(keep=64, variant="release").steps()[0].select(view)
    paper = vt.VisionTrim(keep=64, stages="vision").steps()[0].select(view)
    print("visiontrim: of 64 tokens,", common(release.index, paper.index), "are kept by the release and by the paper")


def holov() -> None:
    """Strip quotas for three weights of the variance term, and what is left empty."""
    torch.manual_seed(0)
    equal, empty = 0, []
    for _ in range(40):
        features = F.normalize(torch.randn(576, 64), dim=-1)
        attention = (4 * torch.randn(576)).softmax(0) * 1e3
        quotas = [quotas_of_strips(features, attention, weight, 192) for weight in (0.0, 0.09, 10.0)]
        equal += torch.equal(quotas[0], quotas[1]) and torch.equal(quotas[0], quotas[2])
        empty.append(int((quotas[1] - 36).clamp(min=0).sum()))
    print(
        f"holov: quotas equal for weights 0, 0.09 and 10 in {equal} of 40; empty of 192: {min(empty)} to {max(empty)}"
    )


def quotas_of_strips(features: Tensor, attention: Tensor, weight: float, count: int) -> Tensor:
    """Tokens of 16 strips of 36: each strip's variances are scaled to its mean attention, so they cancel."""
    scores = []
    for unit, own in zip(features.view(16, 36, -1), attention.view(16, 36), strict=True):
        cosine = (unit @ unit.mT).fill_diagonal_(0.0)
        mean = cosine.sum(1, keepdim=True) / 35
        variance = (cosine - mean).square().sum(1) / 35
        scores.append((own + weight * variance * own.mean() / (variance.mean() + 1e-6)).mean())
    share = torch.stack(scores) / sum(scores)
    quota = (count * share).floor().long()
    for strip in share.argsort(descending=True)[: count - int(quota.sum())]:
        quota[strip] += 1
    return quota


def flashvid() -> None:
    """A tree of equal frames: the sum of all below, divided by one more than its direct children."""
    token = torch.ones(8)
    for frames in (2, 4, 8):
        below, divided = token.clone(), token.clone()
        for _ in range(frames - 1):  # every frame has one child, the next
            below = token + below
            divided = below / 2
        print(f"flashvid: {frames} equal frames give {float(divided.norm() / token.norm()):.1f} times the length")


def vcast() -> None:
    """Quotas of seven frames: floors, then the leftover to the largest fraction, which is not cleared."""
    weights = torch.tensor([0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.19])
    exact = 1 + 43 * weights / weights.sum()
    left = 50 - int(exact.floor().sum())
    code = exact.floor().long()
    code[(exact - exact.floor()).argmax()] += left
    meant = exact.floor().long()
    meant[(exact - exact.floor()).argsort(descending=True)[:left]] += 1
    print(f"vcast: {left} left over; to one frame {code.tolist()}, by largest remainders {meant.tolist()}")


def prunesid() -> None:
    """The tokens kept of one picture under several seeds of the randomised principal components."""
    case = recorded("prunesid")
    wide = torch.randn(1, 576, 1024, generator=torch.Generator().manual_seed(0))
    for name, features in (("recorded, width 40", case["published_features"]), ("random, width 1,024", wide)):
        squashed, kept = features.sigmoid(), []
        centred = squashed - squashed.mean(-1, keepdim=True)
        for seed in range(6):
            torch.manual_seed(seed)
            loading, group = torch.pca_lowrank(centred.mT, q=16)[2].abs().max(-1)
            kept.append(pick_from_groups(features, group, loading, 64, factor=2.0, by_group=False).index)
        same = [common(a, b) for number, a in enumerate(kept) for b in kept[:number]]
        print(f"prunesid ({name}): of 64 tokens two seeds keep {min(same)} to {max(same)} in common")


def cdpruner() -> None:
    """Relevance scaled over two pictures together, and by itself."""
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(2, 576, 96, generator=generator), dim=-1)
    cosine = torch.randn(2, 576, generator=generator) * torch.tensor([[0.02], [0.06]])

    def picks(low: Tensor, high: Tensor) -> Tensor:
        relevance = (cosine - low + 1e-6) / (high - low)
        return determinant_picks(vectors * relevance[..., None], 64)

    alone = picks(cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True))
    together = picks(cosine.min(), cosine.max())
    print(
        "cdpruner: of 64 tokens", [common(a, b) for a, b in zip(alone, together, strict=True)], "stay in a batch of two"
    )


def divprune() -> None:
    """Greedy max-min in half precision without a mark on what was taken, on tokens around a common mean."""
    features = recorded("divprune")["published_projected"][0]
    for mean in (0.0, 30.0, 60.0, 100.0):
        half = F.normalize(features + mean, dim=-1).half()
        distance = 1 - half @ half.mT
        picks = [int(distance.float().kthvalue(2, dim=0).values.argmax())]
        nearest = distance[picks[0]].clone()
        for _ in range(287):
            picks.append(int(nearest.argmax()))
            nearest = torch.minimum(nearest, distance[picks[-1]])
        ours = len(set(max_min_picks(features[None] + mean, 288)[0].tolist()))
        print(f"divprune (mean {mean:.0f}): {len(set(picks))} different tokens in 288 picks; here {ours}")


def pope() -> None:
    """Answers of one version of the labels scored by position against another, from which 90 lines were taken."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([True, False], 1500))
    answers = np.delete(labels, np.sort(rng.choice(3000, 90, replace=False)))  # every answer is right
    right = float((answers == labels[: len(answers)]).mean())
    print(f"pope: {len(answers):,} right answers paired by position with 3,000 labels: {100 * right:.1f} % right")


FINDINGS = {f.__name__: f for f in (visiontrim, holov, flashvid, vcast, prunesid, cdpruner, divprune, pope)}


if __name__ == "__main__":
    with torch.inference_mode():
        for name in sys.argv[1:] or FINDINGS:
            FINDINGS[name]()
