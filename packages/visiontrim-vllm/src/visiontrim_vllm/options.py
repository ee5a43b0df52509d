"""What a server and each of its requests ask for.

The server: ``--hf-overrides '{"visiontrim": {...}}'``. A request: ``mm_processor_kwargs: {"visiontrim": {...}}``, of
which vLLM makes a part of the identity of an image, and so of the keys of all of its caches; ``vllm serve`` takes it
with ``--trust-request-mm-kwargs`` only. Knows nothing of vLLM.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visiontrim.core.budget import Amount, resolve
from visiontrim.core.errors import TrimError
from visiontrim.core.method import DecoderLayer, Method
from visiontrim.core.registry import load_method

KEY = "visiontrim"
"""Name of the option, in both places."""
LONGEST = 4000
"""Characters of a question that a request may give."""
REQUEST = ("method", "keep", "question", "positions")
SERVER = ("method", "keep", "positions", "text_tower", "pictures_at_once", "remember")


@dataclass(frozen=True)
class Asked:
    """What is done with the images of one request."""

    recipe: str
    """The method with every option, as JSON; "" for images that stay whole."""
    question: str
    """"" where there is none, or the method reads none."""
    compact: bool
    """Whether survivors are counted one after the other, else they have the positions that they had."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of(cls, text: str) -> Asked:
        return cls(**json.loads(text))

    def count(self, total: int) -> int:
        """Tokens that stay of an image of ``total``. An image of fewer than asked for stays whole."""
        keep = _keep(self.recipe) if self.recipe else total
        return total if isinstance(keep, int) and keep >= total else resolve(keep, total)


@dataclass(frozen=True)
class Options:
    """Those of a server. Raises :class:`TrimError` for what it cannot serve."""

    method: str | None = None
    """None: the plug-in does nothing."""
    keep: Amount | None = None
    positions: str | None = None
    """"keep" or "compact"; None: the method's rule."""
    text_tower: str | None = None
    pictures_at_once: int = 16
    """Images that are encoded together; the scheduler counts only what is left of them."""
    remember: int = 8
    """Calls of the encoder whose output is kept, so that several questions about one picture encode it once."""

    @classmethod
    def of(cls, hf_config: Any) -> Options:
        given = getattr(hf_config, KEY, None) or {}
        _check(given, SERVER)
        options = cls(**given)
        if options.method is not None:
            options.asked({}, several=False)
        return options

    def asked(self, request: Mapping[str, Any], several: bool, question: str = "") -> Asked:
        """What a request asks for; ``several``: whether the model has several positions for a token.

        ``question`` is what stands in the prompt, for requests that do not say it.
        """
        _check(request, REQUEST)
        # tables hand on every key of every row
        request = {key: value for key, value in request.items() if value is not None}
        spec = request.get("method", self.method)
        if spec in (None, "none"):
            return Asked("", "", False)
        keep = request.get("keep", self.keep if spec == self.method else None)
        method = servable(load_method(spec, **({} if keep is None else {"keep": keep})))
        asked = request.get("question", question)
        if not isinstance(asked, str) or len(asked) > LONGEST:
            raise TrimError(f"the question is no text of at most {LONGEST:,} characters: shorten it")
        rule = request.get("positions", self.positions) or method.positions
        if rule not in ("keep", "compact"):
            raise TrimError(f"positions={rule!r}: vLLM has one place for a token, so choose 'keep' or 'compact'")
        recipe = json.dumps(method.to_dict())
        return Asked(recipe, asked.strip() if method.text_aware else "", rule == "compact" and not several)


def servable(method: Method) -> Method:
    """The method, if vLLM can schedule it: all is chosen before the language model, and how much is known before.

    Raises :class:`TrimError` for all others.
    """
    method = method.as_part()  # the language model's part is vLLM's
    if any(isinstance(step.site, DecoderLayer) for step in method.steps()) or method.decoding is not None:
        raise TrimError(
            f"{method} acts inside the language model, whose layers share one length of the cache in vLLM: take a "
            "method that acts at the vision encoder, or vt.trim()"
        )
    if any(step.own_counts for step in method.steps()):
        raise TrimError(
            f"{method} decides by the picture how many tokens stay, but vLLM schedules before it is encoded: take "
            "another method, or vt.trim()"
        )
    if method.positions in ("members", "unmerged"):
        raise TrimError(f"{method} gives tokens several positions, which vLLM cannot: take another method")
    if not isinstance(getattr(method, "keep", None), int | float):
        raise TrimError(f"{method} says no number of tokens, which vLLM must know before an image is encoded: say keep")
    return method


@functools.lru_cache(maxsize=256)
def _keep(recipe: str) -> Amount:
    return load_method(json.loads(recipe)).keep  # pyright: ignore[reportAttributeAccessIssue]


def _check(given: Any, known: tuple[str, ...]) -> None:
    if not isinstance(given, Mapping):
        raise TrimError(f"{KEY} is {type(given).__name__}, where an object with {', '.join(known)} is expected")
    if strange := set(given) - set(known):
        raise TrimError(f"{KEY} has no option {min(strange)!r}: choose from {', '.join(known)}")
