"""Tests of models whose encoder is timm's; ``make matrix`` runs them in an environment of their own."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # families and tiny
torch.set_num_threads(1)
_register_fake = torch.library.register_fake


def _register_what_is_there(name, *args, **kwargs):
    """torchvision, which timm imports, was built for another torch: its operators are missing, and are not needed."""
    if isinstance(name, str) and name.startswith("torchvision::"):
        return lambda function: function
    return _register_fake(name, *args, **kwargs)


torch.library.register_fake = _register_what_is_there


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
