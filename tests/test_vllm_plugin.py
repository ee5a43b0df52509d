"""What the plug-in for vLLM decides without vLLM: counts, refusals, and positions that survive bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from visiontrim_vllm.options import Asked, Options
from visiontrim_vllm.positions import first_positions, set_positions, with_places

from visiontrim.core.errors import TrimError

IMAGE = 9


@dataclass(frozen=True)
class Place:
    offset: int
    length: int
    is_embed: torch.Tensor | None = None


@dataclass(frozen=True)
class Feature:
    mm_position: Place


def options(**given):
    return Options.of(SimpleNamespace(visiontrim=given))


def test_a_request_overrides_the_server_and_counts_are_known_beforehand():
    server = options(method="visiontrim", keep=64)
    asked = server.asked({}, several=False, question="what?")
    assert (asked.count(576), asked.count(50), asked.question, asked.compact) == (64, 50, "what?", False)
    assert server.asked({"keep": 0.25}, several=False).count(576) == 144
    other = server.asked({"method": "divprune", "keep": 9, "question": "why?"}, several=False)
    assert other.count(576) == 9
    assert other.question == "", "divprune reads none, so the same picture is the same"
    assert server.asked({"method": "none"}, several=False).count(576) == 576
    assert server.asked({"positions": "compact"}, several=False).compact
    assert not server.asked({"positions": "compact"}, several=True).compact
    assert Asked.of(asked.to_json()) == asked
    assert server.asked({"keep": None, "question": "what?"}, several=False) == asked, "as a table has it"
    assert options().method is None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"method": "fastv"}, "inside the language model"),
        ({"method": "visiontrim|fastv"}, "inside the language model"),
        ({"method": "dycoke:view_layer=2"}, "inside the language model"),
        ({"method": "pixelprune"}, "by the picture"),
        ({"method": "random", "keep": -1}, "keeps nothing"),
        ({"method": "random", "positions": "unmerged"}, "choose 'keep' or 'compact'"),
        ({"metod": "random"}, "no option 'metod'"),
    ],
)
def test_what_vllm_cannot_do_is_refused(given, match):
    with pytest.raises(TrimError, match=match):
        options(**given)


def plain(tokens, features):
    return torch.arange(len(tokens)).repeat(4, 1), 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_survivors_have_their_own_positions_and_text_follows_the_whole_image(dtype):
    tokens = [1, 2, IMAGE, IMAGE, IMAGE, 3, IMAGE, IMAGE, 4]
    features = [Feature(Place(2, 3)), Feature(Place(6, 2))]
    positions, delta = first_positions(tokens, features, [9000, 5], plain, several=False)
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 9002, 9003, 9004, 9008]
    assert delta == 9000 - 3 + 5 - 2
    one = with_places(torch.zeros(3, 8, dtype=dtype), torch.tensor([[0], [301], [8999]]), 1)
    two = with_places(torch.ones(2, 8, dtype=dtype), torch.tensor([[1], [4]]), 1)
    at = torch.tensor([2, 3, 4, 6, 7])
    expected = [0, 1, 2, 303, 9001, 9002, 9004, 9007, 9008]
    clean, found = set_positions(positions, at, [one, two], 1)
    assert found[0].tolist() == expected
    assert [part.shape for part in clean] == [(3, 8), (2, 8)]
    again, _ = set_positions(found, at, [one, two], 1)[1], None
    assert again[0].tolist() == expected, "after preemption they are set again"
    part = set_positions(positions, at[1:], [one[1:], two[:1]], 1)[1]
    assert part[0].tolist() == [0, 1, 2, 303, 9001, 9002, 9004, 9004, 9008], "and by chunks"


def test_three_positions_a_token():
    def whole(tokens, features):
        rows, columns, start = 4, 5, 2
        t, h, w = (torch.arange(len(tokens)) for _ in range(3))
        end = start + rows * columns
        t[start:end] = start
        h[start:end] = start + torch.arange(20) // columns
        w[start:end] = start + torch.arange(20) % columns
        after = start + max(rows, columns) + torch.arange(len(tokens) - end)
        for row in (t, h, w):
            row[end:] = after
        return torch.stack([t, h, w]), int(after[-1]) + 1 - len(tokens)

    tokens = [1, 2, IMAGE, IMAGE, 3, 4]
    positions, delta = first_positions(tokens, [Feature(Place(2, 2))], [20], whole, several=True)
    assert positions[:, 4:].tolist() == [[7, 8]] * 3
    assert delta == 9 - len(tokens)
    index = torch.tensor([7, 19])
    columns = with_places(torch.zeros(2, 8), torch.stack([index * 0, index // 5, index % 5], -1), 3)
    _, found = set_positions(positions, torch.tensor([2, 3]), [columns], 3)
    assert found[:, 2:4].T.tolist() == [[2, 3, 4], [2, 5, 6]]
    whole_image = with_places(torch.zeros(2, 8), None, 3)
    assert torch.equal(set_positions(positions, torch.tensor([2, 3]), [whole_image], 3)[1], positions)


def test_placeholders_between_marks():
    lit = torch.tensor([False, True, True, False])
    tokens = [1, 7, IMAGE, IMAGE, 8, 2]
    seen = []

    def whole(full, features):
        seen.append((full, features[0].mm_position))
        return plain(full, features)

    positions, _ = first_positions(tokens, [Feature(Place(1, 4, lit))], [6], whole, several=False)
    full, place = seen[0]
    assert full == [1, 7, *[IMAGE] * 6, 8, 2]
    assert (place.offset, place.length, place.is_embed.tolist()) == (1, 8, [False, *[True] * 6, False])
    assert positions[0].tolist() == [0, 1, 2, 3, 8, 9]
