"""One schema for every dataset: `Video`, and its form as a row of a `datasets.Dataset`.

Frames keep the bytes of their files, or become PNGs; masks are COCO run-length encodings, which are exact for
overlapping objects, ids of any size and frames without annotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, overload
from uuid import uuid4

import datasets
import numpy as np
from PIL import Image

from samoe_hf.errors import InputError

from .annotations import Annotations, MaskArrays, Shapes
from .frames import IN_MEMORY, ArrayFrames, FrameSequence, SampleError, named_errors, one_form
from .images import ImageFrames, encode_png
from .shapes import encode_rle

Value = TypeVar("Value")
FEATURES = datasets.Features(
    {
        "video_id": datasets.Value("string"),
        "domain": datasets.Value("string"),
        "frames": datasets.List(datasets.Image()),
        "frame_names": datasets.List(datasets.Value("string")),
        "size": datasets.List(datasets.Value("int32")),  # height, width
        "object_ids": datasets.List(datasets.Value("int64")),
        "annotated_frames": datasets.List(datasets.Value("int32")),
        "masks": datasets.List(datasets.List(datasets.Value("string"))),  # RLE counts, annotated frames x objects
        "spacing": datasets.List(datasets.Value("float64")),  # empty where unknown
        "classes": datasets.List(datasets.Value("string")),  # of the objects; None where unknown
    }
)


@dataclass(frozen=True)
class Video:
    """A video with the masks of its objects.

    Attributes:
        video_id: unique within its dataset.
        frames: (H, W, 3) uint8 RGB frames, decoded on access.
        annotations: the masks, see `Annotations`.
        domain: the name under which routing and metrics are reported.
        spacing: of a volume, the size of a voxel along x, y and the slices, in mm.
        classes: name of each object's class by its id, where it is known.
    """

    video_id: str
    frames: FrameSequence
    annotations: Annotations
    domain: str = "default"
    spacing: tuple[float, float, float] | None = None
    classes: Mapping[int, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in (self.video_id, *self.frames.names):
            if not name.isascii() and name != name.encode(errors="replace").decode():
                raise SampleError(f"{name!a}: names of videos and frames must be UTF-8; this one is not, so rename it")
        frames = self.annotations.frames
        if frames and not 0 <= frames[0] <= frames[-1] < len(self.frames):
            raise SampleError(f"{self.video_id}: annotations up to frame {frames[-1]}, but {len(self.frames)} frames")
        size, spacing = self.annotations.size, self.spacing
        if size is not None and tuple(size) != tuple(self.size):
            raise SampleError(f"{self.video_id}: masks of size {tuple(size)} for frames of {tuple(self.size)}")
        if spacing is not None and not (len(spacing) == 3 and all(0 < length < math.inf for length in spacing)):
            raise SampleError(f"{self.video_id}: spacing must be three lengths above 0, not {tuple(spacing)}")

    @classmethod
    def from_arrays(
        cls,
        video_id: str,
        frames: np.ndarray,
        masks: np.ndarray,
        object_ids: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Video:
        """A video in memory: frames (T, H, W[, 3]) uint8, masks (T, num_objects, H, W) bool, ids 1… by default."""
        ids = range(1, masks.shape[1] + 1) if object_ids is None else object_ids
        return cls(video_id, ArrayFrames(frames), MaskArrays(masks, ids), **kwargs)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.frames.size

    @property
    def object_ids(self) -> list[int]:
        """Ids of all objects, ascending, above 0."""
        return self.annotations.object_ids

    @property
    def annotated_frames(self) -> list[int]:
        """Indices of the frames whose masks are known, ascending. On one, an object with an empty mask is absent."""
        return self.annotations.frames

    @property
    def first_visible(self) -> int | None:
        """The first annotated frame that shows an object; None if none does."""
        return next((frame for frame in self.annotated_frames if self.visible(frame)), None)

    def visible(self, frame: int) -> list[int]:
        """Ids of the objects with pixels on an annotated frame, ascending."""
        return self._annotated(frame).visible(frame)

    def masks(self, frame: int, object_ids: Sequence[int] | None = None) -> np.ndarray:
        """The objects' masks on an annotated frame.

        Args:
            object_ids: objects to read, in this order; all of the video's by default.

        Returns:
            (num_objects, H, W) bool, all False for an absent object.

        Raises:
            SampleError: the frame is not annotated, or its masks differ in size from the frames; names the file.
        """
        masks = self._annotated(frame).masks(frame, self.object_ids if object_ids is None else object_ids)
        if masks.shape[1:] != tuple(self.size):
            source = self.annotations.source(frame)
            turned = masks.shape[:0:-1] == tuple(self.size)
            hint = "; frames are turned as their EXIF orientation says, are the masks drawn on unturned ones?" * turned
            sizes = f"masks of size {masks.shape[1:]} for frames of {self.size}"
            raise SampleError(f"{self.video_id}: {sizes} ({source}){hint}")
        return masks

    def id_map(self, frame: int) -> np.ndarray:
        """The objects' ids on an annotated frame, (H, W) integers, 0 for background; the highest where they overlap."""
        ids, visible = np.zeros(self.size, dtype=np.int64), self.visible(frame)
        for object_id, mask in zip(visible, self.masks(frame, visible), strict=True):
            ids[mask] = object_id
        return ids

    def _annotated(self, frame: int) -> Annotations:
        if frame not in self.annotations.frames:
            raise SampleError(f"{self.video_id}: frame {frame} is not annotated")
        return self.annotations


