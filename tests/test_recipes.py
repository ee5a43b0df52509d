"""Ways to write a method down: each is the method that it says, or ends in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import visiontrim as vt
from visiontrim.core.method import Method
from visiontrim.core.recipe import MOST_BYTES, shown

NOT_YAML = "is not valid YAML or JSON"
TEXTS = [
    ("visiontrim:keep=[1", NOT_YAML),
    ("visiontrim:keep={", NOT_YAML),
    ("visiontrim:keep=*a", NOT_YAML),
    ('visiontrim:keep="', NOT_YAML),
    ("random:keep=\x00", NOT_YAML),
    ("random:keep=<<", NOT_YAML),
    ("random:keep=!!python/object:os.system", NOT_YAML),
    ("random:keep=2024-01-01", "give a number, text"),
    ("random:keep={a: 1}", "give a number, text"),
    ("sparsevlm:keep=[[1],2,3]", "give a number, text"),
    ("random:keep=64,keep=32", "keep stands there twice"),
    ("random:seed=100000000000000000000", "does not fit into 64 bits"),
    ("random:seed=18446744073709551616", "does not fit into 64 bits"),
    ("random:seed=-9223372036854775809", "is no seed"),
    ("fade:seed=-9223372036854775809", "is no seed"),
    ("mustdrop:thresholds=[a,b]", "give a list of numbers"),
    ("dymu:keep=null,thresholds=5", "give a list of numbers"),
    ("dycoke:view_layer=a", "give a whole number"),
    ("visiontrim:split", "is no option"),
    ("none:keep=3", "has no option 'keep': it has none"),
    ("|", "unknown method ''"),
    ("", "unknown method ''"),
    ("x" * 5000, "unknown method 'xxx"),
    ("a\x00b.yaml", "cannot be read"),
    (f"{'x' * 5000}.yaml", "cannot be read"),
]
FILES = [
    (b"", "holds no mapping"),
    (b"null", "holds no mapping"),
    (b"[1]", "holds no mapping"),
    (b"hello", "holds no mapping"),
    ("method: random\n".encode("utf-16"), "is not UTF-8"),
    ("method: random # é".encode("latin-1"), "is not UTF-8"),
    (b"&a {plan: [*a]}", "names itself"),
    (b"plan: [HERE]", "names itself"),
    (b"plan: [random, OTHER]", "names itself"),
    (b"method: HERE", "unknown method"),
    (b"{method: random, 5: 3}", "a key that is not text in line 1"),
    (b"{1: 1, a: 2}", "a key that is not text"),
    (b"method: random\n? [1]\n: 3", "a key that is not text in line 2"),
    (b"{null: 1, a: 2}", "a key that is not text"),
    (b"method: random\nmethod: none", "'method' stands there twice in line 2"),
    (b"method: random\n---\nmethod: none", NOT_YAML),
    (b"plan: []", "a plan of no methods"),
    (b"plan: [null]", "None is no method"),
    (b"plan: random", "a plan is a list"),
    (b"plan: [random]\nkeep: 3", "a plan is a list"),
    (b"method: [random]", "names its method"),
    (b"[ " * 3000, "nests too deeply"),
    (b"method: random\nkeep: " + b"[" * 40 + b"1" + b"]" * 40, "give a number, text"),
    (b'{"plan":[' * 25 + b'"random"' + b"]}" * 25, "more than 20 deep"),
    (b"method: random\nkeep: [" + b"1," * 2000 + b"1]", "2,001 entries"),
    (b"plan: [" + b"none," * 300 + b"none]", "more than 200 methods"),
    (b"#" * (MOST_BYTES + 1), "more than 1,048,576 bytes"),
    (b"!!python/object/apply:os.system ['exit 1']", NOT_YAML),
]


def refused(spec: object) -> str:
    with pytest.raises(vt.TrimError) as told:
        vt.load_method(spec)  # pyright: ignore[reportArgumentType]
    message = str(told.value)
    assert "\n" not in message
    assert len(message) < 1200, "a message is read, not scrolled"
    return message


@pytest.mark.parametrize(("text", "words"), TEXTS, ids=[shown(text) for text, _ in TEXTS])
def test_texts_that_are_no_method(text, words):
    assert words in refused(text)


@pytest.mark.parametrize(("content", "words"), FILES, ids=[shown(content) for content, _ in FILES])
def test_files_that_are_no_recipe(tmp_path, content, words):
    here, other = tmp_path / "here.yaml", tmp_path / "other.yaml"
    here.write_bytes(content.replace(b"HERE", str(here).encode()).replace(b"OTHER", b"other.yaml"))
    other.write_text("plan: [here.yaml]")
    assert words in refused(here)


def test_plans_that_grow_by_aliases_end():
    plan: object = "none"
    for _ in range(18):
        plan = {"plan": [plan, plan]}
    assert "more than 200 methods" in refused(plan)


def test_objects_that_are_no_recipe():
    for spec in ({"method": "random", 5: 3}, {5: "random", "a": 1}, {"method": None}, {"plan": [5]}, {}):
        refused({"plan": [spec]})
    for spec in (None, 5, [], ["random"], b"random"):
        assert "is no method" in refused({"plan": [spec]})


def test_recipes_in_a_recipe_are_beside_it(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    (folder / "parts").mkdir(parents=True)
    (folder / "plan.yaml").write_text("plan: [parts/first.yaml, parts/../second.json]")
    (folder / "parts" / "first.yaml").write_text("plan: [third.yml]")
    (folder / "parts" / "third.yml").write_text("\ufeffmethod: random\nkeep: 128")  # with a byte-order mark
    (folder / "second.json").write_text('{"method": "random", "keep": 0.5, "layer": 2}')
    monkeypatch.chdir(tmp_path)
    expected = vt.Random(keep=128) | vt.Random(keep=0.5, layer=2)
    assert vt.load_method("recipes/plan.yaml") == expected
    monkeypatch.chdir(folder / "parts")
    assert vt.load_method(folder / "plan.yaml") == expected
    (folder / "second.json").unlink()
    assert f"the recipe {folder / 'parts' / '..' / 'second.json'} cannot be read" in refused(folder / "plan.yaml")


def test_the_same_recipe_twice_does_not_name_itself(tmp_path):
    (tmp_path / "none.yaml").write_text("method: none")
    (tmp_path / "plan.yaml").write_text("plan: [none.yaml, none.yaml, &a {method: none}, *a]")
    assert vt.load_method(tmp_path / "plan.yaml").steps() == ()


def test_numbers_of_numpy_are_numbers():
    assert vt.load_method("random", keep=np.int64(8)) == vt.Random(keep=8)
    assert vt.load_method("random", keep=np.float64(0.5)) == vt.Random(keep=0.5)


def test_a_seed_is_any_that_torch_takes():
    for seed in (-(2**63), 2**64 - 1):
        assert vt.load_method("random", seed=seed) == vt.Random(seed=seed)


def read(spec: object) -> None:
    """A method that reads back as itself, or one sentence."""
    try:
        method = vt.load_method(spec)  # pyright: ignore[reportArgumentType]
    except vt.TrimError as error:
        told = str(error)
    else:
        assert isinstance(method, Method)
        assert vt.load_method(method.to_dict()) == method
        return
    assert "\n" not in told


NAMES = st.sampled_from(sorted(vt.list_methods())) | st.sampled_from(["method", "plan", "keep", "layer", "seed"])
SIGNS = st.text(st.sampled_from(list(":=,|[]{}*&!<>%@`\"'#\\-?.~ \t\n\x00\u2028é019")), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | SIGNS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers() | SIGNS | NAMES, inner, max_size=3),
    max_leaves=6,
)
OPTIONS = st.sampled_from(sorted({field for cls in vt.list_methods().values() for field in cls().to_dict()}))
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(st.lists(NAMES | SIGNS | OPTIONS, max_size=6).map("".join) | st.text(max_size=20))
@example("random:layer=1,,|none:=,:")
def test_any_text_is_read_or_refused(text):
    read(text)


@QUICK
@given(NAMES, st.dictionaries(OPTIONS, VALUES, max_size=4))
def test_any_options_are_read_or_refused(name, options):
    read({"method": name} | options)


@QUICK
@given(VALUES)
def test_any_object_is_read_or_refused(value):
    read({"plan": [value]})


@QUICK
@given(
    content=VALUES.map(lambda value: yaml.safe_dump(value).encode()) | st.binary(max_size=80) | SIGNS.map(str.encode)
)
def test_any_file_is_read_or_refused(tmp_path: Path, content):
    (tmp_path / "any.yaml").write_bytes(content)
    read(tmp_path / "any.yaml")
