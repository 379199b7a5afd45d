"""Images as frames and as labels, and writing of label images.

A frame is what a viewer shows: upright as its EXIF orientation says, its transparent pixels on white. A label image is
what is stored: numbers, whatever gray or colour a viewer would show for them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from samoe_hf.errors import InputError

from .frames import FrameSequence, SampleError, check_folder, frame_order, named_errors, one_form, say_once
from .image_files import (
    IMAGE_SUFFIXES,
    Page,
    Picture,
    Source,
    decode_deep_colors,
    describe_unread,
    image_info,
    open_page,
    page_times,
)

Window = tuple[float, float]
LABEL_FORMATS = ("BMP", "GIF", "PNG", "PPM", "TIFF", "WEBP")  # which can keep every value
# What a PNG of labels says where white, which others have for void or as the only object, is an object's id.
WHITE_IS_ID = ("white", "id")
SAMPLED_FRAMES = 16  # by which the window of a video is found


class ImageFrames(FrameSequence):
    """Frames that are images, or the pages of one file: a TIFF stack, an animated GIF, PNG, WebP or AVIF.

    Frames of 8 bits are what a viewer shows. Of gray frames with more bits or floats, the 0.5 and 99.5 percentiles
    over the video become black and white, which is said once.

    Args:
        sources: paths, encoded images as bytes, or PIL images, in order; or the path of one file of several pages.
        window: other intensities that become black and white.
        names: by default the files' stems, or "00000", "00001"…
        owner: the video, for messages about images that are no files.

    Raises:
        SampleError: no frames, or two of one name; on access, a frame that cannot be read, differs in size or depth
            from the first, or has colours of 16 bits and no window.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        window: Window | None = None,
        names: Sequence[str] | None = None,
        owner: str = "",
    ):
        check_window(window)
        if not sources:
            raise SampleError("a video without frames")
        self.sources: list[Source] = [Path(source) if isinstance(source, str) else source for source in sources]
        self.paths = [source for source in self.sources if isinstance(source, Path)]
        self.window, self.owner = window, owner
        if names is None and len(self.paths) == len(sources):
            names = [path.stem for path in self.paths]
            name, count = Counter(map(one_form, names)).most_common(1)[0]
            if count > 1:  # masks are named after frames
                raise SampleError(f"{self.paths[0].parent}: {count} frames are called {name}")
            info = image_info(self.sources[0])
            if len(info.pages) > 1 and len(sources) == 1:
                self.sources, names = [Page(self.paths[0], page) for page in info.pages], None
        self.names = [f"{i:05d}" for i in range(len(self.sources))] if names is None else list(names)
        self.size = image_info(self.sources[0], self._name(0)).size

    def _name(self, index: int) -> str:
        source = self.sources[index]
        return str(source) if isinstance(source, Path | Page) else f"{self.owner}, frame {self.names[index]}"

    def _pixels(self, index: int) -> np.ndarray:
        """A frame's values, see [`read_pixels`]."""
        pixels = read_pixels(self.sources[index], self._name(index), self.window is not None)
        if pixels.shape[:2] != self.size:
            raise SampleError(f"{self._name(index)}: frame of size {pixels.shape[:2]}, not {self.size} as the first")
        return pixels

    @property
    def has_pages(self) -> bool:
        """Whether the frames are pages of one file."""
        return isinstance(self.sources[0], Page)

    @cached_property
    def _times(self) -> tuple[float, ...]:
        return page_times(self.paths[0]) if self.has_pages else ()

    @property
    def fps(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Pages per second, their mean, where the file tells their times."""
        return (len(self) - 1) / self._times[-1] if self._times else None

    def time(self, index: int) -> float | None:
        """Seconds from the first page to another one, where the file tells them."""
        return self._times[index] if self._times else None

    @cached_property
    def is_deep(self) -> bool:
        """Whether the frames have more than 8 bits per channel."""
        return self._pixels(0).dtype != np.uint8

    def _read(self, index: int) -> np.ndarray:
        pixels = self._pixels(index)
        if (pixels.dtype != np.uint8) != self.is_deep:
            bits = "more than 8 bits" if self.is_deep else "8 bits"
            raise SampleError(f"{self._name(index)}: frame of {pixels.dtype}, but the video's first one has {bits}")
        pixels = to_uint8(pixels, self.window or (self._found_window if self.is_deep else None))
        return np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels

    @cached_property
    def _found_window(self) -> Window:
        """The 0.5 and 99.5 percentiles over the video, which is said."""
        owner = self.owner or (self.paths[0].parent if len(self.paths) > 1 else self.paths[0])
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), SAMPLED_FRAMES)).astype(int)).tolist()
        with named_errors(owner, "no intensities"):
            low, high = find_window(np.concatenate([self._pixels(i).ravel() for i in chosen]))
        say_once(
            f"{owner}: frames of more than 8 bits; their 0.5 and 99.5 percentiles, {low:.6g} and {high:.6g}, become "
            "black and white in the whole video; `window` chooses others"
        )
        return low, high

    def encoded(self, index: int) -> bytes:
        """An image file that shows this frame: its own, or a PNG where that does not show it by itself."""
        source = self.sources[index]
        if isinstance(source, Path | bytes) and self.window is None and not self.is_deep:
            return source if isinstance(source, bytes) else source.read_bytes()
        return encode_png(self._read(index))


def encode_png(frame: np.ndarray) -> bytes:
    """A frame (H, W, 3) uint8 as a PNG."""
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def image_paths(folder: str | Path) -> list[Path]:
    """The image files of a folder, by their suffixes, in the order of frames; says which pictures are not read.

    Raises:
        FileNotFoundError: there is no such folder.
        SampleError: it holds no images.
    """
    with os.scandir(check_folder(folder)) as entries:
        files = [Path(entry.path) for entry in entries if not (entry.is_dir() or entry.name.startswith("."))]
    paths, unread = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES], describe_unread(files)
    if not paths:
        others = f"; it holds {unread}" if unread else ""
        raise SampleError(f"{folder}: no images in this folder ({', '.join(IMAGE_SUFFIXES)}){others}")
    if unread:
        say_once(f"{folder} holds {unread}")
    return frame_order(paths)


def read_pixels(source: Source, name: str | None = None, deep_colors: bool = False) -> np.ndarray:
    """Reads an image as it is shown: (H, W, 3) uint8 RGB; with more than 8 bits (H, W) of the type that is stored.

    Args:
        name: what to call it in messages.
        deep_colors: colours of 16 bits are read as (H, W, 3) uint16.

    Raises:
        SampleError: a damaged file, several pages, or colours of 16 bits that are not asked for.
    """
    with open_page(source, name) as picture:
        if picture.colors:
            if not deep_colors or picture.image.getexif().get(0x0112, 1) != 1:
                raise SampleError(
                    f"{name or source}: colours of 16 bits per channel; `window` must say which intensities become "
                    "black and white, such as [0, 65535], or [0, 4095] for 12 bits (upright images alone)"
                )
            return decode_deep_colors(source, picture.colors)
        image = ImageOps.exif_transpose(picture.image)
        if image.mode[0] in "IF":
            values = np.asarray(image)
            if picture.white_is_zero:
                values = 65535 - values if values.dtype == np.uint16 else -values
            return values
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.asarray(image.convert("RGB"))


def read_label_png(source: Source, name: str | None = None) -> np.ndarray:
    """Reads a label image: palette indices, gray values or 16-bit values as they are stored.

    A binary mask of 0 and 255 stays so. Gray values of 2 and 4 bits, and those of a TIFF in which white is zero, are
    the stored numbers, not the shown grays; of 1 bit, white is 1. Of an RGB image and a GIF, grays are the values.
    DAVIS' colours stand for ids there, and where a palette has no others, but in another order. Transparent pixels are
    background. An EXIF orientation turns labels too.

    Args:
        source: a path, the file's bytes, a page or a PIL image.
        name: what to call it in messages; the path by default.

    Returns:
        (H, W) uint8, or uint16 for 16-bit files.

    Raises:
        SampleError: a damaged file, a format that may change values, several pages, ids above 65535, or other colours.
    """
    name = name or str(source)
    with open_page(source, name) as picture:
        if not _keeps_values(picture.image, source):
            known = ", ".join(LABEL_FORMATS)
            raise SampleError(
                f"{name}: {picture.image.format} image; labels must be {known}, without losses: others may change ids"
            )
        if picture.colors:
            raise SampleError(f"{name}: colours of 16 bits; labels must be a palette, gray or 16-bit gray image")
        values = _stored_values(picture, name)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise SampleError(f"{name}: labels must be from 0 to 65535, not {values.min()} to {values.max()}")
    return values if values.dtype == np.uint8 else values.astype(np.uint16)


def _stored_values(picture: Picture, name: str) -> np.ndarray:
    """The values (H, W) of an upright label image as they are stored."""
    image, maximum = ImageOps.exif_transpose(picture.image), picture.maximum
    if picture.image.format == "GIF":  # whose writers number colours anew
        image = image.convert("RGBA")
    values = np.array(image)
    if image.mode == "1":
        return values.astype(np.uint8)
    if image.mode == "P":
        return _ids_of_palette(image)[values]
    if image.mode == "L":
        values = 255 - values if picture.white_is_zero else values
        return values if maximum == 255 else np.rint(values * (maximum / 255)).astype(np.uint8)
    if image.mode in ("LA", "PA", "RGBA"):
        alpha = values[..., -1:]
        is_hidden = (alpha == 0) & alpha.any()  # where all were, values are stored without regard to that
        if is_hidden.any() and not is_hidden.all() and not values[..., :-1][~is_hidden[..., 0]].any():
            raise SampleError(f"{name}: black on transparent pixels; labels must be numbers or colours above 0")
        values = np.where(is_hidden, 0, values[..., :-1])
    if image.mode in ("LA", "PA"):
        return values[..., 0]
    if image.mode in ("RGB", "RGBA"):
        return _ids_of_colors(values, name, "a GIF" if picture.image.format == "GIF" else "an RGB image")
    if image.mode[0] != "I":
        raise SampleError(f"{name}: {image.mode} image; labels must be a palette, gray or 16-bit image")
    return np.rint(values * (maximum / 65535)).astype(np.int64) if picture.image.format == "PPM" else values


def _keeps_values(image: Image.Image, source: Source) -> bool:
    """Whether the image's format, if it has one, keeps every value; a WebP does where none of its parts is lossy."""
    if image.format != "WEBP" or isinstance(source, Image.Image):
        return image.format is None or image.format in LABEL_FORMATS
    data = (
        source if isinstance(source, bytes) else Path(source.path if isinstance(source, Page) else source).read_bytes()
    )
    place = 12
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if kind == b"VP8 ":
            return False
        place += 24 if kind == b"ANMF" else 8 + size + size % 2  # what is in a page follows its header
    return True


def _ids_of_palette(image: Image.Image) -> np.ndarray:
    """The id (256,) of each index of a palette image: itself, or that of its colour where all used ones are DAVIS' in
    another order. Some tools number them anew."""
    ids, palette = np.arange(256, dtype=np.uint8), np.reshape(image.getpalette("RGB") or [], (-1, 3))
    used = np.flatnonzero(image.histogram())
    colors = palette[used[used < len(palette)]]
    known = {tuple(color): i for i, color in enumerate(voc_palette().tolist())}
    told = [known.get(tuple(color), -1) for color in colors.tolist()]
    if -1 not in told and len({*told}) == len(used) and (colors != colors[:, :1]).any():
        ids[used] = told
    return ids


def _ids_of_colors(colors: np.ndarray, name: str, kind: str) -> np.ndarray:
    """Ids (H, W) of an image (H, W, 3) of grays, or of DAVIS' colours; `kind` is for messages."""
    if (colors[..., :1] == colors[..., 1:]).all():
        return colors[..., 0].copy()
    packed, known = (rgb.astype(int) @ np.array([1 << 16, 1 << 8, 1]) for rgb in (colors, voc_palette()))
    present, places = np.unique(packed, return_inverse=True)
    ids_of = {color: i for i, color in enumerate(known.tolist())}
    if not ids_of.keys() >= set(present.tolist()):
        raise SampleError(
            f"{name}: {kind} of {len(present)} colours, such as "
            f"{', '.join(f'#{color:06x}' for color in present[:6])}; labels must be a PNG or TIFF of ids as palette "
            "indices or grays, 0 for background, or have DAVIS' colours"
        )
    return np.array([ids_of[color] for color in present.tolist()], np.uint8)[places].reshape(packed.shape)


def voc_palette() -> np.ndarray:
    """The colour map of PASCAL VOC and DAVIS, (256, 3) uint8: an id's bits, spread over the channels' high bits."""
    ids = np.arange(256)
    channels = [sum(((ids >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def write_palette_png(path: str | Path, ids: np.ndarray, text: PngInfo | None = None) -> None:
    """Writes (H, W) integer ids, 0 for background, as a palette PNG in DAVIS' colours, with text if it is given.

    Where 255 is among them, the file says that it is an id, so that [`~annotations.LabelImages`] reads it as one.

    Raises:
        ValueError: ids outside 0..255, which a palette cannot hold, or another shape or dtype.
    """
    if ids.ndim != 2 or ids.dtype.kind not in "iub":
        raise InputError(f"{path}: ids must be (H, W) integers, not {ids.dtype} {ids.shape}")
    if ids.min(initial=0) < 0 or ids.max(initial=0) > 255:
        raise InputError(f"{path}: ids {ids.min()} to {ids.max()}; a palette holds 0 to 255, so renumber the objects")
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    if (ids == 255).any():
        text = text or PngInfo()
        text.add_text(*WHITE_IS_ID)
    image.save(path, pnginfo=text)


def white_is_id(source: Source, name: str) -> bool:
    """Whether a label image says that its white is an object's id."""
    key, value = WHITE_IS_ID
    with open_page(source, name) as picture:
        return picture.image.info.get(key) == value


# --- Intensities of more than 8 bits as gray values


def check_window(window: Window | None) -> None:
    """Raises `InputError` for a window whose first intensity is not below its second."""
    if window is not None and not (len(window) == 2 and window[0] < window[1]):
        raise InputError(f"`window` must be (black, white), the smaller intensity first, not {tuple(window)}")


def find_window(values: np.ndarray) -> Window:
    """The 0.5 and 99.5 percentiles of intensities of any shape and real dtype; those that are not finite do not count.

    Raises:
        SampleError: none is finite.
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise SampleError("no finite intensities")
    low, high = np.percentile(finite, (0.5, 99.5))
    return float(low), float(high)


def to_uint8(values: np.ndarray, window: Window | None = None) -> np.ndarray:
    """Intensities of any shape and real type as gray values 0…255; uint8 without a window is returned as it is.

    `window` has the intensities that become 0 and 255, by default the 0.5 and 99.5 percentiles. NaN becomes 0.
    """
    if values.dtype == np.uint8 and window is None:
        return values
    low, high = find_window(values) if window is None else window
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = (values.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    return np.rint(np.nan_to_num(scaled, copy=False).clip(0, 255)).astype(np.uint8)
