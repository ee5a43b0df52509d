"""Settings of all tests: shapes and dtypes in signatures are checked, and cores are left to other work."""

import functools
import gc
import sys

import pytest
import torch
import typer.main
from jaxtyping import install_import_hook

import shapes

install_import_hook(["visiontrim.core", "visiontrim.ops"], "shapes.checker")

from visiontrim.cli import main  # noqa: E402
from visiontrim.core.view import View  # noqa: E402  # after the hook, which checks it

shapes.check_every(View)
torch.set_num_threads(1)  # the models are tiny: a second thread would only wait
typer.main.get_command = functools.cache(typer.main.get_command)  # which reads the options of all commands every time


def pytest_collection_finish():
    gc.freeze()  # a million objects of imported packages, through which every collection would look anew


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command; gives (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["visiontrim", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run
