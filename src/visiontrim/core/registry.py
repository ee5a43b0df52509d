"""Names of methods, and the ways to write one down: a name, ``name:k=v``, a recipe, an object."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

import yaml

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method, Plan

ENTRY_POINTS = "visiontrim.methods"
RECIPE_SUFFIXES = (".yaml", ".yml", ".json")

MethodType = TypeVar("MethodType", bound=type[Method])
_registered: dict[str, type[Method]] = {}


def register(cls: MethodType) -> MethodType:
    """Class decorator: make a method available under its ``name``."""
    if (known := _registered.setdefault(cls.name, cls)) is not cls:
        raise TrimError(f"two methods are called {cls.name!r}: {known.__module__} and {cls.__module__}; rename one")
    _take_plain_numbers(cls)
    return cls


def _take_plain_numbers(cls: type[Method]) -> None:
    """Numbers of numpy, as loops over budgets have them, become Python's when a method is made."""
    made = cls.__init__

    @functools.wraps(made)
    def init(self: Method, *args: Any, **options: Any) -> None:
        made(self, *map(_plain, args), **{name: _plain(value) for name, value in options.items()})

    cls.__init__ = init


def _plain(value: Any) -> Any:
    """``np.int64(64)`` as 64."""
    return value.item() if isinstance(value, numbers.Number) and hasattr(value, "item") else value


@functools.cache
def _load_plugins() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        point.load()  # importing the module registers its methods


def list_methods() -> dict[str, type[Method]]:
    """All methods by name: the package's own and those of plug-ins (entry points ``visiontrim.methods``)."""
    _load_plugins()
    return dict(sorted(_registered.items()))


def load_method(spec: str | Path | Mapping[str, Any] | Method, **overrides: Any) -> Method:
    """Turn any spelling of a method into the object.

    ``spec`` is a method object; a name (``"visiontrim"``); a name with options (``"visiontrim:keep=64,fusion=max"``);
    several of these joined by ``|``; the path of a recipe file (YAML or JSON); or a recipe's content:
    ``{"method": name, **options}`` or ``{"plan": [recipe, ...]}``. ``overrides`` replace options of a single method.
    Raises :class:`TrimError` for unknown names, options and files.
    """
    if isinstance(spec, Method):
        return _replace(spec, overrides)
    if isinstance(spec, Mapping):
        return _from_recipe(spec, overrides)
    text = str(spec)
    if text.endswith(RECIPE_SUFFIXES):
        return _from_recipe(_read(Path(text)), overrides)
    if "|" in text:
        return _replace(Plan(tuple(load_method(part.strip()) for part in text.split("|"))), overrides)
    name, _, options = text.partition(":")
    return _build(name.strip(), _parse_options(text, options) | overrides)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise TrimError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise TrimError(f"the recipe {path} is not valid YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise TrimError(f"the recipe {path} holds no mapping: write 'method: NAME' and its options, or 'plan: [...]'")
    return content


def _from_recipe(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> Method:
    if set(recipe) == {"plan"} and isinstance(recipe["plan"], list):
        return _replace(Plan(tuple(load_method(part) for part in recipe["plan"])), overrides)
    if not isinstance(recipe.get("method"), str):
        raise TrimError(f"a recipe names its method, but this one has {sorted(recipe)}: add 'method: NAME'")
    return _build(recipe["method"], {k: v for k, v in recipe.items() if k != "method"} | dict(overrides))


def _parse_options(text: str, options: str) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for option in filter(None, re.split(r",(?![^\[]*\])", options)):  # not at the commas of a list
        key, equals, value = option.partition("=")
        if not equals:
            raise TrimError(f"{text!r}: {option!r} is no option; write NAME:key=value,key=value")
        parsed[key.strip()] = yaml.safe_load(value)
    return parsed


def _build(name: str, options: Mapping[str, Any]) -> Method:
    known = list_methods()
    if name not in known:
        raise TrimError(f"unknown method {name!r}{_nearest(name, known)}")
    cls = known[name]
    fields = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    for option in options:
        if option not in fields:
            raise TrimError(f"{name} has no option {option!r}{_nearest(option, fields)}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def _replace(method: Method, overrides: Mapping[str, Any]) -> Method:
    if not overrides:
        return method
    if isinstance(method, Plan):
        raise TrimError(f"{', '.join(overrides)} is ambiguous for the plan {method}: set it on its methods")
    return _build(method.name, {k: v for k, v in method.to_dict().items() if k != "method"} | dict(overrides))


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f": choose from {', '.join(sorted(known))}"
