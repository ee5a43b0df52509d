"""Fewer vision tokens in vLLM, out of its tree. Installed, it does nothing until a server is configured for it::

vllm serve MODEL --model-impl transformers --hf-overrides '{"visiontrim": {"method": "visiontrim", "keep": 64}}'
"""

from __future__ import annotations

from typing import Any

BACKEND = "TransformersMultiModalForCausalLM"
"""The class of vLLM that runs the vision-language models of transformers as they are."""


def register() -> None:
    """Called in every process of vLLM (front end, engine core, workers), possibly more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from visiontrim_vllm.configuring import Configured, guarded

    if issubclass(MODELS_CONFIG_MAP.get(BACKEND, object), Configured):
        return
    # a string, so that no process imports models before vLLM wants it
    ModelRegistry.register_model(BACKEND, "visiontrim_vllm.model:Trimmed")
    for name in ModelRegistry.get_supported_archs():  # a class of vLLM's own would leave the option unheard
        MODELS_CONFIG_MAP[name] = guarded(MODELS_CONFIG_MAP.get(name))
    MODELS_CONFIG_MAP[BACKEND] = Configured
    _mend_cpu_runner()


def _mend_cpu_runner() -> None:
    """The CPU runner of vLLM 0.32 loads models by a function of its own, which forgets that they may set positions.

    ``GPUModelRunner.load_model`` sets ``is_multimodal_pruning_enabled``, ``CPUModelRunner.load_model`` does not.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker import cpu_model_runner

    runner = cpu_model_runner.CPUModelRunner
    load = runner.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        config = self.model_config.multimodal_config
        if getattr(self.get_model(), "sets_positions", False) and config is not None:
            self.is_multimodal_pruning_enabled = config.is_multimodal_pruning_enabled()

    runner.load_model = load_model
