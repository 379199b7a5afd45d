"""Scores of predicted against annotated masks: of videos, of sets of videos, and of volumes.

[`METRICS`] lists the figures. A video is given as id maps (T, H, W), where 0 is background, or as boolean masks
(T, N, H, W), which may overlap; prediction and target in the same form, as arrays or tensors. Objects are paired by
their id: a mask under another object's id is wrong.

One rule holds for every score but MOSEv2's J: where neither side has a mask it is 1, where only one side has one it is
0. A mean over no frames or objects is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike

from samoe_hf.data.layouts import Protocol
from samoe_hf.errors import InputError

from .geometry import bounding_box, compare_labels, f_measure, volume_surface_dice

F_DISTANCE = 0.008  # of the image diagonal: how far apart boundaries may lie (DAVIS)
MOSE_DISTANCE = 0.1  # of the square root of the object's area, and at most that of F (MOSEv2)
BOUNDARY_IOU_DISTANCE = 0.02  # of the image diagonal: width of the band inside a mask (Cheng et al., 2021)
DECAY_BINS = 4

MaskArray = np.ndarray | torch.Tensor  # id maps (T, H, W) or masks (T, N, H, W)


def _to_numpy(array: MaskArray) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    return np.asarray(array)


def _check_pair(
    prediction: MaskArray, target: MaskArray, object_ids: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    prediction, target = _to_numpy(prediction), _to_numpy(target)
    for name, array in (("prediction", prediction), ("target", target)):
        if (array.ndim, array.dtype.kind) not in ((3, "u"), (3, "i"), (4, "b")):
            shown = f"{array.dtype} {array.shape}"
            raise InputError(f"{name} is neither integer (T, H, W) nor boolean (T, N, H, W): {shown}")
    if prediction.shape != target.shape:
        raise InputError(f"prediction and target differ in shape: {prediction.shape} and {target.shape}")
    if object_ids is None:
        seen = np.zeros(int(target.max(initial=0)) + 1, dtype=bool)  # far faster than `np.unique` on every pixel
        for id_map in target if target.ndim == 3 else ():
            seen[np.maximum(id_map, 0)] = True
        object_ids = range(1, target.shape[1] + 1) if target.ndim == 4 else (np.flatnonzero(seen[1:]) + 1).tolist()
    ids = tuple(object_ids)
    if len(set(ids)) != len(ids) or min(ids, default=1) < 1 or (target.ndim == 4 and len(ids) != target.shape[1]):
        raise InputError(f"object ids must be distinct, above 0 and one per mask, but are {ids}")
    return prediction, target, ids


def _label_maps(video: np.ndarray, object_ids: Sequence[int]) -> Iterator[np.ndarray]:
    """Maps (H, W) of labels 0..K: one per frame, K = N, from id maps; one per frame and object, K = 1, from masks."""
    if video.ndim == 4:
        yield from np.ascontiguousarray(video).reshape(-1, *video.shape[-2:]).view(np.uint8)
        return
    labels = np.zeros(max(object_ids, default=0) + 2, dtype=np.uint8 if len(object_ids) < 256 else np.uint16)
    labels[list(object_ids)] = np.arange(1, len(object_ids) + 1)
    for id_map in video:
        yield labels.take(id_map, mode="clip")  # other ids fall on the ends of the table, which are background


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole == 0, 1.0, part / np.maximum(whole, 1))


@dataclass(frozen=True, eq=False)
class VideoScores:
    """Scores of one video for every frame and object; made by `score_video`.

    Attributes:
        object_ids: the N objects, in the order of the columns.
        intersection, prediction_area, target_area: pixels, int (T, N).
        f: boundary accuracy F (T, N).
        boundary_iou: (T, N).
        f_adaptive: MOSEv2's boundary accuracy Ḟ (T, N), which is stricter for small objects.
        object_scores: the model's logits that an object is visible (T, N), where there are any.
        iou_scores: the IoU that the model expects of each mask (T, N), NaN before the first prompt.
        doubts: see [`~samoe_hf.where_to_look`] (T, N), NaN where nothing was tracked or something was prompted.
        surface_dice: of a volume, whose slices are the frames: surface Dice of each object (N,).
    """

    object_ids: tuple[int, ...]
    intersection: np.ndarray
    prediction_area: np.ndarray
    target_area: np.ndarray
    f: np.ndarray
    boundary_iou: np.ndarray
    f_adaptive: np.ndarray
    object_scores: np.ndarray | None = None
    iou_scores: np.ndarray | None = None
    doubts: np.ndarray | None = None
    surface_dice: np.ndarray | None = None

    @classmethod
    def concatenate(cls, parts: Sequence[VideoScores]) -> VideoScores:
        """Scores of consecutive frames, of the same objects, as those of one video."""
        names = ["intersection", "prediction_area", "target_area", "f", "boundary_iou", "f_adaptive"]
        if parts[0].object_scores is not None:
            names.append("object_scores")
        return cls(parts[0].object_ids, **{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})

    @property
    def union(self) -> np.ndarray:
        """Pixels in either mask, int (T, N)."""
        return self.prediction_area + self.target_area - self.intersection

    @property
    def j(self) -> np.ndarray:
        """Region similarity J, the intersection over union (T, N)."""
        return _ratio(self.intersection, self.union)

    @property
    def jf(self) -> np.ndarray:
        """Mean of J and F (T, N)."""
        return (self.j + self.f) / 2

    @property
    def j_mose(self) -> np.ndarray:
        """MOSEv2's J (T, N): one pixel more in the intersection and in the union, so no mask that is missed has 0."""
        return (self.intersection + 1) / (self.union + 1)

    @property
    def jf_mose(self) -> np.ndarray:
        """MOSEv2's J&Ḟ, the mean of its J and Ḟ (T, N)."""
        return (self.j_mose + self.f_adaptive) / 2

    @property
    def jf_mose_absent(self) -> np.ndarray:
        """J&Ḟ where the target does not have the object, else NaN (T, N)."""
        return np.where(self.target_area == 0, self.jf_mose, math.nan)

    @property
    def jf_mose_present(self) -> np.ndarray:
        """J&Ḟ where the target has the object, else NaN (T, N)."""
        return np.where(self.target_area > 0, self.jf_mose, math.nan)

    @property
    def dice(self) -> np.ndarray:
        """Dice coefficient (T, N)."""
        return _ratio(2 * self.intersection, self.prediction_area + self.target_area)

    @property
    def volume_dice(self) -> np.ndarray:
        """Dice coefficient over all frames at once (N,): the 3-D Dice where the frames are slices."""
        return _ratio(2 * self.intersection.sum(axis=0), (self.prediction_area + self.target_area).sum(axis=0))

    @property
    def occlusion_correct(self) -> np.ndarray:
        """1 where the object score is positive if and only if the target has the object (T, N); NaN without scores."""
        if self.object_scores is None:
            return np.full(self.f.shape, math.nan)
        return ((self.object_scores > 0) == (self.target_area > 0)).astype(float)


