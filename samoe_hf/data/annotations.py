"""Masks of a video's objects, read from the forms in which datasets store them.

One class per form, all with the interface of `Annotations`; a frame's masks are read when they are asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .video_io import SampleError, read_label_png


class Annotations(ABC):
    """Masks per annotated frame and object.

    Attributes:
        frames: indices of the annotated frames, ascending. A frame that is not among them says nothing about the
            objects; on one that is, an object without pixels is absent.
    """

    frames: list[int]

    @property
    @abstractmethod
    def object_ids(self) -> list[int]:
        """Ids of all objects of the video, ascending, above 0; some forms read every label once to know them."""

    @abstractmethod
    def visible(self, frame: int) -> list[int]:
        """Ids of the objects with pixels on an annotated frame, ascending."""

    @abstractmethod
    def masks(self, frame: int, object_ids: Sequence[int]) -> np.ndarray:
        """Masks of the given objects on an annotated frame, (len(object_ids), H, W) bool."""

    def source(self, frame: int) -> str:
        """What to call a frame's annotation in messages."""
        return f"annotation of frame {frame}"


class _IdMaps(Annotations):
    """Annotations that are one image of object ids per frame, 0 for background."""

    @abstractmethod
    def ids(self, frame: int) -> np.ndarray:
        """(H, W) ids of an annotated frame."""

    @cached_property
    def object_ids(self) -> list[int]:
        return sorted(set().union(*(self.visible(frame) for frame in self.frames)))

    def visible(self, frame: int) -> list[int]:
        return [int(value) for value in np.unique(self.ids(frame)) if value > 0]

    def masks(self, frame: int, object_ids: Sequence[int]) -> np.ndarray:
        return self.ids(frame)[None] == np.asarray(object_ids, dtype=np.int64)[:, None, None]


class IdVolume(_IdMaps):
    """Ids in memory, (T, H, W) of any integer dtype; all frames are annotated."""

    def __init__(self, ids: np.ndarray):
        if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
            raise SampleError(f"labels must be (T, H, W) integers, not {ids.dtype} {ids.shape}")
        self.volume = ids
        self.frames = list(range(len(ids)))

    def ids(self, frame: int) -> np.ndarray:
        return self.volume[frame]


class LabelImages(_IdMaps):
    """One label image per annotated frame.

    Args:
        paths: frame index -> palette, gray or 16-bit label image.
        binary: every value above 0 is object 1 (DAVIS 2016 stores 255).
        object_ids: the only ids that count as objects; all by default.
    """

    def __init__(
        self, paths: Mapping[int, str | Path], binary: bool = False, object_ids: Collection[int] | None = None
    ):
        self.paths = dict(paths)
        self.frames = sorted(self.paths)
        self.binary, self.counted = binary, None if object_ids is None else sorted(object_ids)

    @cached_property
    def object_ids(self) -> list[int]:
        return super().object_ids if self.counted is None else self.counted

    def ids(self, frame: int) -> np.ndarray:
        ids = read_label_png(self.paths[frame])
        return (ids > 0).astype(np.uint8) if self.binary else ids

    def visible(self, frame: int) -> list[int]:
        return [i for i in super().visible(frame) if self.counted is None or i in self.counted]

    def source(self, frame: int) -> str:
        return str(self.paths[frame])


class ObjectImages(Annotations):
    """One binary image per object and annotated frame, so that objects may overlap (SA-V validation and test).

    Args:
        paths: object id -> frame index -> mask image. A frame is annotated where any object has an image; an object
            without one is absent there.
    """

    def __init__(self, paths: Mapping[int, Mapping[int, str | Path]]):
        self.paths = {object_id: dict(frames) for object_id, frames in sorted(paths.items())}
        self.frames = sorted(set().union(*self.paths.values()))

    @property
    def object_ids(self) -> list[int]:
        return list(self.paths)

    def visible(self, frame: int) -> list[int]:
        return [i for i, paths in self.paths.items() if frame in paths and read_label_png(paths[frame]).any()]

    def masks(self, frame: int, object_ids: Sequence[int]) -> np.ndarray:
        shown = {i: read_label_png(self.paths[i][frame]) > 0 for i in object_ids if frame in self.paths[i]}
        size = next(iter(shown.values())).shape if shown else read_label_png(self.source(frame)).shape
        return _stack(shown, object_ids, size, self.source(frame))

    def source(self, frame: int) -> str:
        return str(next(paths[frame] for paths in self.paths.values() if frame in paths))


