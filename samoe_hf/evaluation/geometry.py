"""Geometry of masks: overlaps and boundaries of label maps, surfaces of volumes, and points that lie near others.

Points are numbers ("keys"), each the sum of its coordinates times strides that keep rows and masks apart.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np


def bounding_box(occupied: np.ndarray, margin: int) -> tuple[slice, ...] | None:
    """Slices around the non-zero elements, with a margin within the array; None where there are none."""
    box: list[slice] = []
    for axis in range(occupied.ndim):
        others = tuple(other for other in range(occupied.ndim) if other != axis)
        where = np.flatnonzero(occupied[tuple(box)].max(axis=others, initial=0))
        if not where.size:
            return None
        box.append(slice(max(where[0] - margin, 0), where[-1] + 1 + margin))
    return tuple(box)


def _overlaps(prediction: np.ndarray, target: np.ndarray, num_labels: int) -> np.ndarray:
    """Pixels in common, in the prediction and in the target, for labels 1..K: (3, K)."""
    size = num_labels + 1
    pairs = np.bincount((target.astype(np.intp) * size + prediction).ravel(), minlength=size**2).reshape(size, size)
    return np.stack([pairs.diagonal(), pairs.sum(axis=0), pairs.sum(axis=1)])[:, 1:]


def _block_edges(labels: np.ndarray) -> np.ndarray:
    """Where a pixel, its right, lower and lower right neighbour are not all alike, the border repeated: bool (H, W)."""
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edges = np.zeros(labels.shape, dtype=bool)
    edges[:, :-1] = across
    edges[:-1, :-1] |= across[1:]
    edges[:-1] |= down
    edges[:-1, :-1] |= down[:, 1:]
    return edges


def _boundary_keys(labels: np.ndarray, edges: np.ndarray, origin: int, strides: Sequence[int]) -> np.ndarray:
    """Sorted keys of the boundary pixels of all labels, as DAVIS' `seg2bmap` draws them.

    A key is `origin` plus (label - 1, y, x) times `strides`.
    """
    y, x = np.divmod(np.flatnonzero(edges), labels.shape[1])
    lower, right = np.minimum(y + 1, labels.shape[0] - 1), np.minimum(x + 1, labels.shape[1] - 1)
    # A label has its boundary in every such block that it takes part in, once however many corners it has.
    corners = np.sort([labels[y, x], labels[y, right], labels[lower, x], labels[lower, right]], axis=0)
    new = np.diff(corners, axis=0, prepend=np.zeros_like(corners[:1])) != 0
    keys = origin + (corners.astype(np.int64) - 1) * strides[0] + y * strides[1] + x * strides[2]
    return np.sort(keys[new])


def _band(labels: np.ndarray, edges: np.ndarray, width: int) -> np.ndarray:
    """The labels without what lies more than `width` pixels (chessboard distance) inside each of them."""
    rows_inside, columns_inside = (size - 2 * width for size in labels.shape)
    band = labels.copy()
    if rows_inside > 0 and columns_inside > 0:
        total = np.zeros((labels.shape[0] + 1, labels.shape[1] + 1), dtype=np.int32)
        np.cumsum(edges, axis=1, out=total[1:, 1:])
        np.cumsum(total, axis=0, out=total)
        in_rows = total[2 * width : -1] - total[:rows_inside]
        no_edge = in_rows[:, 2 * width : -1] == in_rows[:, :columns_inside]
        band[width:-width, width:-width][no_edge] = 0
    return band


def compare_labels(
    prediction: np.ndarray, target: np.ndarray, num_labels: int, band_width: int, origin: int, strides: Sequence[int]
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Compares two maps (H, W) of the labels 0..K.

    Returns:
        Overlaps of the regions, and of the bands inside their boundaries (2, 3, K); and the boundary keys of prediction
        and target.
    """
    edges = _block_edges(prediction), _block_edges(target)
    bands = _band(prediction, edges[0], band_width), _band(target, edges[1], band_width)
    keys = (
        _boundary_keys(prediction, edges[0], origin, strides),
        _boundary_keys(target, edges[1], origin, strides),
    )
    overlaps = [_overlaps(prediction, target, num_labels), _overlaps(bands[0], bands[1], num_labels)]
    return np.stack(overlaps), keys