class VideoList(Sequence[Video]):
    """Videos that are opened when they are asked for; a slice is a list of them.

    Args:
        entries: what `open_entry` takes to open each: a mapping of video ids, or a sequence or map-style dataset.
        open_entry: (video id or index, entry) -> `Video`; must be picklable for data loader workers that are spawned.

    Attributes:
        video_ids: of all videos, in order; none where `entries` does not tell them.
    """

    def __init__(self, entries: Any, open_entry: Callable[[Any, Any], Video]):
        self.entries, self.open_entry = entries, open_entry
        self.video_ids: list[str] = list(entries) if isinstance(entries, Mapping) else []

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Video: ...
    @overload
    def __getitem__(self, index: slice) -> list[Video]: ...
    def __getitem__(self, index: int | slice) -> Video | list[Video]:
        keys: Sequence[Any] = self.video_ids or range(len(self))
        if isinstance(index, slice):
            return [self._open(key) for key in keys[index]]
        return self._open(keys[index])

    def _open(self, key: Any) -> Video:
        try:
            entry = self.entries[key]
        except FileNotFoundError:
            raise
        except OSError as error:  # such as of `datasets`, which decodes images itself
            raise SampleError(f"item {key} cannot be read: {IN_MEMORY.sub('', str(error))}") from error
        return self.open_entry(key, entry)

    def select(self, video_ids: Sequence[str]) -> VideoList:
        """The videos with these ids, in this order; raises `ValueError` for an unknown id."""
        known = {one_form(str(video_id)): video_id for video_id in self.entries}
        video_ids = [known.get(one_form(video_id), video_id) for video_id in video_ids]
        missing = [video_id for video_id in video_ids if video_id not in self.entries]
        if missing:
            raise InputError(f"no videos {missing}; there are {self.video_ids[:10]}{'…' if len(self) > 10 else ''}")
        return VideoList({video_id: self.entries[video_id] for video_id in video_ids}, self.open_entry)


