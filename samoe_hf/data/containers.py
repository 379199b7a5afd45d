"""Frames of video files, in any order."""

from __future__ import annotations

import gc
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame

from .container_index import MAX_FRAMES, NO_TIME, checksum, index_by_decoding, index_container, keep_index
from .decoder import Decoder
from .frames import FrameSequence, SampleError, named_errors, say_once
from .image_files import file_version

RATE_TOLERANCE = 0.02  # of time stamps that are rounded
BEHIND_BYTES = 2**27  # of frames before the one that is read, where reading goes backward
MAX_IDLE = 4  # decoders that are kept open while nobody reads from them
_max_idle = MAX_IDLE
# Reader -> its decoder while it is idle, the one that was used last at the end. In use, it is its thread's alone.
_idle: OrderedDict[int, Decoder] = OrderedDict()
_of_parent: list[Decoder] = []
_numbers = count()


def _leave_to_parent() -> None:
    """A forked process shares its parent's place in a file, and lacks its decoders' threads: it leaves them alone."""
    _of_parent.extend(_idle.values())
    _idle.clear()
    gc.freeze()  # nor does it collect what PyAV left in cycles, which would wait for those threads


if register := getattr(os, "register_at_fork", None):  # Windows does not fork
    register(after_in_child=_leave_to_parent)


def _close_idle(number: int) -> None:
    """Closes the decoder of a reader, if there is one."""
    if (decoder := _idle.pop(number, None)) is not None:
        decoder.close()


def keep_decoders(count: int) -> None:
    """From now on keeps decoders of so many files open, which are read in turns, and 4 at least."""
    global _max_idle
    _max_idle = max(MAX_IDLE, count)


