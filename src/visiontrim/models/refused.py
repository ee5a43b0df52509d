"""Why models that transformers has for images, or for images among others, do not run: by type, in a sentence.

It knows model types; docs/models.md prints these sentences. Types that nobody has looked at are not here.
"""

from __future__ import annotations

TOGETHER = "the answer comes from a decoder with cross-attention to an encoder: an image is no tokens of the prompt"
CROSS = "cross-attention: images are keys of layers of their own, and no tokens of the prompt"
QUERIES = "a fixed number of learned queries stands for the image, or an older layout without `get_image_features`"
ONE_MODULE = "encoder and decoder, or decoder and head, are one module, between whose parts no tokens can be removed"
ADDED_LATER = "features are added to empty placeholders before several decoder layers, and never enter as tokens"
DENOISED = "an answer is denoised block by block by a decoder of its own, and not written token after token"
TEXT_ALONE = "the class that transformers has for it takes no images"
SOUND = "it takes sound and no images"
WHOLE_OMNI = "it is a whole omni model: trim its part that reads, `vt.trim(model.thinker, ...)`"

REASONS: dict[str, tuple[str, ...]] = {
    TOGETHER: ("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"),
    CROSS: ("evolla", "idefics", "mllama"),
    QUERIES: ("blip", "blip-2", "git", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5", "pi0"),
    ONE_MODULE: ("chameleon", "llama4", "nemotron_h_omni", "phi4_multimodal"),
    ADDED_LATER: ("granite4_vision",),
    DENOISED: ("diffusion_gemma",),
    TEXT_ALONE: ("mistral4",),
    WHOLE_OMNI: ("qwen2_5_omni", "qwen3_omni_moe"),
    SOUND: (
        "fun_asr_nano",
        "glmasr",
        "granite_speech",
        "granite_speech_plus",
        "kyutai_speech_to_text",
        "moss_transcribe_diarize",
        "nemo_speechlm",
        "omniasr",
        "qwen2_audio",
        "qwen3_asr",
        "vibevoice_asr",
        "voxtral",
        "voxtral_realtime",
    ),
}
"""Reasons with the types that have them."""
REFUSED: dict[str, str] = {name: reason for reason, names in REASONS.items() for name in names}
"""By type its reason."""