def evenly_chosen(values: Sequence[Value], count: int) -> list[Value]:
    """Up to so many of the values, evenly spread, with the first."""
    number = min(count, len(values))
    return [values[i * len(values) // number] for i in range(number)]


def named_entries(*parts: Sequence[Video]) -> list[tuple[str, Callable[[], Video]]]:
    """A name of each video, and what opens it: its id, or "video 1" and so on where ids are not told before.

    Of several datasets, each name begins with its dataset's number.
    """
    entries = []
    for number, videos in enumerate(parts, start=1):
        ids = videos.video_ids if isinstance(videos, VideoList) else []
        owner = f"dataset {number}, " if len(parts) > 1 else ""
        for index, name in enumerate(ids or [f"video {number}" for number in range(1, len(videos) + 1)]):
            entries.append((f"{owner}{name}", partial(videos.__getitem__, index)))
    return entries


def encoded_source(image: Any, name: str) -> bytes | str:
    """An image's bytes, or else its path, of `{"bytes", "path"}`; raises `SampleError` where it has neither."""
    source = image["bytes"] or image["path"]
    if not source:
        raise SampleError(f"{name}: no image")
    return source


def encoded_frames(video_id: str, images: list[Any], names: Sequence[str] | None = None) -> ImageFrames:
    """Frames as a row of a dataset holds them: `{"bytes", "path"}`, or images that `datasets` has decoded already."""
    names = [f"{i:05d}" for i in range(len(images))] if names is None else list(names)
    if not images or len(images) != len(names) or not all(isinstance(name, str) for name in names):
        raise SampleError(f"{video_id}: {len(images)} frames with the names {names[:10]}")
    sources = [
        image if isinstance(image, Image.Image) else encoded_source(image, f"{video_id}, frame {name}")
        for image, name in zip(images, names, strict=True)
    ]
    return ImageFrames(sources, names=names, owner=video_id)


def video_to_row(video: Video) -> dict[str, Any]:
    """The video as a row with the types of `FEATURES`, its frames encoded."""
    frames = video.frames
    encode = frames.encoded if isinstance(frames, ImageFrames) else lambda i: encode_png(frames[i])
    return {
        "video_id": video.video_id,
        "domain": video.domain,
        "frames": [{"bytes": encode(i), "path": None} for i in range(len(frames))],
        "frame_names": frames.names,
        "size": list(video.size),
        "object_ids": video.object_ids,
        "annotated_frames": video.annotated_frames,
        "masks": [[encode_rle(mask)["counts"] for mask in video.masks(frame)] for frame in video.annotated_frames],
        "spacing": list(video.spacing or ()),
        "classes": [video.classes.get(i) for i in video.object_ids],
    }


def video_from_row(row: dict[str, Any]) -> Video:
    """The video of a row; frames and masks are decoded on access.

    Raises:
        SampleError: the row does not fit `FEATURES`, or its parts do not fit together; names the video.

    `datasets` itself decodes every image of a row with the feature `Image()`; `videos_from_dataset` prevents that.
    """
    with named_errors(repr(row.get("video_id")), "not a row with samoe_hf.data.FEATURES"):
        video_id, domain, ids = str(row["video_id"]), str(row["domain"]), row["object_ids"]
        frames = encoded_frames(video_id, row["frames"], row["frame_names"])
        if frames.size != tuple(row["size"]):
            raise SampleError(f"{video_id}: frames of size {frames.size}, not {row['size']} as the row says")
        if len(set(row["annotated_frames"])) < len(row["annotated_frames"]):
            raise SampleError(f"{video_id}: a frame that is annotated twice")
        rles = {
            frame: {i: [{"size": frames.size, "counts": counts}] for i, counts in zip(ids, frame_counts, strict=True)}
            for frame, frame_counts in zip(row["annotated_frames"], row["masks"], strict=True)
        }
        spacing = tuple(row["spacing"]) or None
        names = row.get("classes") or [None] * len(ids)
        classes = {i: str(name) for i, name in zip(ids, names, strict=True) if name is not None}
        return Video(video_id, frames, Shapes(rles, ids, frames.size, video_id), domain, spacing, classes)


def to_datasets(videos: Sequence[Video], cache_dir: str | None = None) -> datasets.Dataset:
    """Videos as a `datasets.Dataset` with `FEATURES`, in `cache_dir` or `datasets`' own cache.

    It is written anew at each call, since a fingerprint of lazily read files would not notice that they have changed.
    """
    # A row is a whole video; Arrow's offsets end at 2 GB per written batch.
    return datasets.Dataset.from_generator(
        lambda: map(video_to_row, videos),
        features=FEATURES,
        cache_dir=cache_dir,  # pyright: ignore[reportArgumentType] (None is its default)
        writer_batch_size=4,
        fingerprint=uuid4().hex,
    )
