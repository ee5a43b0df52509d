"""The type checker behind the shapes in signatures, in tests only. An int is a number where a float is asked for."""

from __future__ import annotations

import functools
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from beartype import BeartypeConf, beartype
from jaxtyping import Bool, Float, jaxtyped
from torch import Tensor

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_view(view: Any) -> None:
    """Raise TypeError unless all tensors of ``view`` have the declared shapes, and these agree among each other."""
    with jaxtyped("context"):
        for owner in (view, view.encoder, view.decoder, view.text):
            for name, hint in _hints(type(owner)).items():
                for key in [name] if owner is view else [k for k in owner if name in (k, k[0])]:
                    value = getattr(view, name) if owner is view else owner[key]
                    _check(f"{type(owner).__name__}: {key}", value, hint)


def check_every(view: type) -> None:
    """Let every view be checked that is made."""
    made = view.__init__

    @functools.wraps(made)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        check_view(self)

    view.__init__ = checked


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _check(name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Annotated:  # the shapes of both sides, or of a text
        kind, *shapes = get_args(hint)
        _check(name, value, kind)
        parts = [(Float, value.tokens), (Float, value.text) if len(shapes) == 2 else (Bool, value.mask)]
        of_mask = shapes[0].rpartition(" ")[0]
        for (dtype, part), shape in zip(parts, [shapes[0], *shapes[1:], of_mask], strict=False):
            _check(name, part, dtype[Tensor, shape])
    elif not isinstance(value, get_origin(hint) or hint if get_origin(hint) is tuple else hint):
        raise TypeError(f"{name} of shape {tuple(getattr(value, 'shape', ()))} is no {hint}")
