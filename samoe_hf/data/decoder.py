"""Decoding of a video file through PyAV: which stream is shown, its frames in their order, and their pixels."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import InvalidDataError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image
from torch.utils.data import get_worker_info

from .frames import SampleError

# FFmpeg also takes text for a video (as a terminal's output) and playlists, which name other files.
CONTAINER_FORMATS = (
    "3g2,3gp,apng,asf,avi,dv,flv,gif,h263,h264,hevc,ivf,m4a,m4v,matroska,mj2,mov,mp4,mpeg,mpegts,mpegvideo,mxf,nut,obu,"
    "ogg,vc1,webm,wtv,yuv4mpegpipe"
)
MAX_LEADING = 1000  # packets before the first frame
STILL = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# Titles and the like that are no UTF-8 are an error before PyAV 19, which needs Python 3.12, unless it is told.
TEXTS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
# Each colour value from all that go into it; a faster conversion takes the nearest colours, and rounds.
ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def shown_stream(streams: tuple[VideoStream, ...]) -> VideoStream | None:
    """The video stream that a player shows: no cover, the default one, the largest, the first; None without any."""
    decodable = [stream for stream in streams if stream.codec_context is not None]
    ranks = [
        (not stream.disposition & STILL, bool(stream.disposition & Disposition.default), stream.width * stream.height)
        for stream in decodable
    ]
    return decodable[ranks.index(max(ranks))] if ranks else None


class Decoder:
    """A video file that is being decoded, from its first frame on or from where it was sought to.

    FFmpeg reads this file alone, and no frames of more pixels than Pillow reads. In a worker of a data loader it takes
    one thread. Else threads may decode a frame each, `by_frames`; they report damage elsewhere than PyAV's default.
    A file that cannot be read is an `FFmpegError`, one without a video that can be decoded a `SampleError`.
    """

    def __init__(self, path: Path, by_frames: bool):
        options = {"format_whitelist": CONTAINER_FORMATS, "protocol_whitelist": "file"}
        self.container = av.open(f"file:{path}", options=options, **TEXTS)
        stream = shown_stream(self.container.streams.video)
        if stream is None:
            self.container.close()
            raise SampleError(f"{path}: no video stream in this file that can be decoded")
        self.stream = stream
        if get_worker_info() is not None:
            stream.codec_context.thread_count = 1
        elif by_frames:
            stream.codec_context.thread_type = "AUTO"
        if Image.MAX_IMAGE_PIXELS:
            stream.codec_context.options = {"max_pixels": str(Image.MAX_IMAGE_PIXELS)}
        self.next: int | None = 0  # number of the frame that comes next; None after seeking
        self.start: int | None = None  # time of the packet that it began at; None where that is no key frame's
        self.is_sought = False  # it began elsewhere than at the file's first frame
        self.last = 0  # number of the frame that was read last
        self.behind: dict[int, VideoFrame] = {}  # those before it that were decoded on the way
        self.frames = self._decode()
        self._reformatter = VideoReformatter()

    def close(self) -> None:
        """Closes the file and frees the decoder; PyAV's objects hold each other, so nothing else does."""
        self.frames.close()
        self.behind.clear()
        self.container.close()
        del self.container, self.stream

    def seek(self, time: int) -> None:
        """Goes on at the key frame that the container finds for a time, in the stream's units."""
        self.frames.close()
        self.behind.clear()
        self.container.seek(time, stream=self.stream)
        self.next, self.is_sought = None, True
        self.frames = self._decode()

    def packets(self) -> Iterator[av.Packet]:
        """The stream's packets from here on, the last of them without data."""
        return self.container.demux(self.stream)

    def _decode(self) -> Generator[VideoFrame]:
        """Frames as PyAV decodes them. Packets before the first may lack what decoding needs, as in a broadcast."""
        has_begun = False
        for number, packet in enumerate(self.packets()):
            if number == 0:
                self.start = packet.pts if packet.is_keyframe else None
            try:
                frames = packet.decode()
            except InvalidDataError:
                if has_begun or number > MAX_LEADING:
                    raise
                continue
            has_begun |= bool(frames)
            yield from frames

    def pixels(self, frame: VideoFrame) -> np.ndarray:
        """A frame as (H, W, 3) uint8 RGB, upright; colours as FFmpeg's accurate conversion gives them."""
        rgb = self._reformatter.reformat(frame, format="rgb24", interpolation=ACCURATE, threads=1)
        return upright(rgb.to_ndarray(), frame)


def upright(pixels: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """Pixels (H, W, ...) turned and mirrored as a frame's display matrix says; errors as there."""
    a, b, c, d = display_matrix(frame)
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1].copy()  # so that it holds no frame of FFmpeg


def upright_size(frame: VideoFrame) -> tuple[int, int]:
    """Height and width of a frame that is turned as its display matrix says; errors as there."""
    a, b, _, _ = display_matrix(frame)
    return (frame.width, frame.height) if abs(b) > abs(a) else (frame.height, frame.width)


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d): a pixel at (x, y) is shown at (a x + c y, b x + d y), but for a shift and a scale.

    One that turns by other than quarters is a `SampleError`.
    """
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
    if max(abs(b), abs(c)) > 0.02 * min(abs(a), abs(d)) and max(abs(a), abs(d)) > 0.02 * min(abs(b), abs(c)):
        turn = math.degrees(math.atan2(-b, a))
        raise SampleError(f"its frames are turned by {turn:.1f} degrees, which is no multiple of 90")
    return a, b, c, d
