"""The masks of a session: a palette PNG for each frame in the session's folder, so that they fill no RAM."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from samoe_hf.data.video_io import read_label_png, write_palette_png


class MaskStore:
    """Maps of ids (H, W) uint8, 0 for background, by frame.

    Args:
        folder: for the files; made if it is not there.
        size: (height, width) of all maps.

    Attributes:
        frames: that have a map.
    """

    def __init__(self, folder: Path, size: tuple[int, int]):
        self.folder, self.size = folder, size
        folder.mkdir(parents=True, exist_ok=True)
        self.frames: set[int] = set()

    def path(self, frame: int) -> Path:
        """The file of a frame, there or not."""
        return self.folder / f"{frame:05d}.png"

    def write(self, frame: int, id_map: np.ndarray) -> None:
        """Stores a frame's map in place of an earlier one."""
        write_palette_png(self.path(frame), id_map)
        self.frames.add(frame)

    def read(self, frame: int, object_ids: Collection[int]) -> np.ndarray:
        """A frame's map, of these objects only; all background where nothing was stored."""
        if frame not in self.frames:
            return np.zeros(self.size, dtype=np.uint8)
        kept = np.zeros(256, dtype=np.uint8)
        kept[list(object_ids)] = list(object_ids)
        return kept[read_label_png(self.path(frame))]

    def content_of(self, frame: int) -> bytes | None:
        """A frame's file, None where there is none; see [`restore`]."""
        return self.path(frame).read_bytes() if frame in self.frames else None

    def restore(self, frame: int, content: bytes | None) -> None:
        """Makes a frame's file what it was when [`content_of`] gave its content."""
        if content is None:
            self.path(frame).unlink(missing_ok=True)
            self.frames.discard(frame)
        else:
            self.path(frame).write_bytes(content)
            self.frames.add(frame)

    def clear(self) -> None:
        """Removes all maps."""
        for frame in self.frames:
            self.path(frame).unlink(missing_ok=True)
        self.frames.clear()
