"""What is known of a video file before its frames are read: their number, their times, and where decoding can start.

The packets of an intact file of some containers and codecs tell it. Every other file is decoded once. What took long is
remembered in `HF_HOME`.
"""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections import OrderedDict
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4
from zlib import crc32

import av
import numpy as np
from av.error import FFmpegError, InvalidDataError
from av.video.frame import VideoFrame
from huggingface_hub import constants
from torch.utils.data import get_worker_info
from tqdm import tqdm

from .decoder import Decoder, upright_size
from .frames import SampleError, named_errors
from .mp4_tables import count_samples

MAX_FRAMES = 2**22  # 39 hours at 30 frames per second
NO_TIME = np.iinfo(np.int64).min
# In these containers, a packet of these codecs is a frame, and has its time; and in the last too, if each frame stands
# alone. Elsewhere times are missing, guessed or equal.
EXACT_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")
EXACT_CODECS = {"h264", "hevc", "vp9", "av1", "libdav1d", "ffv1"}
PROGRESSIVE = 1  # of FFmpeg's orders of fields; 0 is unknown, and the rest may have a packet for each field
SECONDS_TO_REMEMBER = 1.0
SAMPLES_PER_FRAME = 10  # at most, with those of sound
MAX_KNOWN = 16384  # in memory


@dataclass(frozen=True)
class ContainerIndex:
    """The frames of a video file, in the order in which decoding gives them."""

    times: np.ndarray  # of each frame, in the stream's units; `NO_TIME` where the file does not tell it
    keys: np.ndarray  # frames that decoding may start from, ascending; none where times do not tell frames apart
    checksums: np.ndarray  # of each frame's pixels, or empty where the file was not decoded
    size: tuple[int, int]  # height and width of an upright frame
    fps: float | None  # frames per second, None where the file does not tell it
    time_base: float  # the stream's unit of time, in seconds
    problem: str = ""  # why not all of the file is used


_known: OrderedDict[tuple[str, int, int], ContainerIndex] = OrderedDict()


