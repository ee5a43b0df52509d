"""An unknown release of transformers: every name that the engine relies on is renamed, one at a time, in a subclass.

A run must then end in one sentence that says so, or be right; never in another answer.
"""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from transformers import masking_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

import visiontrim as vt
from releases import CACHE
from tiny import generate, llava, prompts
from visiontrim.engine import contract, upstream

NEW = "renamed_"
PLAN = vt.Random(keep=9) | vt.FastV(keep=0.5, layer=2)
"""Something at every seam: the encoder's output, between layers, and an attention module that is listened to."""
INPUTS = prompts((3, "image", 5), (1, "image", 2))


def one(name) -> str:
    """Of alternatives the one that this release uses."""
    return name if isinstance(name, str) else CACHE if CACHE in name else name[0]


def subclassed(instance, **members) -> None:
    """Give ``instance`` a class of its own, with other members."""
    cls = type(instance)
    instance.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__} | members)


def rename_argument(module, name: str) -> None:
    """The forward of ``module`` calls an argument otherwise, and so does whoever calls it."""
    cls = type(module)
    declared = inspect.signature(cls.forward)
    parameters = [p.replace(name=NEW + name) if p.name == name else p for p in declared.parameters.values()]

    def call(self, *args, **kwargs):
        return cls.__call__(self, *args, **{NEW + key if key == name else key: value for key, value in kwargs.items()})

    def forward(self, *args, **kwargs):
        return cls.forward(self, *args, **{name if key == NEW + name else key: v for key, v in kwargs.items()})

    forward.__signature__ = declared.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    subclassed(module, __call__=call, forward=forward)


def swap(output, old: str, new: str):
    """``output`` with a field of another name."""
    return Renamed({new if key == old else key: value for key, value in output.items()})


