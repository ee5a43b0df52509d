"""Published numbers as data: which table of which paper prints what for a model, and the call that a row stands for.

Columns of one name mean different things in different papers; a cell says which subset it is of and whether a server or
a judge made it. The numbers are facts of ``published.yaml``; nothing here was measured.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from visiontrim.core.errors import TrimError

USUAL = (192, 128, 64)
FILE = Path(__file__).parent / "published.yaml"


@dataclass(frozen=True, slots=True)
class Cell:
    """One printed number."""

    value: float
    source: str
    """The paper and its table."""
    column: str
    """As the paper calls it."""
    benchmark: str | None
    """Which of this package's benchmarks scores the same; None where none does."""
    subset: str
    needs: Literal["server", "judge"] | None
    plain: float | None
    """The plain model's number in the same table."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A method at a budget, as this package runs it."""

    method: str
    tokens: int
    call: str
    per: Literal["image", "tile"]
    note: str


def known_models() -> list[str]:
    return list(_facts()["models"])


def model_of(config: Any) -> str | None:
    """The model of the tables that a configuration of transformers is, by its shape; None for any other."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    shape = {"model_type": config.model_type, "width": text.hidden_size, "layers": text.num_hidden_layers}
    for name, facts in _facts()["models"].items():
        if all(facts[key] == value for key, value in shape.items()):
            return name
    return None


def cells(model: str, method: str, tokens: int) -> list[Cell]:
    """All numbers that are printed for a method at a budget, in order of the tables."""
    found = []
    for table in _facts()["tables"]:
        if table["model"] != model:
            continue
        plain = next((row["values"] for row in table["rows"] if row["method"] == "none"), None)
        for row in table["rows"]:
            if (row["method"], row["tokens"]) == (method, tokens):
                found += _row(table, row, plain)
    return found


def budgets(model: str, method: str) -> list[int]:
    """Numbers of tokens at which something is printed, largest first."""
    rows = [row for table in _facts()["tables"] if table["model"] == model for row in table["rows"]]
    return sorted({row["tokens"] for row in rows if row["method"] == method}, reverse=True)


def usual(model: str, method: str) -> list[int]:
    """The budgets of most tables, where the method has one of them, else all of its own."""
    found = budgets(model, method)
    if not found:
        raise TrimError(f"nothing is printed for {method!r} on {model}: choose {', '.join(methods(model))}")
    return [number for number in found if number in USUAL] or found


def methods(model: str) -> list[str]:
    """Methods of which something is printed for a model."""
    rows = [row for table in _facts()["tables"] if table["model"] == model for row in table["rows"]]
    return [name for name in dict.fromkeys(row["method"] for row in rows) if name != "none"]


def setting(model: str, method: str, tokens: int) -> Setting:
    """The call that stands for a row. Raises :class:`TrimError` for a method that no table has."""
    calls = _facts()["calls"]
    if method not in calls:
        raise TrimError(f"nothing is printed for {method!r} on {model}: choose {', '.join(methods(model))}")
    facts: dict[Any, Any] = calls[method]
    own: dict[str, Any] = facts.get(model, {})
    number = round(tokens * own.get("share", 1))
    call = str(facts.get(tokens) or own.get("call") or facts["call"]).format(tokens=number)
    return Setting(method, tokens, call, own.get("per", "image"), facts.get("note", ""))


def averages(model: str) -> dict[str, dict[int, float]]:
    """Mean retention in % by method and number of tokens, the first that is printed; the plain model is left out."""
    found: dict[str, dict[int, float]] = {}
    for table in _facts()["tables"]:
        if table["model"] == model:
            for row in table["rows"]:
                if "average" in row and row["method"] != "none":
                    found.setdefault(row["method"], {}).setdefault(row["tokens"], float(row["average"]))
    for row in _facts()["averages"].get(model, []):
        for tokens, value in row.items():
            if isinstance(tokens, int):
                found.setdefault(row["method"], {}).setdefault(tokens, float(value))
    return found


def held_out() -> list[str]:
    """Methods whose averages nothing may be tuned by."""
    return list(_facts()["held_out"])


def call(method: str) -> str:
    """The method as its paper has it, without ``keep``, which is the mean of tokens per layer."""
    text = str(_facts()["calls"].get(method, {}).get("call", method))
    return re.sub(r"keep=\{tokens\},?", "", text).rstrip(":,")


def _row(table: Mapping[str, Any], row: Mapping[str, Any], plain: list[float | None] | None) -> list[Cell]:
    source = f"{_facts()['sources'][table['source']]}, {table['table']}"
    return [
        Cell(
            float(value),
            source,
            column["name"],
            column["benchmark"],
            column.get("subset", ""),
            column.get("needs"),
            None if plain is None else plain[number],
        )
        for number, (column, value) in enumerate(zip(table["columns"], row["values"], strict=True))
        if value is not None
    ]


@functools.cache
def _facts() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))
