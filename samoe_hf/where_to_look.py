"""Which frames of a tracked video are worth a look, and why.

An object's doubt on a frame is 1 less a product of factors from 0 to 1:

- what the model says: score, IoU and stability where the object is seen, 1 - score where it is not;
- how it goes on from the frame that it was tracked from, which is the one before, or, before its first prompt, the one
  after: the smaller area over the larger; its size (the root of the larger area) over the way that it went, where that
  is longer; and 0.5 where it vanishes or comes back.

What the user gave is not doubted. A look at a frame settles the doubts there, and of the frames that were tracked from
it a share, 0.85 for each frame on. The frame that settles most comes first. Then its share is taken from its neighbours
on both sides, so that frames near each other count once, and the frame that settles most of the rest comes next.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import dist, prod, sqrt
from typing import NamedTuple

import numpy as np

from .tracks import TrackRow

SHARE = 0.85
WORTH_A_LOOK = 0.5  # least doubt
FEW = 10  # frames of a video


class Look(NamedTuple):
    """A frame that is worth a look.

    Args:
        frame, time, object: of the largest doubt there.
        doubt: from 0 to 1.
        settles: the sum of the doubts of all objects, there and after, that a look settles.
        reason: in words.
    """

    frame: int
    time: float | None
    object: int
    doubt: float
    settles: float
    reason: str


def doubts(rows: Iterable[TrackRow]) -> Iterator[Look]:
    """The doubt of each object on each frame but those on which it was prompted.

    Of an object that was prompted nowhere, the first frame is not doubted.
    """
    return (look for part in _parts(rows) for look in _doubts(part))


def where_to_look(rows: Iterable[TrackRow], count: int = FEW, least: float = WORTH_A_LOOK) -> list[Look]:
    """The frames of a video that are worth a look, the one that settles most doubts first.

    Args:
        rows: of a video, such as those of a `tracks.csv`.
        count: how many frames at most.
        least: the least doubt of a frame that is listed.
    """
    parts = [part for part in map(_doubts, _parts(rows)) if part]
    frames = [np.array([look.frame for look in part]) for part in parts]
    rest = [np.array([look.doubt for look in part]) for part in parts]
    chosen: list[Look] = []
    while parts and len(chosen) < count:
        doubt, settles = np.zeros((2, max(int(t.max()) for t in frames) + 1))
        for t, left in zip(frames, rest, strict=True):
            settles[t] += np.convolve(left[::-1], SHARE ** np.arange(64))[len(left) - 1 :: -1]
            doubt[t] = np.maximum(doubt[t], left)
        settles[(doubt < least) | (doubt == 0)] = 0
        best = int(settles.argmax())
        if settles[best] == 0:
            break
        look = max((look for part in parts for look in part if look.frame == best), key=lambda look: look.doubt)
        chosen.append(look._replace(settles=round(float(settles[best]), 2)))
        for t, left in zip(frames, rest, strict=True):
            left *= 1 - SHARE ** np.abs(t - best)
    return chosen


def _parts(rows: Iterable[TrackRow]) -> Iterator[list[TrackRow]]:
    """The rows of each object from its first prompt on, and back from it."""
    by_object = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.frame):
        by_object[row.object].append(row)
    for own in by_object.values():
        start = next((number for number, row in enumerate(own) if row.prompted), 0)
        yield own[start:]
        yield own[start::-1]


def _doubts(part: Sequence[TrackRow]) -> list[Look]:
    looks = []
    for before, row in pairwise(part):
        if not row.prompted:
            factors = _factors(before, row)
            doubt = round(1 - prod(factor for factor, _ in factors), 4)
            looks.append(Look(row.frame, row.time, row.object, doubt, doubt, f"object {row.object} {min(factors)[1]}"))
    return looks


def _factors(before: TrackRow, row: TrackRow) -> list[tuple[float, str]]:
    """The factors of a doubt, each with what it says."""
    score, where = f"score {row.score:.2f}", f"frame {before.frame}"
    if row.seen:
        factors = [
            (row.score, f"may not be there: {score}"),
            (row.iou, f"has an uncertain mask: expected IoU {row.iou:.2f}"),
            (row.stability, f"has an uncertain outline: stability {row.stability:.2f}"),
        ]
    else:
        factors = [(1 - row.score, f"may be lost: it has no mask, {score}")]
    if abs(row.frame - before.frame) > 1:
        return factors
    if row.seen != before.seen:
        what = "comes back: it is not" if row.seen else "may be lost: it is still"
        factors.append((0.5, f"{what} seen on {where}, {score}"))
    elif row.seen:
        (small, large), ratio = sorted((before.area, row.area)), row.area / before.area
        size, way = sqrt(large), dist(before.center, row.center)
        factors.append((small / large, f"jumps: its area is {ratio:.2f} times that on {where}"))
        factors.append((size / max(size, way), f"jumps: it is {way / size:.1f} times its size away from {where}"))
    return factors
