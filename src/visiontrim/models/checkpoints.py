"""Checkpoints by name: whether they are there, told before anything is waited for, and whether they are whole.

Knows folders, the cache of the hub and the hub; what a model does with its weights is not known here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from visiontrim.core.errors import TrimError

PATIENCE = 5.0
"""Seconds that the hub has to say whether it knows a name."""
WAY_OUT = "give a directory, or a hub name such as llava-hf/llava-1.5-7b-hf"


def check_there(kind: str, name: str, known: Sequence[str] = ()) -> None:
    """Raise :class:`TrimError` for a name of which neither the disk nor the hub knows a configuration.

    The disk is looked at first, and the hub is asked once and not for long. ``known`` are names to which a wrong one is
    compared.
    """
    path = Path(name)
    if _exists(path):
        return
    near = _nearest(name, known)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or "\\" in name or _exists(path.parent, name):
        raise TrimError(f"the {kind} {_short(name)} cannot be loaded (there is no such folder){near or f': {WAY_OUT}'}")
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise TrimError(f"the {kind} {_short(name)} cannot be loaded (it is no folder){near or f': {WAY_OUT}'}")
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError:
        raise TrimError(
            f"the {kind} {_short(name)} cannot be loaded (it is neither a folder nor a name that a hub can have)"
            f"{near or f': {WAY_OUT}'}"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise TrimError(f"the {kind} {name!r} is not on this machine, and the hub is switched off{near or ''}")
    try:
        HfApi().model_info(name, timeout=PATIENCE)
    except RepositoryNotFoundError:
        raise TrimError(f"the {kind} {name!r} is not on the hub, or not for you{near or f': {WAY_OUT}'}") from None
    except HfHubHTTPError:
        return  # gated, or an error of the hub: loading says what
    except Exception as error:  # no connection; its class depends on the release
        raise TrimError(
            f"the {kind} {name!r} is not on this machine, and the hub cannot be reached ({sentence(error)}){near or ''}"
        ) from error


def loaded(kind: str, name: str | Path, load: Callable[..., Any], way_out: str = WAY_OUT, **options: Any) -> Any:
    """What ``load`` makes of ``name``. Raises :class:`TrimError`, in one sentence, whatever is wrong with it."""
    try:
        return load(name, **options)
    except TrimError:
        raise
    except Exception as error:  # files of others raise nearly everything
        raise TrimError(f"the {kind} {_short(name)} cannot be loaded ({sentence(error)}): {way_out}") from error


def whole(kind: str, name: str | Path, load: Callable[..., Any], **options: Any) -> Any:
    """A model for which its file holds all weights, and no layer more.

    Raises :class:`TrimError` where it does not: transformers would draw what lacks at random.
    """
    model, found = loaded(kind, name, load, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    wrong = ""
    if odd := sorted(found["mismatched_keys"]):
        key, there, wanted = odd[0]
        wrong = f"{len(odd)} tensors have another size, as {key}: {list(there)}, where {list(wanted)} is wanted"
    elif lacking := sorted(found["missing_keys"]):
        wrong = f"{len(lacking)} tensors lack, as {lacking[0]}"
    elif more := _layers_more(found["unexpected_keys"], model.state_dict()):
        wrong = f"{len(more)} tensors of further layers have no place, as {more[0]}"
    if wrong:
        raise TrimError(
            f"the weights and the config.json of the {kind} {_short(name)} do not belong together: {wrong}; get both "
            "anew"
        )
    return model


def sentence(error: BaseException) -> str:
    """The first line of a message, the second too where the first announces it, without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError | IndexError | ZeroDivisionError | AttributeError):
        return f"{type(error).__name__} {lines[0] if lines else ''}".strip().rstrip(".")
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return (text if len(text) <= 300 else f"{text[:300]}...").rstrip(".")


def _layers_more(unexpected: Iterable[str], there: Iterable[str]) -> list[str]:
    known = {re.sub(r"\.\d+\.", ".0.", key) for key in there}
    return sorted(key for key in unexpected if re.sub(r"\.\d+\.", ".0.", key) in known)


def _nearest(name: str, known: Sequence[str]) -> str:
    for cutoff, given in ((0.6, name), (0.6, name.rpartition("/")[2])):
        if close := difflib.get_close_matches(given, known, n=1, cutoff=cutoff):
            return f": did you mean {close[0]!r}?"
    return ""


def _exists(path: Path, name: str = "/") -> bool:
    """Whether it is there; a name without a folder in it is in none."""
    try:
        return "/" in name and path.exists() and str(path) != "."
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _short(name: str | Path) -> str:
    text = str(name)
    return repr(text if len(text) <= 200 else f"{text[:100]}...")
