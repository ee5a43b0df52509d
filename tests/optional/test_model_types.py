"""The last table of docs/models.md, which depends on the release of transformers."""

from pathlib import Path

import model_types


def test_the_table_of_model_types():
    docs = (Path(__file__).parent.parent.parent / "docs" / "models.md").read_text()
    assert model_types.table() in docs