def score_video(
    prediction: MaskArray,
    target: MaskArray,
    object_ids: Sequence[int] | None = None,
    object_scores: MaskArray | None = None,
) -> VideoScores:
    """Scores every frame and object of a video.

    J and F are DAVIS' (Perazzi et al., 2016; `db_eval_iou` and `db_eval_boundary` of davis2017-evaluation), boundary
    IoU is that of Cheng et al., 2021 (boundary-iou-api), Ḟ that of MOSEv2 (Ding et al., 2025; `metricsv2.py` of
    MOSE-api).

    Args:
        prediction, target: integer id maps (T, H, W) or boolean masks (T, N, H, W).
        object_ids: the objects to score; by default those in the id maps of `target`, or 1..N for masks. All other ids
            are background.
        object_scores: logits (T, N) that the object is visible, for the occlusion accuracy.

    Raises:
        ValueError: if shapes differ (names both), or an argument is not as described.
    """
    prediction, target, ids = _check_pair(prediction, target, object_ids)
    table, (height, width) = (len(target), len(ids)), target.shape[-2:]
    logits = None if object_scores is None else _to_numpy(object_scores)
    if logits is not None and logits.shape != table:
        raise InputError(f"object scores must have shape (T, N) = {table}, not {logits.shape}")
    num_labels = 1 if target.ndim == 4 else len(ids)
    diagonal = float(np.linalg.norm((height, width)))
    band_width = max(1, round(BOUNDARY_IOU_DISTANCE * diagonal))

    overlaps = np.zeros((2, 3, math.prod(table)), dtype=np.int64)
    points = [(np.zeros((0, 3), dtype=np.intp),) * 2]
    for index, pair in enumerate(zip(_label_maps(prediction, ids), _label_maps(target, ids), strict=True)):
        box = bounding_box(pair[0] | pair[1], margin=1)  # the margin holds the boundary above and left of a mask
        if box is not None:
            first = np.array((index * num_labels, 0, 0))
            found, (predicted, annotated) = compare_labels(pair[0][box], pair[1][box], num_labels, band_width)
            overlaps[..., first[0] : first[0] + num_labels] = found
            points.append((predicted + first, annotated + first))

    predicted, annotated = (np.concatenate(side) for side in zip(*points, strict=True))
    region, band = overlaps.reshape(2, 3, *table)
    boundary_iou = _ratio(band[0], band[1] + band[2] - band[0])
    distance, of_objects = F_DISTANCE * diagonal, np.ceil(MOSE_DISTANCE * np.sqrt(region[2]))
    all_radii = np.full(table, np.ceil(distance)), np.minimum(of_objects, distance)
    f, f_adaptive = (f_measure(predicted, annotated, radii.ravel()).reshape(table) for radii in all_radii)
    return VideoScores(ids, region[0], region[1], region[2], f, boundary_iou, f_adaptive, logits)


