"""The help of every command."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from visiontrim.cli import app

COMMANDS = sorted(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
TRAINING = [("zoo", name) for name in typer.main.get_command(app).commands["zoo"].commands]  # pyright: ignore


@pytest.mark.parametrize("command", [*((name,) for name in COMMANDS if name != "zoo"), *TRAINING], ids=" ".join)
def test_flags_have_no_type(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "--help" in result.output
    assert "bool" not in result.output.lower()
    assert "xample" in result.output  # and every command has one