class MaskArrays(Annotations):
    """Masks in memory, (T, num_objects, H, W) bool, all frames annotated or those listed; objects may overlap."""

    def __init__(self, masks: np.ndarray, object_ids: Sequence[int], frames: Sequence[int] | None = None):
        self.frames = list(range(len(masks))) if frames is None else sorted(frames)
        if masks.dtype != bool or masks.ndim != 4 or masks.shape[:2] != (len(self.frames), len(object_ids)):
            raise SampleError(
                f"masks must be bool ({len(self.frames)}, {len(object_ids)}, H, W), not {masks.dtype} {masks.shape}"
            )
        self._masks = dict(zip(self.frames, masks, strict=True))
        self._ids = [int(i) for i in object_ids]

    @property
    def object_ids(self) -> list[int]:
        return self._ids

    def visible(self, frame: int) -> list[int]:
        return [i for i, mask in zip(self._ids, self._masks[frame], strict=True) if mask.any()]

    def masks(self, frame: int, object_ids: Sequence[int]) -> np.ndarray:
        return self._masks[frame][[self._ids.index(i) for i in object_ids]]


class RleMasks(Annotations):
    """COCO run-length encoded masks; objects may overlap (SA-V training, COCO, rows of a `datasets.Dataset`).

    Args:
        rles: frame index -> object id -> RLE `{"size": [H, W], "counts": …}`; an object that is missing is absent.
        object_ids: ids of all objects.
        size: (height, width) of the masks.
        name: the file, for messages.
    """

    def __init__(
        self,
        rles: Mapping[int, Mapping[int, dict[str, Any]]],
        object_ids: Sequence[int],
        size: Sequence[int],
        name: str,
    ):
        self.rles, self._ids, self.size, self.name = rles, sorted(object_ids), tuple(size), name
        self.frames = sorted(rles)

    @property
    def object_ids(self) -> list[int]:
        return self._ids

    def visible(self, frame: int) -> list[int]:
        return [i for i, rle in sorted(self.rles[frame].items()) if coco_mask.area(rle) > 0]

    def masks(self, frame: int, object_ids: Sequence[int]) -> np.ndarray:
        shown = {i: self._decode(frame, i) for i in object_ids if i in self.rles[frame]}
        return _stack(shown, object_ids, self.size, self.source(frame))

    def _decode(self, frame: int, object_id: int) -> np.ndarray:
        try:
            return coco_mask.decode(self.rles[frame][object_id]).astype(bool)
        except (ValueError, TypeError, KeyError) as error:
            raise SampleError(
                f"{self.source(frame)}: object {object_id} is no COCO run-length encoded mask ({error})"
            ) from error

    def source(self, frame: int) -> str:
        return f"{self.name}, frame {frame}"


def _stack(shown: Mapping[int, np.ndarray], object_ids: Sequence[int], size: Sequence[int], name: str) -> np.ndarray:
    """Masks of the objects in order, (num_objects, H, W) bool, empty for those that are not shown."""
    masks = np.zeros((len(object_ids), *size), dtype=bool)
    for position, object_id in enumerate(object_ids):
        if object_id in shown:
            if shown[object_id].shape != tuple(size):
                raise SampleError(f"{name}: object {object_id} is {shown[object_id].shape}, others are {tuple(size)}")
            masks[position] = shown[object_id]
    return masks
