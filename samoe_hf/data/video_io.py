"""Reading and writing of frames and label images.

Every reader hands out frames as `FrameSequence`: a lazily decoded sequence of (H, W, 3) uint8 RGB arrays.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class SampleError(ValueError):
    """A file or a sample of a dataset cannot be used; the message names it."""


class FrameSequence(Sequence, ABC):
    """A video's frames, decoded on access: (H, W, 3) uint8 RGB arrays, all of one size.

    Attributes:
        names: one name per frame: file stems, or "00000", "00001"… where frames have no files.
        size: (height, width) in pixels.
        fps: frames per second where the source tells it, else None.
    """

    names: list[str]
    size: tuple[int, int]
    fps: float | None = None

    @abstractmethod
    def _read(self, index: int) -> np.ndarray:
        """Decodes the frame at a non-negative index."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"frame {index} of a video with {len(self)} frames")
        return self._read(position)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._read(i) for i in range(len(self)))


class ArrayFrames(FrameSequence):
    """Frames already in memory: (T, H, W) or (T, H, W, 3) uint8; gray values are repeated over the three channels."""

    def __init__(self, frames: np.ndarray, fps: float | None = None):
        if frames.dtype != np.uint8 or not (frames.ndim == 3 or (frames.ndim == 4 and frames.shape[-1] == 3)):
            raise SampleError(f"frames must be uint8 (T, H, W) or (T, H, W, 3), not {frames.dtype} {frames.shape}")
        if 0 in frames.shape:
            raise SampleError(f"a video without frames or pixels: {frames.shape}")
        self.array, self.fps = frames, fps
        self.names = [f"{i:05d}" for i in range(len(frames))]
        self.size = frames.shape[1:3]

    def _read(self, index: int) -> np.ndarray:
        frame = self.array[index]
        return np.repeat(frame[..., None], 3, axis=-1) if frame.ndim == 2 else frame


class ImageFrames(FrameSequence):
    """Frames in image files, in the given order."""

    def __init__(self, paths: Sequence[str | Path]):
        if not paths:
            raise SampleError("a video without frames")
        self.paths = [Path(path) for path in paths]
        self.names = [path.stem for path in self.paths]
        with open_image(self.paths[0]) as image:
            self.size = (image.height, image.width)

    def _read(self, index: int) -> np.ndarray:
        frame = read_image(self.paths[index])
        if frame.shape[:2] != self.size:
            raise SampleError(
                f"{self.paths[index]}: frame of size {frame.shape[:2]}, but the video's first has {self.size}"
            )
        return frame


class ContainerFrames(FrameSequence):
    """Frames of a video container through PyAV, turned upright as the file's display matrix says.

    On construction the container is indexed (demuxed, not decoded) and its first frame decoded. Access seeks by key
    frames; in ascending order each frame is decoded once.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._container: Any = None
        try:
            self._index_packets()
        except av.FFmpegError as error:
            raise SampleError(f"{self.path}: not a readable video ({error})") from error
        if not self._times:
            raise SampleError(f"{self.path}: no frames in this video")
        self.names = [f"{i:05d}" for i in range(len(self._times))]
        self.size = self._read(0).shape[:2]

    def _index_packets(self) -> None:
        with av.open(str(self.path)) as container:
            if not container.streams.video:
                raise SampleError(f"{self.path}: no video stream in this file")
            stream = container.streams.video[0]
            self.fps = float(stream.average_rate) if stream.average_rate else None
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            if any(packet.pts is None for packet in packets):
                raise SampleError(f"{self.path}: packets without time stamps; remux the file, e.g. with ffmpeg to .mp4")
            self._times = sorted(packet.pts for packet in packets)
            self._key_times = sorted(packet.pts for packet in packets if packet.is_keyframe)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_container": None, "_decoder": None}

    def _open(self) -> None:
        self._container, self._owner = av.open(str(self.path)), os.getpid()
        self._container.streams.video[0].thread_type = "AUTO"

    def _prepare(self, index: int) -> None:
        """Leaves `_decoder` at or before the frame, seeking only where decoding on would take longer."""
        # An FFmpeg context shared with a forked parent would share its position in the file.
        if self._container is None or self._owner != os.getpid():
            self._open()
        elif self._decoded == index - 1:
            return
        else:
            key = bisect_right(self._key_times, self._times[index]) - 1
            if self._decoded < index and self._key_times[max(key, 0)] <= self._times[self._decoded]:
                return
        stream = self._container.streams.video[0]
        self._container.seek(self._times[index], stream=stream)
        self._decoder = self._container.decode(stream)

    def _read(self, index: int) -> np.ndarray:
        try:
            self._prepare(index)
            for frame in self._decoder:
                if frame.pts == self._times[index]:
                    self._decoded = index
                    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        except av.FFmpegError as error:
            self._container = None
            raise SampleError(f"{self.path}: frame {index} cannot be decoded ({error})") from error
        self._container = None
        raise SampleError(
            f"{self.path}: frame {index} of {len(self._times)} is missing; the file is cut off or damaged"
        )


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which "frame10" follows "frame9"."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def image_paths(folder: str | Path) -> list[Path]:
    """The .jpg, .jpeg and .png files of a folder in natural order.

    Raises:
        FileNotFoundError: there is no such folder.
        SampleError: it holds no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    paths = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not paths:
        raise SampleError(f"{folder}: no {', '.join(IMAGE_SUFFIXES)} files in this folder")
    return sorted(paths, key=lambda path: natural_key(path.name))


