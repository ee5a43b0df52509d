"""Signals: what a group of them promises, and that those a model gives have the declared shapes."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import families
import visiontrim as vt
from families import Prompts
from shapes import check_view
from test_trim import tokenizer, tower
from tiny import llava, prompts
from views import GROUPS, changed, signals_of
from visiontrim.core.method import Site
from visiontrim.core.signals import NAMES, MissingSignal, Signal

pytestmark = pytest.mark.usefixtures("no_grad")

# ------------------------------------------------------------------------------------------------ a group


def test_a_group_is_read_by_name_and_by_layer():
    deep, middle = torch.rand(1, 3), torch.rand(1, 3)
    group = vt.EncoderSignals({("cls_attention", 5): middle, "unit": 4}, cls_attention=deep)
    assert group.cls_attention is group["cls_attention"] is group["cls_attention", None] is deep
    assert group["cls_attention", 5] is group.get(("cls_attention", 5)) is middle
    assert group.unit == 4
    assert ("cls_attention", None) in group
    assert "cls_attention" in group
    assert ("cls_attention", -1) not in group
    assert "keys" not in group
    assert group.get("keys") is None
    assert group.get("keys", 1) == 1
    assert list(group) == [("cls_attention", 5), "unit", "cls_attention"]
    assert copy.deepcopy(group).unit == 4
    with pytest.raises(AttributeError):
        group.unit = 5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError):
        group.attention  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_missing_is_named():
    encoder, text = vt.EncoderSignals(), vt.TextSignals()
    for read in (lambda: encoder.cls_attention, lambda: encoder["cls_attention"]):
        with pytest.raises(MissingSignal, match=r"does not give the signal 'encoder\.cls_attention', which the method"):
            read()
    with pytest.raises(vt.TrimError, match=r"the signal \('encoder\.keys', 5\)"):
        encoder["keys", 5]
    with pytest.raises(MissingSignal, match=r"no question came with this call, so there is no 'text\.words'") as raised:
        text.words  # noqa: B018
    assert raised.value.signal == "text.words"


def test_needs_read_as_the_view_does():
    needs: set[Signal] = {"encoder.keys", ("encoder.keys", 5), "decoder.keys", "text.words"}
    assert vt.EncoderSignals.among(needs) == {"keys", ("keys", 5)}
    assert vt.DecoderSignals.among(needs) == {"keys"}
    assert {of.spelled(key) for of in GROUPS for key in of.among(needs)} == needs
    assert set(NAMES) == {of.spelled(name) for of in GROUPS for name in of.names}


def test_names_are_declared():
    with pytest.raises(vt.TrimError, match=r"no signal 'encoder\.atention': did you mean 'encoder\."):
        vt.EncoderSignals(atention=1)
    with pytest.raises(vt.TrimError, match=r"no signal 'decoder\.words': did you mean 'text\.words'\?"):
        vt.DecoderSignals({("words", 3): 1})


# ------------------------------------------------------------------------------------------------ refusals


@dataclass(frozen=True)
class Spy(vt.Step):
    """Keeps everything, and notes the view."""

    site: Site = vt.VisionOutput()  # noqa: RUF009  # pyright: ignore[reportIncompatibleMethodOverride]
    needs: frozenset[Signal] = frozenset()  # pyright: ignore[reportIncompatibleMethodOverride]
    reads: tuple[str, str] | None = None
    seen: list[vt.View] = field(default_factory=list, compare=False)
    name: ClassVar[str] = "spy"
    summary: ClassVar[str] = "keeps everything"
    paper: ClassVar[str] = "test"

    def select(self, view: vt.View) -> vt.Keep:
        self.seen.append(view)
        if self.reads is not None:
            getattr(getattr(view, self.reads[0]), self.reads[1])
        return vt.Keep.everything(view)

    def __str__(self) -> str:
        return self.name


@pytest.mark.parametrize(
    ("need", "meant"),
    [
        ("cls_attention", "'encoder.cls_attention'"),
        ("encoder_keys", "'encoder.keys'"),
        ("keys", "'encoder.keys', 'decoder.keys'"),
        ("text", "'text.question', 'text.words'"),
        ("encoder.cls_atention", "'encoder.cls_attention'"),
        (("cls_attention", 1), "'encoder.cls_attention'"),
        ("nonsense", "'encoder.cls_attention'"),
    ],
)
@pytest.mark.parametrize("site", [vt.EncoderLayer(1), vt.VisionOutput(), vt.DecoderLayer(2)], ids=str)
def test_a_need_that_is_no_signal_is_refused_with_the_name_that_was_meant(need, meant, site):
    with pytest.raises(vt.TrimError, match=f"no signal .*did you mean {meant}"):
        vt.trim(llava(), Spy(site, frozenset({need})))


@pytest.mark.parametrize(
    ("site", "need", "where"),
    [
        (vt.EncoderLayer(0), "encoder.keys", "before the first encoder layer"),
        (vt.EncoderLayer(1), "encoder.projected", "in the encoder"),
        (vt.EncoderLayer(1), ("encoder.keys", 0), "in the encoder"),
        (vt.VisionOutput(), "encoder.pixels", "at the encoder's output"),
        (vt.VisionOutput(), "decoder.query", "at the encoder's output"),
        (vt.VisionOutput(), ("encoder.projected", 1), "at the encoder's output"),
        (vt.DecoderLayer(2), "encoder.cls_attention", "between decoder layers"),
        (vt.DecoderLayer(2), "text.words", "between decoder layers"),
    ],
)
def test_a_need_that_does_not_exist_at_the_place_is_refused(site, need, where):
    with pytest.raises(vt.TrimError, match=f"spy reads .*, which there is none of {where}"):
        vt.trim(llava(), Spy(site, frozenset({need})))


def test_a_signal_that_was_not_asked_for_cannot_be_read():
    model, inputs = llava(), prompts((3, "image", 5))
    silent = Spy(reads=("encoder", "cls_attention"))
    with vt.trim(model, silent), pytest.raises(vt.TrimError, match=r"spy reads .*'encoder\.cls_attention'.* add it"):
        model(**inputs)
    asking = replace(silent, needs=frozenset({"encoder.cls_attention"}))
    with vt.trim(model, asking):
        model(**inputs)
    bare = llava(tower="siglip")
    with vt.trim(bare, asking), pytest.raises(vt.TrimError, match=r"does not give .*: use another method"):
        bare(**inputs)


# ------------------------------------------------------------------------------------------------ shapes

SITES = {vt.EncoderLayer(1): [], vt.VisionOutput(): [("encoder.keys", 0)], vt.DecoderLayer(2): []}
"""Where a step asks for everything that there is, and what it asks for beside names."""
BETWEEN = {"cls_attention", "received_attention", "column_attention", "keys", "queries", "cls_query"}
BETWEEN |= {"pixels", "colours", "mass", "lattice", "unit"}
AT_OUTPUT = {"cls_attention", "cls_attention_wide", "received_attention", "column_attention", "keys", "projected"}
AT_OUTPUT |= {"sensitivity"}


def asked(site: Site) -> frozenset[Signal]:
    of_encoder = {f"encoder.{name}" for name in (BETWEEN if isinstance(site, vt.EncoderLayer) else AT_OUTPUT)}
    of_text = {f"text.{name}" for name in vt.TextSignals.names}
    match site:
        case vt.EncoderLayer():
            return frozenset(of_encoder)
        case vt.VisionOutput():
            return frozenset({*of_encoder, *of_text, *SITES[site]})
        case _:
            return frozenset({*(f"decoder.{name}" for name in vt.DecoderSignals.names), "text.question"})


@functools.cache
def views(name: str) -> list[vt.View]:
    """What steps see at the three places that ask for everything, on a batch of three images in two prompts."""
    rows = ((3, "image", 5), (1, "image", 2, "image", 7))
    processor = SimpleNamespace(tokenizer=tokenizer(False), image_processor=SimpleNamespace(image_std=[0.5] * 3))
    options = {"processor": processor, "question": ["what is red", "blue"]}
    if name == "llava":
        model, inputs, options["text_tower"] = llava(), prompts(*rows), tower()
    else:
        model, inputs = families.build(name), Prompts(name, *rows).batch()
    spies = [Spy(site, asked(site)) for site in SITES]
    with torch.no_grad(), vt.trim(model, spies[0] | spies[1] | spies[2], **options):
        model(**inputs)
    return [spy.seen[0] for spy in spies]


ABSENT = {"llava": set(), "qwen2_5_vl": {"encoder.cls_attention", "encoder.cls_attention_wide", "encoder.cls_query"}}
ABSENT["qwen2_5_vl"] |= {"encoder.sensitivity"}  # its merger joins patches first


@pytest.mark.parametrize("name", ABSENT)
def test_every_signal_has_its_declared_shape(name):
    """All of them, on a model with [CLS] and on one that packs its pictures and has none."""
    between, output, decoder = views(name)
    for view in (between, output, decoder):
        check_view(view)
    given = {need for view in (between, output, decoder) for need in signals_of(view)}
    assert {need for need in given if isinstance(need, str)} == set(NAMES) - ABSENT[name]
    assert given - set(NAMES) == {("encoder.keys", 0)}
    assert len(output.features) == len(decoder.features)
    assert output.encoder.projected.shape == decoder.features.shape
    assert output.text.words.tokens.shape[-1] == output.encoder.projected.shape[-1]
    embeddings = decoder.decoder.embeddings
    assert embeddings.tokens.shape[1] == decoder.entered
    rotary = decoder.decoder.rotary
    assert rotary.tokens.shape[-1] % 2 == 0


def doubled(value):
    """For twice as many pictures."""
    match value:
        case torch.Tensor():
            return torch.cat([value, value])
        case vt.Text():
            return vt.Text(doubled(value.tokens), doubled(value.mask), value.scale)
        case vt.Sides():
            return vt.Sides(doubled(value.tokens), doubled(value.text))
        case _:
            return "no signal"


@pytest.mark.parametrize("name", ABSENT)
def test_any_other_shape_is_noticed(name):
    for view in views(name):
        for signal, value in signals_of(view).items():
            for other in (doubled(value), value[..., None] if isinstance(value, torch.Tensor) else "no signal"):
                with pytest.raises(TypeError, match=r"Signals: .* is no "):
                    changed(view, {signal: other})


@pytest.mark.parametrize("name", ABSENT)
def test_two_steps_hear_one_layer(name):
    """The step between the encoder's layers and the one at its output both read the keys of the first layer."""
    between, output, _ = views(name)
    torch.testing.assert_close(between.encoder.keys, output.encoder["keys", 0])
