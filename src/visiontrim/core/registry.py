"""Names of methods, and the ways to write one down: a name, ``name:k=v``, a recipe, an object."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method, Plan
from visiontrim.core.recipe import RECIPE_SUFFIXES, option_value, parse_options, read_recipe, shown

ENTRY_POINTS = "visiontrim.methods"
DEEPEST = 20
"""Recipes in each other."""
MOST_METHODS = 200
"""Of a plan: more than a model has places."""

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
    item = getattr(value, "item", None)
    return item() if isinstance(value, numbers.Number) and callable(item) else value


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
    ``{"method": name, **options}`` or ``{"plan": [recipe, ...]}``. Files that a recipe file names are relative to it.
    ``overrides`` replace options of a single method. Raises :class:`TrimError` for unknown names, options and files,
    and for recipes that name themselves.
    """
    return _load(spec, overrides, Path(), ())


def _load(spec: object, overrides: Mapping[str, Any], folder: Path, inside: tuple[object, ...]) -> Method:
    """``folder`` is where recipe files are looked for, ``inside`` the recipes that this one stands in."""
    if isinstance(spec, Method):
        return _replace(spec, overrides)
    if isinstance(spec, Mapping):
        return _from_recipe(spec, overrides, folder, _entered(id(spec), inside))
    if not isinstance(spec, str | Path):
        raise TrimError(f"{shown(spec)} is no method: give a name, NAME:key=value, a recipe file, or 'method: NAME'")
    text = str(spec)
    if text.endswith(RECIPE_SUFFIXES):
        path = folder / text
        content = read_recipe(path)
        return _from_recipe(content, overrides, path.parent, _entered(str(path.resolve()), inside))
    if "|" in text:
        parts = [_load(part.strip(), {}, folder, inside) for part in text.split("|")]
        return _replace(_plan(parts), overrides)
    name, _, options = text.partition(":")
    return _build(name.strip(), parse_options(text, options) | dict(overrides))


def _entered(name: object, inside: tuple[object, ...]) -> tuple[object, ...]:
    """``inside`` with one recipe more. Raises :class:`TrimError` for one that stands in itself."""
    if name in inside:
        raise TrimError(f"{f'the recipe {name}' if isinstance(name, str) else 'a recipe'} names itself: take that out")
    if len(inside) >= DEEPEST:
        raise TrimError(f"recipes stand in each other more than {DEEPEST} deep: write one plan of their methods")
    return *inside, name


def _from_recipe(
    recipe: Mapping[Any, Any], overrides: Mapping[str, Any], folder: Path, inside: tuple[object, ...]
) -> Method:
    if strange := [key for key in recipe if not isinstance(key, str)]:
        raise TrimError(f"{shown(strange[0])} is no name of an option: a recipe's keys are text")
    if "plan" in recipe and "method" not in recipe:
        parts = recipe["plan"]
        if len(recipe) > 1 or not isinstance(parts, list | tuple):
            raise TrimError("a plan is a list of methods and stands alone: write 'plan: [NAME, {method: NAME}]'")
        return _replace(_plan([_load(part, {}, folder, inside) for part in parts]), overrides)
    if not isinstance(recipe.get("method"), str):
        raise TrimError(f"a recipe names its method, but this one has {shown(list(recipe))}: add 'method: NAME'")
    return _build(recipe["method"], {k: v for k, v in recipe.items() if k != "method"} | dict(overrides))


def _plan(parts: list[Method]) -> Method:
    if not parts:
        raise TrimError("a plan of no methods says nothing: write 'method: none' for the plain model")
    if sum(len(part.methods) if isinstance(part, Plan) else 1 for part in parts) > MOST_METHODS:
        raise TrimError(f"a plan of more than {MOST_METHODS} methods: no model has so many places")
    return Plan(tuple(parts))


def _build(name: str, options: Mapping[str, Any]) -> Method:
    known = list_methods()
    if name not in known:
        raise TrimError(f"unknown method {shown(name)}{_nearest(name, known)}")
    cls = known[name]
    fields = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    for option in options:
        if option not in fields:
            raise TrimError(f"{name} has no option {shown(option)}{_nearest(option, fields)}")
    return cls(**{option: option_value(option, value) for option, value in options.items()})


def _replace(method: Method, overrides: Mapping[str, Any]) -> Method:
    if not overrides:
        return method
    if isinstance(method, Plan):
        raise TrimError(f"{', '.join(overrides)} is ambiguous for the plan {method}: set it on its methods")
    return _build(method.name, {k: v for k, v in method.to_dict().items() if k != "method"} | dict(overrides))


def _nearest(word: str, known: Any) -> str:
    if not known:
        return ": it has none"
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f": choose from {', '.join(sorted(known))}"
