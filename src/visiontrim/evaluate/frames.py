"""Frames of a video: a file that transformers' loader decodes, an animated picture, or a folder of pictures.

The decoder is an extra package (av, torchcodec, decord or opencv), the first that is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageSequence

from visiontrim.core.errors import TrimError
from visiontrim.images import load_image

BACKENDS = {"av": "pyav", "torchcodec": "torchcodec", "decord": "decord", "cv2": "opencv"}
"""Packages that decode, and what transformers calls them."""
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".MP4", ".gif")
"""Of videos, in the order in which a video without a suffix is looked for."""


@dataclass(frozen=True, slots=True)
class Frames:
    """So many frames of a video, evenly from its first to its last one."""

    path: Path
    count: int
    start: float | None = None
    """Seconds at which the part that is asked about begins; None: at the beginning."""
    end: float | None = None

    def load(self) -> list[Image.Image]:
        """The frames in order of time. Raises :class:`TrimError` for what cannot be decoded."""
        if self.path.is_dir():
            names = sorted(path for path in self.path.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
            if not names:
                raise TrimError(f"{self.path} holds no frames (.jpg or .png)")
            return [load_image(names[index]) for index in evenly(0, len(names) - 1, self.count)]
        if not self.path.is_file():
            raise TrimError(f"the video {self.path} does not exist")
        return self._animation() if self.path.suffix.lower() == ".gif" else self._decoded()

    def digest(self) -> str:
        total = hashlib.sha256(f"{self.count}|{self.start}|{self.end}".encode())
        paths = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        try:
            for path in paths:
                total.update(path.name.encode() + path.read_bytes())
        except OSError as error:
            raise TrimError(f"the video {self.path} cannot be read ({error.strerror or error})") from error
        return total.hexdigest()

    def _animation(self) -> list[Image.Image]:
        try:
            with Image.open(self.path) as image:
                shown = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
        except (OSError, ValueError, SyntaxError) as error:
            raise TrimError(f"the video {self.path} cannot be decoded ({error})") from error
        return [shown[index] for index in evenly(0, len(shown) - 1, self.count)]

    def _decoded(self) -> list[Image.Image]:
        from transformers.video_utils import load_video

        try:
            path: Any = str(self.path)  # its annotation forgets paths
            video, _ = load_video(path, backend=_backend(), sample_indices_fn=self._chosen)
        except TrimError:
            raise
        except Exception as error:  # decoders of broken files raise nearly everything
            raise TrimError(f"the video {self.path} cannot be decoded ({' '.join(str(error).split())})") from error
        frames = np.asarray(video)
        if frames.ndim == 4 and frames.shape[1] == 3 != frames.shape[-1]:
            frames = frames.transpose(0, 2, 3, 1)
        return [Image.fromarray(frames[index]) for index in evenly(0, len(frames) - 1, self.count)]

    def _chosen(self, metadata: Any, **_: Any) -> Int[np.ndarray, " frames"]:
        total = int(metadata.total_num_frames)
        if total < 1:
            raise TrimError(f"the video {self.path} does not say how many frames it has: copy it into a .mp4 anew")
        rate = float(metadata.fps or 1.0)
        first = 0 if self.start is None else min(int(self.start * rate), total - 1)
        last = total - 1 if self.end is None else max(first, min(int(self.end * rate), total - 1))
        return np.unique(evenly(first, last, self.count))


def evenly(first: int, last: int, count: int) -> Int[np.ndarray, " count"]:
    """``count`` whole numbers from ``first`` to ``last``; some of them twice where there are fewer."""
    return np.linspace(first, last, count, dtype=int)


def find_video(folder: Path, name: str) -> Path:
    """The video of that name in any of the usual formats; the first of them where there is none."""
    if Path(name).suffix in SUFFIXES or (folder / name).is_dir():
        return folder / name
    paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


def _backend() -> str:
    found = next((name for package, name in BACKENDS.items() if importlib.util.find_spec(package)), None)
    if found is None:
        raise TrimError("videos need a decoder: pip install av, or give each video as a folder of frames")
    return found
