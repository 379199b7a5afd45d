"""What has been seen so far: the memories of past frames, of one object, and how those of several are read together.

Which of them a frame reads is chosen in `memory_selection.py`. Nothing here knows of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Evidence(NamedTuple):
    """How well an object was seen on a frame.

    `score`: the probability that it is there, from 0 for a half to 1, times the estimated IoU of its mask. `iou`: that
    IoU. `area`: pixels of the mask. `box_iou`: IoU of the mask's box with one that also holds what else was nearly
    taken for the object; 1 where there is nothing, or where nobody asks.
    """

    score: float
    iou: float
    area: int
    box_iou: float = 1.0


@dataclass(eq=False)
class FrameMemory:
    """What one frame leaves behind for a batch of objects.

    `pointers` (objects, hidden): object pointers.
    `features` (objects, tokens, channels): output of the memory encoder, or None where it was not run.
    `evidence`: of each object, or None where no memory is chosen by it.
    """

    pointers: Tensor
    features: Tensor | None = None
    evidence: list[Evidence] | None = None

    def row(self, index: int) -> "ObjectMemory":
        """The memory of one object of the batch; nothing is copied."""
        return ObjectMemory(self, index)


class ObjectMemory(NamedTuple):
    """What one frame leaves behind of one object: row `index` of a batch's memory."""

    batch: FrameMemory
    index: int

    @property
    def evidence(self) -> Evidence | None:
        return None if self.batch.evidence is None else self.batch.evidence[self.index]

    @property
    def pointer(self) -> Tensor:
        """(1, hidden)."""
        return self.batch.pointers[self.index : self.index + 1]


class MemoryBank:
    """Memories of one object: of conditioning frames, of tracked ones, and those of these that show a double of the
    object."""

    def __init__(self):
        self.conditioning: dict[int, ObjectMemory] = {}
        self.tracked: dict[int, ObjectMemory] = {}
        self.anchors: dict[int, ObjectMemory] = {}

    def write(self, frame_idx: int, memory: ObjectMemory, conditioning: bool) -> None:
        """Keeps the memory of a frame, in place of an earlier one; `conditioning` for initially prompted frames."""
        self.anchors.pop(frame_idx, None)
        if conditioning:
            self.tracked.pop(frame_idx, None)
            self.conditioning[frame_idx] = memory
        else:
            self.tracked[frame_idx] = memory

    def forget_before(self, frame_idx: int) -> None:
        """Drops memories of tracked frames before a frame."""
        self.tracked = {t: memory for t, memory in self.tracked.items() if t >= frame_idx}
        self.anchors = {t: memory for t, memory in self.anchors.items() if t >= frame_idx}

    def copy(self) -> "MemoryBank":
        """A bank with the same memories, which may be written to alone."""
        copied = MemoryBank()
        for name, memories in vars(self).items():
            setattr(copied, name, dict(memories))
        return copied

    def __contains__(self, frame_idx: int) -> bool:
        return frame_idx in self.conditioning or frame_idx in self.tracked or frame_idx in self.anchors

    def __getitem__(self, frame_idx: int) -> ObjectMemory:
        return self.conditioning.get(frame_idx) or self.tracked.get(frame_idx) or self.anchors[frame_idx]


def read_memories(banks: Sequence[MemoryBank], frames: Sequence[int | None], name: str, device: torch.device) -> Tensor:
    """ "features" (objects, tokens, channels) or "pointers" (objects, hidden), of a frame of each object's bank.

    Those that were in one batch are read as one. Zeros stand for what is read of no frame.
    """
    memories = [None if t is None else bank[t] for bank, t in zip(banks, frames, strict=True)]
    first = next(memory for memory in memories if memory is not None)
    whole, start = getattr(first.batch, name), first.index
    if all(m is not None and m.batch is first.batch and m.index == start + row for row, m in enumerate(memories)):
        whole = whole if len(whole) == len(memories) else whole[start : start + len(memories)]
    else:  # row by row, since a list of numbers would be sent to a GPU, and waited for
        zeros = torch.zeros_like(whole[:1])
        rows = [zeros if m is None else getattr(m.batch, name)[m.index : m.index + 1] for m in memories]
        whole = torch.cat(rows)
    # Apple's GPUs would read it after it is freed (PyTorch's issue 189690).
    return whole.to(device, non_blocking=device.type != "mps")
