"""Datasets of the `datasets` library, on the Hub or on disk, as videos.

Known are those of `to_datasets`; those with a column of lists of frames and one of lists of label images; and those
with one frame a row, its label image, and the name of its video. Images are decoded when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from samoe_hf.errors import InputError

from .annotations import LabelImages
from .frames import DAMAGE, SampleError, named_errors, natural_key
from .images import Window, check_window
from .items import VideoStream, shown_as, videos_from_items
from .schema import FEATURES, Video, VideoList, encoded_frames, encoded_source, video_from_row

# What columns are called, the likeliest first.
FRAMES = ("frames", "images", "frame", "image")
MASKS = ("masks", "labels", "annotations", "segmentations", "mask", "label", "annotation", "segmentation")
VIDEO = ("video_id", "video", "sequence", "sequence_id")
ORDER = ("frame_number", "frame_index", "frame_idx", "frame_id", "frame_name", "frame")
AnyDataset = datasets.Dataset | datasets.IterableDataset


def read_dataset(
    root: str | Path,
    split: str | None = None,
    streaming: bool = False,
    frames_column: str | None = None,
    masks_column: str | None = None,
    video_column: str | None = None,
    order_column: str | None = None,
    binary: bool | None = None,
) -> Sequence[Video] | Iterable[Video]:
    """A dataset made by `to_datasets`, or one with frames and masks as columns of images.

    Args:
        root: a folder of `save_to_disk`, or anything `datasets.load_dataset` takes, such as a name on the Hub.
        split: of several that were saved together, and of `load_dataset`; by default "train".
        streaming: nothing is downloaded ahead; gives an iterable, for `ClipStream`.
        frames_column, masks_column, video_column, order_column, binary: see [`videos_from_dataset`].

    Raises:
        ValueError: no such dataset or split; or a `split` of a dataset that was saved alone, as another split or none.
    """
    folder, split, asked = Path(root), split or "train", split
    folder = folder / split if (folder / split / "state.json").is_file() else folder
    if (folder / "state.json").is_file():
        with named_errors(folder, "not a dataset of `save_to_disk`"):
            dataset = datasets.load_from_disk(str(folder))
        assert isinstance(dataset, datasets.Dataset)  # since it has a state
        if asked and folder == Path(root) and str(dataset.split) != asked:
            raise InputError(f"{folder}: a dataset saved alone, not known to be the split {asked!r}; leave out `split`")
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    else:
        with named_errors(root, f"its split {split!r} cannot be loaded", (ValueError,)):
            dataset = datasets.load_dataset(str(root), split=split, streaming=streaming)
        assert isinstance(dataset, AnyDataset)  # since a split is named
    named = (frames_column, masks_column, video_column, order_column)
    return videos_from_dataset(dataset, *named, binary=binary)


def videos_from_dataset(
    dataset: AnyDataset,
    frames_column: str | None = None,
    masks_column: str | None = None,
    video_column: str | None = None,
    order_column: str | None = None,
    domain: str | None = None,
    binary: bool | None = None,
    window: Window | None = None,
) -> Sequence[Video] | Iterable[Video]:
    """Videos of a dataset: a sequence, or, of an `IterableDataset`, an iterable with `set_epoch`.

    Frames are not decoded before they are asked for, unlike in the rows that `datasets` hands out itself.

    Args:
        dataset: with `FEATURES`; or with columns of images. A row is a video, with lists of frames and of label images
            (None for a frame without annotation); or a frame with its label image. If `frames` and `masks` are other
            columns, or a transform or a generator makes the rows, they are read as [`video_from_item`] reads items.
        frames_column: the frames, by default "frames", "images", "frame" or "image".
        masks_column: the label images, by default "masks", "labels", "annotations", "segmentations" or one of these in
            the singular.
        video_column: the video's name, by default "video_id", "video" or "sequence". Rows that are frames need it.
        order_column: of rows that are frames, their order in a video, by default "frame_number", "frame_index" or
            alike; else the rows' order.
        domain: the videos' domain, by default the column "domain", else "dataset".
        binary: True if every label above 0 is object 1, False if white is an id, see [`LabelImages`].
        window: see [`~samoe_hf.data.registry.load_videos`].

    Raises:
        ValueError: columns are missing; names those that are there.
    """
    check_window(window)
    features: Mapping[str, Any] = dataset.features or {}
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        features = {}  # a transform makes the rows
    options = {"frames_column": frames_column, "masks_column": masks_column,
               "video_column": video_column, "order_column": order_column}  # fmt: skip
    named = {option: column for option, column in options.items() if column is not None}
    for option, column in named.items():
        if column not in features:
            raise InputError(f"`{option}`: the dataset has no column {column!r}. {_describe(features)}")
    return shown_as(_open_dataset(dataset, features, named, binary), domain, window)


def _open_dataset(
    dataset: AnyDataset, features: Mapping[str, Any], named: Mapping[str, str], binary: bool | None
) -> Sequence[Video] | Iterable[Video]:
    if not named and set(FEATURES) - {"classes"} <= set(features):  # older datasets have no classes
        return _rows_as_videos(dataset, [name for name in FEATURES if name in features], ["frames"], _open_own)
    columns = _find_columns(features, named, binary)
    if columns is not None and _image_kind(features[columns.frames]) == "image":
        return _group_frames(dataset, columns)
    if columns is not None:
        return _rows_as_videos(dataset, columns.all(), [columns.frames, columns.masks], columns.open_row)
    if binary is not None:
        raise InputError("`binary` goes with columns of images")
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] is None:
        dataset = dataset.with_format("numpy")
    return videos_from_items(dataset)


@dataclass(frozen=True)
class ImageColumns:
    """Which columns hold what, and whether every label above 0 is object 1."""

    frames: str
    masks: str
    video: str | None
    order: str | None
    domain: str | None
    binary: bool | None

    def all(self) -> list[str]:
        """The columns that are read for a video."""
        return [c for c in (self.frames, self.masks, self.video, self.domain) if c is not None]

    def open_row(self, index: int, row: Mapping[str, Any]) -> Video:
        """The video of a row with lists of images."""
        name = None if self.video is None else row[self.video]
        return self.open(f"row_{index}" if name is None else str(name), row[self.frames], row[self.masks], row)

    def open_rows(self, dataset: EncodedRows, video_id: str, indices: list[int]) -> Video:
        """The video of some rows, of a frame each."""
        rows = dataset.read(indices)
        return self.open(video_id, [row[self.frames] for row in rows], [row[self.masks] for row in rows], rows[0])

    def open(self, video_id: str, images: list[Any], labels: list[Any], row: Mapping[str, Any]) -> Video:
        """The video of encoded frames and label images; `row` may name its domain."""
        if not images or not labels or len(images) != len(labels) or None in images:
            counts = f"{len(images or ())} frames in {self.frames!r} and {len(labels or ())} masks in {self.masks!r}"
            raise SampleError(f"{video_id}: {counts}; expected one label image for each frame, or None")
        annotated = {
            i: encoded_source(label, f"{video_id}, frame {i} of {self.masks!r}")
            for i, label in enumerate(labels)
            if label is not None
        }
        domain = self.domain and row[self.domain]
        annotations = LabelImages(annotated, self.binary, names=(video_id, self.masks))
        return Video(video_id, encoded_frames(video_id, images), annotations, str(domain or "dataset"))


def _image_kind(feature: Any) -> str | None:
    """ "image", "images" for a list of them, or None for anything else."""
    if isinstance(feature, datasets.Image):
        return "image"
    is_list = isinstance(feature, datasets.List | datasets.LargeList)
    return "images" if is_list and isinstance(feature.feature, datasets.Image) else None


def _find_columns(features: Mapping[str, Any], named: Mapping[str, str], binary: bool | None) -> ImageColumns | None:
    """The columns that are named, else those of a known name; None where the rows are items."""

    def find(option: str, known: Sequence[str], fits: Callable[[Any], bool]) -> str | None:
        names = [named[option]] if option in named else known
        return next((name for name in names if name in features and fits(features[name])), None)

    def is_name(feature: Any) -> bool:
        return isinstance(feature, datasets.Value | datasets.ClassLabel)

    frames = find("frames_column", FRAMES, lambda f: _image_kind(f) is not None)
    kind = None if frames is None else _image_kind(features[frames])
    masks = find("masks_column", MASKS, lambda f: _image_kind(f) == kind)
    video = find("video_column", VIDEO, is_name)
    if frames is None or masks is None or (video is None and kind == "image"):
        if not features or (not named and {"frames", "masks"} <= set(features)):
            return None
        raise InputError(
            f"the dataset lacks the columns {sorted(set(FEATURES) - set(features))} of samoe_hf.data.FEATURES, and its "
            f"columns are not known as frames and masks. {_describe(features)}. Expected: frames (a list of images) "
            "and masks (a list of label images); or a frame a row as image, mask (a label image) and video_id. "
            "Others are named with `frames_column`, `masks_column` and `video_column`"
        )
    order = find("order_column", [c for c in ORDER if c != frames], is_name)
    domain = "domain" if isinstance(features.get("domain"), datasets.Value) else None
    return ImageColumns(frames, masks, video, order, domain, binary)


def _describe(features: Mapping[str, Any]) -> str:
    def kind(feature: Any) -> str:
        name = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
        return {"image": "an image", "images": "a list of images"}.get(_image_kind(feature) or "", str(name))

    columns = (f"{name} ({kind(feature)})" for name, feature in features.items())
    return f"It has: {', '.join(columns) or 'none, but what a transform or a generator makes'}"


def _open_own(index: int, row: dict[str, Any]) -> Video:
    return video_from_row(row)


def _rows_as_videos(
    dataset: AnyDataset, columns: list[str], image_columns: list[str], open_row: Callable[[int, dict[str, Any]], Video]
) -> VideoList | VideoStream:
    dataset = dataset.select_columns(columns)
    if isinstance(dataset, datasets.Dataset):
        return VideoList(EncodedRows(dataset), open_row)
    for column in image_columns:
        dataset = dataset.cast_column(column, datasets.List(datasets.Image(decode=False)))  # pyright: ignore[reportArgumentType]
    return VideoStream(dataset, open_row)


def _group_frames(dataset: AnyDataset, columns: ImageColumns) -> VideoList:
    """Videos of rows that are a frame each, by the name of their video, in the order of their first rows."""
    if isinstance(dataset, datasets.IterableDataset):
        raise InputError(
            f"rows that are single frames ({columns.frames!r}, {columns.masks!r}) cannot be grouped to videos while "
            "they are streamed; leave out `streaming`"
        )
    assert columns.video is not None
    index_columns = [columns.video, *([] if columns.order is None else [columns.order])]
    groups: dict[str, list[tuple[Any, int]]] = {}
    name_of = getattr(dataset.features[columns.video], "int2str", str)
    for index, row in enumerate(EncodedRows(dataset.select_columns(index_columns)).read(slice(None))):
        if None in row.values():
            raise SampleError(f"row {index} of the dataset has no {' or '.join(map(repr, index_columns))}")
        place = index if columns.order is None else row[columns.order]
        place = natural_key(place) if isinstance(place, str) else place
        groups.setdefault(name_of(row[columns.video]), []).append((place, index))
    entries = {video_id: [index for _, index in sorted(rows)] for video_id, rows in groups.items()}
    return VideoList(entries, partial(columns.open_rows, EncodedRows(dataset.select_columns(columns.all()))))


class EncodedRows:
    """Rows of a dataset, whose images stay encoded."""

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read([index])[0]

    def read(self, indices: slice | list[int]) -> list[dict[str, Any]]:
        """Some rows; raises `SampleError` where the file is damaged."""
        table: Any = self.dataset[indices]
        source = ", ".join(file["filename"] for file in self.dataset.cache_files) or "a dataset in memory"
        where = f"row {indices[0]}" if isinstance(indices, list) and len(indices) == 1 else "rows"
        with named_errors(f"{source}, {where}", "damaged", (*DAMAGE, SystemError)):
            table.validate(full=True)  # Arrow reads beyond its memory where offsets in a file are damaged
            return table.to_pylist()