def surface_dice(
    prediction: MaskArray,
    target: MaskArray,
    spacing: Sequence[float],
    tolerance: float,
    object_ids: Sequence[int] | None = None,
) -> np.ndarray:
    """Share of the surfaces of both volumes that lies within `tolerance` of the other's surface (Nikolov et al., 2018).

    Surface points and distances are those of DeepMind's surface-distance. The area at a point is the length of the
    mask's finite difference, where surface-distance has a table of triangles; on CT lesions the two differ by less
    than 0.01.

    Args:
        prediction, target: id maps (D, H, W) or boolean masks (D, N, H, W).
        spacing: size of a voxel along D, H and W (reverse of SimpleITK's x, y, z), in the unit of the tolerance, as mm.
        object_ids: see `score_video`.

    Returns:
        Surface Dice of every object (N,).
    """
    prediction, target, ids = _check_pair(prediction, target, object_ids)
    if len(spacing) != 3 or not all(0 < step < math.inf for step in spacing) or not 0 <= tolerance < math.inf:
        raise InputError(f"need three positive spacings and a tolerance of at least 0, not {spacing} and {tolerance}")
    result = np.ones(len(ids))
    for column, object_id in enumerate(ids):
        pair = [video[:, column] if video.ndim == 4 else video == object_id for video in (prediction, target)]
        box = bounding_box(pair[0] | pair[1], margin=0)
        if box is not None:
            result[column] = volume_surface_dice(pair[0][box], pair[1][box], spacing, tolerance)
    return result


def counted_frames(scores: VideoScores, protocol: Protocol) -> np.ndarray:
    """Which frames of which objects a benchmark counts, bool (T, N).

    - "davis": all but the first and the last, so none in a video of one or two frames.
    - "sav": of these, from the first on that shows the object in target or prediction, and only objects that the target
      shows in one of them (SA-V's sav_benchmark.py).
    - "youtube_vos": those after the first that shows the object in the target (Xu et al., 2018; the server's code is
      not public).
    - "all": all.
    """
    if protocol not in get_args(Protocol):
        raise InputError(f"unknown protocol {protocol!r}; known are {', '.join(get_args(Protocol))}")
    in_target, in_either = scores.target_area > 0, scores.union > 0
    counted = np.ones(in_target.shape, dtype=bool)
    if protocol == "youtube_vos":
        counted[:1] = False
        counted[1:] = np.logical_or.accumulate(in_target, axis=0)[:-1]
    elif protocol != "all":
        counted[:1] = counted[-1:] = False
    if protocol == "sav":
        in_target_at_all = (in_target & counted).any(axis=0)
        counted &= np.logical_or.accumulate(in_either & counted, axis=0) & in_target_at_all
    return counted


