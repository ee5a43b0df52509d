"""How well the joint space of a bundled text tower ranks the patches of an object by the object's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.zoo.scenes import draw_scene
from visiontrim.zoo.suite import HELD_OUT


class PhraseScores(NamedTuple):
    """Means over the objects of all scenes."""

    phrases: int
    area: float
    """Area under the ROC curve: how often a patch of an object that the phrase names scores above another patch."""
    hits: float
    """How often the best patch is one of them."""


EMBEDDINGS: dict[str, Callable[[Any, Any], Float[Tensor, "patches width"]]] = {
    "post_layernorm(last_hidden_state)": lambda vision, out: vision.post_layernorm(out.hidden_states[-1][0, 1:]),
    "last_hidden_state": lambda vision, out: out.hidden_states[-1][0, 1:],
    "post_layernorm(hidden_states[-2])": lambda vision, out: vision.post_layernorm(out.hidden_states[-2][0, 1:]),
    "hidden_states[-2]": lambda vision, out: out.hidden_states[-2][0, 1:],
}
"""What ``visual_projection`` may get of each patch; the first is as trained."""


@torch.inference_mode()
def phrase_scores(
    bundle: Any,
    scenes: int,
    embedding: str = next(iter(EMBEDDINGS)),
    told: Callable[[], object] = lambda: None,
) -> PhraseScores:
    """Cosines of phrases such as "a red digit 7" with the patches of the held-out scenes that show what they name.

    ``told`` is called after each scene.
    """
    clip, areas, hits = bundle.text_tower.model, [], []
    for seed in range(HELD_OUT, HELD_OUT + scenes):
        scene = draw_scene(seed)
        pixels = bundle.processor.image_processor(scene.image, return_tensors="pt")["pixel_values"]
        out = clip.vision_model(pixel_values=pixels, output_hidden_states=True)
        patches = F.normalize(clip.visual_projection(EMBEDDINGS[embedding](clip.vision_model, out)), dim=-1)
        phrases = [obj.phrase for obj in scene.objects]
        words = bundle.text_tower.tokenizer(phrases, padding=True, return_tensors="pt")
        texts = F.normalize(clip.get_text_features(**words).pooler_output, dim=-1)
        for phrase, text in zip(phrases, texts, strict=True):
            named = torch.tensor([False, *(other == phrase for other in phrases)])[torch.from_numpy(scene.patch_owner)]
            similarity = patches @ text
            areas.append((similarity[named][:, None] > similarity[~named]).float().mean().item())
            hits.append(named[similarity.argmax()].item())
        told()
    return PhraseScores(len(areas), sum(areas) / len(areas), sum(hits) / len(hits))
