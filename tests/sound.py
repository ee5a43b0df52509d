"""Prompts with sound, pictures, and videos with their sound in between, for tiny thinkers of omni models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from shrunk import CHANGES, END, IMAGE, START, VIDEO, built

THINKERS = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
AUDIO, BEGIN, OVER = 7, 8, 9
PER_SECOND = 4
"""Positions of a second, and so audio tokens: a frame of the videos here takes as long."""
IMAGES, FRAMES, FRAME = (1, 4, 6), 3, 4
"""Patches of an image, frames of a video, and tokens of such a frame."""


def thinker(name: str) -> Any:
    changes = dict(CHANGES[name])
    changes[""] = changes[""] | {"audio_start_token_id": BEGIN, "audio_end_token_id": OVER}
    changes[""] |= {"audio_token_index": AUDIO} if name == "qwen2_5_omni_thinker" else {"audio_token_id": AUDIO}
    changes[""] |= {"position_id_per_seconds": PER_SECOND, "seconds_per_chunk": 1}
    if name == "qwen3_omni_moe_thinker":  # transformers counts the tokens of windows of 100 frames
        changes["audio_config"] = changes["audio_config"] | {"n_window": 50, "n_window_infer": 100}
        changes["vision_config"] = {"deepstack_visual_indexes": [0, 1]}
    return built(name, changes)


def _spectrum(name: str, tokens: int) -> int:
    """Frames of a spectrogram that become so many audio tokens."""
    return 4 * tokens if name == "qwen2_5_omni_thinker" else 100 * (tokens // 13) + 8 * (tokens % 13)


class Prompts:
    """Rows list numbers of text tokens and ``("image",)``, ``("audio", tokens)``, ``("video",)``, ``("both", tokens)``.

    The last is a video with its sound in between, by time.
    """

    def __init__(self, name: str, *rows: Sequence[Any]) -> None:
        self._name = name
        self._both = any(not isinstance(part, int) and part[0] == "both" for row in rows for part in row)
        self._generator = torch.Generator().manual_seed(3)
        self._parts = [self._row(row) for row in rows]

    def _row(self, row: Sequence[Any]) -> tuple[list[int], dict[str, list[Tensor]]]:
        ids, given = [1], {"image": [], "video": [], "audio": []}
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(20, 200, (part,), generator=self._generator).tolist()
                continue
            kind, *sizes = part
            if kind == "image":
                ids += [START, *[IMAGE] * 6, END]
                given["image"].append(self._noise(24, 3 * 2 * 14**2))
            if kind == "audio":
                ids += [BEGIN, *[AUDIO] * sizes[0], OVER]
            if kind in ("video", "both"):
                given["video"].append(self._noise(FRAMES * 16, 3 * 2 * 14**2))
            if kind == "video":
                ids += [START, *[VIDEO] * FRAMES * FRAME, END]
            if kind == "both":
                heard, between = sizes[0], []
                for _ in range(FRAMES):
                    now = min(heard, PER_SECOND)
                    between += [VIDEO] * FRAME + [AUDIO] * now
                    heard -= now
                ids += [START, BEGIN, *between, *[AUDIO] * heard, OVER, END]
            if kind in ("audio", "both"):
                given["audio"].append(self._noise(128, _spectrum(self._name, sizes[0])))
        return ids, given

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def batch(self, *numbers: int) -> dict[str, Any]:
        """The rows of these ``numbers``, or all, padded at the left."""
        parts = [self._parts[number] for number in numbers or range(len(self._parts))]
        width = max(len(ids) for ids, _ in parts)
        ids = torch.stack([pad(torch.tensor(ids), (width - len(ids), 0)) for ids, _ in parts])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        images, videos, sounds = ([one for _, given in parts for one in given[kind]] for kind in parts[0][1])
        if images:
            inputs["pixel_values"] = torch.cat(images)
            inputs["image_grid_thw"] = torch.tensor([IMAGES] * len(images))
        if videos:
            inputs["pixel_values_videos"] = torch.cat(videos)
            inputs["video_grid_thw"] = torch.tensor([(FRAMES, 4, 4)] * len(videos))
            inputs["video_second_per_grid"] = torch.ones(len(videos))
            inputs["use_audio_in_video"] = self._both
        if sounds:
            longest = max(sound.shape[1] for sound in sounds)
            inputs["input_features"] = torch.stack([pad(sound, (0, longest - sound.shape[1])) for sound in sounds])
            lengths = torch.tensor([sound.shape[1] for sound in sounds])
            inputs["feature_attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return inputs


def gone(ids: Tensor, trace: Any, picture: int = IMAGE) -> dict[int, Tensor]:
    """By decoder layer the places that are gone from there on; ``picture`` is the placeholder of all pictures."""
    hidden: dict[int, Tensor] = {}
    for token, traced in ((picture, trace.images), (AUDIO, trace.sounds)):
        places = [row.nonzero()[:, 0] for row in ids == token]
        taken = [0] * len(ids)
        for part in traced:
            block = places[part.sample][taken[part.sample] :][: part.total]
            taken[part.sample] += part.total
            for stage in part.stages:
                dropped = torch.ones(part.total, dtype=torch.bool)
                dropped[stage.index] = False
                layer = getattr(stage.site, "index", 0)
                of_row = hidden.setdefault(layer, torch.zeros_like(ids, dtype=torch.bool))[part.sample]
                of_row[block[dropped]] = True
        assert taken == [len(row) for row in places] or not traced
    return dict(sorted(hidden.items()))