def _mean(values: ArrayLike) -> float:
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan


def _recall(values: np.ndarray) -> float:
    return _mean(values > 0.5)


def _decay(values: np.ndarray) -> float:
    """DAVIS' decay over frames: the mean of the first quarter less that of the last, which share their end frames."""
    if not values.size:
        return math.nan
    # DAVIS keeps these limits in 8 bits, which goes wrong beyond 256 frames; here they are right.
    limits = np.round(np.linspace(1, len(values), DECAY_BINS + 1) + 1e-10).astype(int) - 1
    return float(values[: limits[1] + 1].mean() - values[limits[-2] :].mean())


def _after_changes(values: np.ndarray) -> float:
    """The mean over stretches of numbers between NaNs, each by its mean; without one from the first frame on."""
    is_number = ~np.isnan(values)
    changes = np.flatnonzero(np.diff(is_number)) + 1
    stretches = [part for part in np.split(values, changes)[1:] if part.size and not np.isnan(part[0])]
    return _mean([part.mean() for part in stretches])


class Metric(NamedTuple):
    """A figure of an evaluation.

    Attributes:
        title: heading of its column in tables.
        meaning: what it is, for readers of a report. `{tolerance}` stands for the tolerance of surfaces in mm.
        table: the attribute of [`VideoScores`] that it is computed from: values of frames and objects (T, N), or (N,)
            where it is `of_volume`.
        average: over an object's frames that count.
        of_volume: whether only volumes have it.
        is_main: whether short tables show it, and models are compared by it.
    """

    title: str
    meaning: str
    table: str
    average: Callable[[np.ndarray], float] = _mean
    of_volume: bool = False
    is_main: bool = False


METRICS = {
    "J&F_mean": Metric("J&F", "mean of J and F", "jf", is_main=True),
    "J&F_recall": Metric("J&F recall", "share of frames with a mean of J and F above 0.5", "jf", _recall),
    "J&F_decay": Metric("J&F decay", "as J decay; lower is better", "jf", _decay),
    "J_mean": Metric("J", "region similarity: intersection over union of predicted and true mask (DAVIS)", "j",
                     is_main=True),
    "J_recall": Metric("J recall", "share of frames with J above 0.5", "j", _recall),
    "J_decay": Metric("J decay", "mean J of an object's first quarter of frames less that of its last; lower is better",
                      "j", _decay),
    "F_mean": Metric("F", "boundary accuracy: harmonic mean of the shares of the predicted and of the true boundary "
                     "that lie within 0.8 % of the image's diagonal of the other (DAVIS)", "f", is_main=True),
    "F_recall": Metric("F recall", "share of frames with F above 0.5", "f", _recall),
    "F_decay": Metric("F decay", "as J decay; lower is better", "f", _decay),
    "dice": Metric("Dice", "twice the intersection over the sum of both areas, per frame", "dice", is_main=True),
    "boundary_iou": Metric("boundary IoU", "IoU of the bands inside both boundaries, 2 % of the diagonal wide",
                           "boundary_iou", is_main=True),
    "J&F_mose": Metric("J&Ḟ", "MOSEv2's: mean of its J and Ḟ", "jf_mose", is_main=True),
    "J_mose": Metric("J (MOSEv2)", "J with one pixel more in the intersection and in the union", "j_mose"),
    "F_mose": Metric("Ḟ", "F with a distance of a tenth of the square root of the true mask's area, where that is less "
                     "(MOSEv2)", "f_adaptive"),
    "J&F_disappear": Metric("J&Ḟ_d", "J&Ḟ of the stretches of frames for which an object that was there is away",
                            "jf_mose_absent", _after_changes, is_main=True),
    "J&F_reappear": Metric("J&Ḟ_r", "J&Ḟ of the stretches of frames on which an object is there that was away before",
                           "jf_mose_present", _after_changes, is_main=True),
    "occlusion_accuracy": Metric("occlusion accuracy", "share of frames on which the object score says rightly whether "
                                 "the object is to be seen", "occlusion_correct"),
    "dice_3d": Metric("3-D Dice", "Dice of a whole volume, all annotated slices at once, the prompted one among them",
                      "volume_dice", of_volume=True, is_main=True),
    "surface_dice": Metric("surface Dice", "share of both surfaces, in mm², that lies within {tolerance:g} mm of the "
                           "other", "surface_dice", of_volume=True, is_main=True),
}  # fmt: skip
MAIN_METRICS = tuple(name for name, metric in METRICS.items() if metric.is_main)


