"""Steps of decoding in turn: who goes when, and what the ratios are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from visiontrim import zoo
from visiontrim.measure.steps import compare, in_turn, ratio, twin

DEVICE = torch.device("cpu")


def answering(tokens, seen, name):
    def answer(turns):
        for token in range(tokens):
            seen.append((name, token))
            assert not turns(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1)).any()

    return answer


def test_steps_take_turns():
    seen = []
    steps = in_turn(answering(4, seen, "a"), answering(4, seen, "b"), DEVICE)
    assert seen == [(name, token) for token in range(4) for name in "ab"]
    assert steps.shape == (3, 2, 2)  # the first token is no step
    assert (steps >= 0).all()


@pytest.mark.parametrize("first", [True, False])
def test_an_error_of_one_is_raised_and_the_other_ends(first):
    seen = []

    def broken(turns):
        turns(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1))
        raise ValueError("of a thread")

    ways = [broken, answering(5, seen, "other")]
    with pytest.raises(ValueError, match="of a thread"):
        in_turn(*(ways if first else ways[::-1]), DEVICE)
    assert len(seen) == 5


def test_what_a_copy_makes_cancels_out():
    steps = np.abs(np.random.default_rng(1).normal(1, 0.1, (200, 1, 2)))
    slow_copy, ours = 1.2, 1.05
    orders = [
        np.concatenate([steps, steps * ours * slow_copy], 1),  # ours on the slow copy
        np.concatenate([steps * slow_copy, steps * ours], 1),
    ]
    for low, middle, high in ratio(orders).values():
        assert middle == pytest.approx(ours)
        assert low <= middle <= high


def test_the_interval_grows_with_the_noise():
    drawn = np.random.default_rng(2)

    def width(noise):
        steps = np.exp(drawn.normal(0, noise, (100, 2, 2)))
        low, _, high = ratio([steps, steps[::-1]])["wall"]
        return high - low

    assert width(0.2) > 3 * width(0.02)


def test_a_twin_shares_weights_and_no_hooks():
    model = zoo.load().model
    other = twin(model)
    assert other is not model
    assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in model.parameters()]
    other.register_forward_hook(lambda *_: None)
    assert not model._forward_hooks


def test_more_work_is_a_longer_step():
    model = zoo.load().model

    def way(work):
        def answer(model, turns):
            ids = torch.zeros(1, 1, dtype=torch.long)
            for _ in range(30):
                for _ in range(work):
                    torch.ones(64, 64) @ torch.ones(64, 64)
                turns(ids, ids)

        return answer

    found = compare({"light": way(5), "heavy": way(60)}, [("light", "heavy"), ("light", "light")], model, 1)
    assert found[0]["cpu"][0] > 2  # twelve times the work
    assert 0.5 < found[1]["cpu"][1] < 2
