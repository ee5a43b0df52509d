"""Settings of all tests: shapes and dtypes in signatures are checked, and torch leaves cores to other work."""

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["visiontrim.core", "visiontrim.ops"], "shapes.checker")
torch.set_num_threads(1)  # the models are tiny: a second thread would only wait


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
