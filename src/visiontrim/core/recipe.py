"""What stands in recipes and behind a method's name: YAML and JSON, read strictly.

Knows files, mappings and values, and no method. A key that stands twice, a value in a value, or a file that is none is
refused: nothing is overruled in silence.
"""

from __future__ import annotations

import numbers
import re
import reprlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from visiontrim.core.errors import TrimError

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
MOST_BYTES = 2**20
"""Of a recipe file: a plan of a hundred methods has a few thousand."""
MOST_ENTRIES = 1000
"""Of a list among the options: a number for each layer at most."""
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60
_brief.maxlevel = 2


def shown(value: object) -> str:
    """A value for a message, not longer than a line."""
    return _brief.repr(value)


class _Strict(yaml.SafeLoader):
    """Keys are text, and none stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = self.construct_object(key) if isinstance(key, yaml.ScalarNode) else None
            if not isinstance(name, str):
                raise yaml.MarkedYAMLError(problem="a key that is not text", problem_mark=key.start_mark)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"{name!r} stands there twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> Mapping[str, Any]:
    """The mapping in a file. Raises :class:`TrimError` for a file that cannot be read or holds anything else."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        name = str(path) if len(str(path)) < 300 else f"{str(path)[:100]}..."
        raise TrimError(f"the recipe {name} cannot be read: {reason}") from error
    if len(content) > MOST_BYTES:
        raise TrimError(f"the recipe {path} has more than {MOST_BYTES:,} bytes: it is none")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrimError(f"the recipe {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    found = _parsed(text, f"the recipe {path}")
    if not isinstance(found, Mapping):
        raise TrimError(f"the recipe {path} holds no mapping: write 'method: NAME' and its options, or 'plan: [...]'")
    return found


def parse_options(text: str, options: str) -> dict[str, Any]:
    """``key=value,key=value``, the end of ``text``. Raises :class:`TrimError` for anything else."""
    parsed: dict[str, Any] = {}
    for option in filter(None, re.split(r",(?![^\[]*\])", options)):  # not at the commas of a list
        key, equals, value = option.partition("=")
        key = key.strip()
        if not equals:
            raise TrimError(f"{shown(text)}: {shown(option)} is no option; write NAME:key=value,key=value")
        if key in parsed:
            raise TrimError(f"{shown(text)}: {key} stands there twice; leave one of them")
        parsed[key] = _parsed(value, f"{key}={shown(value)[1:-1]}")
    return parsed


def option_value(name: str, value: object) -> object:
    """The value of an option as methods take it: lists as tuples. Raises :class:`TrimError` for what none takes."""
    if isinstance(value, list | tuple):
        if len(value) > MOST_ENTRIES:
            raise TrimError(f"{name} has {len(value):,} entries: no option has more than {MOST_ENTRIES:,}")
        for entry in value:
            _check_plain(name, value, entry)
        return tuple(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = int(value)  # of numpy
    elif isinstance(value, numbers.Real) and not isinstance(value, bool | int | float):
        value = float(value)
    _check_plain(name, value, value)
    return value


def _check_plain(name: str, value: object, part: object) -> None:
    if part is not None and not isinstance(part, bool | int | float | str):
        raise TrimError(f"{name}={shown(value)}: give a number, text, true, false, null, or a list of these")
    if isinstance(part, int) and abs(part) >= 2**64:
        raise TrimError(f"{name}={shown(value)} does not fit into 64 bits: give a smaller number")


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Strict)  # JSON is YAML
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f" in line {mark.line + 1}"
        raise TrimError(f"{where} is not valid YAML or JSON: {error.problem or error.context}{place}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, a number of 5000 digits
        raise TrimError(f"{where} is not valid YAML or JSON: {' '.join(str(error).split())[:120]}") from error
    except RecursionError:
        raise TrimError(f"{where} nests too deeply: a recipe is a mapping of options, or a plan of such") from None
