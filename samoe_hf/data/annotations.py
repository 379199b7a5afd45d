"""Masks of a video's objects, in the forms in which datasets store them. They are read when they are asked for."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

from .frames import SampleError, named_errors, say_once
from .image_files import Page
from .images import read_label_png, white_is_id
from .shapes import draw

HINT = "`binary: true` (`year: 2016` for the kind davis) reads every value above 0 as the object"


class Annotations(ABC):
    """Masks per annotated frame and object.

    Attributes:
        frames: indices of the annotated frames, ascending. A frame that is not among them says nothing about the
            objects; on one that is, an object without pixels is absent.
        size: (height, width) of all masks, where it is known before they are read.
        notes: what was guessed, which `samoe data check` prints; some is known when masks are read.
    """

    frames: list[int]
    size: tuple[int, int] | None = None

    @cached_property
    def notes(self) -> list[str]:
        return []

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

    def note(self, text: str) -> None:
        """Says what was guessed: in `notes`, and once in the log."""
        if text not in self.notes:
            self.notes.append(text)
            say_once(text)

    def source(self, frame: int) -> str:
        """What to call a frame's annotation in messages."""
        return f"annotation of frame {frame}"


class LabelMaps(Annotations):
    """Annotations that are one image of object ids per frame, 0 for background."""

    @abstractmethod
    def ids(self, frame: int) -> np.ndarray:
        """(H, W) ids of an annotated frame."""

    _all_ids: list[int] | None = None

    @property
    def object_ids(self) -> list[int]:
        if self._all_ids is None:
            self._all_ids = sorted(set().union(*(self.visible(frame) for frame in self.frames)))
        return self._all_ids

    def visible(self, frame: int) -> list[int]:
        return [int(value) for value in np.unique(self.ids(frame)) if value > 0]

    def masks(self, frame: int, object_ids: Sequence[int]) -> np.ndarray:
        return self.ids(frame)[None] == np.asarray(object_ids, dtype=np.int64)[:, None, None]


class IdVolume(LabelMaps):
    """Ids in memory, (T, H, W) of any integer dtype and not negative; all frames annotated or those listed."""

    def __init__(self, ids: np.ndarray, frames: Sequence[int] | None = None):
        if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
            raise SampleError(f"labels must be (T, H, W) integers, not {ids.dtype} {ids.shape}")
        if ids.min(initial=0) < 0:
            raise SampleError(f"labels must be 0 (background) or the ids of objects, not {ids.min()}")
        self.frames, self.size = list(range(len(ids)) if frames is None else frames), ids.shape[1:]
        ids = ids.astype(np.min_scalar_type(ids.max(initial=0)), copy=False)
        self._rows = dict(zip(self.frames, ids, strict=True))

    def ids(self, frame: int) -> np.ndarray:
        return self._rows[frame]


