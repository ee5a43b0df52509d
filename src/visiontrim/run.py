"""The one entrance: open a run on a model, close it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args
from weakref import WeakKeyDictionary, ref

from PIL import Image
from transformers import PreTrainedModel

from visiontrim.core.budget import Amount, check_amount
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method, Positions, VisionOutput
from visiontrim.core.registry import load_method
from visiontrim.core.signals import TextSignals
from visiontrim.core.trace import Trace
from visiontrim.engine.context import Clock
from visiontrim.engine.contract import facts
from visiontrim.engine.guidance import Questions
from visiontrim.engine.session import Session
from visiontrim.engine.sites import Per
from visiontrim.images import as_seen, deviations
from visiontrim.methods.controls import Uniform
from visiontrim.models.family import unwrapped
from visiontrim.models.text import Reader, TextTower, guidance_of, words_of
from visiontrim.picture import Frames, token_map
from visiontrim.report import Report

_open: WeakKeyDictionary[PreTrainedModel, ref[Run]] = WeakKeyDictionary()
"""Models with an open run, and the run, which lives as long as its hooks on the model; all of it weak, so that a
forgotten run keeps no model alive."""


def trim(
    model: PreTrainedModel,
    method: str | Path | Mapping[str, Any] | Method = "visiontrim",
    *,
    keep: Amount | None = None,
    keep_audio: Amount | str | Path | Mapping[str, Any] | Method | None = None,
    question: str | Sequence[str] | None = None,
    text_tower: str | Path | TextTower | None = None,
    processor: Reader | None = None,
    positions: Positions | None = None,
    per: Per = "image",
    remember: int = 0,
    clock: Clock | None = None,
) -> Run:
    """Compress the vision tokens of ``model`` while the returned run is open.

    ::

        with vt.trim(model, "visiontrim", keep=64) as run:
            out = model.generate(**inputs, max_new_tokens=64)
        print(run.report)

    Args:
        model: a vision-language model of transformers, with its weights on any device and in any dtype; also wrapped
            by peft or ``torch.compile``.
        method: a name, ``name:key=value,...``, several joined by ``|``, a recipe file (YAML, JSON), or the object.
        keep: vision tokens per image (int) or their fraction (float in (0, 1]); None takes what the method says.
        keep_audio: what to keep of every sound, for omni models (their ``thinker``): tokens (int) or a fraction (float)
            evenly along time, or a method, in any form of ``method``, that is then applied to audio tokens alone. A
            sound is to it what a video of one place would be: at the audio encoder's output ``random``, ``uniform``,
            ``divprune``, ``evs`` and others that read nothing else of an encoder; between decoder layers ``fastv`` and
            others. None leaves sound whole, and it counts as text.
        question: the question, for methods that are guided by text: one for all rows of a batch, or one for each.
            Without it such methods do without guidance. May be changed between calls as ``run.question``.
        text_tower: the CLIP model that the vision encoder was taken from: a hub name or a directory, whose
            checkpoint is read in float32 and stays on the CPU, or a :class:`TextTower`. Without it, the language
            model's own embeddings of the question guide.
        processor: the model's processor. Its tokenizer reads the question when there is no text tower,
            ``run.picture`` learns from it which part of an image the model sees, and methods that compare colours how
            it normalised them.
        positions: position ids of survivors: ``"keep"`` (their own), ``"compact"`` (consecutive), ``"members"``: a
            merged token has those of up to 8 of its members (:mod:`visiontrim.engine.members`), or ``"unmerged"``: in
            attention, and so in the cache, it stands at the places of all of its members
            (:mod:`visiontrim.engine.unmerging`); no stage inside the language model then. None takes the method's
            rule, but not ``"compact"`` where the model's positions are several numbers each (Qwen).
        per: what a number of tokens is meant for: a whole ``"image"`` (with all its tiles; a whole video), each
            ``"tile"`` of an anyres image, or each ``"frame"`` of a video.
        remember: how many calls of the vision encoder keep their output on the host. A prompt with the same images,
            such as the whole conversation with a further question, is then trimmed anew without encoding again,
            and equal images of one batch are encoded once. Methods inside the encoder always encode. The price is the
            prefill of the conversation, and the encoder's hidden states in host memory.
        clock: times the method's own work, see :class:`visiontrim.measure.Clock`.

    Raises:
        TrimError: for input that cannot work; the model is then untouched.
    """
    if isinstance(method, type):
        raise TrimError(f"{method.__name__} is a class: give an object, {method.__name__}(keep=64), or a name")
    chosen = load_method(method, **({} if keep is None else {"keep": keep}))
    if positions not in (None, *get_args(Positions)):
        raise TrimError(f"positions={positions!r}: choose from {', '.join(map(repr, get_args(Positions)))}")
    if per not in get_args(Per):
        raise TrimError(f"per={per!r}: choose from {', '.join(map(repr, get_args(Per)))}")
    if isinstance(remember, bool) or not isinstance(remember, int) or remember < 0:
        raise TrimError(f"remember={remember!r}: give the number of calls of the encoder to remember, 0 for none")
    sound = None if keep_audio is None else _of_sound(keep_audio)
    return Run(model, chosen, sound, question, text_tower, processor, positions, per, remember, clock)


def _of_sound(keep: Any) -> Method:
    """The method that ``keep_audio`` means."""
    if isinstance(keep, int | float):
        check_amount(keep, "keep_audio")
        return Uniform(keep)
    return load_method(keep)


def current(model: PreTrainedModel) -> Run | None:
    """The run that is open on ``model``, also where nobody kept it; None: there is none."""
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise TrimError(f"{model!r} is no model: give the one of transformers that a run may be open on")
    run = _open.get(inner)
    return None if run is None else run()


def remove(model: PreTrainedModel) -> None:
    """Close the run that is open on ``model``, if there is one: as :meth:`Run.remove`."""
    if (run := current(model)) is not None:
        run.remove()


class Run:
    """A method on a model: a context manager, or :meth:`attach` and :meth:`remove` for longer stays.

    ``report``, ``trace`` and ``picture`` speak of the latest prefill that held images, in any thread.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        sound: Method | None,
        question: str | Sequence[str] | None,
        text_tower: str | Path | TextTower | None,
        processor: Reader | None,
        positions: Positions | None,
        per: Per,
        remember: int,
        clock: Clock | None,
    ) -> None:
        self.model = unwrapped(model)
        self.method = method
        self.audio_method = sound
        """What is applied to audio tokens; None: they stay whole."""
        self._processor = processor
        self._family = facts(self.model) if sound is None else facts(self.model).with_sound()
        guidance = guidance_of(self._family, text_tower, processor)
        if question is not None and _reads_question(method) and guidance is None:
            raise TrimError(
                "the question cannot be read without a text tower or the model's processor: pass text_tower= or "
                "processor="
            )
        self._questions = Questions(guidance, words_of(self._family, processor), question)
        rule = positions or ("keep" if self._family.mrope and method.positions == "compact" else method.positions)
        self._rule: Positions = rule
        deviation = deviations(getattr(processor, "image_processor", None))
        self._session = Session(
            self._family, method, sound, rule, per, remember, self._questions, deviation, self._finish, clock
        )
        self._trace: Trace | None = None
        self._attached = False

    @property
    def question(self) -> tuple[str, ...]:
        """The questions that guide the next call, one for all rows or one for each; () for none."""
        return self._questions.asked

    @question.setter
    def question(self, question: str | Sequence[str] | None) -> None:
        self._questions.asked = question

    def attach(self) -> Run:
        """Compress from now on. Raises :class:`TrimError` if the model has an open run."""
        if (other := current(self.model)) is not None:
            raise TrimError(
                f"the model already has an open run ({other.method}): leave it by visiontrim.remove(model), or compose "
                "with |"
            )
        self._session.attach()
        self._attached = True
        _open[self.model] = ref(self)
        return self

    def remove(self) -> None:
        """Leave the model as it was before :meth:`attach`, once calls in progress in other threads are over.

        Raises :class:`TrimError` within a call of the model, which could not go on.
        """
        if not self._attached:
            return
        with self._session.context.idle():
            self._attached = False
            del _open[self.model]
            self._session.detach()

    def __enter__(self) -> Run:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def trace(self) -> Trace:
        """What the latest prefill kept. Raises :class:`TrimError` before the first prompt with an image."""
        if self._trace is None:
            raise TrimError("no prompt with an image has passed through this run yet: call generate() inside it first")
        return self._trace

    @property
    def report(self) -> Report:
        """What the latest prefill saved: one line as text, ``table()`` for rich, ``to_dict()`` for JSON."""
        return Report.of(self.trace, self.method, self._family, self._rule, self.audio_method)

    def picture(self, image: Frames, number: int = 0, part: int = 0) -> Image.Image:
        """Draw on ``image``, the prompt's image ``number``, which of its tokens were kept, merged and dropped.

        An anyres image has an overview as ``part`` 0 and the mosaic of its tiles as part 1. A video is a list of its
        frames, and counts as an image.
        """
        images = 1 + max((image.number for image in self.trace.images), default=-1)
        parts = [image for image in self.trace.images if image.number == number]
        if not parts:
            raise TrimError(f"there is no image {number}: the prompt had {images}, counted from 0")
        if not 0 <= part < len(parts):
            raise TrimError(f"there is no part {part} of image {number}: it has {len(parts)}, counted from 0")
        look = getattr(self._processor, "image_processor", None)
        seen = as_seen(image, look) if isinstance(image, Image.Image) else [as_seen(one, look) for one in image]
        return token_map(seen, parts[part])

    def _finish(self, trace: Trace) -> None:
        self._trace = trace


def _reads_question(method: Method) -> bool:
    """Whether a step needs the question before the language model, in whose prompt it is, is reached."""
    of_text = (TextSignals.among(step.needs) for step in method.steps() if isinstance(step.site, VisionOutput))
    return any(names - {"words"} for names in of_text)
