"""Which memories a frame reads of an object: the last ones, those that scored well, or those that tell doubles apart.

- "recent": SAM 2's choice (arXiv:2408.00714, section 4; `sam2/modeling/sam2_base.py`). All conditioning frames, the
  last `num_maskmem - 1` other frames, and object pointers of conditioning frames and of recent ones.
- "score": SAM 3's choice (arXiv:2511.16719; `frame_filter` of `sam3`'s tracker). Instead of the last frames the last
  ones whose score is above 0.01, and the previous frame.
- "distractor": the memories of DAM4SAM (arXiv:2411.17576). The last frame and some before it, five frames apart, on
  all of which the object is seen; and as conditioning ones frames where something else was nearly taken for it.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from heapq import nsmallest
from statistics import median
from typing import NamedTuple

from .errors import InputError
from .memory_bank import MemoryBank, ObjectMemory

MIN_SCORE = 0.01
# What DAM4SAM asks of a frame that shows a double: estimated IoU, the area against its usual one, how much larger a
# box becomes that holds the double too, and frames since the last one. How many conditioning frames are read in all.
MIN_IOU, AREA_RANGE, NUM_AREAS, MAX_BOX_IOU = 0.8, (0.8, 1.2), 10, 0.7
ANCHOR_INTERVAL, MAX_ANCHORS, RECENT_STRIDE = 6, 4, 5


class MemorySelection(NamedTuple):
    """The memories that a frame reads of an object.

    `spatial`: (frame index, index of its temporal encoding) of each frame whose features are read.
    `pointers`: (frame index, signed distance) of each frame whose object pointer is read; in frames, or in places of
    the frames that scored well.
    `max_distance`: the distance by which pointers' distances are normalized.
    """

    spatial: tuple[tuple[int, int], ...]
    pointers: tuple[tuple[int, int], ...]
    max_distance: int


class MemoryLimits(NamedTuple):
    """How much a frame reads.

    `num_maskmem`: number of temporal encodings; up to `num_maskmem - 1` frames are read beside conditioning ones.
    `max_object_pointers`: pointers are read from fewer than this many frames back.
    `max_cond_frames`: only so many of the closest conditioning frames are read; -1 for all.
    `num_frames`: length of the video if it is known.
    `past_pointers_only`: whether to leave out pointers of conditioning frames that lie ahead.
    """

    num_maskmem: int
    max_object_pointers: int
    max_cond_frames: int = -1
    num_frames: int | None = None
    past_pointers_only: bool = True

    @property
    def max_pointers(self) -> int:
        return self.max_object_pointers if self.num_frames is None else min(self.num_frames, self.max_object_pointers)


def select_memories(
    kind: str, bank: MemoryBank, frame_idx: int, limits: MemoryLimits, reverse: bool = False
) -> MemorySelection:
    """Chooses the memories that a frame reads of an object, by one of [`MEMORY_SELECTIONS`]."""
    if not bank.conditioning:
        raise InputError(f"Frame {frame_idx} cannot be tracked: no frame has been prompted yet.")
    return MEMORY_SELECTIONS[kind](bank, frame_idx, limits, -1 if reverse else 1)


def _recent(bank: MemoryBank, frame_idx: int, limits: MemoryLimits, step: int) -> MemorySelection:
    selected = closest_frames(frame_idx, list(bank.conditioning), limits.max_cond_frames)
    others = [frame_idx - step * distance for distance in range(1, max(limits.num_maskmem, limits.max_pointers))]
    return _selection(bank, frame_idx, limits, step, selected, others[: limits.num_maskmem - 1], others)


def _by_score(bank: MemoryBank, frame_idx: int, limits: MemoryLimits, step: int) -> MemorySelection:
    """Beside conditioning frames, the places of frames that scored well count, not their distance in time.

    As in Meta's code, frame 0 is not among them where time runs forward, and the farthest of them has no pointer.
    """
    selected = closest_frames(frame_idx, list(bank.conditioning), limits.max_cond_frames)
    previous = frame_idx - step
    is_good = [t for t in _before(frame_idx, bank.tracked, step) if t > min(step, 0) and _score(bank, t) > MIN_SCORE]
    good = is_good[: limits.max_pointers - 1]
    if previous not in good and 0 <= previous < (limits.num_frames or previous + 1):
        good.insert(0, previous)
    return _selection(bank, frame_idx, limits, step, selected, good[: limits.num_maskmem - 1], good[:-1])


def _distractor(bank: MemoryBank, frame_idx: int, limits: MemoryLimits, step: int) -> MemorySelection:
    """All prompted frames stay; the closest frames that show a double join them, up to four in all."""
    prompted = closest_frames(frame_idx, list(bank.conditioning), limits.max_cond_frames)
    anchors = _before(frame_idx - step, (t for t in bank.anchors if t not in bank.conditioning), step)
    selected = prompted + anchors[: max(MAX_ANCHORS - len(prompted), 0)]
    room = max(limits.num_maskmem - len(selected), limits.num_maskmem - MAX_ANCHORS, 1)
    seen = [t for t in _before(frame_idx, bank.tracked, step) if t not in selected and _is_seen(bank, t)]
    spatial = (seen[:1] + [t for t in seen[1:] if t % RECENT_STRIDE == 0])[:room]
    return _selection(bank, frame_idx, limits, step, selected, spatial, seen, by_distance=True)


def _selection(
    bank: MemoryBank,
    frame_idx: int,
    limits: MemoryLimits,
    step: int,
    selected: Sequence[int],
    spatial: Sequence[int],
    pointers: Sequence[int],
    by_distance: bool = False,
) -> MemorySelection:
    """A selection of conditioning frames and others, from the last on, by whose place their time is encoded.

    A conditioning frame that was not selected can still be read as one of the others. With `by_distance` pointers'
    times are distances in frames all the same.
    """
    chosen = [(t, limits.num_maskmem - 1) for t in selected]
    chosen += [(t, place) for place, t in enumerate(spatial) if t not in selected][::-1]
    places = [(t, (frame_idx - t) * step if by_distance else place) for place, t in enumerate(pointers, start=1)]
    own = [(t, (frame_idx - t) * step) for t in selected]
    if limits.past_pointers_only:
        own = [(t, distance) for t, distance in own if distance >= 0]
    own += [(t, place) for t, place in places if place < limits.max_pointers and t in bank and t not in selected]
    return MemorySelection(
        tuple((t, index) for t, index in chosen if t in bank and bank[t].batch.features is not None),
        tuple(own),
        max(limits.max_pointers - 1, 1),
    )


MEMORY_SELECTIONS: dict[str, Callable[[MemoryBank, int, MemoryLimits, int], MemorySelection]] = {
    "recent": _recent,
    "score": _by_score,
    "distractor": _distractor,
}


def closest_frames(frame_idx: int, frames: Sequence[int], limit: int) -> list[int]:
    """Up to `limit` of `frames`: the closest before `frame_idx`, the closest from it on, then by distance; -1: all."""
    if limit == -1 or len(frames) <= limit:
        return list(frames)
    before = max((t for t in frames if t < frame_idx), default=None)
    after = min((t for t in frames if t >= frame_idx), default=None)
    chosen = [t for t in (before, after) if t is not None]
    rest = sorted((t for t in frames if t not in chosen), key=lambda t: abs(t - frame_idx))
    return chosen + rest[: limit - len(chosen)]


def _before(frame_idx: int, frames: Iterable[int], step: int) -> list[int]:
    """Those of `frames` that time has passed, the last ones first."""
    return sorted((t for t in frames if (frame_idx - t) * step > 0), key=lambda t: abs(t - frame_idx))


def _score(bank: MemoryBank, frame_idx: int) -> float:
    """1 for a frame that was tracked while no memory was chosen by its score."""
    evidence = bank[frame_idx].evidence
    return 1.0 if evidence is None else evidence.score


def _is_seen(bank: MemoryBank, frame_idx: int) -> bool:
    evidence = bank[frame_idx].evidence
    return evidence is None or evidence.area > 0


def remember(bank: MemoryBank, frame_idx: int, memory: ObjectMemory, conditioning: bool, reverse: bool = False) -> None:
    """Keeps the memory of a frame, and as an anchor if the frame shows a double; see [`MemoryBank.write`]."""
    is_anchor = not conditioning and _shows_double(bank, frame_idx, memory, -1 if reverse else 1)
    bank.write(frame_idx, memory, conditioning)
    if is_anchor:
        bank.anchors[frame_idx] = memory


def _shows_double(bank: MemoryBank, frame_idx: int, memory: ObjectMemory, step: int) -> bool:
    """Whether a tracked frame shows the object well, and beside it something that was nearly taken for it."""
    evidence = memory.evidence
    if evidence is None or evidence.area == 0 or evidence.iou <= MIN_IOU or evidence.box_iou > MAX_BOX_IOU:
        return False
    known = [bank[t].evidence for t in _before(frame_idx, bank.tracked, step)]
    areas = [evidence.area, *(one.area for one in known if one is not None and one.area > 0)]
    is_usual = len(areas) > 1 and AREA_RANGE[0] <= evidence.area / median(areas[:NUM_AREAS]) <= AREA_RANGE[1]
    return is_usual and all(abs(t - frame_idx) >= ANCHOR_INTERVAL for t in bank.anchors if t != frame_idx)


def forget(bank: MemoryBank, kind: str, frame_idx: int, kept: Collection[int], num_kept: int) -> None:
    """Drops tracked frames but those in `kept`, and up to `num_kept` that may be read however long ago they were."""
    lasting = {"score": [lambda t: _score(bank, t) > MIN_SCORE]}
    lasting["distractor"] = [lambda t: _is_seen(bank, t), lambda t: _is_seen(bank, t) and t % RECENT_STRIDE == 0]
    centers, keep = [frame_idx, *bank.conditioning], {*kept}
    for center in centers:
        for lasts in lasting.get(kind, ()):
            keep.update(nsmallest(num_kept, filter(lasts, bank.tracked), key=lambda t: abs(t - center)))
    anchors = [nsmallest(MAX_ANCHORS, bank.anchors, key=lambda t: abs(t - center)) for center in centers]
    bank.tracked = {t: memory for t, memory in bank.tracked.items() if t in keep}
    bank.anchors = {t: memory for t, memory in bank.anchors.items() if t in keep or any(t in own for own in anchors)}