def score_objects(videos: Mapping[str, VideoScores], protocol: Protocol = "davis") -> list[dict[str, Any]]:
    """A row for every object: `video` (its name), `object_id`, `num_frames` that count, and the [`METRICS`] over these.

    Metrics of volumes are left out for other videos. Arguments are those of [`summarize`].
    """
    rows = []
    for video, scores in videos.items():
        counted = counted_frames(scores, protocol)
        metrics = {n: m for n, m in METRICS.items() if not m.of_volume or scores.surface_dice is not None}
        of_video = [
            {"video": video, "object_id": object_id, "num_frames": int(frames.sum())}
            for object_id, frames in zip(scores.object_ids, counted.T, strict=True)
        ]
        for name, metric in metrics.items():
            table = getattr(scores, metric.table)
            for column, row in enumerate(of_video):
                values = table[column] if metric.of_volume else table[counted[:, column], column]
                row[name] = float(values) if metric.of_volume else metric.average(values)
        rows += of_video
    return rows


def summarize(
    videos: Mapping[str, VideoScores], protocol: Protocol = "davis", groups: Mapping[tuple[str, int], str] | None = None
) -> dict[str, Any]:
    """Scores of a set of videos.

    Args:
        videos: scores by video name.
        protocol: which frames count, see `counted_frames`.
        groups: group of every (video, object id), such as "seen" and "unseen" for YouTube-VOS.

    Returns:
        `num_videos`, `num_objects` and `num_frames` (summed over objects) that count; the columns of `score_objects`
        averaged over objects. With groups also `groups`, {group: {"J_mean", "F_mean", "J&F_mean"}}, and `overall`, the
        mean of their J&F.
    """
    every = score_objects(videos, protocol)
    rows = [row for row in every if row["num_frames"]]
    summary: dict[str, Any] = {
        "num_videos": len({row["video"] for row in rows}),
        "num_objects": len(rows),
        "num_frames": sum(row["num_frames"] for row in rows),
    }
    for name, metric in METRICS.items():
        # A volume is scored as a whole, whichever of its slices count.
        values = [row[name] for row in (every if metric.of_volume else rows) if name in row]
        if values or not metric.of_volume:
            summary[name] = _mean(values)
    return summary if groups is None else summary | _group(rows, groups)


def _group(rows: list[dict[str, Any]], groups: Mapping[tuple[str, int], str]) -> dict[str, Any]:
    keys = [(row["video"], row["object_id"]) for row in rows]
    if missing := [key for key in keys if key not in groups]:
        raise InputError(f"no group is given for the objects {missing}")
    result = {
        group: {
            name: _mean([row[name] for row, key in zip(rows, keys, strict=True) if groups[key] == group])
            for name in ("J_mean", "F_mean", "J&F_mean")
        }
        for group in sorted({groups[key] for key in keys})
    }
    return {"groups": result, "overall": _mean([scores["J&F_mean"] for scores in result.values()])}
