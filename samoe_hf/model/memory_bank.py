"""What has been seen so far: the memories of past frames, for a batch of objects, and which of them a frame reads.

The choice of frames is that of SAM 2 (arXiv:2408.00714, section 4; `sam2/modeling/sam2_base.py`): all conditioning
frames, the last `num_maskmem - 1` other frames, and object pointers of conditioning frames and of recent ones. Nothing
here knows of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError


@dataclass(eq=False)
class FrameMemory:
    """What one frame leaves behind for a batch of objects, or for one of them, which then is row `index` of `batch`.

    `features` (objects, tokens, channels): output of the memory encoder, or None where it was not run.
    `pointers` (objects, hidden): object pointers.
    """

    pointers: Tensor
    features: Tensor | None = None
    batch: "FrameMemory | None" = None
    index: int = 0

    def row(self, index: int) -> "FrameMemory":
        """The memory of one object of the batch; nothing is copied."""
        features = None if self.features is None else self.features[index : index + 1]
        return FrameMemory(self.pointers[index : index + 1], features, self, index)


class MemorySelection(NamedTuple):
    """The memories that a frame reads. Objects with equal selections have memories of the same layout.

    `spatial`: (frame index, index of its temporal encoding) of each frame whose features are read.
    `pointers`: (frame index, signed distance in frames) of each frame whose object pointer is read.
    `max_distance`: the distance by which pointers' distances are normalized.
    """

    spatial: tuple[tuple[int, int], ...]
    pointers: tuple[tuple[int, int], ...]
    max_distance: int


class MemoryBank:
    """Memories of a batch of objects that are prompted and tracked on the same frames."""

    def __init__(self):
        self.conditioning: dict[int, FrameMemory] = {}
        self.tracked: dict[int, FrameMemory] = {}

    def write(self, frame_idx: int, memory: FrameMemory, conditioning: bool) -> None:
        """Keeps the memory of a frame, in place of an earlier one; `conditioning` for initially prompted frames."""
        if conditioning:
            self.tracked.pop(frame_idx, None)
            self.conditioning[frame_idx] = memory
        else:
            self.tracked[frame_idx] = memory

    def copy(self) -> "MemoryBank":
        """A bank with the same memories, which may be written to alone."""
        copied = MemoryBank()
        copied.conditioning, copied.tracked = dict(self.conditioning), dict(self.tracked)
        return copied

    def __getitem__(self, frame_idx: int) -> FrameMemory:
        return self.conditioning.get(frame_idx) or self.tracked[frame_idx]

    def select(
        self,
        frame_idx: int,
        *,
        num_maskmem: int,
        max_object_pointers: int,
        max_cond_frames: int = -1,
        num_frames: int | None = None,
        reverse: bool = False,
        past_pointers_only: bool = True,
    ) -> MemorySelection:
        """Chooses the memories that frame `frame_idx` reads.

        Args:
            num_maskmem: number of temporal encodings; up to `num_maskmem - 1` frames are read beside conditioning ones.
            max_object_pointers: pointers are read from fewer than this many frames back.
            max_cond_frames: only so many of the closest conditioning frames are read; -1 for all.
            num_frames: length of the video if it is known.
            reverse: whether time runs backward.
            past_pointers_only: whether to leave out pointers of conditioning frames that lie ahead.

        Raises:
            ValueError: if there is no conditioning frame yet.
        """
        if not self.conditioning:
            raise InputError(f"Frame {frame_idx} cannot be tracked: no frame has been prompted yet.")
        step = -1 if reverse else 1
        selected = closest_frames(frame_idx, list(self.conditioning), max_cond_frames)
        # A conditioning frame that was not selected can still be read as one of the recent frames.
        recent = {t: m for t, m in self.conditioning.items() if t not in selected} | self.tracked

        spatial = [(t, num_maskmem - 1) for t in selected if self.conditioning[t].features is not None]
        for distance in range(num_maskmem - 1, 0, -1):
            t = frame_idx - step * distance
            if t in recent and recent[t].features is not None:
                spatial.append((t, distance - 1))

        pointers = [(t, (frame_idx - t) * step) for t in selected]
        if past_pointers_only:
            pointers = [(t, distance) for t, distance in pointers if distance >= 0]
        max_pointers = max_object_pointers if num_frames is None else min(num_frames, max_object_pointers)
        for distance in range(1, max_pointers):
            t = frame_idx - step * distance
            if t in recent:
                pointers.append((t, distance))
        return MemorySelection(tuple(spatial), tuple(pointers), max(max_pointers - 1, 1))


def closest_frames(frame_idx: int, frames: Sequence[int], limit: int) -> list[int]:
    """Up to `limit` of `frames`: the closest before `frame_idx`, the closest from it on, then by distance; -1: all."""
    if limit == -1 or len(frames) <= limit:
        return list(frames)
    before = max((t for t in frames if t < frame_idx), default=None)
    after = min((t for t in frames if t >= frame_idx), default=None)
    chosen = [t for t in (before, after) if t is not None]
    rest = sorted((t for t in frames if t not in chosen), key=lambda t: abs(t - frame_idx))
    return chosen + rest[: limit - len(chosen)]


def read_features(banks: Sequence[MemoryBank], frame_idx: int, device: torch.device) -> Tensor:
    """Features of one frame for the objects of all `banks`: (objects, tokens, channels)."""
    return _join([bank[frame_idx] for bank in banks], "features").to(device, non_blocking=True)


def read_pointers(banks: Sequence[MemoryBank], frame_idx: int, device: torch.device) -> Tensor:
    """Object pointers of one frame for the objects of all `banks`: (objects, hidden)."""
    return _join([bank[frame_idx] for bank in banks], "pointers").to(device, non_blocking=True)


def _join(memories: list[FrameMemory], name: str) -> Tensor:
    """One tensor for all objects; those that were in one batch still are, and need not be put together again."""
    batch = memories[0].batch
    if len(memories) == 1:
        return getattr(memories[0], name)
    if batch is None or any(memory.batch is not batch for memory in memories):
        return torch.cat([getattr(memory, name) for memory in memories])
    whole, indices = getattr(batch, name), [memory.index for memory in memories]
    return whole if indices == list(range(len(whole))) else whole[indices]
