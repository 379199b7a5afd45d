"""Videos in files: containers, images and folders of them are read, H.264 is written."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np

from samoe_hf.errors import InputError

from .container_index import MAX_FRAMES
from .containers import ContainerFrames
from .frames import FrameSequence
from .image_files import IMAGE_SUFFIXES
from .images import ImageFrames, image_paths

VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".h264", ".hevc", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
)


def read_video(path: str | Path, max_frames: int = MAX_FRAMES) -> FrameSequence:
    """Opens a video file (any container and codec FFmpeg reads), an image file of several pages, or a folder of images.

    Args:
        path: the file or folder.
        max_frames: a video file with more is refused, before they cost memory.

    Raises:
        FileNotFoundError: the path does not exist.
        SampleError: an empty folder, no video, or too many frames; on access, also a frame that is damaged or differs
            in size.
    """
    path = Path(path)
    if path.is_dir():
        return ImageFrames(image_paths(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video file or folder of frames")
    return ImageFrames([path]) if path.suffix.lower() in IMAGE_SUFFIXES else ContainerFrames(path, max_frames)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float = 24) -> None:
    """Writes (H, W, 3) uint8 RGB frames as H.264 (yuv420p, which every browser plays).

    That format needs even sizes: an odd height or width is extended by repeating its last row or column.

    Raises:
        ValueError: no frames, a frame of another dtype or size than expected.
    """
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise InputError(f"{path}: no frames to write")
    height, width = first.shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(max(fps, 0.01)).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        for i, frame in enumerate(chain([first], iterator)):
            if frame.dtype != np.uint8 or frame.shape != (height, width, 3):
                raise InputError(f"{path}: frame {i} is {frame.dtype} {frame.shape}, not uint8 {(height, width, 3)}")
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())
