"""torch.compile: the hooks break graphs, and results stay. Backend "eager" traces everything and generates no code."""

from __future__ import annotations

import pytest
import torch

import families
import visiontrim as vt
from families import Prompts
from tiny import close, generate

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # of what is traced
]

PLANS = {"vision": vt.Random(keep=0.5), "both": vt.Random(keep=0.5) | vt.Random(keep=0.25, layer=2)}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_compiled_model(plan):
    model, inputs = families.build("llava"), Prompts("llava", (3, "image", 5), (1, "image", 2)).batch()
    with vt.trim(model, plan):
        reference = generate(model, inputs, max_new_tokens=3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile(backend="eager", dynamic=True)
    with vt.trim(model, plan) as run:
        ours = generate(model, inputs, max_new_tokens=3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    assert run.report.kept_tokens == 8
    close(torch.stack(ours.logits), torch.stack(reference.logits), 1e-5)


def test_what_torch_compile_returns():
    """Its generate() is that of the model inside."""
    model, inputs = families.build("llava"), Prompts("llava", (3, "image", 5)).batch()
    compiled = torch.compile(model, backend="eager")
    with vt.trim(model, "random", keep=5):
        reference = generate(model, inputs)
    with vt.trim(compiled, "random", keep=5) as run:
        ours = generate(compiled, inputs)
    assert run.model is model
    assert all(a.equal(b) for a, b in zip(ours.logits, reference.logits, strict=True))