class Renamed(dict):
    """An output whose fields have the names they are given."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def rename_output(module, name: str) -> None:
    """The output of ``module`` calls a field otherwise, which whoever calls it knows."""
    cls = type(module)

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        return swap(cls.forward(self, *args, **kwargs), name, NEW + name)

    def call(self, *args, **kwargs):
        output = swap(cls.__call__(self, *args, **kwargs), NEW + name, name)
        return BaseModelOutputWithPast(**output)

    subclassed(module, __call__=call, forward=forward)


class Hidden:
    """In a class: an attribute that is not there."""

    def __get__(self, *_):
        raise AttributeError("renamed")


def hide(instance, name: str) -> None:
    instance.__dict__.pop(name, None)
    for registered in (instance._modules, instance._parameters, instance._buffers):
        registered.pop(name, None)
    subclassed(instance, **{name: Hidden()})


def parts(model) -> dict:
    core = model.model
    return {"model": model, "core": core, "text model": core.language_model}


def break_argument(model, monkeypatch, part: str, name: str) -> None:
    if part == "mask function":
        make = masking_utils.create_causal_mask
        declared = inspect.signature(make)

        def renamed(**kwargs):
            return make(**{key.removeprefix(NEW): value for key, value in kwargs.items()})

        changed = [p.replace(name=NEW + name) if p.name == name else p for p in declared.parameters.values()]
        renamed.__signature__ = declared.replace(parameters=changed)  # pyright: ignore[reportFunctionMemberAccess]
        monkeypatch.setattr(masking_utils, "create_causal_mask", renamed)
    elif part == "decoder layer":
        for layer in model.model.language_model.layers:
            rename_argument(layer, name)
    else:
        rename_argument(parts(model)[part], name)


def break_member(model, monkeypatch, part: str, name: str) -> None:
    if part.startswith("cache"):
        monkeypatch.setattr(DynamicLayer if part == "cache layer" else DynamicCache, name, Hidden(), raising=False)
        if part == "cache" and name == "layers":  # an instance's own
            monkeypatch.setattr(Cache, "__init__", lambda self, *args, **kwargs: None)
    else:
        hide(parts(model)[part], name)


def break_output(model, monkeypatch, part: str, name: str) -> None:
    if part == "text model":
        rename_output(model.model.language_model, name)
        return
    core, cls = model.model, type(model.model)
    encode = getattr(cls, part)

    @functools.wraps(encode)
    def renamed(self, *args, **kwargs):
        return swap(encode(self, *args, **kwargs), name, NEW + name)

    subclassed(core, **{part: renamed})


def break_handed_on(model, monkeypatch, part: str, name: str) -> None:
    rename_argument(model, name)
    rename_argument(model.model, name)


def break_given(model, monkeypatch, part: str, name: str) -> None:
    """Decoder layers still declare an argument, but get it under another name."""
    for layer in model.model.language_model.layers:
        declared = type(layer).forward
        rename_argument(layer, name)
        type(layer).forward.__signature__ = inspect.signature(declared)


def break_decoding(model, monkeypatch, part: str, name: str) -> None:
    """Steps of decoding go around the hooks of the text model."""
    text, cls = model.model.language_model, type(model.model.language_model)

    def call(self, *args, **kwargs):
        step = kwargs["inputs_embeds"].shape[1] == 1
        return (self.forward if step else functools.partial(cls.__call__, self))(*args, **kwargs)

    subclassed(text, __call__=call)


def break_attention(model, monkeypatch, part: str, name: str) -> None:
    """Modules take the attention function of the model, whatever their own configuration says."""
    attention = model.model.language_model.layers[1].self_attn
    config = attention.__dict__.pop("config")
    subclassed(attention, config=property(lambda self: config, lambda self, value: None))


CASES = [
    *((break_argument, part, one(name)) for part, names in contract.ARGUMENTS.items() for name in names),
    *((break_member, part, one(name)) for part, names in contract.MEMBERS.items() for name in names),
    (break_member, "core", "language_model"),  # by its name in this family
    *((break_output, part, one(name)) for part, names in contract.OUTPUTS.items() for name in names),
    *((break_handed_on, "forward", one(name)) for name in contract.HANDED_ON),
    (break_attention, "attention", "config"),
    (break_given, "decoder layer", "attention_mask"),
    (break_given, "decoder layer", "position_embeddings"),
    (break_decoding, "text model", "__call__"),
]


def answers(model, inputs):
    """By a bare forward with images, and by generate()."""
    with vt.trim(model, PLAN) as run:
        logits = model(**inputs).logits
        out = generate(model, inputs, max_new_tokens=3)
    return torch.stack(out.logits), logits, run.trace.cache_lengths


@functools.cache
def right():
    return answers(llava(), INPUTS)


@pytest.mark.parametrize(("simulate", "part", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_renamed_name_is_an_error_or_right(simulate, part, name, monkeypatch):
    expected = right()
    model = llava()
    simulate(model, monkeypatch, part, name)
    error = None
    try:
        named = {NEW + key if key == name and simulate is break_handed_on else key: v for key, v in INPUTS.items()}
        found = answers(model, named)
    except vt.TrimError as raised:
        error = str(raised)
    if error is not None:
        assert "relies on" in error
        assert upstream.RELEASES[-1] in error
        assert not model._forward_pre_hooks, "the model is left as it was"
    else:
        assert found[2] == expected[2]
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_a_layer_that_caches_more_than_the_trace_says():
    model = llava()

    def write_a_sink(module, args, kwargs, output):
        layer = kwargs[CACHE].layers[1]
        layer.keys, layer.values = (torch.cat([t[..., :1, :], t], -2) for t in (layer.keys, layer.values))

    hook = model.model.language_model.layers[1].register_forward_hook(write_a_sink, with_kwargs=True)
    found = pytest.raises(vt.TrimError, match=r"relies on \d+ tokens in layer 1 of the cache after this prefill")
    with found, vt.trim(model, vt.Random(keep=9)):
        model(**INPUTS, use_cache=True)
    hook.remove()
    assert vt.current(model) is None


def test_another_cache_that_comes_back():
    model = llava()

    def swap_cache(module, args, output):
        output[CACHE] = DynamicCache()

    model.model.language_model.register_forward_hook(swap_cache)
    found = pytest.raises(vt.TrimError, match=r"to return the cache it was given.*another DynamicCache")
    with found, vt.trim(model, vt.Random(keep=9)):
        model(**INPUTS, use_cache=True)
