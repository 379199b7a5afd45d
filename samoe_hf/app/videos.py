"""A session's video: what was uploaded, checked and kept in the session's folder; or a synthetic example.

Frames are decoded as they are needed, so that a long video does not fill the memory.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from samoe_hf.data.synthetic import SYNTHETIC_DOMAINS, SyntheticVideos
from samoe_hf.data.video_io import (
    IMAGE_SUFFIXES,
    FrameSequence,
    ImageFrames,
    SampleError,
    natural_key,
    open_image,
    read_video,
    write_video,
)
from samoe_hf.errors import InputError

from .archives import Archive, open_archive
from .limits import Limits

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv", ".gif")
DEFAULT_FPS = 12.0  # of frames without a video file
EXAMPLE_FRAMES, EXAMPLE_SIZE, EXAMPLE_FPS = 24, (192, 256), 12
# Name on the page -> look and seed of the synthetic video.
EXAMPLES = {
    "Shapes": ("shapes", 1),
    "Scenes": ("scenes", 9),
    "Paper": ("paper", 2),
    "Night": ("night", 5),
    "Blobs": ("blobs", 4),
    "Echoes": ("echoes", 0),
    "Stripes": ("stripes", 11),
}


class OpenedVideo(NamedTuple):
    """A video in the folder of a session. `name` is safe as a file's name; `fps` is always a number."""

    name: str
    frames: FrameSequence
    fps: float


def safe_name(name: str, default: str = "video") -> str:
    """A name for files, of letters, digits, `_` and `-`, at most 60: whatever a page sent."""
    stem = PurePosixPath(str(name).replace("\\", "/")).name.partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")[:60] or default


def hide_paths(text: str, folder: Path) -> str:
    """A message without the server's paths: of a file below the folder, its name is left."""
    return re.sub(rf"{re.escape(str(folder))}[^\s'\":]*?([^/\s'\":]*)(?=$|[\s'\":)])", r"\1", text)


@contextmanager
def hiding_paths(folder: Path) -> Iterator[None]:
    """Errors of files that are raised meanwhile do not name the server's paths."""
    try:
        yield
    except SampleError as error:
        raise SampleError(hide_paths(str(error), folder)) from error


def open_upload(paths: Sequence[str | Path], folder: Path, limits: Limits) -> OpenedVideo:
    """Takes uploaded files into a session's folder and opens them.

    Args:
        paths: one video file, one zip of images, or images, which are frames in the natural order of their names.
        folder: an empty one.

    Raises:
        SampleError: anything else, a damaged file, frames of different sizes, or more than the limits allow.
    """
    with hiding_paths(folder):
        return _open_upload([Path(path) for path in paths], folder, limits)


def _open_upload(paths: Sequence[Path], folder: Path, limits: Limits) -> OpenedVideo:
    if not paths:
        raise SampleError("No file was uploaded.")
    for path in paths:
        if path.stat().st_size > limits.upload_bytes:
            raise SampleError(f"{path.name} has more than {limits.upload_bytes} bytes.")
    suffixes = {path.suffix.lower() for path in paths}
    if len(paths) == 1 and suffixes == {".zip"}:
        with open_archive(paths[0], limits) as archive:
            files = _unpack_frames(archive, folder, limits)
        return _checked(safe_name(paths[0].name), ImageFrames(files), limits)
    if suffixes <= set(IMAGE_SUFFIXES):
        ordered = sorted(paths, key=lambda path: natural_key(path.name))
        if len(ordered) > limits.frames:
            raise SampleError(f"{len(ordered)} frames were uploaded; {limits.frames} are the most.")
        files = [folder / f"{i:05d}{path.suffix.lower()}" for i, path in enumerate(ordered)]
        for path, file in zip(ordered, files, strict=True):
            keep_file(path, file)
        return _checked(safe_name(ordered[0].name, "frames"), ImageFrames(files), limits)
    if len(paths) > 1:
        raise SampleError("Upload one video, one zip of frames, or images only.")
    if suffixes - set(VIDEO_SUFFIXES):
        raise SampleError(f"{paths[0].name} is neither a video, nor a zip, nor an image.")
    file = folder / f"video{paths[0].suffix.lower()}"
    keep_file(paths[0], file)
    return open_kept(safe_name(paths[0].name), file, limits)


def open_kept(name: str, path: Path, limits: Limits) -> OpenedVideo:
    """Opens a video file, or a folder of frames, that lies in a session's folder already; checks it.

    Raises:
        SampleError: as [`open_upload`].
    """
    with hiding_paths(path if path.is_dir() else path.parent):
        return _checked(name, read_video(path), limits)


def keep_file(source: Path, target: Path) -> None:
    """Takes a file into a session's folder, without a copy where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _unpack_frames(archive: Archive, folder: Path, limits: Limits) -> list[Path]:
    """The images of a zip, all of one folder, as numbered files."""
    names = [name for name in archive.names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise SampleError(f"The zip holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    if len({PurePosixPath(name).parent for name in names}) > 1:
        raise SampleError("The zip holds images in several folders; zip the frames of one video.")
    if len(names) > limits.frames:
        raise SampleError(f"The zip holds {len(names)} frames; {limits.frames} are the most.")
    files = []
    for number, name in enumerate(sorted(names, key=natural_key)):
        files.append(folder / f"{number:05d}{PurePosixPath(name).suffix.lower()}")
        archive.unpack(name, files[-1], limits.upload_bytes)
    return files


def _checked(name: str, frames: FrameSequence, limits: Limits) -> OpenedVideo:
    height, width = frames.size
    if len(frames) > limits.frames:
        raise SampleError(f"{name} has {len(frames)} frames; {limits.frames} are the most.")
    if height * width > limits.pixels:
        raise SampleError(f"{name} has frames of {width} x {height} pixels; {limits.pixels} pixels are the most.")
    if isinstance(frames, ImageFrames):
        _check_sizes(frames)
    frames[0]  # decoded now, so that a damaged video is refused before it is shown
    fps = frames.fps or DEFAULT_FPS
    return OpenedVideo(name, frames, fps if 0.1 <= fps <= 240 else DEFAULT_FPS)


def _check_sizes(frames: ImageFrames) -> None:
    """Checks by their headers that all images have the first one's size."""
    for number, path in enumerate(frames.paths):
        with open_image(path, f"frame {number}") as image:
            if (image.height, image.width) != frames.size:
                raise SampleError(
                    f"Frame {number} has {image.width} x {image.height} pixels, but the first has "
                    f"{frames.size[1]} x {frames.size[0]}."
                )


def write_example(name: str, folder: Path) -> Path:
    """Writes a synthetic example as a video file into a session's folder.

    Raises:
        ValueError: an unknown example.
    """
    if name not in EXAMPLES:
        raise InputError(f"`example` must be one of {', '.join(EXAMPLES)}, got {name!r}.")
    look, seed = EXAMPLES[name]
    assert look in SYNTHETIC_DOMAINS
    video = SyntheticVideos(1, EXAMPLE_FRAMES, EXAMPLE_SIZE, domain=look, seed=seed)[0]
    path = folder / f"{look}.mp4"
    write_video(path, (np.ascontiguousarray(frame) for frame in video.frames), fps=EXAMPLE_FPS)
    return path
