"""The masks of a session: a palette PNG for each frame in the session's folder, so that they fill no memory."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from samoe_hf.data.video_io import read_label_png, write_palette_png
from samoe_hf.errors import InputError


class MaskStore:
    """Maps of ids (H, W) uint8, 0 for background, by frame; empty where nothing was stored.

    Args:
        folder: for the files; made if it is not there.
        size: (height, width) of all maps.
    """

    def __init__(self, folder: Path, size: tuple[int, int]):
        self.folder, self.size = folder, size
        folder.mkdir(parents=True, exist_ok=True)
        self.frames: set[int] = set()

    def path(self, frame: int) -> Path:
        """The file of a frame, there or not."""
        return self.folder / f"{frame:05d}.png"

    def write(self, frame: int, id_map: np.ndarray) -> None:
        """Stores a frame's map in place of an earlier one; ValueError for another size."""
        if id_map.shape != tuple(self.size):
            raise InputError(f"The masks of frame {frame} have the size {id_map.shape}, but the video {self.size}.")
        write_palette_png(self.path(frame), id_map)
        self.frames.add(frame)

    def read(self, frame: int, object_ids: Collection[int]) -> np.ndarray:
        """A frame's map, of these objects only."""
        if frame not in self.frames:
            return np.zeros(self.size, dtype=np.uint8)
        kept = np.zeros(256, dtype=np.uint8)
        kept[list(object_ids)] = list(object_ids)
        return kept[read_label_png(self.path(frame))]

    def bytes_of(self, frame: int) -> bytes | None:
        """A frame's file, None where there is none; see [`restore`]."""
        return self.path(frame).read_bytes() if frame in self.frames else None

    def restore(self, frame: int, content: bytes | None) -> None:
        """Puts back what [`bytes_of`] gave."""
        self.frames.discard(frame)
        self.path(frame).unlink(missing_ok=True)
        if content is not None:
            self.path(frame).write_bytes(content)
            self.frames.add(frame)

    def clear(self) -> None:
        """Removes all maps."""
        for frame in self.frames:
            self.path(frame).unlink(missing_ok=True)
        self.frames.clear()