class LabelImages(LabelMaps):
    """One label image per annotated frame.

    White (255, or 65535 of 16 bits) is no object's id, unless the file says so: where all labels of a video are white
    or 0, they are masks of one object, 1; beside other ids it is a border or void, and is left out.

    Args:
        images: frame index -> palette, gray or 16-bit label image: its path, the bytes of its file, or a page.
        binary: True if every value above 0 is object 1; False if values are ids, white too.
        object_ids: the only ids that count as objects; all by default.
        names: of images as bytes, the video and the column that they are from.
        ignore_ids: ids that are no objects; white beside others by default.
    """

    def __init__(
        self,
        images: Mapping[int, str | Path | bytes | Page],
        binary: bool | None = None,
        ignore_ids: Collection[int] | None = None,
        object_ids: Collection[int] | None = None,
        names: tuple[str, str] = ("", ""),
    ):
        self.images, self.names = dict(images), names
        self.frames = sorted(self.images)
        self.binary, self.ignore_ids = binary, ignore_ids
        self._all_ids = self.counted = None if object_ids is None else sorted(object_ids)

    def ids(self, frame: int) -> np.ndarray:
        ids = read_label_png(self.images[frame], self.source(frame))
        if self.counted is not None:
            ids[np.isin(ids, self.counted, invert=True)] = 0
            return ids
        if self.ignore_ids:
            ids[np.isin(ids, list(self.ignore_ids))] = 0
        if self.binary:
            return (ids > 0).astype(np.uint8)
        white = 65535 if ids.max(initial=0) > 255 else 255
        is_white = ids == white
        if self.binary is False or not is_white.any() or (ids.itemsize > 1 and white < max(self._values)):
            return ids
        if white_is_id(self.images[frame], self.source(frame)):
            return ids
        if has_soft_edges(ids):
            raise SampleError(f"{self.source(frame)}: a mask with soft edges, whose shades are no objects' ids; {HINT}")
        if ((ids == 0) | is_white).all() and self._values <= {0, white, *(self.ignore_ids or ())}:
            return is_white.astype(np.uint8)
        if self.ignore_ids is None:
            image, (_, column) = self.images[frame], self.names
            path = Path(image.path if isinstance(image, Page) else str(image))
            owner = f"the column {column!r}" if isinstance(image, bytes) else path.parent.parent
            self.note(f"labels in {owner} hold {white} beside ids: it is left out; `ignore_ids: []` keeps it")
            ids[is_white] = 0
        return ids

    @cached_property
    def _values(self) -> frozenset[int]:
        """All values in the video's label images."""
        images = [self.images[frame] for frame in self.frames]
        paths = [str(image) for image in images if isinstance(image, str | Path)]
        if len(paths) < len(images):
            return frozenset().union(*map(_values_of, images))
        return _values_of_files(tuple(paths), sum(os.stat(path).st_mtime_ns for path in paths))

    def source(self, frame: int) -> str:
        image, (video_id, column) = self.images[frame], self.names
        return f"{video_id}, frame {frame} of {column!r}" if isinstance(image, bytes) else str(image)


def read_object_mask(
    path: str | Path | Page,
    object_id: int,
    advice: str,
    binary: bool | None = None,
    ignore_ids: Collection[int] | None = None,
) -> np.ndarray:
    """The mask (H, W) bool of an object, whose image is of one value and 0, or has soft edges; else a `SampleError`.

    Args:
        object_id, advice: for the message.
        binary: True if all values above 0 are the object.
        ignore_ids: values that are not the object.
    """
    values = read_label_png(path)
    mask = (values > 0) & ~np.isin(values, list(ignore_ids or ()))
    kinds = [] if binary else np.unique(values[mask]).tolist()
    if len(kinds) > 1 and not has_soft_edges(values):
        shown = ", ".join(map(str, kinds[:5]))
        raise SampleError(
            f"{path}: read as the mask of one object, {object_id}, but holds the values {shown}; {advice}"
        )
    return mask


@lru_cache(maxsize=16384)
def _values_of_files(paths: tuple[str, ...], modified_ns: int) -> frozenset[int]:
    """All values in some label images; `modified_ns` tells changed files."""
    return frozenset().union(*map(_values_of, paths))


def _values_of(image: str | Path | bytes | Page) -> list[int]:
    return np.unique(read_label_png(image)).tolist()


def has_soft_edges(ids: np.ndarray) -> bool:
    """Whether (H, W) unsigned integers are a mask with soft edges, white in its largest value, and not objects' ids."""
    white = np.iinfo(ids.dtype).max
    between = (ids > 0) & (ids < white)
    if not (between.any() and (ids == white).any()):
        return False
    # Shades of an edge have darker and lighter neighbours; of an object's pixels, few that touch two others have.
    return bool(((minimum_filter(ids, 3) < ids) & (ids < maximum_filter(ids, 3)))[between].mean() > 0.5)


