"""Hand-made views: their signals by the names of ``needs``, and the same view with other ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from visiontrim.core.signals import DecoderSignals, EncoderSignals, Signal, Signals, TextSignals
from visiontrim.core.view import View

GROUPS: tuple[type[Signals], ...] = (EncoderSignals, DecoderSignals, TextSignals)


def grouped(signals: Mapping[Signal, Any]) -> dict[str, Signals]:
    """The groups of a view, by its fields, with the ``signals`` that are not None."""
    given = {signal: value for signal, value in signals.items() if value is not None}
    return {of.group: of({key: given[of.spelled(key)] for key in of.among(given)}) for of in GROUPS}


def signals_of(view: View) -> dict[Signal, Any]:
    """All signals of ``view``."""
    groups = [getattr(view, of.group) for of in GROUPS]
    return {group.spelled(key): group[key] for group in groups for key in group}


def changed(view: View, signals: Mapping[Signal, Any], **fields: Any) -> View:
    """``view`` with other ``signals``, of which None takes one away, and other ``fields``."""
    return dataclasses.replace(view, **grouped(signals_of(view) | dict(signals)), **fields)


def showing(view: View, needs: frozenset[Signal]) -> View:
    """``view`` with no other signals than ``needs``."""
    return dataclasses.replace(view, **grouped({k: value for k, value in signals_of(view).items() if k in needs}))
