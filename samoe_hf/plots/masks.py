"""Pictures of masks: over a frame, and frames side by side."""

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import find_objects


@contextmanager
def _plain_text() -> Iterator[None]:
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


# Names of domains, videos and models are drawn as they are: `$` is no mathematics, and letters that Matplotlib's font
# lacks are boxes.
plain_text = _plain_text()

# Those of Okabe and Ito, which everyone can tell apart, without black; neighbours are of different lightness.
OBJECT_COLORS = (
    (230, 159, 0), (0, 114, 178), (240, 228, 66), (213, 94, 0), (86, 180, 233), (204, 121, 167), (0, 158, 115),
)  # fmt: skip
PANEL_INCHES, DPI = 1.8, 130
# Opacities of the object's colour inside, of its hatching, and of the black beside the hatching.
TINT, HATCH, SHADOW = 0.15, 0.85, 0.45


def object_color(object_id: int) -> tuple[int, int, int]:
    """The colour of an object, each part 0 to 255; after seven they begin anew."""
    return OBJECT_COLORS[(object_id - 1) % len(OBJECT_COLORS)]


def overlay_masks(
    frame: np.ndarray, id_map: np.ndarray, height: int | None = None, show_ids: bool = True
) -> np.ndarray:
    """Draws objects over a frame so that they are seen on any: each outlined, hatched, and with its id.

    From outside in, an outline is black, white and of the object's colour ([`object_color`]). The hatching is of that
    colour with black beside it; objects of the same colour are hatched in different directions.

    Args:
        frame: (H, W, 3) uint8, as what is returned.
        id_map: (H, W) integers, 0 for background.
        height: of the picture in pixels; the frame's by default.
    """
    if height is not None and height != len(frame):
        frame, id_map = resized(frame, id_map, height)
    ids = np.flatnonzero(np.bincount(id_map.ravel())) if id_map.max(initial=0) < 1 << 16 else np.unique(id_map)
    ids = ids[ids > 0].tolist()
    if not ids:
        return frame
    numbers = np.searchsorted([0, *ids], id_map).astype(np.uint16)  # the first of the ids is 1
    line = max(1, min(id_map.shape) // 240)
    picture = np.array(frame)
    _hatch(picture, numbers, ids, line)
    _draw_outlines(picture, numbers, ids, line)
    if show_ids:
        _write_ids(picture, numbers, ids)
    return picture


def resized(frame: np.ndarray, mask: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """A frame (H, W, 3) uint8 and a mask or map of ids (H, W), at another height in pixels."""
    width = max(1, round(height * frame.shape[1] / frame.shape[0]))
    rows, columns = (np.arange(new) * old // new for new, old in zip((height, width), mask.shape, strict=True))
    picture = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(picture), mask[rows[:, None], columns]


def _hatch(picture: np.ndarray, numbers: np.ndarray, ids: Sequence[int], line: int) -> None:
    """Tints and hatches objects in place."""
    for number, where in enumerate(find_objects(numbers), start=1):
        object_id = ids[number - 1]
        lines = hatching(*numbers.shape, line, (object_id - 1) // len(OBJECT_COLORS) % 4)[where]
        fill_hatched(picture[where], numbers[where] == number, lines, object_color(object_id))


def fill_hatched(picture: np.ndarray, mask: np.ndarray, lines: np.ndarray, color: tuple[int, int, int]) -> None:
    """Tints and hatches a mask (H, W) of a picture (H, W, 3) uint8 in place, with lines of [`hatching`]."""
    kept = 1 - np.array([TINT, HATCH, SHADOW], dtype=np.float32)[:, None]
    added = np.array([TINT, HATCH, 0], dtype=np.float32)[:, None] * np.array(color, dtype=np.float32)
    drawn = kept[lines] * picture + added[lines]
    np.copyto(picture, drawn.astype(np.uint8), where=mask[..., None])


@lru_cache(maxsize=16)
def hatching(height: int, width: int, line: int, direction: int) -> np.ndarray:
    """Lines in one of four directions: 0 between them, 1 on them and 2 on the shadow beside them, (height, width)."""
    y, x = np.ogrid[:height, :width]
    across = (x + y, x - y, y + 0 * x, x + 0 * y)[direction] // (2 * line) % 5
    return np.where(across < 2, across + 1, 0)


def _draw_outlines(picture: np.ndarray, numbers: np.ndarray, ids: Sequence[int], line: int) -> None:
    """Draws outlines in place: a black line outside of the edge, a white and a coloured one inside."""
    colors = np.array([(0, 0, 0), *map(object_color, ids)], dtype=np.uint8)
    near = near_edges(numbers, line)
    y, x = np.nonzero(_grown(near, 2 * line) & (numbers > 0))
    picture[y, x] = colors[numbers[y, x]]
    y, x = np.nonzero(near)
    picture[y, x] = np.where(numbers[y, x, None] > 0, np.uint8(255), np.uint8(0))


def near_edges(numbers: np.ndarray, distance: int) -> np.ndarray:
    """Pixels at most so far from one of another number, bool (H, W)."""
    near = np.zeros(numbers.shape, dtype=bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = numbers[a] != numbers[b]
        near[a] |= differs
        near[b] |= differs
    return _grown(near, distance - 1)


def _grown(mask: np.ndarray, distance: int) -> np.ndarray:
    """Pixels at most so far from a mask, by the larger of the distances in x and y."""
    # SciPy's dilation and maximum filter take 4 to 30 times as long, which is felt in a video.
    for _ in range(distance):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        mask = grown.copy()
        mask[:, 1:] |= grown[:, :-1]
        mask[:, :-1] |= grown[:, 1:]
    return mask


def _write_ids(picture: np.ndarray, numbers: np.ndarray, ids: Sequence[int]) -> None:
    """Writes each object's id in place, in the widest part of its middle row, where it fits."""
    size = max(10, min(numbers.shape) // 16)
    for number, where in enumerate(find_objects(numbers), start=1):
        mask = numbers[where] == number
        label, opacity = _label(str(ids[number - 1]), size)
        height, width = opacity.shape[:2]
        pixels = np.cumsum(mask.sum(axis=1))
        row = int(np.searchsorted(pixels, pixels[-1] / 2))
        changes = np.flatnonzero(np.diff(np.pad(mask[row].astype(np.int8), 1)))
        start, end = max(zip(changes[::2], changes[1::2], strict=True), key=lambda run: run[1] - run[0], default=(0, 0))
        top, left = row - height // 2, (start + end - width) // 2
        inside = mask[max(top, 0) : top + height, max(left, 0) : left + width]
        if top >= 0 and left >= 0 and inside.shape == (height, width) and inside.all():
            part = picture[where][top : top + height, left : left + width]
            part[:] = (1 - opacity) * part + opacity * label


@lru_cache(maxsize=512)
def _label(text: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Text in white within black, (h, w, 3), and its opacity, (h, w, 1) from 0 to 1."""
    font, stroke = ImageFont.load_default(size), max(1, size // 8)
    left, top, right, bottom = font.getbbox(text, stroke_width=stroke)
    image = Image.new("RGBA", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), text, "white", font, stroke_width=stroke, stroke_fill="black")
    rgba = np.asarray(image, dtype=np.float32)
    return rgba[..., :3], rgba[..., 3:] / 255


def captioned(picture: np.ndarray, lines: Sequence[str], legend: Mapping[str, np.ndarray]) -> np.ndarray:
    """A picture below lines of text and a legend, name -> swatch; all are (H, W, 3) uint8."""
    height, width = picture.shape[:2]
    size = max(12, width // 48)
    step, font = int(size * 1.45), ImageFont.load_default(size)
    texts = [part for line in lines for part in textwrap.wrap(line, 2 * width // size)]
    places, x, row = [], 8, len(texts)
    for name in legend:
        entry = size + 24 + int(font.getlength(name))
        x, row = (8, row + 1) if x + entry > width else (x, row)
        places.append((x, 4 + row * step))
        x += entry
    canvas = Image.new("RGB", (width, height + step * (row + 1) + 6), "white")
    canvas.paste(Image.fromarray(picture), (0, canvas.height - height))
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(texts):
        draw.text((8, 4 + number * step), text, "black", font)
    for (x, y), (name, swatch) in zip(places, legend.items(), strict=True):
        canvas.paste(Image.fromarray(swatch).resize((size, size), Image.Resampling.NEAREST), (x, y + 1))
        draw.rectangle((x, y + 1, x + size, y + 1 + size), outline="black")
        draw.text((x + size + 5, y), name, "black", font)
    return np.asarray(canvas)


@plain_text
def plot_sheet(rows: Mapping[str, Sequence[np.ndarray]], path: str | Path, title: str) -> None:
    """Draws a row of pictures (H, W, 3) uint8 under each name; rows may differ in their length and size."""
    columns = max(map(len, rows.values()))
    heights = [0.25 + PANEL_INCHES * pictures[0].shape[0] / pictures[0].shape[1] for pictures in rows.values()]
    figure = Figure(figsize=(PANEL_INCHES * columns, sum(heights) + 0.4), layout="constrained")
    parts = figure.subfigures(len(rows), height_ratios=heights, squeeze=False)[:, 0]
    for part, (name, pictures) in zip(parts, rows.items(), strict=True):
        part.suptitle(name, fontsize=9, x=0.01, ha="left")
        for axes, picture in zip(part.subplots(1, columns, squeeze=False)[0], pictures, strict=False):
            axes.imshow(picture)
        for axes in part.axes:
            axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=DPI)
