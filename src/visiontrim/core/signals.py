"""What a step may ask to see beside the tokens, by where it comes from: vision encoder, language model, question.

Knows the names and shapes of signals, and how to say that one is missing; not how any is computed, nor by which model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated, Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from visiontrim.core.errors import TrimError

Signal = str | tuple[str, int]
"""A group and a name in it, such as ``"encoder.cls_attention"``; a step lists in ``needs`` those that it reads.

A pair asks for a signal of the encoder's attention as another of its layers gives it, counted from 0 or, if negative,
from the last one: ``("encoder.cls_attention", 5)``."""
Key = str | tuple[str, int | None]
"""A name inside a group, or a pair of it and an encoder layer; None is the layer that the plain name means."""


@dataclass(frozen=True, slots=True)
class Text:
    """Token features of a text in some space."""

    tokens: Float[Tensor, "batch text joint"]
    mask: Bool[Tensor, "batch text"]
    """False marks padding: texts of a batch differ in length."""
    scale: float
    """Factor of a cosine in this space: exp(logit_scale) of a CLIP tower."""
    ends: Bool[Tensor, "batch text"] | None = None
    """Tokens that sum up the text: the end token of each window of a CLIP tower; None: this space has none."""


@dataclass(frozen=True, slots=True)
class Sides:
    """One quantity on both sides: of the vision tokens and of the text after the image (``TextSignals.question``)."""

    tokens: Float[Tensor, "batch *tokens dim"]
    text: Float[Tensor, "batch *text dim"]
    """Places where the question's mask is False hold nothing of meaning."""


class MissingSignal(TrimError):  # noqa: N818  # a TrimError, named by what is wrong
    """A signal was read that the view does not have; ``signal`` is its name as in ``needs``."""

    def __init__(self, signal: Signal, message: str) -> None:
        super().__init__(message)
        self.signal = signal


class Signals:
    """Named values, of which some may be missing; a subclass declares the names. A group does not change.

    ``group.name``, ``group["name"]`` and, for another encoder layer, ``group["name", 5]`` are the value, a tensor
    without gradients, or raise :class:`MissingSignal`. ``"name" in group`` and ``group.get("name")`` ask first;
    iteration gives what there is. Raises :class:`TrimError` for values under names that are not declared.
    """

    __slots__ = ("_values",)
    group: ClassVar[str]
    """Name of the group in a view and in ``needs``."""
    names: ClassVar[tuple[str, ...]]
    why: ClassVar[str] = "this model does not give the signal {signal!r}, which the method needs: use another method"
    """What is said of a missing signal."""

    def __init_subclass__(cls, group: str) -> None:
        cls.group, cls.names = group, tuple(name for name in cls.__annotations__ if name not in Signals.__annotations__)
        for name in cls.names:
            setattr(cls, name, property(itemgetter(name)))
        NAMES.update({f"{group}.{name}": name for name in cls.names})

    def __init__(self, values: Mapping[Key, Any] | None = None, /, **named: Any) -> None:
        self._values = {_plain(key): value for key, value in (*(values or {}).items(), *named.items())}
        for key in self._values:
            check_name(self.spelled(key))

    def __getitem__(self, key: Key) -> Any:
        value = self.given(key)
        return value.detach() if isinstance(value, Tensor) and value.requires_grad else value

    def given(self, key: Key) -> Any:
        """The value with its gradients: what sums are made of, not choices."""
        try:
            return self._values[_plain(key)]
        except KeyError:
            signal = self.spelled(key)
            raise MissingSignal(signal, self.why.format(signal=signal)) from None

    def __contains__(self, key: Key) -> bool:
        return _plain(key) in self._values

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)

    def get(self, key: Key, default: Any = None) -> Any:
        """The value, or ``default`` if it is missing."""
        return self[key] if key in self else default  # noqa: SIM401  # this is what would be called

    @classmethod
    def among(cls, needs: Iterable[Signal]) -> frozenset[Any]:
        """Keys in this group of those of ``needs`` that are its own."""
        prefix = f"{cls.group}."
        split = [need if isinstance(need, tuple) else (need, None) for need in needs]
        return frozenset(_plain((name.removeprefix(prefix), at)) for name, at in split if name.startswith(prefix))

    @classmethod
    def spelled(cls, key: Key) -> Signal:
        """``key`` as in ``needs``."""
        match _plain(key):
            case name, int(layer):
                return f"{cls.group}.{name}", layer
            case name:
                return f"{cls.group}.{name}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(str, self))})"


NAMES: dict[str, str] = {}
"""The names of all signals as in ``needs``, each with its name in its group."""


def name_of(key: Key) -> str:
    """The name alone, without an encoder layer."""
    return key[0] if isinstance(key, tuple) else key


def _plain(key: Key) -> Any:
    return key[0] if isinstance(key, tuple) and key[1] is None else key


def check_name(signal: Signal) -> None:
    """Raise :class:`TrimError` unless ``signal`` is declared in a group."""
    name = name_of(signal)
    if name not in NAMES:
        last = name.rpartition(".")[2]
        alike = [full for full, own in NAMES.items() if own == last] or difflib.get_close_matches(name, NAMES, 3, 0.7)
        alike = alike or [full for full in NAMES if full.startswith(f"{name}.")] or list(NAMES)
        raise TrimError(f"there is no signal {name!r}: did you mean {', '.join(map(repr, alike))}?")


