"""Frames of video files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image

from samoe_hf.errors import InputError

from .frames import FrameSequence, SampleError, named_errors
from .image_files import IMAGE_SUFFIXES
from .images import ImageFrames, image_paths

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# FFmpeg also takes text for a video (as a terminal's output) and playlists, which name other files.
CONTAINER_FORMATS = "3g2,3gp,apng,asf,avi,dv,flv,gif,ivf,m4a,matroska,mj2,mov,mp4,mpeg,mpegts,mxf,nut,ogg,webm,wtv"


@lru_cache(maxsize=16384)
def index_container(path: Path, modified_ns: int, num_bytes: int) -> dict[str, Any]:
    """What is known of a container before its frames are decoded, by demuxing it once and decoding its first frame.

    Args:
        path: the file.
        modified_ns, num_bytes: its time of modification and its size: a file that has changed is indexed anew.

    Returns:
        `times` of the frames and `key_times` of those that decoding can start from, ascending, in the stream's units;
        `size` (height, width) of an upright frame; and `fps`, None where it is not known.
    """
    with named_errors(path, "not a readable video", (FFmpegError, MemoryError)), open_container(path) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        if any(packet.pts is None for packet in packets):
            raise SampleError(f"{path}: packets without time stamps; remux the file, e.g. with ffmpeg to .mp4")
        times = np.sort([packet.pts for packet in packets])
        key_times = np.sort([packet.pts for packet in packets if packet.is_keyframe])
        container.seek(int(times[0]) if packets else 0, stream=stream)
        first = next((frame for frame in container.decode(stream) if packets and frame.pts == times[0]), None)
        if first is None:
            raise SampleError(f"{path}: its first frame cannot be decoded; the file is empty, cut off or damaged")
        fps = float(stream.average_rate) if stream.average_rate else None
        return {"times": times, "key_times": key_times, "size": upright(first).shape[:2], "fps": fps}


def open_container(path: Path) -> Any:
    """Opens a container, of which FFmpeg reads this file alone, and no frames of more pixels than Pillow reads."""
    options = {"format_whitelist": CONTAINER_FORMATS, "protocol_whitelist": "file"}
    container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    stream = next(iter(container.streams.video), None)
    if stream is None or stream.codec_context is None:
        container.close()
        raise SampleError(f"{path}: no video stream in this file that can be decoded")
    stream.thread_type = "AUTO"
    if Image.MAX_IMAGE_PIXELS:
        stream.codec_context.options = {"max_pixels": str(Image.MAX_IMAGE_PIXELS)}
    return container


def upright(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8 RGB, turned as the file's display matrix says."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


class ContainerFrames(FrameSequence):
    """Frames of a video container through PyAV, turned upright as the file's display matrix says.

    Access seeks by key frames; in ascending order each frame is decoded once.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._container: Any = None
        status = self.path.stat()
        index = index_container(self.path, status.st_mtime_ns, status.st_size)
        self._times, self._key_times, self.size, self.fps = index.values()
        self.names = [f"{i:05d}" for i in range(len(self._times))]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_container": None, "_decoder": None}

    def _prepare(self, index: int) -> None:
        """Leaves `_decoder` at or before the frame, seeking only where decoding on would take longer."""
        time = self._times[index]
        # An FFmpeg context shared with a forked parent would share its position in the file.
        if self._container is None or self._owner != os.getpid():
            self._container, self._owner = open_container(self.path), os.getpid()
        elif self._decoded < index:
            last_key = self._key_times[: np.searchsorted(self._key_times, time, side="right")][-1:]
            if self._decoded == index - 1 or (last_key <= self._times[self._decoded]).all():
                return
        stream = self._container.streams.video[0]
        self._container.seek(int(time), stream=stream)
        self._decoder = self._container.decode(stream)

    def _read(self, index: int) -> np.ndarray:
        try:
            self._prepare(index)
            for frame in self._decoder:
                if frame.pts == self._times[index]:
                    self._decoded = index
                    pixels = upright(frame)
                    if pixels.shape[:2] != self.size:
                        raise SampleError(f"{self.path}: frame {index} of size {pixels.shape[:2]}, not {self.size}")
                    return pixels
        except (FFmpegError, MemoryError) as error:
            self._container = None
            raise SampleError(f"{self.path}: frame {index} cannot be decoded ({error})") from error
        self._container = None
        raise SampleError(f"{self.path}: frame {index} of {len(self)} is missing; the file is cut off or damaged")


def read_video(path: str | Path) -> FrameSequence:
    """Opens a video file (any container and codec FFmpeg reads), an image file of several pages, or a folder of images.

    Raises:
        FileNotFoundError: the path does not exist.
        SampleError: an empty folder, or no video; on access, also a frame that is damaged or differs in size.
    """
    path = Path(path)
    if path.is_dir():
        return ImageFrames(image_paths(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video file or folder of frames")
    return ImageFrames([path]) if path.suffix.lower() in IMAGE_SUFFIXES else ContainerFrames(path)


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
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        for i, frame in enumerate(chain([first], iterator)):
            if frame.dtype != np.uint8 or frame.shape != (height, width, 3):
                raise InputError(f"{path}: frame {i} is {frame.dtype} {frame.shape}, not uint8 {(height, width, 3)}")
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())