def checksum(frame: VideoFrame) -> int:
    """Of what was decoded, without the padding of its rows, which is arbitrary."""
    kind, total = frame.format, 0
    for number, plane in enumerate(frame.planes):
        bits = sum(-(-part.bits // 8) * 8 for part in kind.components if part.plane == number)
        row_bytes = plane.width * (kind.padded_bits_per_pixel if len(frame.planes) == 1 else bits) // 8
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, :row_bytes]  # type: ignore[call-overload]
        total = crc32(np.ascontiguousarray(rows).data, total)
    return total


def index_container(path: Path, modified_ns: int, num_bytes: int, max_frames: int = MAX_FRAMES) -> ContainerIndex:
    """The index of a video file; one of another time of modification or size is indexed anew.

    No video that can be decoded, frames of several sizes, and too many, before they cost memory, are a `SampleError`.
    """
    identity = (str(path), modified_ns, num_bytes)
    index = _known.get(identity) or recall(remembered_place(path, modified_ns, num_bytes))
    if index is None:
        if count_samples(path) > SAMPLES_PER_FRAME * max_frames:
            raise SampleError(f"{path} has tables for more than {max_frames} frames; {max_frames} are the most")
        with named_errors(path, "not a readable video", (FFmpegError, MemoryError)):
            index = index_by_packets(path, max_frames)
            if index is None:
                began = time.monotonic()
                index = index_by_decoding(path, max_frames)
                if time.monotonic() - began > SECONDS_TO_REMEMBER:
                    keep_index(path, modified_ns, num_bytes, index, max_frames)
    check_count(path, len(index.times), max_frames)
    _known[identity] = index
    while len(_known) > MAX_KNOWN:
        _known.popitem(last=False)
    return index


def keep_index(path: Path, modified_ns: int, num_bytes: int, index: ContainerIndex, max_frames: int) -> None:
    """Keeps an index in memory, and on disk unless the number of frames is limited, as for what strangers upload."""
    _known[str(path), modified_ns, num_bytes] = index
    if max_frames == MAX_FRAMES:
        remember(remembered_place(path, modified_ns, num_bytes), index)


def index_by_packets(path: Path, max_frames: int) -> ContainerIndex | None:
    """Of a file whose packets tell its frames; None for every other."""
    with closing(Decoder(path, by_frames=False)) as decoder:
        stream, codec = decoder.stream, decoder.stream.codec_context
        containers = EXACT_CONTAINERS[: 3 if codec.codec.intra_only else 2 if codec.name in EXACT_CODECS else 0]
        if decoder.container.format.name not in containers:
            return None
        first: VideoFrame | None = None
        times, are_keys, num_empty = array("q"), bytearray(), 0
        for packet in decoder.packets():
            num_empty += not packet.size
            if packet.size:
                if packet.pts is None or packet.is_discard or packet.is_corrupt:
                    return None
                times.append(packet.pts)
                are_keys.append(packet.is_keyframe)
                check_count(path, len(times), max_frames)
            if first is None:
                try:
                    first = next(iter(packet.decode()), None)
                except InvalidDataError:
                    return None
        decoded = np.frombuffer(times, np.int64)
        order = np.argsort(decoded, kind="stable")
        ascending = decoded[order]
        if first is None or num_empty > 1 or codec.field_order > PROGRESSIVE or (np.diff(ascending) <= 0).any():
            return None
        # Frames before the first key frame, as after a cut, are not decoded.
        if order[0] != 0 or not are_keys[0] or first.pts != ascending[0]:
            return None
        keys = np.flatnonzero(np.frombuffer(are_keys, bool)[order])
        problem = ""
        told, count = (decoder.container.duration or 0) / 10**6, len(times)
        shown = float((ascending[-1] - ascending[0]) * stream.time_base) * count / max(count - 1, 1)
        if stream.frames > count:
            problem = f"the file is cut off: {count} of its {stream.frames} frames are there"
        elif count > 1 and told - shown > max(1, 0.1 * told):
            problem = f"its {count} frames end after {shown:.1f} of {told:.1f} seconds; it may be cut off"
        return ContainerIndex(ascending, keys, np.zeros(0, np.uint32), upright_size(first), *rates(stream), problem)


def index_by_decoding(path: Path, max_frames: int) -> ContainerIndex:
    """Of any file, by decoding all of it."""
    times, are_keys, checksums = array("q"), bytearray(), array("I")
    size: tuple[int, int] | None = None
    problem = ""
    with closing(Decoder(path, by_frames=False)) as decoder:
        stream = decoder.stream
        bar = tqdm(
            decoder.frames,
            desc=f"{path.name}: its frames are found by decoding it once",
            total=stream.frames or None,
            unit="frame",
            delay=SECONDS_TO_REMEMBER,
            leave=False,
            disable=get_worker_info() is not None,
        )
        try:
            for number, frame in enumerate(bar):
                check_count(path, number + 1, max_frames)
                shape = upright_size(frame)
                size = size or shape
                if shape != size:
                    raise SampleError(f"{path}: frame {number} of size {shape}, not {size} as the first")
                times.append(NO_TIME if frame.pts is None else frame.pts)
                are_keys.append(frame.key_frame)
                checksums.append(checksum(frame))
        except FFmpegError as error:
            if not times:
                raise
            problem = f"decoding ends after {len(times)} frames ({error}); the rest of the file is not used"
        finally:
            bar.close()
        if size is None:
            raise SampleError(f"{path}: no frame can be decoded; the file is empty, cut off or damaged")
        all_times = np.array(times, np.int64)
        are_told = all_times[0] != NO_TIME and (np.diff(all_times) > 0).all()
        keys = np.flatnonzero(np.frombuffer(are_keys, bool)) if are_told else np.zeros(0, np.int64)
        return ContainerIndex(all_times, keys, np.array(checksums, np.uint32), size, *rates(stream), problem)


def rates(stream: av.VideoStream) -> tuple[float | None, float]:
    """Frames per second of a stream, None where the file does not tell it, and its unit of time in seconds."""
    return float(stream.average_rate) if stream.average_rate else None, float(stream.time_base or 0)


def check_count(path: Path, count: int, max_frames: int) -> None:
    """Raises `SampleError` for more frames than are allowed."""
    if count > max_frames:
        raise SampleError(f"{path} has more than {max_frames} frames; {max_frames} are the most")


def remembered_place(path: Path, modified_ns: int, num_bytes: int) -> Path:
    """Where the index of a file lies on disk, if it is remembered. Another FFmpeg may decode other pixels."""
    identity = repr((str(path.resolve()), modified_ns, num_bytes, av.__version__, av.library_versions))
    name = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
    return Path(constants.HF_HOME) / "samoe" / "videos" / f"{name}.npz"


def remember(place: Path, index: ContainerIndex) -> None:
    """Writes an index; failing to write is no error."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{uuid4().hex}.part")
        try:
            with part.open("xb") as file:
                np.savez(file, **{**asdict(index), "fps": index.fps or 0.0})  # pyright: ignore[reportArgumentType]
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)


def recall(place: Path) -> ContainerIndex | None:
    """Reads an index; None where there is none, or one that cannot be used."""
    with suppress(Exception), np.load(place, allow_pickle=False) as data:
        times, keys, checksums = data["times"], data["keys"], data["checksums"]
        height, width = data["size"].tolist()
        if len(times) and len(checksums) in (0, len(times)) and (keys < len(times)).all():
            fps, time_base = float(data["fps"]) or None, float(data["time_base"])
            return ContainerIndex(times, keys, checksums, (height, width), fps, time_base, str(data["problem"]))
    return None