def ball_runs(radius: float, spacing: Sequence[float], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Offsets of keys within `radius` as runs along the last axis, (shift, half length), the nearest runs first."""
    slack = 1 + 1e-9  # a distance equal to the radius is within it, whatever the rounding
    reaches = [math.floor(radius * slack / step) for step in spacing[:-1]]
    runs = []
    for offset in itertools.product(*(range(-reach, reach + 1) for reach in reaches)):
        squared = sum((o * step) ** 2 for o, step in zip(offset, spacing, strict=False))
        if squared <= (radius * slack) ** 2:
            half = math.floor(math.sqrt((radius * slack) ** 2 - squared) / spacing[-1])
            runs.append((squared, sum(o * stride for o, stride in zip(offset, strides, strict=False)), half))
    return [(shift, half) for _, shift, half in sorted(runs)]


def near_points(keys: np.ndarray, others: np.ndarray, runs: list[tuple[int, int]]) -> np.ndarray:
    """Which keys have one of `others` (sorted) within the ball, bool.

    This is what dilating the others by the ball and looking up the keys would give, but it touches boundary points
    alone, and most of them find a partner in the first runs.

    Args:
        runs: of the ball, see [`ball_runs`].
    """
    near = np.zeros(len(keys), dtype=bool)
    left = np.arange(len(keys) if len(others) else 0)
    for shift, half in runs:
        if not left.size:
            break
        low = keys[left] + (shift - half)
        gap = others.take(np.searchsorted(others, low), mode="clip") - low
        hit = (gap >= 0) & (gap <= 2 * half)
        near[left[hit]] = True
        left = left[~hit]
    return near


def f_measure(prediction: np.ndarray, target: np.ndarray, runs: list, mask_stride: int, num_masks: int) -> np.ndarray:
    """F of every mask (num_masks,) from the boundary keys of all."""

    def share_matched(keys: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        owner = keys // mask_stride
        count = np.bincount(owner, minlength=num_masks)
        matched = np.bincount(owner[near_points(keys, others, runs)], minlength=num_masks)
        return matched / np.maximum(count, 1), count == 0

    precision, no_prediction = share_matched(prediction, target)
    recall, no_target = share_matched(target, prediction)
    total = precision + recall
    return np.where(no_prediction & no_target, 1.0, 2 * precision * recall / np.where(total > 0, total, 1))


def surface_points(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Corners of voxels (P, 3) that the surface passes, and its area at each (P,)."""

    def combine_corners(difference_along: int | None) -> np.ndarray:
        cells = np.pad(mask, 1).astype(np.int8)
        for axis in range(3):
            lower, upper = np.delete(cells, -1, axis), np.delete(cells, 0, axis)
            cells = upper - lower if axis == difference_along else upper + lower
        return cells

    inside = combine_corners(None)
    points = np.nonzero((inside > 0) & (inside < 8))
    # The surface of a cell of eight voxels as a vector: per axis, its share of the cell's face across that axis.
    parts = [combine_corners(axis)[points] / 4 * math.prod(spacing) / spacing[axis] for axis in range(3)]
    return np.stack(points, axis=1), np.linalg.norm(parts, axis=0)


def volume_surface_dice(
    prediction: np.ndarray, target: np.ndarray, spacing: Sequence[float], tolerance: float
) -> float:
    """Surface Dice of one object's masks (D, H, W) that have any voxels, see [`metrics.surface_dice`]."""
    rows, columns = (
        size + 2 + math.ceil(tolerance / step) for size, step in zip(target.shape[1:], spacing[1:], strict=True)
    )
    strides = (rows * columns, columns, 1)
    runs = ball_runs(tolerance, spacing, strides)
    surfaces = [surface_points(mask, spacing) for mask in (prediction, target)]
    keys = [points @ np.array(strides) for points, _ in surfaces]
    near = [near_points(keys[0], keys[1], runs), near_points(keys[1], keys[0], runs)]
    areas = [area for _, area in surfaces]
    return float(sum(area[n].sum() for area, n in zip(areas, near, strict=True)) / sum(area.sum() for area in areas))
