"""What the engine relies on in transformers, written down and checked: a broken promise is an error, never a number.

Before a run opens, names are looked up in classes and signatures (:func:`facts`, :func:`check_arguments`). What only
shows once the model runs is checked where it costs nothing, without a look at a tensor's values: that the pass through
the language model came by, that it returned the cache it was given, that every layer holds as many tokens as the trace
says, and that steps of decoding come by as well. It knows names and lengths; it does not know how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from visiontrim.core.errors import TrimError
from visiontrim.engine.cache import Trimmed, physical_length
from visiontrim.engine.call import Call
from visiontrim.engine.forward import Prefill
from visiontrim.engine.upstream import (
    CACHE_NAMES,
    FEATURE_NAMES,
    RELEASE,
    RELEASES,
    Cache,
    DynamicCache,
    DynamicLayer,
    StaticLayer,
    Upstream,
    given_cache,
    parameters,
    with_implementation,
)
from visiontrim.models.family import Family, family_of

Name = str | tuple[str, ...]
"""What something is called; a tuple: any of these."""

ARGUMENTS: dict[str, tuple[Name, ...]] = {
    "text model": ("inputs_embeds", "attention_mask", "position_ids", CACHE_NAMES),
    "core": ("input_ids", "attention_mask"),
    "model": ("input_ids", "labels"),
    "decoder layer": ("hidden_states", "attention_mask", "position_embeddings"),
    "mask function": ("config", "inputs_embeds", "attention_mask", "layer_idx", CACHE_NAMES),
}
"""Arguments of forwards, and of the functions that make masks. The core holds encoder and text model, the model the
language model's head. Of decoder layers they are relied on where a run changes what these get."""
MEMBERS: dict[str, tuple[str, ...]] = {
    "text model": ("layers", "config"),
    "core": ("get_image_features",),
    "model": ("model", "generate"),
    "cache": ("layers", "get_seq_length", "get_mask_sizes"),
    "cache layer": (
        "update",
        "get_seq_length",
        "get_mask_sizes",
        "crop",
        "reset",
        "reorder_cache",
        "batch_repeat_interleave",
        "batch_select_indices",
        "lazy_initialization",
    ),
}
"""Attributes and methods; the text model itself is where the family says. Of a dynamic cache's layers what
:class:`Trimmed` overrides or calls."""
OUTPUTS: dict[str, tuple[Name, ...]] = {
    "text model": ("last_hidden_state", CACHE_NAMES),
    "get_image_features": ("pooler_output",),
}
"""Fields of what is returned."""
HANDED_ON: tuple[Name, ...] = ("pixel_values", FEATURE_NAMES)
"""Arguments in which a forward of model and core gets images, or what generate() encoded of them."""


def broken(expected: str, found: str) -> TrimError:
    """The error of a promise that transformers does not keep."""
    known = f"{', '.join(RELEASES[:-1])} and {RELEASES[-1]}"
    return TrimError(
        f"visiontrim relies on {expected}, but found {found}: this is transformers {RELEASE}, and the "
        f"releases known to work are {known}; install one of them, or see what works by `visiontrim doctor`"
    )


def facts(model: Any) -> Family:
    """What is known of ``model``. Raises :class:`TrimError` if its parts are not where they are looked for."""
    try:
        family = family_of(model)
        for part, names in MEMBERS.items():
            owner = _owner(family, part)
            extra = [f"get_{kind}_features" for kind in family.kinds] if part == "core" else []
            for name in (*names, *extra):
                if not hasattr(owner, name):
                    raise broken(f"{type(owner).__name__}.{name}", "none of that name")
    except AttributeError as error:
        raise broken(f"the parts of {type(model).__name__} where they have been so far", str(error)) from error
    return family


def _owner(family: Family, part: str) -> Any:
    match part:
        case "text model":
            return family.language_model
        case "core":
            return family.core
        case "model":
            return family.model
        case "cache":
            return DynamicCache()
        case _:
            return DynamicLayer()


