"""Random video files: codecs, groups of pictures, containers, time stamps, orientations, damage; and what they show."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation

from samoe_hf.data import SampleError, read_video
from samoe_hf.data.decoder import TEXTS

LOW_LEVEL = {"libx264": "x264-params", "libx265": "x265-params"}
# Codec -> containers (suffix: FFmpeg's name) and pixel formats.
CODECS: dict[str, tuple[str, str]] = {
    "libx264": ("mp4 mov mkv avi mpegts asf flv h264 nut fragmented", "yuv420p yuv422p yuv444p yuv420p10le"),
    "libx265": ("mp4 mkv mpegts hevc", "yuv420p yuv420p10le"),
    "libvpx": ("webm mkv avi", "yuv420p"),
    "libvpx-vp9": ("webm mkv mp4", "yuv420p yuv444p"),
    "libsvtav1": ("mp4 webm", "yuv420p"),
    "mpeg4": ("mp4 avi mkv mov m4v", "yuv420p"),
    "mpeg2video": ("mpeg mpegts mkv mxf vob", "yuv420p yuv422p"),
    "mpeg1video": ("mpeg mpegts", "yuv420p"),
    "wmv2": ("asf avi", "yuv420p"),
    "msmpeg4": ("avi", "yuv420p"),
    "mjpeg": ("avi mov mkv mp4", "yuvj420p yuvj422p yuvj444p"),
    "ffv1": ("mkv avi", "yuv420p yuv422p10le gray"),
    "huffyuv": ("avi", "yuv422p rgb24"),
    "prores_ks": ("mov mkv", "yuv422p10le"),
    "rawvideo": ("avi nut", "yuv420p"),
    "qtrle": ("mov", "rgb24"),
    "gif": ("gif", "rgb8"),
}
SUFFIXES = {"mpegts": "ts", "asf": "wmv", "mpeg": "mpg", "fragmented": "mp4"}
MUXERS = {"mkv": "matroska", "fragmented": "mp4", "vob": "vob", "m4v": "m4v"}
WITH_ORIENTATION = ("mp4", "mov", "fragmented")
FINE_TIMES = ("mp4", "mov", "mkv", "webm", "nut", "fragmented")
DAMAGES = ("cut", "headless", "trimmed", "bytes")


@dataclass
class RandomVideo:
    """A file and how it was made."""

    path: Path
    traits: dict[str, Any] = field(default_factory=dict)


def draw_scene(rng: np.random.Generator, num_frames: int, size: tuple[int, int]) -> np.ndarray:
    """Frames that differ, or of which some are the same: (T, H, W, 3) uint8."""
    height, width = size
    frames = np.full((num_frames, height, width, 3), 90, np.uint8)
    still = rng.random() < 0.3
    for i in range(num_frames):
        t = i // 5 if still else i
        frames[i, :8] = 37 * t % 256
        left = 3 * t % (width - 16)
        frames[i, 10:30, left : left + 14] = 230, 40, 40
        frames[i, height - 9 :, 20:50] = 40, 11 * t % 256, 240
    return frames


def make_video(folder: Path, number: int, rng: np.random.Generator) -> RandomVideo:
    """Writes a random video file."""
    codec = str(rng.choice(list(CODECS)))
    containers, pixel_formats = CODECS[codec]
    container, pixel_format = str(rng.choice(containers.split())), str(rng.choice(pixel_formats.split()))
    rate = int(rng.choice([10, 25, 30, 3000]))
    if codec in ("mpeg2video", "mpeg1video", "mpeg4") or (
        rate == 3000 and (container not in FINE_TIMES or codec == "libsvtav1")
    ):
        rate = 25
    traits: dict[str, Any] = {"codec": codec, "container": container, "pixels": pixel_format, "rate": rate}
    options = draw_options(codec, container, rng, traits)
    size = (48, 64) if rng.random() < 0.8 else (98, 130)
    frames = draw_scene(rng, int(rng.integers(3, 60)), size)
    if container in WITH_ORIENTATION and rng.random() < 0.5:
        traits["orientation"] = 90 * int(rng.integers(4)), bool(rng.random() < 0.5)
    traits["times"] = str(rng.choice(["even", "even", "late", "gaps"]))
    traits["preview"] = container in ("mp4", "mkv", "mov") and bool(rng.random() < 0.15)
    flags = "frag_keyframe+empty_moov" if container == "fragmented" else ""
    if container in ("mp4", "mov") and rng.random() < 0.3:
        flags = "faststart"
    video = RandomVideo(folder / f"{number:03d}.{SUFFIXES.get(container, container)}", traits)
    muxer, mux_options = MUXERS.get(container, container), {"movflags": flags} if flags else {}
    with av.open(str(video.path), "w", format=muxer, options=mux_options) as target:
        write_streams(target, frames, options, traits, rng)
    if rng.random() < 0.4:
        traits["damage"] = damage(video.path, str(rng.choice(DAMAGES)), rng)
    return video


def draw_options(codec: str, container: str, rng: np.random.Generator, traits: dict[str, Any]) -> dict[str, str]:
    """Random options of an encoder; what matters of them goes to the traits."""
    gop, num_b = int(rng.choice([1, 4, 12, 250])), int(rng.choice([0, 2, 3]))
    traits["gop"] = gop
    if codec in LOW_LEVEL:
        is_open, has_fields = bool(rng.random() < 0.5), codec == "libx264" and bool(rng.random() < 0.2)
        low = [f"keyint={gop}", f"bframes={num_b}", f"open-gop={int(is_open)}"]
        low += ["scenecut=0"] * int(rng.random() < 0.5) + ["tff=1"] * has_fields
        low += ["log-level=none", "pools=1"] * (codec == "libx265")
        traits |= {"b": num_b, "open": is_open, "fields": has_fields}
        return {LOW_LEVEL[codec]: ":".join(low), "preset": "veryfast"}
    if codec == "libsvtav1":
        return {"preset": "12", "g": str(max(gop, 4))}
    options = {"g": str(gop)}
    if codec in ("mpeg4", "mpeg2video", "mpeg1video"):
        traits["b"] = num_b
        options["bf"] = str(num_b)
        if codec == "mpeg4" and container == "avi" and rng.random() < 0.5:
            options["vtag"] = "XVID"
    elif codec == "libvpx":
        options |= {"auto-alt-ref": "1", "lag-in-frames": "12", "deadline": "realtime"}
    return options


def write_streams(
    target: Any, frames: np.ndarray, options: dict[str, str], traits: dict[str, Any], rng: np.random.Generator
) -> None:
    """Encodes frames into a container; before them a small preview, if there is one."""
    rate, small = traits["rate"], None
    if traits["preview"]:
        small = target.add_stream("mjpeg", rate=rate)
        small.height, small.width, small.pix_fmt = 16, 16, "yuvj420p"
    stream = target.add_stream(traits["codec"], rate=rate, options=options)
    stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], traits["pixels"]
    if small is not None:
        small.disposition, stream.disposition = 0, av.stream.Disposition.default
    if "orientation" in traits:
        degrees, is_mirrored = traits["orientation"]
        stream.set_display_rotation(degrees, hflip=is_mirrored)
    time = 7 if traits["times"] == "late" else 0
    for i, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=traits["pixels"])
        frame.pts, frame.time_base = time, Fraction(1, rate)
        time += int(rng.integers(1, 4)) if traits["times"] == "gaps" else 1
        if small is not None and i < 2:
            tiny = av.VideoFrame.from_ndarray(pixels[:16, :16], format="rgb24").reformat(format="yuvj420p")
            tiny.pts, tiny.time_base = i, Fraction(1, rate)
            target.mux(small.encode(tiny))
        target.mux(stream.encode(frame))
    for each in (small, stream):
        target.mux([] if each is None else each.encode())


def damage(path: Path, kind: str, rng: np.random.Generator) -> str:
    """Changes a file as a recorder that stopped, a broadcast, an editor that does not encode, or a bad disk do."""
    data = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(data[: int(len(data) * rng.uniform(0.3, 0.95))])
    elif kind == "headless" and path.suffix in (".ts", ".mpg", ".vob", ".h264", ".hevc", ".m4v"):
        path.write_bytes(data[int(len(data) * rng.uniform(0.1, 0.6)) :])
    elif kind == "bytes":
        for _ in range(3):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        path.write_bytes(data)
    else:
        kind = "trimmed"
        trim(path, rng.uniform(0.1, 0.6))
    return kind


def trim(path: Path, share: float) -> None:
    """Copies the packets from the key frame before a time on, as `ffmpeg -ss TIME -c copy` does; not of all codecs."""
    trimmed = path.with_name(f"trimmed{path.suffix}")
    with av.open(str(path)) as source:
        stream = source.streams.video[-1]
        if stream.codec_context.name in ("libdav1d", "rawvideo"):
            return
        packets = [packet for packet in source.demux(stream) if packet.size]
        known = [packet.pts for packet in packets if packet.pts is not None]
        if not known:
            return
        time = known[int(share * len(known))]
        first = max((i for i, p in enumerate(packets) if p.is_keyframe and (p.pts or 0) <= time), default=0)
        with av.open(str(trimmed), "w", format=source.format.name.split(",")[0]) as target:
            copy = target.add_stream_from_template(stream)
            for packet in packets[first:]:
                packet.pts = None if packet.pts is None else packet.pts - time
                packet.dts = None if packet.dts is None else packet.dts - time
                packet.stream = copy
                target.mux(packet)
    trimmed.replace(path)


def plain_decoding(path: Path) -> tuple[list[np.ndarray], bool]:
    """The frames of PyAV's plain decoding, up to an error; and whether there was none."""
    frames: list[np.ndarray] = []
    try:
        # Damage may hit a text that nobody reads.
        with av.open(str(path), **TEXTS) as source:
            stream = max(source.streams.video, key=lambda s: (s.disposition & 1, s.width * s.height))
            for frame in source.decode(stream):
                frames.append(shown(frame))
    except (FFmpegError, ValueError):
        return frames, False
    return frames, True


