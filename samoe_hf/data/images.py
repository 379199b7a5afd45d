"""Reading of image files as frames and as labels, and writing of label images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from samoe_hf.errors import InputError

from .frames import DAMAGE, FrameSequence, SampleError, frame_order, named_errors

IMAGE_SUFFIXES = (".bmp", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
LABEL_FORMATS = ("BMP", "GIF", "PNG", "TIFF")  # which keep every value
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # among Pillow's others are some that run programs


class ImageFrames(FrameSequence):
    """Frames in image files, in the given order."""

    def __init__(self, paths: Sequence[str | Path]):
        if not paths:
            raise SampleError("a video without frames")
        self.paths = [Path(path) for path in paths]
        self.names = [path.stem for path in self.paths]
        with open_image(self.paths[0]) as image:
            self.size = (image.height, image.width)

    def _read(self, index: int) -> np.ndarray:
        frame = read_image(self.paths[index])
        if frame.shape[:2] != self.size:
            raise SampleError(f"{self.paths[index]}: frame of size {frame.shape[:2]}, not {self.size} as the first")
        return frame


def image_paths(folder: str | Path) -> list[Path]:
    """The image files of a folder, by their suffixes, in natural order.

    Raises:
        FileNotFoundError: there is no such folder.
        SampleError: it holds no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    with os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    paths = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise SampleError(f"{folder}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return frame_order(paths)


@contextmanager
def open_image(source: str | Path | bytes, name: str | None = None) -> Iterator[Image.Image]:
    """Opens an image file or an encoded image; errors while it is open name it and become `SampleError`.

    Images of more pixels than `PIL.Image.MAX_IMAGE_PIXELS` are refused before they are decoded.

    Args:
        source: a path, or the file's bytes.
        name: what to call it in messages; the path by default.
    """
    name = name or str(source)
    stream = BytesIO(source) if isinstance(source, bytes) else source
    limit = f"more than {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS) are not decoded"
    with (
        named_errors(name, limit, (Image.DecompressionBombError,)),
        named_errors(name, "not a readable image", (*DAMAGE, SyntaxError)),  # Pillow's for some damaged PNGs
        Image.open(stream, formats=IMAGE_FORMATS) as image,
    ):
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        yield image


def read_image(source: str | Path | bytes, name: str | None = None) -> np.ndarray:
    """Reads an image file, or an encoded image's bytes, as (H, W, 3) uint8 RGB.

    Raises:
        SampleError: a damaged file, or more than 8 bits per channel.
    """
    with open_image(source, name) as image:
        if image.mode.startswith(("I", "F")):
            raise SampleError(f"{name or source}: {image.mode} image; frames must have 8 bits per channel")
        return np.asarray(image.convert("RGB"))


def read_label_png(source: str | Path | bytes, name: str | None = None) -> np.ndarray:
    """Reads a label image: palette indices, gray values or 16-bit values as they are stored.

    A binary mask stored as 0 and 255 stays 0 and 255 here. Of an RGB image, grays are the values, and DAVIS' colours
    stand for ids.

    Args:
        source: a path, or the file's bytes.
        name: what to call it in messages; the path by default.

    Returns:
        (H, W) uint8, or uint16 for 16-bit files.

    Raises:
        SampleError: a damaged file, a format that may change values, ids above 65535, or colours that stand for none.
    """
    name = name or str(source)
    with open_image(source, name) as image:
        if image.format not in LABEL_FORMATS:
            known = ", ".join(LABEL_FORMATS)
            raise SampleError(f"{name}: {image.format} image; labels must be {known}: other formats may change ids")
        if image.mode in ("1", "L", "P"):
            return np.asarray(image).astype(np.uint8)
        if image.mode in ("RGB", "RGBA"):
            return _ids_of_colors(np.asarray(image)[..., :3], name)
        if not image.mode.startswith("I"):
            raise SampleError(f"{name}: {image.mode} image; labels must be a palette, gray or 16-bit image")
        values = np.asarray(image)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise SampleError(f"{name}: labels must be from 0 to 65535, not {values.min()} to {values.max()}")
    return values.astype(np.uint16)


def _ids_of_colors(colors: np.ndarray, name: str) -> np.ndarray:
    """Ids (H, W) of an RGB image (H, W, 3) of grays, or of DAVIS' colours."""
    if (colors[..., :1] == colors[..., 1:]).all():
        return colors[..., 0].copy()
    packed, known = (rgb.astype(int) @ np.array([1 << 16, 1 << 8, 1]) for rgb in (colors, voc_palette()))
    present, places = np.unique(packed, return_inverse=True)
    ids_of = {color: i for i, color in enumerate(known.tolist())}
    if not ids_of.keys() >= set(present.tolist()):
        raise SampleError(
            f"{name}: an RGB image of {len(present)} colours, such as "
            f"{', '.join(f'#{color:06x}' for color in present[:6])}; labels must be a palette, gray or 16-bit image of "
            "ids, 0 for background, or have DAVIS' colours"
        )
    return np.array([ids_of[color] for color in present.tolist()], np.uint8)[places].reshape(packed.shape)


def voc_palette() -> np.ndarray:
    """The colour map of PASCAL VOC and DAVIS, (256, 3) uint8: an id's bits, spread over the channels' high bits."""
    ids = np.arange(256)
    channels = [sum(((ids >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def write_palette_png(path: str | Path, ids: np.ndarray) -> None:
    """Writes (H, W) integer ids, 0 for background, as a palette PNG in DAVIS' colours.

    Raises:
        ValueError: ids outside 0..255, which a palette cannot hold, or another shape or dtype.
    """
    if ids.ndim != 2 or ids.dtype.kind not in "iub":
        raise InputError(f"{path}: ids must be (H, W) integers, not {ids.dtype} {ids.shape}")
    if ids.min(initial=0) < 0 or ids.max(initial=0) > 255:
        raise InputError(f"{path}: ids {ids.min()} to {ids.max()}; a palette holds 0 to 255, so renumber the objects")
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    image.save(path)
