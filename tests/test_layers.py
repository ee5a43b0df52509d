"""The design's layering: imports point downwards, and only engine/ and models/ know transformers' internals."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import visiontrim

ROOT = Path(visiontrim.__file__).parent
FLOORS = [
    {"core", "ops"},
    {"methods", "models", "images", "picture", "plotting"},
    {"engine", "report"},
    {"run"},
    {"measure", "zoo", "calibrate", "promises"},
    {"ask", "doctor"},
    {"evaluate", "analyze", "integrations"},
    {"serving"},
    {"cli", "commands"},
]
"""From the ground up: a module imports from its own floor and the ones below; the package itself stands on top."""

NO_TRANSFORMERS = {"core", "ops", "methods", "picture", "images", "report"}
INTERNALS = {
    "cache_utils",
    "masking_utils",
    "modeling_utils",
    "models",
    "integrations",
    "generation",
    "configuration_utils",
}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def floor_of(part: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if part in floor)


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    part = part_of(path)
    for name in imports(path):
        head, *rest = name.split(".")
        if head == "visiontrim":
            target = rest[0] if (rest and (ROOT / rest[0]).exists()) or (ROOT / f"{rest[0]}.py").exists() else None
            if target is None:  # `import visiontrim as vt`: the finished library
                assert floor_of(part) > floor_of("run"), f"{path.name} uses the whole package"
            elif target != part:
                assert floor_of(target) <= floor_of(part), f"{path.name} imports {name}, which stands above it"
        if head == "transformers":
            assert part not in NO_TRANSFORMERS, f"{path.name} imports {name}"
            if rest and rest[0] in INTERNALS:
                assert part in {"engine", "models"}, f"{path.name} imports {name}, an internal of transformers"


def test_no_circle_among_files():
    names = {".".join(("visiontrim", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES}
    below: dict[str, set[str]] = {}
    for name, path in names.items():
        found = {target for target in imports(path) if target in names}
        found |= {target.rpartition(".")[0] for target in imports(path) if target.rpartition(".")[0] in names}
        below[name] = found
    while free := {name for name, needs in below.items() if not needs & below.keys()}:
        below = {name: needs for name, needs in below.items() if name not in free}
    assert not below, f"import each other in a ring, or stand on one: {', '.join(sorted(below))}"


def test_one_room_of_the_engine_knows_transformers():
    knowing = {
        path.stem for path in (ROOT / "engine").glob("*.py") if any(n.startswith("transformers") for n in imports(path))
    }
    assert knowing == {"upstream"}


def test_every_room_of_the_engine_says_what_it_knows():
    for path in (ROOT / "engine").glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert path.stem == "__init__" or ("knows" in text and "not" in text), path.name


def test_methods_and_ops_know_neither_engine_nor_models():
    for part in ("methods", "ops"):
        for path in (ROOT / part).glob("*.py"):
            known = {name.split(".")[1] for name in imports(path) if name.startswith("visiontrim.")}
            assert known <= ({"core", "ops", "methods"} if part == "methods" else {"ops"}), path.name


def test_the_engine_names_no_method():
    names = set(visiontrim.list_methods())
    for path in (*(ROOT / "engine").glob("*.py"), *(ROOT / "models").glob("*.py")):
        code = ast.parse(path.read_text())
        texts = {
            node.value for node in ast.walk(code) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not texts & (names - {"none"}), path.name


def test_no_file_grows_too_long():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path.name