def read_video(path: str | Path) -> FrameSequence:
    """Opens a video file (any container and codec FFmpeg reads) or a folder of .jpg, .jpeg or .png frames.

    Raises:
        FileNotFoundError: nothing is there.
        SampleError (a ValueError): an empty folder or a file that is no video; on access, also a frame that is
            damaged or whose size differs from the first one's.
    """
    path = Path(path)
    if path.is_dir():
        return ImageFrames(image_paths(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video file or folder of frames")
    return ContainerFrames(path)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float = 24) -> None:
    """Writes (H, W, 3) uint8 RGB frames as H.264 (yuv420p, which every browser plays).

    That format needs even sizes: an odd height or width is extended by repeating its last row or column.

    Raises:
        ValueError: no frames, a frame of another dtype or size than expected.
    """
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"{path}: no frames to write")
    height, width = first.shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        for i, frame in enumerate(chain([first], iterator)):
            if frame.dtype != np.uint8 or frame.shape != (height, width, 3):
                raise ValueError(f"{path}: frame {i} is {frame.dtype} {frame.shape}, not uint8 {(height, width, 3)}")
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())


@contextmanager
def open_image(source: str | Path | bytes, name: str | None = None) -> Iterator[Image.Image]:
    """Opens an image file or an encoded image; errors while it is open name it and become `SampleError`.

    Args:
        source: a path, or the file's bytes.
        name: what to call it in messages; the path by default.
    """
    name = name or str(source)
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image") from None
    except SampleError:
        raise
    except (OSError, ValueError, EOFError, SyntaxError) as error:  # Pillow reports some damaged PNGs as SyntaxError
        raise SampleError(f"{name}: not a readable image ({error})") from error


def read_image(source: str | Path | bytes, name: str | None = None) -> np.ndarray:
    """Reads an image file, or an encoded image's bytes, as (H, W, 3) uint8 RGB.

    Raises:
        SampleError: a damaged file, or more than 8 bits per channel.
    """
    with open_image(source, name) as image:
        if image.mode.startswith(("I", "F")):
            raise SampleError(f"{name or source}: {image.mode} image; frames must have 8 bits per channel")
        return np.asarray(image.convert("RGB"))


def read_label_png(path: str | Path) -> np.ndarray:
    """Reads a label image: palette indices, gray values or 16-bit values as they are stored.

    A binary mask stored as 0 and 255 stays 0 and 255 here.

    Returns:
        (H, W) uint8, or uint16 for 16-bit files.

    Raises:
        SampleError: a damaged file, or an image with colour channels instead of ids.
    """
    with open_image(path) as image:
        if image.mode in ("1", "L", "P"):
            return np.asarray(image).astype(np.uint8)
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.uint16)
        raise SampleError(f"{path}: {image.mode} image; labels must be a palette, gray or 16-bit image")


def voc_palette() -> np.ndarray:
    """The colour map of PASCAL VOC and DAVIS, (256, 3) uint8: an id's bits, spread over the channels' high bits."""
    ids = np.arange(256)
    channels = [sum(((ids >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def write_palette_png(path: str | Path, ids: np.ndarray) -> None:
    """Writes (H, W) integer ids, 0 for background, as a palette PNG in DAVIS' colours.

    Raises:
        ValueError: ids outside 0..255, which a palette cannot hold, or another shape or dtype.
    """
    if ids.ndim != 2 or not (np.issubdtype(ids.dtype, np.integer) or ids.dtype == bool):
        raise ValueError(f"{path}: ids must be (H, W) integers, not {ids.dtype} {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() > 255):
        raise ValueError(
            f"{path}: ids {ids.min()} to {ids.max()}; a palette PNG holds 0 to 255, so renumber the objects"
        )
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    image.save(path)
