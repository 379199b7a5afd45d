"""A session's video: what was uploaded, checked and kept in the session's folder; or a synthetic example.

What comes from outside is looked at before it is unpacked or decoded. Frames are decoded as they are needed, so that a
long video does not fill the RAM.
"""

import io
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from samoe_hf.data import video_io
from samoe_hf.data.frames import FrameSequence, SampleError, check_inside, frame_order, named_errors, natural_key
from samoe_hf.data.image_files import IMAGE_SUFFIXES, image_info
from samoe_hf.data.images import ImageFrames
from samoe_hf.data.synthetic import SyntheticVideos
from samoe_hf.data.video_io import read_video, write_video

VIDEO_SUFFIXES = (*video_io.VIDEO_SUFFIXES, ".gif")
DEFAULT_FPS = 12.0  # of frames without a video file
MAX_OTHER_FILES = 1000  # in a zip, beside the frames and their masks
PART_BYTES = 2**20
DIRECTORY_BYTES = 128  # in a zip's directory for each frame. A file of a project needs half as much
# What `zipfile` raises for what it cannot read.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError)
EXAMPLE_FRAMES, EXAMPLE_SIZE, EXAMPLE_FPS = 24, (192, 256), 12
# Look of a synthetic video, as it is called on the page -> its seed.
EXAMPLES = {"Shapes": 1, "Scenes": 9, "Paper": 2, "Night": 5, "Blobs": 4, "Echoes": 0, "Stripes": 11}


@dataclass(frozen=True)
class Limits:
    """How much one person may ask of the app."""

    upload_bytes: int = 512 * 2**20  # of all files of an upload together, and of all in a zip when they are unpacked
    frames: int = 30_000  # of a video
    pixels: int = 4096 * 2304  # of a frame
    objects: int = 32  # of a video
    prompts: int = 2000  # clicks and boxes of a video
    sessions: int = 32  # kept at once; another page is refused until one is free
    idle_seconds: float = 3600  # after which a session that nobody uses is freed
    grace_seconds: float = 60  # the same of a closed page's; a page that is loaded again within takes it up
    waiting: int = 64  # requests that may wait for the device


class Archive:
    """A zip that came from outside, after a look at its directory; nothing is unpacked. Made by [`open_archive`].

    `entries` are its files, by their paths below the archive, without folders, hidden files and what macOS adds
    (`__MACOSX`). A name that leads out of it or comes twice, an encrypted file, a link, and too many files or bytes are
    a `SampleError`.
    """

    def __init__(self, archive: zipfile.ZipFile, limits: Limits):
        self._archive, self._left = archive, limits.upload_bytes
        self.entries: dict[str, zipfile.ZipInfo] = {}
        infos, most = archive.infolist(), 2 * limits.frames + MAX_OTHER_FILES
        if len(infos) > most:
            raise SampleError(f"the zip has {len(infos)} files; {most} are the most")
        for info in infos:
            name = info.filename
            check_inside(name.replace("\\", "/"), "the zip")
            if info.is_dir() or any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts):
                continue
            if info.flag_bits & 1:
                raise SampleError(f"{name} in the zip is encrypted")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise SampleError(f"{name} in the zip is a link")
            if name in self.entries:
                raise SampleError(f"{name} is in the zip twice")
            self.entries[name] = info
        total = sum(info.file_size for info in self.entries.values())
        if total > limits.upload_bytes:
            raise SampleError(f"the zip holds {total} bytes when it is unpacked; {limits.upload_bytes} are the most")

    def read(self, name: str, max_bytes: int) -> bytes:
        """A file's bytes; SampleError if it is not there, is damaged, or holds more of them than `max_bytes`."""
        return b"".join(self._parts(name, max_bytes))

    def unpack(self, name: str, target: Path) -> None:
        """Writes a file of the archive to `target`; errors as in [`read`]."""
        with target.open("wb") as file:
            file.writelines(self._parts(name, self._left))

    def _parts(self, name: str, max_bytes: int) -> Iterator[bytes]:
        if name not in self.entries:
            raise SampleError(f"the zip has no file {name[:80]}")
        most = min(max_bytes, self._left)
        with named_errors(name, "cannot be read in the zip", DAMAGED_ZIP), self._archive.open(name) as file:
            while part := file.read(PART_BYTES):
                most -= len(part)  # what the directory says may be a lie, and a file may be asked for again and again
                self._left -= len(part)
                if most < 0:
                    raise SampleError(f"{name} in the zip is larger than it may be")
                yield part


@contextmanager
def open_archive(path: Path, limits: Limits) -> Iterator[Archive]:
    """Opens a zip; SampleError if it cannot be read, or as [`Archive`] says."""
    with _Parts(path) as file:
        file.most = max(PART_BYTES, DIRECTORY_BYTES * (limits.frames + MAX_OTHER_FILES))
        try:
            archive = zipfile.ZipFile(file)
        except DAMAGED_ZIP as error:
            raise SampleError(f"this is no zip that can be read ({error})") from error
        with archive:
            yield Archive(archive, limits)


