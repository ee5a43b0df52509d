"""Two processes with half of the encoder's heads each choose what one process with all of them does, and both alike."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import visiontrim as vt
from families import Prompts, build
from visiontrim.engine.entrance import Entrance
from visiontrim.engine.ranks import Ranks

METHODS = ("visionzip:keep=6", "fastervlm:keep=5", "divprune:keep=5", "tome:keep=6")
"""By attention and keys, by attention, by features, and between the layers by keys."""


class Rowwise(nn.Module):
    """The sum over the processes of a linear layer's columns."""

    def __init__(self, whole: nn.Linear, own: slice) -> None:
        super().__init__()
        self.weight, self.bias = whole.weight[:, own], whole.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = nn.functional.linear(x, self.weight)
        distributed.all_reduce(out)
        return out + self.bias


def split_heads(model, rank: int) -> None:
    """Leave half of the heads to every attention module of the encoder, as tensor parallelism does."""
    for layer in model.model.vision_tower.encoder.layers:
        attention = layer.self_attn
        width = attention.q_proj.out_features // 2
        own = slice(rank * width, (rank + 1) * width)
        for name in ("q_proj", "k_proj", "v_proj"):
            whole = getattr(attention, name)
            whole.weight, whole.bias = nn.Parameter(whole.weight[own]), nn.Parameter(whole.bias[own])
        attention.out_proj = Rowwise(attention.out_proj, own)


def chosen(model, method, ranks=None):
    pixels = Prompts("llava", (3, "image", 5, "image", 2)).batch()["pixel_values"]
    entered = Entrance(model.model, method, ranks=ranks)(pixel_values=pixels)
    return [(image.index, image.features) for image in entered]


def of_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with torch.no_grad():
        model, group = build("llava"), distributed.group.WORLD
        drawn = vt.Random(keep=5, seed=rank)
        found = {"alone": chosen(model, drawn), "agreed": chosen(model, drawn, Ranks(group, split=False))}
        split_heads(model, rank)
        found["half"] = chosen(model, vt.load_method(METHODS[0]))
        for method in METHODS:
            found[method] = chosen(model, vt.load_method(method), Ranks(group, split=True))
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")  # a clean process, which imports everything once
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=of_rank, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_all_choose_what_one_process_with_all_heads_does(found, method):
    with torch.no_grad():
        expected = chosen(build("llava"), vt.load_method(method))
    for rank in range(2):
        assert same(found[rank][method], expected)
        for (_, features), (_, wanted) in zip(found[rank][method], expected, strict=True):
            torch.testing.assert_close(features, wanted)
    for (_, one), (_, other) in zip(found[0][method], found[1][method], strict=True):
        assert torch.equal(one, other), "to the last bit"


def test_half_of_the_heads_choose_otherwise(found):
    assert not same(found[0]["half"], found[0][METHODS[0]])
    assert not same(found[0]["half"], found[1]["half"])


def test_what_would_differ_is_what_the_first_one_chose(found):
    assert not same(found[0]["alone"], found[1]["alone"])
    assert same(found[0]["agreed"], found[0]["alone"])
    assert same(found[1]["agreed"], found[0]["alone"])
