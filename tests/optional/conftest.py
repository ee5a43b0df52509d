"""Tests that need packages which nothing else needs; ``make matrix`` runs them in an environment of their own."""

import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

jaxtyping.config.update("jaxtyping_disable", True)  # checks of shapes stumble over what torch.compile traces
sys.path.insert(0, str(Path(__file__).parent.parent))  # families and tiny
torch.set_num_threads(1)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
