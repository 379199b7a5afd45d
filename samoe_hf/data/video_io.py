"""Reading and writing of frames and label images.

Every reader hands out frames as `FrameSequence`: a lazily decoded sequence of (H, W, 3) uint8 RGB arrays.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image

from samoe_hf.errors import InputError

IMAGE_SUFFIXES = (".bmp", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
LABEL_FORMATS = ("BMP", "GIF", "PNG", "TIFF")  # which keep every value
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # among Pillow's others are some that run programs
# FFmpeg also takes text for a video (as a terminal's output) and playlists, which name other files.
CONTAINER_FORMATS = "3g2,3gp,apng,asf,avi,dv,flv,gif,ivf,m4a,matroska,mj2,mov,mp4,mpeg,mpegts,mxf,nut,ogg,webm,wtv"


# What libraries raise for damaged files.
DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, MemoryError)
DAMAGE += (RecursionError, struct.error, zlib.error)


class SampleError(InputError):
    """A file or a sample of a dataset cannot be used; the message names it."""


@contextmanager
def named_errors(name: str | Path, problem: str, damage: tuple[type[Exception], ...] = DAMAGE) -> Iterator[None]:
    """Makes what is raised for a damaged file a `SampleError` that names it; a file that is not there stays such.

    Args:
        name: the file, or what else is read.
        problem: what to say of it, such as "not a readable image".
        damage: what libraries raise.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except SampleError as error:
        if str(name) in str(error):
            raise
        raise SampleError(f"{name}: {error}") from error
    except damage as error:
        raise SampleError(f"{name}: {problem} ({error!r})") from error


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
        chosen = range(len(self))[index]
        return self._read(chosen) if isinstance(chosen, int) else [self._read(i) for i in chosen]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._read(i) for i in range(len(self)))


class ArrayFrames(FrameSequence):
    """Frames already in memory: (T, H, W) or (T, H, W, 3) uint8; gray values are repeated over the three channels."""

    def __init__(self, frames: np.ndarray, fps: float | None = None):
        is_video = frames.ndim == 3 or (frames.ndim == 4 and frames.shape[-1] == 3)
        if frames.dtype != np.uint8 or not is_video or 0 in frames.shape:
            raise SampleError(f"frames must be uint8 (T, H, W) or (T, H, W, 3), not {frames.dtype} {frames.shape}")
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
            raise SampleError(f"{self.paths[index]}: frame of size {frame.shape[:2]}, not {self.size} as the first")
        return frame


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


def check_inside(name: str, source: str | Path) -> None:
    """Raises `SampleError` for a name, held by `source`, that leads out of the folder that it is joined to."""
    parts = Path(name).parts if isinstance(name, str) else ()
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise SampleError(f"{source}: {name!r} is no path within a folder")


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which "frame10" follows "frame9"."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def image_paths(folder: str | Path) -> list[Path]:
    """The image files of a folder, by their suffixes, in natural order.

    Raises:
        FileNotFoundError: there is no such folder.
        SampleError: it holds no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    with os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    paths = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise SampleError(f"{folder}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(paths, key=lambda path: natural_key(path.name))


def read_video(path: str | Path) -> FrameSequence:
    """Opens a video file (any container and codec FFmpeg reads) or a folder of images.

    Raises:
        FileNotFoundError: the path does not exist.
        SampleError: an empty folder, or no video; on access, also a frame that is damaged or differs in size.
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


@contextmanager
def open_image(source: str | Path | bytes, name: str | None = None) -> Iterator[Image.Image]:
    """Opens an image file or an encoded image; errors while it is open name it and become `SampleError`.

    Images of more pixels than `PIL.Image.MAX_IMAGE_PIXELS` are refused before they are decoded.

    Args:
        source: a path, or the file's bytes.
        name: what to call it in messages; the path by default.
    """
    name = name or str(source)
    stream = BytesIO(source) if isinstance(source, bytes) else source
    limit = f"more than {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS) are not decoded"
    with (
        named_errors(name, limit, (Image.DecompressionBombError,)),
        named_errors(name, "not a readable image", (*DAMAGE, SyntaxError)),  # Pillow's for some damaged PNGs
        Image.open(stream, formats=IMAGE_FORMATS) as image,
    ):
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        yield image


def read_image(source: str | Path | bytes, name: str | None = None) -> np.ndarray:
    """Reads an image file, or an encoded image's bytes, as (H, W, 3) uint8 RGB.

    Raises:
        SampleError: a damaged file, or more than 8 bits per channel.
    """
    with open_image(source, name) as image:
        if image.mode.startswith(("I", "F")):
            raise SampleError(f"{name or source}: {image.mode} image; frames must have 8 bits per channel")
        return np.asarray(image.convert("RGB"))


def read_label_png(source: str | Path | bytes, name: str | None = None) -> np.ndarray:
    """Reads a label image: palette indices, gray values or 16-bit values as they are stored.

    A binary mask stored as 0 and 255 stays 0 and 255 here. Of an RGB image, grays are the values, and DAVIS' colours
    stand for ids.

    Args:
        source: a path, or the file's bytes.
        name: what to call it in messages; the path by default.

    Returns:
        (H, W) uint8, or uint16 for 16-bit files.

    Raises:
        SampleError: a damaged file, a format that may change values, ids above 65535, or colours that stand for none.
    """
    name = name or str(source)
    with open_image(source, name) as image:
        if image.format not in LABEL_FORMATS:
            known = ", ".join(LABEL_FORMATS)
            raise SampleError(f"{name}: {image.format} image; labels must be {known}: other formats may change ids")
        if image.mode in ("1", "L", "P"):
            return np.asarray(image).astype(np.uint8)
        if image.mode in ("RGB", "RGBA"):
            return _ids_of_colors(np.asarray(image)[..., :3], name)
        if not image.mode.startswith("I"):
            raise SampleError(f"{name}: {image.mode} image; labels must be a palette, gray or 16-bit image")
        values = np.asarray(image)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise SampleError(f"{name}: labels must be from 0 to 65535, not {values.min()} to {values.max()}")
    return values.astype(np.uint16)


def _ids_of_colors(colors: np.ndarray, name: str) -> np.ndarray:
    """Ids (H, W) of an RGB image (H, W, 3) of grays, or of DAVIS' colours."""
    if (colors[..., :1] == colors[..., 1:]).all():
        return colors[..., 0].copy()
    packed, known = (rgb.astype(int) @ np.array([1 << 16, 1 << 8, 1]) for rgb in (colors, voc_palette()))
    present, places = np.unique(packed, return_inverse=True)
    ids_of = {color: i for i, color in enumerate(known.tolist())}
    if not ids_of.keys() >= set(present.tolist()):
        raise SampleError(
            f"{name}: an RGB image of {len(present)} colours, such as "
            f"{', '.join(f'#{color:06x}' for color in present[:6])}; labels must be a palette, gray or 16-bit image of "
            "ids, 0 for background, or have DAVIS' colours"
        )
    return np.array([ids_of[color] for color in present.tolist()], np.uint8)[places].reshape(packed.shape)


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
    if ids.ndim != 2 or ids.dtype.kind not in "iub":
        raise InputError(f"{path}: ids must be (H, W) integers, not {ids.dtype} {ids.shape}")
    if ids.min(initial=0) < 0 or ids.max(initial=0) > 255:
        raise InputError(f"{path}: ids {ids.min()} to {ids.max()}; a palette holds 0 to 255, so renumber the objects")
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    image.save(path)
