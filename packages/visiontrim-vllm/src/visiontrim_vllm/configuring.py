"""What the plug-in changes of vLLM's configuration, and what it refuses, before a model is built.

vLLM lets only models with M-RoPE have positions other than 0, 1, 2, ..., and lets only models that prune videos set
positions after encoding. A server with the plug-in becomes both, whatever its model is.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config import uses_mrope

from visiontrim.core.errors import TrimError
from visiontrim_vllm.options import KEY, Options

SEVERAL = "visiontrim_several"
"""Attribute of the configuration: whether the model itself has several positions a token."""
CHANNELS = 4
"""Rows of positions that vLLM carries along for a model that has one a token: :mod:`visiontrim_vllm.positions`."""


class Configured(VerifyAndUpdateConfig):
    """For models on vLLM's transformers backend."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        config = model_config.hf_config
        if Options.of(config).method is None:
            return
        if not hasattr(config, SEVERAL):
            setattr(config, SEVERAL, uses_mrope(config))
            if not getattr(config, SEVERAL):
                config.mrope_section = [1] * CHANNELS  # not in text_config: its rotary embedding stays
        model_config.multimodal_config.video_pruning_rate = 0.5  # any above 0: "this model sets positions"

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        if Options.of(vllm_config.model_config.hf_config).method is None:
            return
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages > 1:
            raise TrimError(
                f"the model is served in {stages} stages, of which only the first one sees images and their places: "
                "share it by --tensor-parallel-size, or serve several copies (--data-parallel-size)"
            )
        compilation = vllm_config.compilation_config
        for name in ("compile_mm_encoder", "cudagraph_mm_encoder"):
            if getattr(compilation, name, False):
                raise TrimError(f"{name} is set, but inside a compiled encoder nothing can be heard: leave it away")


def guarded(other: type[VerifyAndUpdateConfig] | None) -> type[VerifyAndUpdateConfig]:
    """The rules of one of vLLM's own model classes, which the option would not reach: it is refused there."""
    base: Any = other or VerifyAndUpdateConfig

    class Guarded(base):
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            if getattr(model_config.hf_config, KEY, None):
                raise TrimError(
                    f"{model_config.architecture} is a class of vLLM's own, which {KEY} does not reach: say "
                    "--model-impl transformers"
                )
            base.verify_and_update_model_config(model_config)

    return Guarded
