"""Corrected videos, collected in a folder that `load_videos` reads: `<video>/frames/*` with `<video>/masks/*.png`."""

from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from samoe_hf.data.video_io import write_palette_png
from samoe_hf.errors import InputError
from samoe_hf.model.weights_io import new_folder

from .session import TrackingSession

MAX_COLLECTED_FRAMES = 300
LEAST_FRAMES = 2
# Small frames are kept as they are, since little is lost in them; larger ones as JPEGs.
LOSSLESS_PIXELS, QUALITY = 512 * 512, 95


def collect_video(session: TrackingSession, data: Path) -> Path:
    """Adds a session's video with its masks to the data set; nothing that is there is changed.

    Frames without masks are left out; of very many, the first 300 are taken.

    Returns:
        the new folder of the video, named after it, with a number where there is one of that name.

    Raises:
        InputError: if fewer than two frames have masks, or no mask shows an object.
    """
    with session.exclusive():
        frames = sorted(session.masks.frames)[:MAX_COLLECTED_FRAMES]
        if len(frames) < LEAST_FRAMES:
            raise InputError("Track the video first: only what was tracked, and corrected, can be learned from.")
        if not any(session.id_map(frame).any() for frame in frames):
            raise InputError("The masks of this video are all empty: there is nothing to learn from them.")
        target = _free_folder(data, session.video.name)
        suffix = "png" if np.prod(session.video.frames.size) <= LOSSLESS_PIXELS else "jpg"
        with new_folder(target) as folder:
            (folder / "frames").mkdir()
            (folder / "masks").mkdir()
            for frame in frames:
                image = Image.fromarray(np.ascontiguousarray(session.frame(frame)))
                image.save(folder / "frames" / f"{frame:05d}.{suffix}", quality=QUALITY)
                write_palette_png(folder / "masks" / f"{frame:05d}.png", session.id_map(frame))
    return target


def collected(data: Path) -> list[Path]:
    """The folders of the videos of a data set, none if it is not there."""
    if not data.is_dir():
        return []
    return sorted(path for path in data.iterdir() if (path / "masks").is_dir() and (path / "frames").is_dir())


def _free_folder(data: Path, name: str) -> Path:
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(data / one for one in names if not (data / one).exists())