class EncoderSignals(Signals, group="encoder"):
    """Signals of the vision encoder, at its output or between two of its layers.

    Those of its attention are of the layer whose output is projected or, between layers, of the layer just passed.
    """

    __slots__ = ()
    cls_attention: Float[Tensor, "batch tokens"]
    """Attention of [CLS] to each patch, mean over heads, after the softmax over [CLS] and all patches. An encoder
    without [CLS] gives ``received_attention`` to a step that asks for this."""
    cls_attention_wide: Float[Tensor, "batch tokens"]
    """``cls_attention`` as if all heads were a single one of the full width, with the scale of that width (at the
    output only)."""
    received_attention: Float[Tensor, "batch tokens"]
    """Mean attention that each patch receives from the *other* patches, mean over heads."""
    column_attention: Float[Tensor, "batch tokens"]
    """Mean attention that each patch receives from all tokens, itself and [CLS] included, mean over heads."""
    keys: Float[Tensor, "batch heads tokens head_dim"]
    """Keys of the patches as the attention function gets them."""
    queries: Float[Tensor, "batch heads tokens head_dim"]
    """Queries of the patches, scaled: their dot product with ``keys`` is the logit of the attention (between layers
    only)."""
    cls_query: Float[Tensor, "batch heads 1 head_dim"]
    """The query of [CLS], scaled likewise (between layers only)."""
    projected: Float[Tensor, "batch tokens width"]
    """The tokens in the language model's space, after the projector (at the output only)."""
    sensitivity: Float[Tensor, "batch tokens"]
    """How much the projector changes what it makes of a token when the token changes: the norm of its derivative along
    a unit vector, mean over 64 that are the same for all, float32 (at the output only, and where a projector maps every
    token by itself)."""
    pixels: Float[Tensor, "batch tokens channels values"]
    """What the model got as the pixels of each token: normalised by its processor, and equal where they were. Of a
    token that others merged into, its own (between layers and before the first one)."""
    colours: Float[Tensor, "batch tokens channels values"]
    """``pixels`` with the whole range of a channel as 1, up to a constant for each channel, so that differences are
    those of values in [0, 1]. Needs the processor of the run."""
    mass: Float[Tensor, "batch tokens"]
    """Tokens of the uncompressed segment that each token is the mean of. This one and the next two are always there
    between layers, and not at the output."""
    lattice: tuple[int, int, int]
    """(frames, rows, columns) that the tokens form in raster order, merged ones included; missing where they form no
    such box."""
    unit: int
    """Patches whose features stand side by side in a token."""


class DecoderSignals(Signals, group="decoder"):
    """Signals of the language model, between two of its layers during prefill."""

    __slots__ = ()
    query: Float[Tensor, "batch dim"]
    """Hidden state at the position whose logits give the first generated token."""
    last_attention: Float[Tensor, "batch tokens"]
    """Attention of that position to each token in the layer just passed, mean over heads, float32, after the softmax
    over everything that the position may see: earlier turns, text and other images too."""
    next_attention: Float[Tensor, "batch tokens"]
    """The same with the queries and keys of the layer to come."""
    text_attention: Float[Tensor, "batch query_heads text tokens"]
    """Attention of the tokens of ``TextSignals.question`` to each token in the layer just passed, as for
    ``last_attention`` but for each query head."""
    previous: Float[Tensor, "batch tokens dim"]
    """What entered the layer just passed, where the view's features are what left it."""
    next_normed: Float[Tensor, "batch tokens dim"]
    """The tokens after the input norm of the layer to come."""
    embeddings: Annotated[Sides, "batch entered dim", "batch text dim"]
    """Input embeddings of all tokens that entered the language model."""
    normed: Annotated[Sides, "batch tokens dim", "batch text dim"]
    """The view's features and the text after the language model's final norm."""
    queries: Annotated[Sides, "batch query_heads tokens head_dim", "batch query_heads text head_dim"]
    """Queries of the layer just passed, with positions encoded, and scaled: their dot product with ``keys`` is the
    logit of the attention."""
    keys: Annotated[Sides, "batch key_heads tokens head_dim", "batch key_heads text head_dim"]
    """Keys of that layer, each head shared by query_heads / key_heads query heads."""
    values: Annotated[Sides, "batch key_heads tokens head_dim", "batch key_heads text head_dim"]
    """Values of that layer: what its attention averages. They know no positions."""
    mean_rotary: Float[Tensor, "batch tokens 2"]
    """Mean over its dimensions, and over the axes of mRoPE, of the cosines, then of the sines, of the rotary position
    encoding, float32."""
    rotary: Annotated[Sides, "batch tokens rotary_dim", "batch text rotary_dim"]
    """Cosines, then sines, of the rotary position encoding."""


class TextSignals(Signals, group="text"):
    """The question, and the vision tokens in its space. Without a question there is none of them."""

    __slots__ = ()
    why: ClassVar[str] = "no question came with this call, so there is no {signal!r}, which the method needs: ask one"
    question: Annotated[Text, "batch text joint"]
    """The question in the space of ``joint``; between decoder layers the hidden states of the text after the image, in
    the space of the view's features."""
    words: Annotated[Text, "batch words width"]
    """The language model's own input embeddings of the question, in the space of ``EncoderSignals.projected``."""
    joint: Float[Tensor, "batch tokens joint"]
    """The view's features in the space of ``question``. This and the rest stand at the encoder's output only."""
    joint_normalised: Float[Tensor, "batch tokens joint"]
    """The same of the features after the encoder's final norm, where the space was trained on that."""
    joint_last: Float[Tensor, "batch tokens joint"]
    """The same of the encoder's normalised last hidden state, where tokens are its patches; else as ``joint``."""
