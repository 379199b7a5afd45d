"""Videos with what label tools have trouble with."""

from pathlib import Path

import numpy as np
from PIL import Image

from samoe_hf.data import Video
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.data.images import ImageFrames

SIZE = (30, 44)


def ring(y: int, x: int, size: int = 12) -> np.ndarray:
    """A square with a hole, in which there is a dot."""
    mask = np.zeros(SIZE, bool)
    mask[y : y + size, x : x + size] = True
    mask[y + 3 : y + size - 3, x + 2 : x + size - 4] = False
    mask[y + 5, x + 4] = True
    return mask


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def odd_videos(folder: Path, overlapping: bool = True) -> list[Video]:
    """Holes, several parts, corners that touch, ids above 255, empty frames, frames without annotation, EXIF."""
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 3, *SIZE), bool)  # frames 0, 1, 3, 4 of 6
    masks[0, 0], masks[0, 1] = ring(1, 1), ring(16, 20)
    masks[0, 0, 28:, 40:] = True  # at the border
    masks[1, 1] = rng.random(SIZE) < 0.3  # many parts, whose corners touch
    masks[3, 2, 2:9, 2:9] = True  # all are absent from the third
    if overlapping:
        masks[0, 2] = ring(3, 3)
    exif = Image.Exif()
    exif[274] = 6
    frames = []
    for t in range(6):
        frame = rng.integers(0, 255, (*SIZE[::-1], 3), dtype=np.uint8)  # lies on its side
        frames.append(save(folder / "turned" / f"{t:05d}.jpg", frame, exif=exif))
    turned = MaskArrays(masks, [1, 7, 300], [0, 1, 3, 4])
    one = Video("turned", ImageFrames(frames), turned, classes={1: "cat", 7: "dog", 300: "cat"})
    plain = [save(folder / "b" / f"f{t}.png", np.full((*SIZE, 3), 40 * t, np.uint8)) for t in range(3)]
    own = np.stack([np.stack([ring(2, 2 + t)]) for t in range(3)])
    other = Video("set/b", ImageFrames(plain), MaskArrays(own, [2]), classes={2: "bird"})
    return [one, other]
