"""What tracking says of each object on each frame: scores, and where it is. The table, and its file `tracks.csv`."""

import csv
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from samoe_hf.errors import InputError
from samoe_hf.model.tracking import SamoeTrackingOutput

STABILITY_LOGIT = 1.0  # SAM's `stability_score_offset`


class ObjectScores(NamedTuple):
    """How sure the model is of each object on a frame: (objects,) float32, from 0 to 1.

    Args:
        score: the probability that the object is to be seen, the sigmoid of `object_score_logits`.
        iou: the IoU that the model expects of the mask; 1 for a mask that was given.
        stability: the IoU of the masks above a logit of 1 and above one of -1, SAM's stability score; 1 where both are
            empty.
    """

    score: np.ndarray
    iou: np.ndarray
    stability: np.ndarray

    @classmethod
    def of(cls, output: SamoeTrackingOutput) -> "ObjectScores":
        """The scores of a model's output for a frame."""
        assert output.object_score_logits is not None and output.iou_scores is not None
        assert output.pred_masks is not None
        inner, outer = ((output.pred_masks > x).flatten(1).sum(1) for x in (STABILITY_LOGIT, -STABILITY_LOGIT))
        stability = torch.where(outer > 0, inner / outer.clamp(min=1), 1.0)
        scores = output.object_score_logits[:, 0].float().sigmoid(), output.iou_scores[:, 0].clamp(0, 1), stability
        return cls(*(values.float().cpu().numpy() for values in scores))


class TrackRow(NamedTuple):
    """An object on a frame: a line of `tracks.csv`.

    Args:
        frame: from 0 on.
        time: in seconds from the first frame on, where it is known.
        score, iou, stability: see [`ObjectScores`].
        area: pixels of its mask; 0 where it is not seen.
        x0, y0, x1, y1: the first and the last column and row of its mask, a box as prompts have it; None where it
            is not seen.
        cx, cy: the mean position of its pixels.
        prompted: whether the user said something of it on the frame.
    """

    frame: int
    time: float | None
    object: int
    score: float
    iou: float
    stability: float
    area: int
    x0: int | None
    y0: int | None
    x1: int | None
    y1: int | None
    cx: float | None
    cy: float | None
    prompted: bool

    @property
    def seen(self) -> bool:
        """Whether its mask has a pixel."""
        return self.area > 0

    @property
    def center(self) -> tuple[float, float]:
        """(cx, cy) of an object that is seen."""
        assert self.cx is not None and self.cy is not None
        return self.cx, self.cy


def track_rows(
    frame: int,
    object_ids: Sequence[int],
    scores: ObjectScores,
    masks: Iterable[np.ndarray],
    time: float | None = None,
    prompted: Collection[int] = (),
) -> list[TrackRow]:
    """The rows of a frame, at a time in seconds.

    Args:
        masks: of the objects, in the order of `object_ids`: (H, W) bool each.
        prompted: ids of the objects that the user said something of on the frame.
    """
    rows = []
    for object_id, mask, *sure in zip(object_ids, masks, *scores, strict=True):
        counts = [mask.sum(axis=axis) for axis in (0, 1)]  # of each column, and of each row
        area, place = int(counts[0].sum()), []
        if area:
            (x0, x1), (y0, y1) = (np.flatnonzero(count)[[0, -1]].tolist() for count in counts)
            place = [x0, y0, x1, y1, *(round(float(count @ np.arange(len(count)) / area), 2) for count in counts)]
        sure = [round(float(value), 4) for value in sure]
        values = [frame, None if time is None else round(time, 3), object_id, *sure, area, *(place or [None] * 6)]
        rows.append(TrackRow._make([*values, object_id in prompted]))
    return rows


def write_tracks(path: str | Path, rows: Iterable[TrackRow]) -> None:
    """Writes rows by frames, then by objects, as a CSV; what is not known is empty, `prompted` is 0 or 1."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(TrackRow._fields)
        writer.writerows(
            (*row[:-1], int(row.prompted)) for row in sorted(rows, key=lambda row: (row.frame, row.object))
        )


def _if_any(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: read(text) if text else None


# Of each column.
_READERS = (int, _if_any(float), int, *[float] * 3, int, *[_if_any(int)] * 4, *[_if_any(float)] * 2, "1".__eq__)


def read_tracks(path: str | Path) -> list[TrackRow]:
    """Reads what [`write_tracks`] wrote; an `InputError` names the file and the line of what is something else."""
    with Path(path).open(newline="", encoding="utf-8-sig") as file:  # with a mark of it, once Excel saved it
        reader = csv.reader(file)
        if tuple(next(reader, ())) != TrackRow._fields:
            raise InputError(f"{path} must be a tracks.csv with the columns {','.join(TrackRow._fields)}.")
        try:
            return [TrackRow._make(read(text) for read, text in zip(_READERS, line, strict=True)) for line in reader]
        except ValueError as error:
            raise InputError(f"{path}, line {reader.line_num}: not a line of a tracks.csv ({error})") from error