class ContainerFrames(FrameSequence):
    """Frames of a video file through PyAV: frame `n` is the n-th that decoding gives, whichever is read first.

    In ascending order each frame is decoded once, and in descending order some that come next are kept. Other access
    seeks to a key frame, and makes sure that this led to the same frame; where it did not, decoding starts at an
    earlier one, at last at the first. A copy has a decoder of its own, and so has what was pickled. More frames than
    `max_frames` are refused, before they cost memory.
    """

    def __init__(self, path: str | Path, max_frames: int = MAX_FRAMES):
        self.path, self._max_frames = Path(path), max_frames
        self._identity = file_version(self.path)
        self._index = index_container(self.path, *self._identity, max_frames)
        self.size, self.fps = self._index.size, self._index.fps
        self.names = [f"{i:05d}" for i in range(len(self._index.times))]
        # Of frames at uneven times, a header tells the rate of the closest ones, or none.
        if seconds := self.time(len(self.names) - 1):
            mean = (len(self.names) - 1) / seconds
            self.fps = self.fps if self.fps and abs(mean / self.fps - 1) < RATE_TOLERANCE else mean
        if self._index.problem:
            say_once(f"{self.path}: {self._index.problem}")
        self._own_decoder()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._own_decoder()

    def time(self, index: int) -> float | None:
        """Seconds from the first frame to the frame at an index, as the file tells it, else by its rate."""
        times = self._index.times
        has_times = len(self._index.keys) and self._index.time_base
        return float(times[index] - times[0]) * self._index.time_base if has_times else super().time(index)

    def _own_decoder(self) -> None:
        self._number = next(_numbers)
        finalize(self, _close_idle, self._number)

    def _open(self) -> Decoder:
        while len(_idle) >= _max_idle:  # those that were used longest ago are closed
            _idle.popitem(last=False)[1].close()
        if file_version(self.path) != self._identity:
            raise SampleError(f"{self.path} has changed since it was opened")
        return Decoder(self.path, by_frames=not len(self._index.checksums))

    def _starts(self, decoder: Decoder | None, index: int) -> Iterator[int | None]:
        """Where to start for a frame, in turn until it is found: None for where the decoder is, or a frame's number."""
        keys = self._index.keys
        nearest = int(np.searchsorted(keys, index, side="right")) - 1
        place = index + 1 if decoder is None or decoder.next is None else decoder.next
        is_kept = decoder is not None and index in decoder.behind
        if is_kept or (place <= index and (nearest < 0 or keys[nearest] <= place)):
            yield None
        step = 1
        while nearest >= 0 and keys[nearest] > 0:
            yield int(keys[nearest])
            nearest, step = nearest - step, 2 * step
        yield 0

    def _read(self, index: int) -> np.ndarray:
        decoder, pixels, failure = _idle.pop(self._number, None), None, None
        goes_back = decoder is not None and index == decoder.last - 1
        if decoder is not None and not goes_back:
            decoder.behind.clear()
        try:
            for start in self._starts(decoder, index):
                try:
                    if decoder is None or start == 0:
                        if decoder is not None:
                            decoder.close()
                        decoder = None
                        decoder = self._open()
                    if start:
                        decoder.seek(int(self._index.times[start]))
                    pixels = self._decode_until(decoder, index, goes_back)
                except (FFmpegError, MemoryError) as error:
                    failure = error
                if decoder is not None and pixels is not None:
                    decoder.last = index
                    _close_idle(self._number)  # of another thread
                    _idle[self._number] = decoder
                    decoder = None
                    return pixels
        finally:
            if decoder is not None:
                decoder.close()
        if failure is not None:
            raise SampleError(f"{self.path}: frame {index} cannot be decoded ({failure})") from failure
        return self._read_as_decoded(index)

    def _decode_until(self, decoder: Decoder, index: int, goes_back: bool) -> np.ndarray | None:
        """Decodes on until a frame, and returns its pixels; None where decoding does not give what the index says."""
        if index in decoder.behind:
            return self._pixels(decoder, index, decoder.behind.pop(index))
        times, was_sought, room = self._index.times, decoder.is_sought, BEHIND_BYTES // (2 * math.prod(self.size))
        for frame in decoder.frames:
            time = NO_TIME if frame.pts is None else frame.pts
            if decoder.next is None:
                if decoder.start is None:
                    return None
                # Frames before the key frame refer to others before it.
                if time < decoder.start:
                    continue
                decoder.next = int(np.searchsorted(times, time))
            number, decoder.next = decoder.next, decoder.next + 1
            if number > index or times[number] != time or (was_sought and frame.is_corrupt):
                return None
            if number == index:
                return self._pixels(decoder, index, frame)
            if goes_back:
                decoder.behind[number] = frame
                if len(decoder.behind) > room:
                    del decoder.behind[next(iter(decoder.behind))]
        return None

    def _pixels(self, decoder: Decoder, index: int, frame: VideoFrame) -> np.ndarray | None:
        """The pixels of a frame; None where they are not those that the index tells."""
        if len(self._index.checksums) and self._index.checksums[index] != checksum(frame):
            return None
        with named_errors(self.path, f"frame {index} cannot be shown"):
            pixels = decoder.pixels(frame)
        if pixels.shape[:2] != self.size:
            raise SampleError(f"{self.path}: frame {index} of size {pixels.shape[:2]}, not {self.size}")
        return pixels

    def _read_as_decoded(self, index: int) -> np.ndarray:
        """A frame of a file whose packets did not tell what decoding gives."""
        if len(self._index.checksums):
            raise SampleError(f"{self.path}: frame {index} of {len(self)} is missing or other each time; it is damaged")
        with named_errors(self.path, "not a readable video", (FFmpegError, MemoryError)):
            decoded = index_by_decoding(self.path, self._max_frames)
        keep_index(self.path, *self._identity, decoded, self._max_frames)
        if len(decoded.times) != len(self):
            raise SampleError(
                f"{self.path}: frame {index}: decoding gives {len(decoded.times)} frames, where the file tells of "
                f"{len(self)}; open it again, and it has {len(decoded.times)}"
            )
        self._index = decoded
        return self._read(index)
