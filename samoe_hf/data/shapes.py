"""Masks as COCO's run-length encodings, as polygons and as other shapes, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.mask import encode, frPyObjects
from scipy.ndimage import find_objects, label

from samoe_hf.errors import InputError

# A run-length encoding, a polygon x, y, x, y, …, or a function that draws a mask of a size (height, width).
Part = Mapping[str, Any] | list[float] | Callable[[tuple[int, int]], np.ndarray]


def draw(part: Part, size: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) bool of a part; a pixel belongs to a polygon as pycocotools has it."""
    if callable(part):
        return part(size)
    return decode_rle(part if isinstance(part, Mapping) else encode_polygon(part, size), size)


def decode_rle(rle: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) bool of a COCO run-length encoding; any error where it does not fit the size (height, width).

    Its counts are compressed (a string) or not (a list). pycocotools reads and writes beyond its memory where runs do
    not fit, so it is not trusted with them.
    """
    counts = rle["counts"].encode("ascii") if isinstance(rle["counts"], str) else rle["counts"]
    runs = decompress_counts(counts) if isinstance(counts, bytes) else np.array(counts)
    area = size[0] * size[1]
    is_whole = runs.ndim == 1 and runs.dtype == np.int64 and ((runs >= 0) & (runs <= area)).all() and runs.sum() == area
    if list(rle["size"]) != list(size) or not is_whole:
        raise InputError(f"its size is {rle['size']}, or its runs do not add up to {size[0]} x {size[1]} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) bool as a COCO run-length encoding, with compressed counts."""
    encoded: Any = encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def encode_polygon(polygon: Sequence[float], size: tuple[int, int]) -> dict[str, Any]:
    """The run-length encoding of a polygon x, y, x, y, … in an image of a size (height, width).

    Too few points, points so far outside or an outline so long that pycocotools would take more memory than the image
    is worth are an error.
    """
    height, width = size
    flat = np.array(polygon, dtype=np.float64)
    if flat.ndim != 1 or flat.size < 6 or flat.size % 2:
        raise InputError("a polygon must have at least three points x, y")
    points = flat.reshape(-1, 2)
    if not (np.abs(points - (width / 2, height / 2)) <= 2 * max(size)).all():
        raise InputError(f"a polygon has points far outside the image of {height} x {width} pixels")
    steps = np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1)
    if steps.sum() > 4 * (height + width) + 2 * height * width:
        raise InputError("a polygon's outline is longer than twice the image's pixels")
    shapes: Any = [flat.tolist()]  # pycocotools' types leave out such lists
    return dict(frPyObjects(shapes, *size)[0])


def decompress_counts(counts: bytes) -> np.ndarray:
    """The runs of compressed counts, integers of 5 bits a character; each but the first three is a difference."""
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 0x20) == 0)
    if codes.size == 0 or codes.min() < 0 or codes.max() > 63 or ends.size == 0 or ends[-1] != codes.size - 1:
        raise InputError("damaged counts")
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, ends + 1 - starts))
    if shifts.max() > 30:
        raise InputError("damaged counts")
    runs = np.add.reduceat((codes & 0x1F) << shifts, starts)
    runs -= np.where(codes[ends] & 0x10, 1 << (shifts[ends] + 5), 0)  # the last character's highest bit is the sign
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs


def place(patch: np.ndarray, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """A mask of a size (height, width), with the part of `patch` that lies within it."""
    mask = np.zeros(size, dtype=bool)
    y, x = max(top, 0), max(left, 0)
    seen = patch[y - top : max(size[0] - top, 0), x - left : max(size[1] - left, 0)]
    mask[y : y + seen.shape[0], x : x + seen.shape[1]] = seen
    return mask


def box(bounds: Sequence[float], rotation: float = 0, is_ellipse: bool = False) -> list[float]:
    """A rectangle x0, y0, x1, y1, or the ellipse in it, as a polygon; turned clockwise by degrees around its center."""
    x0, y0, x1, y1 = bounds
    angles = np.radians(np.arange(0, 360, 5) if is_ellipse else (225, 315, 45, 135))
    corners = np.stack([np.cos(angles), np.sin(angles)], -1) * (1 if is_ellipse else 2**0.5)
    corners *= ((x1 - x0) / 2, (y1 - y0) / 2)
    turn = np.radians(rotation)
    turned = corners @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    return np.add(turned, ((x0 + x1) / 2, (y0 + y1) / 2)).ravel().tolist()


def cropped(mask: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The part of a mask (H, W) bool that holds all its pixels, of which there are some, and its left and top."""
    rows, columns = find_objects(mask.astype(np.uint8))[0]
    return mask[rows, columns], columns.start, rows.start


def runs_of(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of background and object in turn, along the rows of a mask (H, W) bool."""
    return decompress_counts(encode_rle(mask.T)["counts"].encode()).tolist()


def polygons_of(mask: np.ndarray) -> list[list[float]]:
    """The outlines along the pixels' edges of a mask (H, W) bool, as polygons x, y, x, y, …, one for each part of it.

    A hole is joined to its outline by a line to and fro, so that pycocotools draws the mask again, to the pixel.
    """
    labelled: Any = label(mask)
    labels: np.ndarray = labelled[0]
    polygons = []
    for number, (rows, columns) in enumerate(find_objects(labels), 1):
        rings = [np.add(ring, (columns.start, rows.start)) for ring in _outlines(labels[rows, columns] == number)]
        polygons.append(joined([ring.ravel().tolist() for ring in rings]))
    return polygons


def joined(polygons: Sequence[list[float]]) -> list[float]:
    """Polygons as one, joined by lines to and fro."""
    if len(polygons) == 1:
        return list(polygons[0])
    starts, order = np.array([ring[:2] for ring in polygons], dtype=np.float64), [0]
    left = np.ones(len(polygons), bool)
    while len(order) < len(polygons):  # to the nearest one
        left[order[-1]] = False
        distances = np.abs(starts - starts[order[-1]]).sum(axis=1)
        order.append(int(np.where(left, distances, np.inf).argmin()))
    rings = [polygons[i] for i in order]
    forth = [value for ring in rings for value in [*ring, *ring[:2]]]
    return forth + [value for ring in rings[-2::-1] for value in ring[:2]]


def _outlines(part: np.ndarray) -> list[np.ndarray]:
    """The closed outlines of pixels (H, W) bool, the outer one first: corners (N, 2) as x, y."""
    padded = np.pad(part, 1)
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    is_corner, is_double = nw ^ ne ^ sw ^ se, (nw == se) & (ne == sw) & (nw != ne)
    (ys, xs), (y2, x2) = np.nonzero(is_corner), np.nonzero(is_double)
    # Two pixels that touch at a corner are two corners.
    y, x = np.concatenate([ys, y2, y2]), np.concatenate([xs, x2, x2])
    up = np.concatenate([(nw ^ ne)[is_corner], np.ones(len(y2), bool), np.zeros(len(y2), bool)])
    left = np.concatenate([(nw ^ sw)[is_corner], nw[is_double], ~nw[is_double]])
    beside, below = np.empty(len(y), int), np.empty(len(y), int)
    along, down = np.lexsort((~left, x, y)), np.lexsort((~up, y, x))
    for partner, order in ((beside, along), (below, down)):
        partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    rings, seen = [], np.zeros(len(y), bool)
    for start in along.tolist():
        ring, corner = [], start
        while not seen[corner]:
            other = int(beside[corner])
            seen[[corner, other]] = True
            ring += [corner, other]
            corner = int(below[other])
        if ring:
            rings.append(np.stack([x[ring], y[ring]], -1))
    return rings
