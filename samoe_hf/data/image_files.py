"""Opening of image files and of their pages: which formats are read, and what a header tells."""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, features

from .frames import DAMAGE, SampleError, named_errors

# Pillow's formats that are read, and their suffixes; some of its others run programs.
SUFFIXES = {
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heif"),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".j2k", ".jp2"),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
READABLE = {"AVIF": features.check("avif"), "JPEG2000": features.check("jpg_2000"), "WEBP": features.check("webp")}
READABLE["HEIF"] = importlib.util.find_spec("pillow_heif") is not None
if READABLE["HEIF"]:
    importlib.import_module("pillow_heif").register_heif_opener()
IMAGE_FORMATS = [name for name in SUFFIXES if READABLE.get(name, True)]
IMAGE_SUFFIXES = tuple(sorted(suffix for name in IMAGE_FORMATS for suffix in SUFFIXES[name]))
# Other files with pictures that people have: they are named, not left out silently.
UNREAD_SUFFIXES = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes} - set(IMAGE_SUFFIXES)
UNREAD_SUFFIXES |= {f".{suffix}" for suffix in re.findall(r"\w+", """
    arw cin cr2 cr3 czi dcm dicom dng dpx exr hdr heics icns ico j2c jls jpf jpx jxl jxr lif lsm mpo nd2 nef orf pam pcx
    pfm psd qoi raf rw2 sgi svg svs tga vsi xcf
""")}  # fmt: skip
MAX_PAGES = 2**16


class Page(NamedTuple):
    """A page of a file that holds several, from 0."""

    path: Path
    number: int

    def __str__(self) -> str:
        return f"{self.path}, page {self.number}"


Source = str | Path | bytes | Page | Image.Image


class ImageInfo(NamedTuple):
    """What an image's header tells."""

    size: tuple[int, int]  # (height, width) of the upright picture
    pages: tuple[int, ...] = (0,)  # numbers of those that a viewer plays or leafs through; one of a still image


class Picture(NamedTuple):
    """An opened image, and how its values are stored.

    Attributes:
        image: Pillow's.
        maximum: the stored value of white in an image of gray values with up to 8 bits, or of a PPM.
        white_is_zero: gray values were inverted (up to 8 bits), or are still to be inverted (more), to be shown.
        colors: how colours of 16 bits per channel are stored, of which Pillow gives 8; else "".
    """

    image: Image.Image
    maximum: int = 255
    white_is_zero: bool = False
    colors: str = ""


def describe_unread(files: Iterable[Path]) -> str:
    """A clause that names the pictures that are not read by their suffixes; "" where there are none."""
    counts = Counter(path.suffix.lower() for path in files if path.suffix.lower() in UNREAD_SUFFIXES)
    hints = dict.fromkeys(SUFFIXES["HEIF"], " (needs `pip install pillow-heif`)")
    kinds = [f"{count} {suffix}{hints.get(suffix, '')}" for suffix, count in sorted(counts.items())]
    return f"files that are not read: {', '.join(kinds)}" if kinds else ""


@contextmanager
def open_image(source: str | Path | bytes, name: str | None = None) -> Iterator[Image.Image]:
    """Opens an image file or an encoded image; errors while it is open name it and become `SampleError`.

    Images of more pixels than `PIL.Image.MAX_IMAGE_PIXELS` are refused before they are decoded.
    """
    stream = BytesIO(source) if isinstance(source, bytes) else source
    with _image_errors(name or str(source)), Image.open(stream, formats=IMAGE_FORMATS) as image:
        _check_pixels(image)
        yield image


@contextmanager
def _image_errors(name: str) -> Iterator[None]:
    limit = f"more than {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS) are not decoded"
    damage = (*DAMAGE, SyntaxError, FFmpegError)  # SyntaxError: Pillow's for some damaged PNGs
    with named_errors(name, limit, (Image.DecompressionBombError,)), named_errors(name, "not a readable image", damage):
        yield


