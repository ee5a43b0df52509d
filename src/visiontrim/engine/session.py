"""Everything that is attached to a model while a run is open.

It knows where a call of the model begins and ends, and which stages a method has; it does not know what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Decoding, Method, Plan, Positions
from visiontrim.core.trace import Trace
from visiontrim.engine.call import Call, Chunks
from visiontrim.engine.checkpointing import InsideHooks
from visiontrim.engine.chunks import check_chunks
from visiontrim.engine.context import Clock, Context
from visiontrim.engine.contract import check_arguments, check_passed
from visiontrim.engine.encoder import EncoderStage
from visiontrim.engine.guidance import Questions
from visiontrim.engine.language import LanguageStage
from visiontrim.engine.memory import Memory
from visiontrim.engine.pack import blank_slots
from visiontrim.engine.placing import counted
from visiontrim.engine.replaced import Replaced
from visiontrim.engine.select import expanded
from visiontrim.engine.sites import Per, Sites, by_layer
from visiontrim.engine.upstream import (
    FEATURE_FIELDS,
    SHARED,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    Upstream,
    given_cache,
    given_features,
    given_pixels,
    given_sound,
)
from visiontrim.engine.vision import VisionStage
from visiontrim.models.family import Family


class Session:
    """Attaches a method to a model. State of a call lives in context variables, so threads do not mix.

    Args:
        family: facts about the model.
        method: what to do with pictures.
        sound: what to do with sound, if it is among the family's kinds.
        positions: position ids of survivors.
        per: what a number of tokens is meant for.
        remember: calls of the encoder whose output is kept on the host; a method that acts inside it keeps none.
        questions: for guidance by text.
        deviation: by what the processor divided each channel of colours in [0, 1]; None: that is not known.
        finish: called with the trace of every prefill that held images.
        clock: times the method's own work under the name "method".
    """

    def __init__(
        self,
        family: Family,
        method: Method,
        sound: Method | None,
        positions: Positions,
        per: Per,
        remember: int,
        questions: Questions,
        deviation: Sequence[float] | None,
        finish: Callable[[Trace], None],
        clock: Clock | None = None,
    ) -> None:
        self._family = family
        self._questions = questions
        self._positions: Positions = positions
        self.context = context = Context(family.model, finish, clock)
        self._upstream = upstream = Upstream(family.language_model)
        between, decoding = _between_layers(family, upstream), method.decoding
        sites = dict.fromkeys(family.pictures, pictured := Sites.of(family, method, between))
        if sound is not None:
            sites["audio"] = Sites.of(family, sound, between, "audio")
            _check_sound(sound, method, positions, stages=bool(sites["audio"].language))
        steps = by_layer(sites)
        self._between = bool(steps) or decoding is not None
        check_arguments(family, upstream, layers=bool(steps) or decoding is not None or positions != "keep")
        _check_layers(family, upstream, steps, decoding)
        if positions == "unmerged":
            _check_unmerged(upstream)
        memory = Memory(remember, once_each=not pictured.encoder) if remember else None
        language = LanguageStage(family, steps, decoding, positions, _narrows_cache(method), upstream, context)
        self._passes = language.passes
        self._stages = (
            EncoderStage(family, pictured.encoder, per, pictured.apart, deviation, context),
            VisionStage(family, sites, per, memory, questions, context),
            language,
        )
        self._removers: list = []

    def attach(self) -> None:
        """Install every hook. The model's weights, classes and configuration objects stay as they are."""
        model, core = self._family.model, self._family.core
        try:
            for module in (model, core):
                self._removers.append(module.register_forward_pre_hook(self._begin_forward, with_kwargs=True))
                end = module.register_forward_hook(self._end_forward, with_kwargs=True, always_call=True)
                self._removers.append(end)
            for stage in self._stages:
                self._removers += stage.attach()
            self._inside = InsideHooks(model)
            self._removers.append(self._inside)
            self._removers.append(Replaced(model, "generate", self._generate))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take everything off again."""
        while self._removers:
            self._removers.pop().remove()

    def _generate(self, generate: Callable, *args, **kwargs):
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if ids is None:
            raise TrimError("generate() got no input_ids, in which image placeholders are found: pass input_ids")
        config = kwargs.get("generation_config") or self._family.model.generation_config
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        cache, mask = given_cache(kwargs), kwargs.get("attention_mask")
        past = int(cache.get_seq_length()) if cache is not None else 0
        end = ids.shape[1] if mask is None else mask.shape[1]
        if past and end == ids.shape[1]:  # the whole conversation: generate() goes on after what is cached
            ids = ids[:, past:]
        if given_features(kwargs):
            raise TrimError(_FOREIGN_FEATURES)
        encodes = given_pixels(kwargs) or self._hears(kwargs)
        if not encodes and bool(self._family.placeholders(ids).any()):
            raise TrimError(
                f"the prompt has {int(self._family.placeholders(ids).sum())} image placeholders but no pixel_values: "
                "pass all of the processor's output to generate()"
            )
        call = Call(None, ids, samples=ids.shape[0], forward_ids=ids, prompt_end=end)
        if chunk is not None and encodes:
            check_chunks(self._family, self._upstream, self._between, self._positions, chunk)
            call.chunks = Chunks()
        if encodes:  # looked at before the encoder is queued, so that nothing has to be waited for
            call.counted = counted(self._family, ids, mask)
        self.context.begin(call)
        try:
            return generate(*args, **kwargs)
        finally:
            self.context.end()

    def _begin_forward(self, module, args, kwargs):
        if self._passes(args, kwargs):
            return None
        self._inside.refresh()
        ids = kwargs.get("input_ids", args[0] if args else None)
        pixels, sound = given_pixels(kwargs), self._hears(kwargs)
        features = given_features(kwargs)
        if ids is None:
            if pixels or features or sound:
                raise TrimError(
                    "the prompt came as inputs_embeds, in which image placeholders cannot be found: pass input_ids"
                )
            return None
        call = self.context.call
        if call is None:
            if features:
                raise TrimError(_FOREIGN_FEATURES)
            call = Call(module, ids, samples=ids.shape[0], forward_ids=ids)
            self.context.begin(call)
        if kwargs.get("pixel_values_videos") is not None and "video" not in self._family.kinds:
            raise TrimError(
                f"the video tokens of {type(self._family.model).__name__} cannot be told from others: send the frames "
                "as images, or the video outside of the run"
            )
        call.carries_vision = pixels or features or sound
        call.passes = 0
        if call.carries_vision:
            call.forward_ids = ids
        if pixels or sound:  # an encoder runs within this forward, on its rows
            call.groups = [expanded(group, len(ids) // call.rows) for group in call.groups if features]
            call.input_ids = ids
            if call.counted is None or not call.counted.covers(ids) or call.counted.rows != len(ids):
                call.counted = counted(self._family, ids, kwargs.get("attention_mask"))
        if kwargs.get("labels") is None:
            return None
        call.labels = kwargs["labels"].clone()
        return args, kwargs | {"labels": call.labels}

    def _hears(self, arguments: Mapping[str, Any]) -> bool:
        """Whether arguments bring sound that this run reduces."""
        return "audio" in self._family.kinds and given_sound(arguments)

    def _end_forward(self, module, args, kwargs, output) -> None:
        if self._passes(args, kwargs):
            return
        if (call := self.context.call) is None:
            return
        if call.owner is module:
            self.context.end()
        if output is None:  # the forward raised
            return
        check_passed(call, module)
        call.carries_vision = False
        if call.owner is module and any(group.kept < group.total for group in call.groups):
            for name in [name for name in output if name.startswith(FEATURE_FIELDS)]:
                output[name] = blank_slots(output[name])


def _narrows_cache(method: Method) -> bool | Literal["all"]:
    parts = method.methods if isinstance(method, Plan) else (method,)
    asked = {part.narrows_cache for part in parts}
    return "all" if "all" in asked else any(asked)


_FOREIGN_FEATURES = "mm_encoder_outputs were computed outside of this run: pass pixel_values instead"


def _between_layers(family: Family, upstream: Upstream) -> bool:
    """Whether tokens can be removed between decoder layers; of prompts that fit into a window where there is one."""
    layers = upstream.cache_layers
    enough = len(layers) >= len(family.language_model.layers)
    kinds = DynamicLayer, DynamicSlidingWindowLayer
    return not family.bidirectional and enough and all(type(layer) in kinds for layer in layers)


def _check_sound(sound: Method, pictured: Method, rule: Positions, stages: bool) -> None:
    """Refuse for sound what a method decides for all tokens of a prompt; ``stages``: some stand between layers."""
    if sound.decoding is not None:
        raise TrimError(f"{sound} chooses what the answer sees of the vision tokens, not of sound: use another method")
    if _narrows_cache(sound) or (stages and _narrows_cache(pictured)):
        raise TrimError(
            f"{sound if _narrows_cache(sound) else pictured} leaves to the cache only what its last stage left, of "
            "sound and pictures alike: leave it out, or keep_audio= without stages between decoder layers"
        )
    if sound.positions in ("members", "unmerged") and sound.positions != rule:
        raise TrimError(f"{sound} needs positions={sound.positions!r}, a rule for the whole prompt: pass it as well")


def _check_layers(
    family: Family, upstream: Upstream, language: Mapping[int, object], decoding: Decoding | None
) -> None:
    """Refuse decoders whose layers cannot hold fewer tokens, or each their own number of them where that is asked."""
    inside = language.keys() | (set() if decoding is None else {decoding.layer})
    if inside and family.bidirectional:
        raise TrimError(
            f"{type(family).__name__} {family.no_stages}, so none can be removed or hidden "
            f"between decoder layers (asked before layer {min(inside)}): use a method's vision stage alone"
        )
    layers = upstream.cache_layers
    shared = [index for index, layer in enumerate(layers) if isinstance(layer, SHARED)]
    if len(layers) < len(family.language_model.layers) or (shared and inside):
        raise TrimError(
            f"decoder layer {min([*shared, len(layers)])} and later ones use the keys and values of earlier layers, "
            "which would have to lack the same tokens: use a method's vision stage alone"
            if shared
            else f"decoder layer {len(layers)} and later ones use the keys and values of earlier layers: only decoders "
            "whose layers all have their own are supported"
        )
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, *SHARED):
            raise TrimError(
                f"decoder layer {index} caches in a {type(layer).__name__}, of which it is not known how it could lack "
                "tokens: only layers with keys and values of their own, and those with linear attention or short "
                "convolutions, are supported"
            )
    if not (recurrent := upstream.recurrent):
        return
    holding = [index for index in range(1, len(layers)) if index not in recurrent]
    if decoding is not None:
        raise TrimError(
            f"from decoder layer {decoding.layer} on the answer would see a part of the vision tokens, but layers "
            f"with linear attention ({min(recurrent)}, ...) keep no tokens that could be hidden: use a method that "
            "removes them in the prefill"
        )
    for index in sorted(language):
        if index in recurrent:
            raise TrimError(
                f"decoder layer {index} has linear attention or a convolution, whose queries rank no tokens: stages "
                f"of this model stand before layers with full attention, {', '.join(map(str, holding))}"
            )


def _check_unmerged(upstream: Upstream) -> None:
    if upstream.recurrent:
        raise TrimError(
            "positions='unmerged' lets a merged token stand in attention at the places of all of its members, but "
            f"decoder layer {min(upstream.recurrent)} has a recurrence instead, which takes every token once: use "
            "positions='keep' or a method that merges nothing"
        )