class MasksOfObjects(Annotations):
    """Annotations that are a mask for each object and frame, so that objects may overlap.

    Args:
        stored: frame index -> object id -> a mask as it is stored. An object without one is absent on that frame.
        size: (height, width) of the masks, where it is known; else that of the first one of a frame.
        name: the file, for messages.
    """

    def __init__(
        self,
        stored: Mapping[int, Mapping[int, Any]],
        object_ids: Collection[int],
        size: Sequence[int] | None = None,
        name: str = "",
    ):
        check_object_ids(object_ids, name)
        self.stored, self._ids, self.name, self.frames = stored, sorted(object_ids), name, sorted(stored)
        self.size = None if size is None else (int(size[0]), int(size[1]))

    @abstractmethod
    def _read(self, frame: int, object_id: int) -> np.ndarray:
        """The mask (H, W) bool of an object that has one on a frame."""

    @property
    def object_ids(self) -> list[int]:
        return self._ids

    def visible(self, frame: int) -> list[int]:
        return [i for i in sorted(self.stored[frame]) if self._read(frame, i).any()]

    def masks(self, frame: int, object_ids: Sequence[int]) -> np.ndarray:
        own = self.stored[frame]
        shown = {i: self._read(frame, i) for i in object_ids if i in own}
        size = self.size or (next(iter(shown.values())) if shown else self._read(frame, next(iter(own)))).shape
        masks = np.zeros((len(object_ids), *size), dtype=bool)
        for row, object_id in zip(masks, object_ids, strict=True):
            if object_id in shown and shown[object_id].shape != size:
                raise SampleError(f"{self.source(frame)}: object {object_id} differs in size, others are {size}")
            row[:] = shown.get(object_id, False)
        return masks

    def source(self, frame: int) -> str:
        return f"{self.name}, frame {frame}"


class ObjectImages(MasksOfObjects):
    """One image per object and annotated frame, of the object and 0 (SA-V validation and test).

    Args:
        paths: object id -> frame index -> mask image. A frame is annotated where any object has an image.
        binary, ignore_ids: see [`read_object_mask`].
    """

    def __init__(
        self,
        paths: Mapping[int, Mapping[int, str | Path | Page]],
        binary: bool | None = None,
        ignore_ids: Collection[int] | None = None,
    ):
        frames = sorted(set().union(*paths.values()))
        super().__init__({t: {i: own[t] for i, own in sorted(paths.items()) if t in own} for t in frames}, paths)
        self.binary, self.ignore_ids = binary, ignore_ids

    def _read(self, frame: int, object_id: int) -> np.ndarray:
        advice = (
            "if it is a label image, give a pattern of masks without {object}; `binary: true` takes all values for the "
            "object"
        )
        return read_object_mask(self.stored[frame][object_id], object_id, advice, self.binary, self.ignore_ids)

    def source(self, frame: int) -> str:
        return str(next(iter(self.stored[frame].values())))


class MaskArrays(MasksOfObjects):
    """Masks in memory, (T, num_objects, H, W) bool, all frames annotated or those listed."""

    def __init__(self, masks: np.ndarray, object_ids: Sequence[int], frames: Sequence[int] | None = None):
        frames = list(range(len(masks))) if frames is None else sorted(frames)
        if masks.dtype != bool or masks.ndim != 4 or masks.shape[:2] != (len(frames), len(object_ids)):
            expected = f"({len(frames)}, {len(object_ids)}, H, W)"
            raise SampleError(f"masks must be bool {expected}, not {masks.dtype} {masks.shape}")
        stored = {t: dict(zip(map(int, object_ids), own, strict=True)) for t, own in zip(frames, masks, strict=True)}
        super().__init__(stored, object_ids, masks.shape[2:])
        self._ids = [int(i) for i in object_ids]

    def _read(self, frame: int, object_id: int) -> np.ndarray:
        return self.stored[frame][object_id]


class Shapes(MasksOfObjects):
    """Masks of which each is the union of its [`Part`]s, such as run-length encodings and polygons; of a known size."""

    def _read(self, frame: int, object_id: int) -> np.ndarray:
        assert self.size is not None
        mask = np.zeros(self.size, dtype=bool)
        with named_errors(f"{self.source(frame)}, object {object_id}", "its shape is no mask"):
            for part in self.stored[frame][object_id]:
                mask |= draw(part, self.size)
        return mask


def check_object_ids(object_ids: Collection[int], name: str = "") -> None:
    """Raises `SampleError`, which names the file, unless all ids are different integers above 0."""
    name = f"{name}: " if name else ""
    if any(isinstance(i, bool) or not isinstance(i, Integral) or i < 1 for i in object_ids):
        raise SampleError(f"{name}ids of objects must be integers above 0, not {list(object_ids)[:20]}")
    if len(set(object_ids)) < len(object_ids):
        raise SampleError(f"{name}ids of objects must be different, not {list(object_ids)[:20]}")