def _check_pixels(image: Image.Image) -> None:
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")


def image_info(source: Source, name: str | None = None) -> ImageInfo:
    """What an image's header tells; `SampleError` also for pages of several sizes or axes, or too many of them."""
    name = name or str(source)
    if isinstance(source, Image.Image):
        return ImageInfo(_upright_size(source))
    if isinstance(source, Page):
        return image_info(source.path, name)._replace(pages=(source.number,))
    if isinstance(source, bytes):
        return _read_info(source, name)
    return _info_of_file(Path(source), *file_version(source))


@lru_cache(maxsize=4096)
def _info_of_file(path: Path, modified_ns: int, num_bytes: int) -> ImageInfo:
    return _read_info(path, str(path))


def file_version(path: str | Path) -> tuple[int, int]:
    """What tells whether a file has changed: its time of modification, and its size."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def _read_info(source: Path | bytes, name: str) -> ImageInfo:
    with open_image(source, name) as image:
        return ImageInfo(_upright_size(image), tuple(_find_pages(image)))


def page_times(path: Path) -> tuple[float, ...]:
    """Seconds from an animation's first page to each of its pages; none where the file does not tell them."""
    return _times_of_file(path, *file_version(path))


@lru_cache(maxsize=4096)
def _times_of_file(path: Path, modified_ns: int, num_bytes: int) -> tuple[float, ...]:
    times = [0]
    with open_image(path) as image:
        for page in _find_pages(image) if image.format != "TIFF" else ():
            image.seek(page)
            image.load()  # only then a WebP tells the time
            times.append(times[-1] + (image.info.get("duration") or 0))
    return tuple(time / 1000 for time in times[:-1]) if any(times[:-1]) else ()


def _upright_size(image: Image.Image) -> tuple[int, int]:
    # Pillow gives the size of a TIFF as it is after turning.
    is_turned = image.format != "TIFF" and image.getexif().get(0x0112) in (5, 6, 7, 8)
    return (image.width, image.height) if is_turned else (image.height, image.width)


def _find_pages(image: Image.Image) -> list[int]:
    """The pages that a viewer plays or leafs through: not previews, nor a default picture beside an animation."""
    if image.format in ("JPEG", "MPO"):  # what an MPO has beside the picture are previews, and views for 3D
        return [0]
    too_many = SampleError(f"more than {MAX_PAGES} pages are not read")
    if image.format != "TIFF":
        count = int(getattr(image, "n_frames", 1))
        if count > MAX_PAGES:
            raise too_many
        return list(range(int(count > 1 and bool(image.info.get("default_image"))), count))
    tiff: Any = image
    description, pages, sizes = str(tiff.tag_v2.get(270, "")), [], set()
    try:
        for number in range(MAX_PAGES + 1):
            if number == MAX_PAGES:
                raise too_many
            tiff.seek(number)
            _check_pixels(tiff)
            if not tiff.tag_v2.get(254, 0) & 0b101:  # bits of a smaller version, and of a mask of transparency
                pages.append(number)
                sizes.add(tiff.size)
    except EOFError:
        tiff.seek(0)
    if len(sizes) > 1:
        raise SampleError(f"pages of several sizes (width, height), {sorted(sizes)[:4]}; expected pages of one size")
    _check_axes(description, len(pages))
    return pages or [0]


def _check_axes(description: str, num_pages: int) -> None:
    """Checks by what ImageJ, OME and tifffile write into a TIFF that its pages have one axis, and are all there."""
    told = re.findall(r"(?m)^(channels|slices|frames)=(\d+)", description)
    told += re.findall(r'\bSize([CZT])="(\d+)"', description)
    shape = re.match(r'\{"shape": \[([\d, ]+)\]', description)
    if not told and shape:
        lengths, product = [int(length) for length in shape[1].split(",")], 1
        for axis, length in enumerate(lengths):
            if product < num_pages:
                told.append((f"axis {axis}", str(length)))
                product *= length
    axes = {name: int(length) for name, length in told if int(length) > 1}
    if len(axes) > 1 and num_pages > 1:
        raise SampleError(f"its {num_pages} pages have several axes, {axes}; expected the frames of one channel")
    count = re.search(r"(?m)^images=(\d+)", description)
    if count and int(count[1]) > num_pages:
        raise SampleError(f"{num_pages} pages in the file, but its description says {count[1]}")


