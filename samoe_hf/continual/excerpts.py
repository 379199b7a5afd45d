"""Parts of videos, in memory and at a model's size."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from samoe_hf.data.schema import Video


def reduced(video: Video, size: int, zoom: float | None = None, frames: Sequence[int] | None = None) -> Video:
    """A video at another size, in memory.

    Args:
        size: height and width in pixels.
        zoom: crops to a square of this many times the side of what all objects cover on these frames.
        frames: annotated ones; all of these by default.
    """
    frames = video.annotated_frames if frames is None else frames
    masks = np.stack([video.masks(t) for t in frames])
    rows, columns = (slice(0, None), slice(0, None)) if zoom is None else _square_around(masks.any(axis=(0, 1)), zoom)
    pixels = [_resized(np.asarray(video.frames[t])[rows, columns], size) for t in frames]
    small = [
        [_resized(255 * mask[rows, columns].astype(np.uint8), size) >= 128 for mask in of_frame] for of_frame in masks
    ]
    return Video.from_arrays(video.video_id, np.stack(pixels), np.array(small), video.object_ids, domain=video.domain)


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))


def _square_around(mask: np.ndarray, zoom: float) -> tuple[slice, slice]:
    """Rows and columns of a square around a mask (H, W), within the frame."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return slice(0, None), slice(0, None)
    side = min(*mask.shape, round(zoom * (1 + max(np.ptp(rows), np.ptp(columns)))))
    corner = [
        int(np.clip((x.min() + x.max() + 1 - side) // 2, 0, extent - side))
        for x, extent in zip((rows, columns), mask.shape, strict=True)
    ]
    return slice(corner[0], corner[0] + side), slice(corner[1], corner[1] + side)
