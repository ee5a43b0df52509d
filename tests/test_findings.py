"""The page of findings shows what its script prints."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "findings.md").read_text()


@pytest.fixture(scope="module")
def findings():
    spec = importlib.util.spec_from_file_location("findings", ROOT / "benchmarks" / "findings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FINDINGS


def test_every_finding_of_the_script_is_on_the_page(findings):
    assert set(re.findall(r"findings\.py (\w+)", PAGE)) == set(findings)


@pytest.mark.parametrize("name", ["visiontrim", "holov", "flashvid", "vcast", "cdpruner", "pope"])
def test_the_page_shows_what_is_printed(name, findings, capsys):
    findings[name]()
    for line in capsys.readouterr().out.splitlines():
        assert f"\n    {line}\n" in PAGE


@pytest.mark.parametrize("name", ["prunesid", "divprune"])
def test_what_hangs_on_rounding_is_shown_in_its_order(name, findings, capsys):
    """Numbers of randomised components and of half precision may differ from machine to machine; the rest may not."""
    findings[name]()
    printed = capsys.readouterr().out.splitlines()
    shown = [line.strip() for line in PAGE.splitlines() if line.startswith(f"    {name} (")]
    assert [re.sub(r"\d+ to \d+|\d+ different", "n", line) for line in printed] == [
        re.sub(r"\d+ to \d+|\d+ different", "n", line) for line in shown
    ]
