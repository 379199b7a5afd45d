"""Geometry of masks: overlaps and boundaries of label maps, surfaces of volumes, and points that lie near others."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.spatial import KDTree


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


def _boundary_points(labels: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Boundary pixels of all labels as DAVIS' `seg2bmap` draws them, (P, 3): label - 1, y and x."""
    y, x = np.divmod(np.flatnonzero(edges), labels.shape[1])
    lower, right = np.minimum(y + 1, labels.shape[0] - 1), np.minimum(x + 1, labels.shape[1] - 1)
    # A label has its boundary in every such block that it takes part in, once however many corners it has.
    corners = np.sort([labels[y, x], labels[y, right], labels[lower, x], labels[lower, right]], axis=0)
    new = np.diff(corners, axis=0, prepend=np.zeros_like(corners[:1])) != 0
    pixel = np.nonzero(new)[1]
    return np.stack([corners[new].astype(np.intp) - 1, y[pixel], x[pixel]], axis=1)


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
    prediction: np.ndarray, target: np.ndarray, num_labels: int, band_width: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Overlaps of two maps' (H, W) labels 1..K, and of the bands inside their boundaries, (2, 3, K); and the boundary
    points of both, (P, 3) each: label - 1, y and x."""
    edges = _block_edges(prediction), _block_edges(target)
    bands = _band(prediction, edges[0], band_width), _band(target, edges[1], band_width)
    overlaps = np.stack([_overlaps(prediction, target, num_labels), _overlaps(*bands, num_labels)])
    return overlaps, (_boundary_points(prediction, edges[0]), _boundary_points(target, edges[1]))


def f_measure(prediction: np.ndarray, target: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """F of every mask from the boundary points of all, (P, 3): number of the mask, y and x.

    `radii`: how far apart the points of each mask may lie, (num_masks,).
    """
    num_masks, gap = len(radii), 2 + int(radii.max(initial=0))
    # A point as one number, with gaps that keep the ends of rows from the next row's start, and masks apart.
    height, width = (gap + max(prediction[:, i].max(initial=0), target[:, i].max(initial=0)) for i in (1, 2))
    keys = [np.sort((points[:, 0] * height + points[:, 1]) * width + points[:, 2]) for points in (prediction, target)]

    def share_matched(keys: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        owner = keys // (height * width)
        count, near = np.bincount(owner, minlength=num_masks), np.zeros(len(keys), dtype=bool)
        for radius in np.unique(radii):
            chosen = radii[owner] == radius
            near[chosen] = _near(keys[chosen], others, _disk(radius), width)
        matched = np.bincount(owner[near], minlength=num_masks)
        return matched / np.maximum(count, 1), count == 0

    precision, no_prediction = share_matched(*keys)
    recall, no_target = share_matched(*keys[::-1])
    total = precision + recall
    return np.where(no_prediction & no_target, 1.0, 2 * precision * recall / np.where(total > 0, total, 1))


def _disk(radius: float) -> list[tuple[int, int, int]]:
    """The pixels of a disk around a pixel, row by row: offset of the row, first and last offset in it.

    The nearest rows come first, in which most points find a partner. The middle of a disk whose radius has a fraction
    lies beside the pixel: so it is where scikit-image's `disk` is the kernel of OpenCV's `dilate`, as in MOSEv2's code.
    """
    places = np.arange(-radius, radius + 1)
    offsets = np.arange(len(places)) - len(places) // 2
    rows = [(dy, offsets[places**2 + y**2 <= radius**2]) for dy, y in zip(offsets, places, strict=True)]
    found = [(int(dy), int(dx[0]), int(dx[-1])) for dy, dx in rows if dx.size]
    return sorted(found, key=lambda row: abs(row[0])) or [(0, 0, 0)]


def _near(keys: np.ndarray, others: np.ndarray, disk: Sequence[tuple[int, int, int]], width: int) -> np.ndarray:
    """Which points have one of `others` within a disk, bool; points are numbers `y * width + x`, `others` ascending."""
    near = np.zeros(len(keys), dtype=bool)
    left = np.arange(len(keys) if len(others) else 0)
    for row, first, last in disk:
        start = keys[left] + row * width + first
        following = np.searchsorted(others, start)
        found = others.take(following, mode="clip") - start
        hit = (found >= 0) & (found <= last - first)
        near[left[hit]] = True
        left = left[~hit]
    return near


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
    surfaces = [surface_points(mask, spacing) for mask in (prediction, target)]
    bound = tolerance * (1 + 1e-9) + 1e-12  # a distance equal to the tolerance is within it, whatever the rounding
    near = 0.0
    for (points, area), (others, _) in itertools.permutations(surfaces):
        if len(others):
            distance, _ = KDTree(others * spacing).query(points * spacing, distance_upper_bound=bound)
            near += area[np.isfinite(distance)].sum()
    return float(near / sum(area.sum() for _, area in surfaces))