class _Parts(io.FileIO):
    """A zip, which is read in parts. `zipfile` reads the directory at once, and makes far more of it in RAM."""

    most = PART_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        if left > self.most and not 0 <= (size or -1) <= self.most:
            raise SampleError(f"the directory of the zip has more than {self.most} bytes")
        return super().read(size)


@dataclass(frozen=True)
class OpenedVideo:
    """A video in the folder of a session: its name, safe for files, its frames, and the video file or all images."""

    name: str
    frames: FrameSequence
    files: list[Path]

    @property
    def fps(self) -> float:
        """Frames per second; a default where the file says none, or nonsense."""
        fps = self.frames.fps or DEFAULT_FPS
        return fps if 0.1 <= fps <= 240 else DEFAULT_FPS

    def frames_again(self) -> FrameSequence:
        """The frames with a decoder of their own, for another thread."""
        return copy(self.frames)


def safe_name(name: str) -> str:
    """A name for files, of letters, digits, `_` and `-`, at most 60: whatever a page sent."""
    stem = PurePosixPath(name.replace("\\", "/")).name.partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")[:60] or "video"


def hide_paths(text: str, folder: Path) -> str:
    """A message without the server's paths: of a file below the folder, its name is left."""
    place = re.escape(folder.as_posix()).replace("/", r"[/\\]+")  # on Windows, where quotes have each `\` twice
    return re.sub(rf"{place}[^\s'\":]*?([^/\\\s'\":]*)(?=$|[\s'\":)])", r"\1", text)


def open_upload(paths: Sequence[Path], folder: Path, limits: Limits) -> OpenedVideo:
    """Takes uploaded files into a session's empty folder and opens them; SampleError for more than the limits allow.

    They are one video file, one zip of images, or images in the natural order of their names.
    """
    if not paths:
        raise SampleError("No file was uploaded.")
    if sum(path.stat().st_size for path in paths) > limits.upload_bytes:
        raise SampleError(f"What was uploaded has more than {limits.upload_bytes} bytes.")
    ordered = [str(path) for path in frame_order(paths)]  # each lies in a folder that Gradio names by its content
    if len(paths) > 1 or paths[0].suffix.lower() != ".zip":
        return open_files(safe_name(ordered[0]), ordered, shutil.copyfile, folder, limits)
    with open_archive(paths[0], limits) as archive:
        images = [name for name in archive.entries if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise SampleError(f"The zip holds no images ({', '.join(IMAGE_SUFFIXES)}).")
        if len({PurePosixPath(name).parent for name in images}) > 1:
            raise SampleError("The zip holds images in several folders; zip the frames of one video.")
        return open_files(safe_name(ordered[0]), sorted(images, key=natural_key), archive.unpack, folder, limits)


def open_files(
    name: str, files: Sequence[str], put: Callable[[str, Path], object], folder: Path, limits: Limits
) -> OpenedVideo:
    """Takes a video file, or images that are frames, into a session's folder under names of our own; opens them."""
    suffixes = [PurePosixPath(file).suffix.lower() for file in files]
    is_video = len(files) == 1 and suffixes[0] in VIDEO_SUFFIXES
    if not is_video and not set(suffixes) <= set(IMAGE_SUFFIXES):
        raise SampleError("Upload one video, one zip of frames, or images only.")
    targets = [folder / f"{number:05d}{suffix}" for number, suffix in enumerate(suffixes)]
    for file, target in zip(files, targets, strict=True):
        put(file, target)
    return open_kept(name, targets[0] if is_video else folder, limits)


def open_kept(name: str, path: Path, limits: Limits) -> OpenedVideo:
    """Opens a video file, or a folder of frames, that lies in a session's folder already; checks it as a whole."""
    frames = read_video(path, limits.frames)
    height, width = frames.size
    if len(frames) > limits.frames:
        raise SampleError(f"{name} has {len(frames)} frames; {limits.frames} are the most.")
    if height * width > limits.pixels:
        raise SampleError(f"{name} has frames of {width} x {height} pixels; {limits.pixels} pixels are the most.")
    files = frames.paths if isinstance(frames, ImageFrames) else []
    for number, file in enumerate(files):
        own = image_info(file, f"frame {number}").size  # reads the header alone
        if own != frames.size:
            raise SampleError(f"Frame {number} has {own[1]} x {own[0]} pixels, but the first has {width} x {height}.")
    frames[0]  # decoded now, so that a damaged video is refused before it is shown
    return OpenedVideo(name, frames, files or [path])


def open_example(name: str, folder: Path, limits: Limits) -> OpenedVideo:
    """Writes one of `EXAMPLES` as a video file into a session's folder, and opens it."""
    look = name.lower()
    video = SyntheticVideos(1, EXAMPLE_FRAMES, EXAMPLE_SIZE, domain=look, seed=EXAMPLES[name])[0]
    path = folder / f"{look}.mp4"
    write_video(path, (np.ascontiguousarray(frame) for frame in video.frames), fps=EXAMPLE_FPS)
    return open_kept(look, path, limits)
