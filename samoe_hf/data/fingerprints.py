"""Short hashes of what results are made from: frames, masks, prompts and settings."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .frames import ArrayFrames, FrameSequence
from .images import ImageFrames
from .schema import Video

# Of a file, its first and last bytes are read: all of a mask's, and those of a recording that tell it from another.
FILE_ENDS = 2**16
# Of frames of other kinds, which must be decoded.
DECODED_FRAMES = 16


def fingerprint(*values: Any) -> str:
    """16 hexadecimal digits that depend on the values alone.

    Values are numbers, text, bytes, arrays, None, and dataclasses, mappings and sequences of them. A `Path` stands for
    the content of its file.
    """
    digest = hashlib.sha256()
    for part in _parts(values):
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(value: Any) -> Iterable[bytes | memoryview]:
    if isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).data.cast("B")
    elif isinstance(value, Path):
        yield from _file_parts(value)
    elif is_dataclass(value):
        yield from _parts([(field.name, getattr(value, field.name)) for field in fields(value)])
    elif isinstance(value, Mapping):
        yield from _parts(sorted(value.items(), key=repr))
    elif isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        yield f"{len(value)} of".encode()
        for item in value:
            yield from _parts(item)
    else:
        text = value if isinstance(value, bytes) else repr(value).encode()
        yield f"{type(value).__name__} {len(text)} ".encode() + text


def _file_parts(path: Path) -> Iterable[bytes]:
    size = path.stat().st_size
    yield f"{size} ".encode()
    with path.open("rb") as file:
        yield file.read(FILE_ENDS)
        if size > FILE_ENDS:
            file.seek(max(FILE_ENDS, size - FILE_ENDS), os.SEEK_SET)
            yield file.read(FILE_ENDS)


def frames_fingerprint(frames: FrameSequence, chosen: Sequence[int] | None = None) -> str:
    """Of a video's frames: their names, size, and the files that they are read from, all or the chosen ones."""
    chosen = range(len(frames)) if chosen is None else chosen
    if isinstance(frames, ArrayFrames):
        content: Any = frames.array
    elif isinstance(frames, ImageFrames):
        sources = [frames.sources[t] for t in chosen if t < len(frames)]
        content = frames.window, [np.asarray(s) if isinstance(s, Image.Image) else s for s in sources]
    elif (path := getattr(frames, "path", None)) is not None:
        content = Path(path)
    else:
        content = [frames[t] for t in chosen[:: max(1, len(chosen) // DECODED_FRAMES)]]
    return fingerprint(list(frames.names), tuple(frames.size), content)


def video_fingerprint(video: Video, frames: Sequence[int] | None = None) -> str:
    """Of a video's frames, and the masks of its objects on the annotated ones, all or those that are given."""
    chosen = video.annotated_frames if frames is None else frames
    masks = [(t, ids := video.visible(t), np.packbits(video.masks(t, ids))) for t in chosen]
    object_ids = video.object_ids if frames is None else []
    about = object_ids, list(video.annotated_frames), video.spacing
    return fingerprint(frames_fingerprint(video.frames, frames), about, masks)