def check_arguments(family: Family, upstream: Upstream, layers: bool) -> None:
    """Raise :class:`TrimError` unless all arguments that a run relies on are there.

    ``layers``: the run changes what decoder layers get.
    """
    for part in ("text model", "core", "model"):
        owner = type(_owner(family, part))
        _check_arguments(f"{owner.__name__}.forward()", parameters(owner.forward), part)
    if layers:
        for layer in {type(layer) for layer in family.language_model.layers}:
            _check_arguments(f"{layer.__name__}.forward()", parameters(layer.forward), "decoder layer")
    for name, make in upstream.mask_functions.items():
        if make is None:
            raise broken(f"a function {name}() that makes masks", "none of that name")
        _check_arguments(f"{name}()", parameters(make), "mask function")
    found = with_implementation(family.language_model.config, "another")._attn_implementation
    if found != "another":
        raise broken("a configuration that names the attention function of one module", f"{found!r} after naming one")


def _check_arguments(where: str, declared: Sequence[str], part: str) -> None:
    for name in ARGUMENTS[part]:
        names = _alternatives(name)
        if not set(names) & set(declared):
            raise broken(f"{where} with an argument {' or '.join(names)}", f"only {', '.join(declared)}")


def _alternatives(name: Name) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else name


def check_passed(call: Call, module: Any) -> None:
    """A forward that carried images must have gone through the hooks on the text model; so must a step of decoding."""
    if (call.carries_vision or call.groups) and not call.prefilled:
        raise broken(
            f"{type(module).__name__} to get images as {HANDED_ON[0]} (encoded ones as {' or '.join(FEATURE_NAMES)}) "
            "and to call its text model with inputs_embeds",
            "encoded images that came another way",
        )
    if call.prefilled and not call.passes:
        raise broken(f"every step of decoding to call the text model of {type(module).__name__}", "a step without one")


def check_given(name: str, given: Mapping[str, Any], layer: int) -> None:
    """A decoder layer must have been given what the engine gives it anew."""
    if name not in given:
        raise broken(f"decoder layer {layer} to be given {name}", f"only {', '.join(given)}")


def check_heard(heard: bool, what: str) -> None:
    """An attention module that is listened to must have shown its queries and keys."""
    if not heard:
        raise broken(f"{what} to call the function that its configuration names", "that it did not")


def check_cached(prefill: Prefill, output: Any, expected: Sequence[int]) -> None:
    """The pass must have returned hidden states and the cache that it got, grown by what the trace says.

    ``expected`` is how many tokens each layer of the cache holds.
    """
    if getattr(output, "last_hidden_state", None) is None:
        raise broken("a text model's output with last_hidden_state", f"one with {', '.join(_fields(output))}")
    if (cache := prefill.cache) is None:
        return
    if (returned := given_cache(output)) is not cache:
        what = "none" if returned is None else f"another {type(returned).__name__}"
        raise broken(f"the text model to return the cache it was given, as {' or '.join(CACHE_NAMES)}", what)
    for layer, length in _lengths(cache):
        if length != expected[layer]:
            raise broken(f"{expected[layer]} tokens in layer {layer} of the cache after this prefill", f"{length}")


def check_encoded(output: Any, function: str, field: str) -> Any:
    """What ``function`` gave as vision tokens, in a ``field`` of its ``output``."""
    features = getattr(output, field, None)
    if features is None:
        raise broken(f"{function} to give vision tokens as {field}", f"one with {', '.join(_fields(output))}")
    return features


def _fields(output: Any) -> Iterator[str]:
    yield from output if isinstance(output, Mapping) else (f"a {type(output).__name__}",)


def _lengths(cache: Cache) -> Iterator[tuple[int, int]]:
    """(layer, tokens that it holds) of the layers that hold everything since the conversation began."""
    for index, layer in enumerate(cache.layers):
        if (isinstance(layer, Trimmed) and not isinstance(layer, StaticLayer)) or type(layer) is DynamicLayer:
            yield index, physical_length(cache, index)