@contextmanager
def open_page(source: Source, name: str | None = None) -> Iterator[Picture]:
    """Opens an image, or a page of one, for reading; `SampleError` also for several pages, of which none is named."""
    name = name or str(source)
    if isinstance(source, Image.Image):
        with _image_errors(name):
            yield _picture(source)
    elif isinstance(source, Page):
        with _image_errors(name):
            stack = _open_stack(source.path, *file_version(source.path), os.getpid(), threading.get_ident())
            yield stack.read(source.number)
    else:
        with open_image(source, name) as image:
            pages = _find_pages(image)
            if len(pages) > 1:
                raise SampleError(f"{name}: an image of {len(pages)} pages; expected a still image")
            yield _picture(image)


def _picture(image: Any) -> Picture:
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    rawmode, *others = (arguments,) if isinstance(arguments, str) else arguments
    bits = re.match(r"L;(\d)", str(rawmode))
    maximum = 2 ** int(bits[1]) - 1 if bits else 255
    if image.format == "PPM" and others:
        maximum = int(others[0])
    white_is_zero = image.format == "TIFF" and image.mode != "P" and image.tag_v2.get(262, 0) == 0
    is_deep = image.format in ("PNG", "TIFF") and image.mode[0] not in "IF" and ";16" in str(rawmode)
    return Picture(image, maximum, white_is_zero, str(rawmode) if is_deep else "")


class _Stack:
    """An open file of several pages, which come fastest in ascending order; for one thread."""

    def __init__(self, path: Path):
        self.path, self.page, self.image = path, 0, Image.open(path, formats=IMAGE_FORMATS)
        self.picture = self.first = _picture(self.image)

    def read(self, number: int) -> Picture:
        """A page, which is valid until the next one is read."""
        if number != self.page:
            is_tiff = self.image.format == "TIFF"
            if number < self.page and not is_tiff:  # Pillow fails where an animated PNG goes on from its beginning
                self.image.close()
                self.image = Image.open(self.path, formats=IMAGE_FORMATS)
            self.image.seek(number)
            _check_pixels(self.image)
            self.picture = _picture(self.image) if is_tiff else self.first._replace(image=self.image)
            self.page = number
        return self.picture

    def __del__(self) -> None:
        if hasattr(self, "image"):
            self.image.close()


@lru_cache(maxsize=8)
def _open_stack(path: Path, modified_ns: int, num_bytes: int, process: int, thread: int) -> _Stack:
    """A stack stays open for its next page; not for another process or thread, whose position would be the same."""
    return _Stack(path)


atexit.register(_open_stack.cache_clear)  # while what closing needs is there


def decode_deep_colors(source: Source, rawmode: str) -> np.ndarray:
    """Colours of 16 bits per channel, (H, W, 3) uint16; raises `SampleError` where they are stored in a rare way."""
    if not isinstance(source, Path | str | bytes) or not rawmode.startswith("RGB;16"):
        raise SampleError(f"an image stored as {rawmode} is not read; save it as a PNG without transparency")
    with av.open(BytesIO(source) if isinstance(source, bytes) else f"file:{source}", "r") as container:
        frame = next(container.decode(video=0))
        if not isinstance(frame, av.VideoFrame) or not frame.format.name.startswith("rgb48"):
            raise SampleError("its colours of 16 bits cannot be decoded; save it as a PNG without transparency")
        return frame.to_ndarray(format="rgb48le")
