"""Frames as every reader hands them out, `FrameSequence`: a lazily decoded sequence of (H, W, 3) uint8 RGB arrays."""

from __future__ import annotations

import logging
import re
import struct
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from samoe_hf.errors import InputError

logger = logging.getLogger(__name__)

# What libraries raise for damaged files.
DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, MemoryError)
DAMAGE += (RecursionError, struct.error, zlib.error)
IN_MEMORY = re.compile(r" ?<[\w.]+ object at 0x\w+>")  # how Pillow names bytes


class SampleError(InputError):
    """A file or a sample of a dataset cannot be used; the message names it."""


@cache
def say_once(text: str) -> None:
    """Logs a sentence as a warning, the first time in this process."""
    logger.warning("%s", text)


@contextmanager
def named_errors(name: str | Path, problem: str, damage: tuple[type[Exception], ...] = DAMAGE) -> Iterator[None]:
    """Makes what is raised for a damaged file a `SampleError` that names it; a file that is not there stays such.

    `problem` is what to say of it, such as "not a readable image"; `damage` what libraries raise.
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
        reason = IN_MEMORY.sub("", repr(error))
        raise SampleError(f"{name}: {problem} ({reason})") from error


class FrameSequence(Sequence, ABC):
    """A video's frames, decoded on access: (H, W, 3) uint8 RGB arrays, all of one size.

    Attributes:
        names: file stems, or "00000", "00001"… where frames have no files.
        size: (height, width) in pixels.
        fps: frames per second where the source tells it, else None.
    """

    names: list[str]
    size: tuple[int, int]
    fps: float | None = None

    @abstractmethod
    def _read(self, index: int) -> np.ndarray:
        """Decodes the frame at a non-negative index."""

    def time(self, index: int) -> float | None:
        """Seconds from the first frame to the frame at an index, None where the source does not tell it."""
        return index / self.fps if self.fps else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice) -> Any:
        chosen = range(len(self))[index]
        return self._read(chosen) if isinstance(chosen, int) else [self._read(i) for i in chosen]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._read(i) for i in range(len(self)))


class ArrayFrames(FrameSequence):
    """Frames already in memory: (T, H, W) or (T, H, W, 3) uint8; gray values are repeated over the three channels."""

    def __init__(self, frames: np.ndarray):
        is_video = frames.ndim == 3 or (frames.ndim == 4 and frames.shape[-1] == 3)
        if frames.dtype != np.uint8 or not is_video or 0 in frames.shape:
            raise SampleError(f"frames must be uint8 (T, H, W) or (T, H, W, 3), not {frames.dtype} {frames.shape}")
        self.array = frames
        self.names = [f"{i:05d}" for i in range(len(frames))]
        self.size = frames.shape[1:3]

    def _read(self, index: int) -> np.ndarray:
        frame = self.array[index]
        return np.repeat(frame[..., None], 3, axis=-1) if frame.ndim == 2 else frame


def check_folder(folder: str | Path) -> Path:
    """The folder as a path; raises `FileNotFoundError` if there is none."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    return Path(folder)


def bare_name(path: Path) -> str:
    """The name of a folder, or of a file without its suffix."""
    return path.name if path.is_dir() else path.stem


def one_form(name: str) -> str:
    """A name in the Unicode form that most systems write, NFC, to compare it; macOS writes another one, NFD."""
    return unicodedata.normalize("NFC", name)


def on_disk(path: Path) -> Path:
    """A path in the Unicode form that it has on disk, if there is one; else as it is."""
    if path.exists() or path.parent == path:
        return path
    parent = on_disk(path.parent)
    forms = (parent / unicodedata.normalize(form, path.name) for form in ("NFC", "NFD"))
    return next(filter(Path.exists, forms), path)


def check_inside(name: str, source: str | Path) -> None:
    """Raises `SampleError` for a name, held by `source`, that leads out of the folder that it is joined to."""
    path = Path(name if isinstance(name, str) else "")
    # Windows writes what is behind a colon to a hidden stream of a file, and drops dots and spaces at the end.
    is_other = isinstance(path, PureWindowsPath) and any(":" in part or part[-1] in ". " for part in path.parts)
    if not path.parts or path.anchor or ".." in path.parts or "\0" in name or is_other:
        raise SampleError(f"{source}: {name!r} is no path within a folder")


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which "frame10" follows "frame9"."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def frame_order(paths: Iterable[Path]) -> list[Path]:
    """Paths in the order of their frames: natural, or by numbers that are decimals, as of seconds, or of which some are
    below 0.

    Hashes that Label Studio puts before names, `1a2b3c4d-frame_01.jpg`, do not count.
    """
    paths = list(paths)
    is_hashed = all(re.match(r"[0-9a-f]{8}-.", path.name) for path in paths)
    is_hashed = is_hashed and any(re.match(r"\d{0,7}[a-f]", path.name) for path in paths)
    ordered = sorted(paths, key=lambda path: natural_key(path.name[9 * is_hashed :]))
    found = [match for path in ordered if (match := re.fullmatch(r"(\D*?)(-?)(\d+(?:\.\d+)?)", path.stem))]
    # A minus that all have, or that is behind several words, is no sign.
    is_signed = len({match[2] for match in found}) == 2 and len({match[1] for match in found}) == 1
    numbers = [float(is_signed * match[2] + match[3]) for match in found]
    if len(set(numbers)) < len(ordered) or not (is_signed or any("." in match[3] for match in found)):
        return ordered
    by_number = [path for _, path in sorted(zip(numbers, ordered, strict=True))]
    if by_number != ordered:
        say_once(f"{ordered[0].parent}: names such as {ordered[-1].name} are put in the order of their numbers")
    return by_number