def stored(frame: av.VideoFrame) -> np.ndarray:
    """A frame's pixels by FFmpeg's accurate conversion, as they are stored."""
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    return frame.to_ndarray(format="rgb24", interpolation=flags)


def shown(frame: av.VideoFrame) -> np.ndarray:
    """The same, turned and mirrored as FFmpeg's `autorotate` does."""
    pixels = stored(frame)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    m = np.frombuffer(matrix, np.int32) / 65536
    height, width = pixels.shape[:2]
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    to_x, to_y = (m[0] * x + m[3] * y).astype(int), (m[1] * x + m[4] * y).astype(int)
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    turned = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    turned[to_y, to_x] = pixels
    return turned


def orders(length: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Ways to read a video."""
    yield list(range(length))
    yield list(range(length))[::-1]
    yield rng.integers(0, length, 12).tolist()


@contextmanager
def logged() -> Iterator[list[str]]:
    """What the package logs while the context is open."""
    sentences, handler, logger = [], logging.Handler(), logging.getLogger("samoe_hf")
    handler.emit = lambda record: sentences.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield sentences
    finally:
        logger.removeHandler(handler)


def outcome(video: RandomVideo, rng: np.random.Generator) -> tuple[str, str]:
    """Reads a file: "exact", "cut off" (what decodes before the damage, said aloud), "refused" or "wrong"; and why."""
    expected, is_whole = plain_decoding(video.path)
    said = ""
    try:
        with logged() as sentences:
            length = len(read_video(video.path))
        said = " ".join(sentences)
        for order in orders(length, rng):
            frames = read_video(video.path)
            for i in order:
                pixels = frames[i]
                if i >= len(expected) and is_whole:
                    return "wrong", f"frame {i} of {len(expected)}"
                if i < len(expected) and not np.array_equal(pixels, expected[i]):
                    if video.traits.get("damage") == "bytes":
                        return "concealed", "FFmpeg conceals damage otherwise with other threads, or from another start"
                    same = [n for n, other in enumerate(expected) if np.array_equal(other, pixels)]
                    return "wrong", f"frame {i} of order {order[:5]} is {same or 'none'}"
    except SampleError as error:
        if video.path.name not in str(error):
            return "wrong", f"not named: {error}"
        # FFmpeg decodes what is left of a GIF's page that is cut.
        may_be_refused = video.traits.get("damage") == "bytes" or "image file is truncated" in str(error)
        is_wrong = is_whole and expected and not may_be_refused
        return "wrong" if is_wrong else "refused", str(error)
    except Exception as error:
        return "wrong", repr(error)
    if is_whole:
        return ("exact", said) if length == len(expected) else ("wrong", f"{length} frames of {len(expected)}")
    if said and length == len(expected):
        return "cut off", said
    return "wrong", f"{length} frames, {len(expected)} decode, said {said!r}"
