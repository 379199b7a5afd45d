"""What the formats of label tools have in common: shapes as masks, masks as polygons, and videos of labelled frames."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.ndimage import find_objects, label

from samoe_hf.data.annotations import MasksOfObjects, decode_rle, segmentation_to_rle
from samoe_hf.data.clips import warn_one_frame
from samoe_hf.data.frames import SampleError, check_inside, frame_order, named_errors, natural_key, say_once
from samoe_hf.data.image_files import IMAGE_SUFFIXES
from samoe_hf.data.images import ImageFrames, encode_png
from samoe_hf.data.layouts import has_words
from samoe_hf.data.pairing import object_ids
from samoe_hf.data.schema import Video, VideoList
from samoe_hf.data.video_io import read_video
from samoe_hf.data.windows import Window, check_window
from samoe_hf.errors import InputError

# A run-length encoding, a polygon x, y, x, y, …, or a function that draws a mask of a size (height, width).
Part = Mapping[str, Any] | list[float] | Callable[[tuple[int, int]], np.ndarray]
NO_CLASS = "object"
UPRIGHT = (".jpg", ".jpeg", ".png")  # files that every tool reads


class LabelledObject(NamedTuple):
    """An object on a frame; `key` tells which one it is throughout the video, None where nothing does."""

    key: int | str | None
    class_name: str
    parts: list[Part]


@dataclass
class LabelledFrame:
    """A frame as a file of labels has it.

    Attributes:
        video: name of its video.
        image: its file, or the bytes of one.
        name: by default the file's stem.
        size: (height, width), where it is told.
        objects: what is on it; None if it is not annotated.
        source: the file of labels, for messages.
    """

    video: str
    image: Path | bytes
    size: tuple[int, int] | None
    objects: list[LabelledObject] | None
    source: str
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name and isinstance(self.image, Path):
            self.name = self.image.stem


@dataclass
class LabelledVideo:
    """A video before it is opened: `frames` are a video file or images, `shapes` frame -> object -> its parts."""

    frames: Path | list[Path | bytes]
    size: tuple[int, int] | None
    shapes: dict[int, dict[int, list[Part]]]
    classes: dict[int, str]
    source: str
    names: list[str] | None = None


class Shapes(MasksOfObjects):
    """Masks of which each is the union of [`Part`]s."""

    def _read(self, frame: int, object_id: int) -> np.ndarray:
        assert self.size is not None
        mask = np.zeros(self.size, dtype=bool)
        with named_errors(f"{self.source(frame)}, object {object_id}", "its shape is no mask"):
            for part in self.stored[frame][object_id]:
                mask |= draw(part, self.size)
        return mask


def draw(part: Part, size: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) bool of a part; a pixel belongs to a polygon as pycocotools has it."""
    if callable(part):
        return part(size)
    return decode_rle(part if isinstance(part, Mapping) else segmentation_to_rle([part], size), size)


def place(patch: np.ndarray, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """A mask of a size (height, width), with the part of `patch` that lies within it."""
    mask = np.zeros(size, dtype=bool)
    y, x = max(top, 0), max(left, 0)
    seen = patch[y - top : max(size[0] - top, 0), x - left : max(size[1] - left, 0)]
    mask[y : y + seen.shape[0], x : x + seen.shape[1]] = seen
    return mask


def box(x0: float, y0: float, x1: float, y1: float, rotation: float = 0, is_ellipse: bool = False) -> list[float]:
    """A rectangle, or the ellipse in it, as a polygon; turned clockwise by degrees around its center."""
    angles = np.radians(np.arange(0, 360, 5) if is_ellipse else (225, 315, 45, 135))
    corners = np.stack([np.cos(angles), np.sin(angles)], -1) * (1 if is_ellipse else 2**0.5)
    corners *= ((x1 - x0) / 2, (y1 - y0) / 2)
    turn = np.radians(rotation)
    turned = corners @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    return (turned + ((x0 + x1) / 2, (y0 + y1) / 2)).ravel().tolist()


def rle_of(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) bool as COCO's compressed run-length encoding."""
    encoded: Any = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def polygons_of(mask: np.ndarray) -> list[list[float]]:
    """The outlines along the pixels' edges of a mask (H, W) bool, as polygons x, y, x, y, …, one for each part of it.

    A hole is joined to its outline by a line to and fro, so that pycocotools draws the mask again, to the pixel.
    """
    labels, _ = label(mask)
    polygons = []
    for number, (rows, columns) in enumerate(find_objects(labels), 1):
        rings = [ring + (columns.start, rows.start) for ring in _outlines(labels[rows, columns] == number)]
        polygons.append(joined([ring.ravel().tolist() for ring in rings]))
    return polygons


def joined(polygons: Sequence[list[float]]) -> list[float]:
    """Polygons as one, joined by lines to and fro."""
    if len(polygons) == 1:
        return list(polygons[0])
    starts, order = np.array([ring[:2] for ring in polygons], dtype=np.float64), [0]
    left = np.ones(len(polygons), bool)
    while len(order) < len(polygons):  # to the nearest one
        left[order[-1]] = False
        distances = np.abs(starts - starts[order[-1]]).sum(axis=1)
        order.append(int(np.where(left, distances, np.inf).argmin()))
    rings = [polygons[i] for i in order]
    forth = [value for ring in rings for value in [*ring, *ring[:2]]]
    return forth + [value for ring in rings[-2::-1] for value in ring[:2]]


def _outlines(part: np.ndarray) -> list[np.ndarray]:
    """The closed outlines of pixels (H, W) bool, the outer one first: corners (N, 2) as x, y."""
    padded = np.pad(part, 1)
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    is_corner, is_double = nw ^ ne ^ sw ^ se, (nw == se) & (ne == sw) & (nw != ne)
    (ys, xs), (y2, x2) = np.nonzero(is_corner), np.nonzero(is_double)
    # Two pixels that touch at a corner are two corners.
    y, x = np.concatenate([ys, y2, y2]), np.concatenate([xs, x2, x2])
    up = np.concatenate([(nw ^ ne)[is_corner], np.ones(len(y2), bool), np.zeros(len(y2), bool)])
    left = np.concatenate([(nw ^ sw)[is_corner], nw[is_double], ~nw[is_double]])
    beside, below = np.empty(len(y), int), np.empty(len(y), int)
    along, down = np.lexsort((~left, x, y)), np.lexsort((~up, y, x))
    for partner, order in ((beside, along), (below, down)):
        partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    rings, seen = [], np.zeros(len(y), bool)
    for start in along.tolist():
        ring, corner = [], start
        while not seen[corner]:
            other = int(beside[corner])
            seen[[corner, other]] = True
            ring += [corner, other]
            corner = int(below[other])
        if ring:
            rings.append(np.stack([x[ring], y[ring]], -1))
    return rings


# --- Reading


def read_json(path: Path, kind: str) -> Any:
    """What a JSON file holds; `SampleError` where it is none."""
    with named_errors(path, f"not {kind}"):
        return json.loads(path.read_bytes())


def files_with(root: Path, suffix: str, words: str) -> list[Path]:
    """The files below a folder with all of some words at their beginning or end, in natural order."""
    paths = sorted(root.rglob(f"*{suffix}"), key=lambda path: natural_key(path.as_posix()))
    return [path for path in paths if has_words(path, words)]


def read_frames(frames: Iterable[LabelledFrame], domain: str, window: Window | None, whose: str) -> VideoList:
    """The videos of labelled frames.

    Images in the folder of a video's frames that are not among them are frames without annotation. Where something has
    no key, nothing tells which objects of two frames are the same: then each image is a video of one frame, which is
    said.

    Args:
        frames: in the order of their numbers, of all videos.
        domain, window: of the reader.
        whose: the data set, for messages.

    Raises:
        SampleError: two frames of a video have one name, or there is none.
    """
    check_window(window)
    videos: dict[str, list[LabelledFrame]] = defaultdict(list)
    for frame in frames:
        videos[frame.video].append(frame)
    if not videos:
        raise SampleError(f"{whose}: no labelled frames")
    if any(one.key is None for own in videos.values() for frame in own for one in frame.objects or ()):
        say_once(f"{whose}: nothing tells which objects of two frames are the same, so each image is a video")
        warn_one_frame(f"Images in {whose}")
        videos = {
            f"{video}/{frame.name}".lstrip("/"): [
                replace(frame, objects=[one._replace(key=i) for i, one in enumerate(frame.objects, 1)])
            ]
            for video, own in videos.items()
            for frame in own
            if frame.objects
        }
    else:
        videos = {video: _with_unlabelled(own, videos) for video, own in videos.items()}
    entries = {name or Path(whose).stem: _video_of(name, own) for name, own in videos.items()}
    return VideoList(entries, partial(open_labelled, domain, window))


def _with_unlabelled(frames: list[LabelledFrame], videos: Mapping[str, list[LabelledFrame]]) -> list[LabelledFrame]:
    """A video's frames and the other images of their folder, if it is theirs alone and all are in its order."""
    first = frames[0]
    folders = {frame.image.parent for frame in frames if isinstance(frame.image, Path)}
    others = {f.image.parent for own in videos.values() if own is not frames for f in own if isinstance(f.image, Path)}
    if len(folders) != 1 or folders & others or not all(isinstance(frame.image, Path) for frame in frames):
        return frames
    (folder,) = folders
    paths = frame_order(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    by_path = {frame.image: frame for frame in frames}
    if [path for path in paths if path in by_path] != list(by_path) or len(by_path) < len(frames):
        return frames
    return [by_path.get(p) or LabelledFrame(first.video, p, None, None, first.source) for p in paths]


def _video_of(name: str, frames: Sequence[LabelledFrame]) -> LabelledVideo:
    sizes = {frame.size for frame in frames if frame.size is not None}
    owner = f"{frames[0].source}: video {name!r}"
    if len(sizes) > 1:
        raise SampleError(f"{owner} has frames of the sizes (height, width) {sorted(sizes)}")
    twice = [
        one for one, count in Counter(str(f.image if f.name == "" else f.name) for f in frames).items() if count > 1
    ]
    if twice:
        raise SampleError(f"{owner} has the frame {twice[0]!r} twice")
    keys = {one.key: one.class_name for frame in frames for one in frame.objects or ()}
    ids = ids_of(keys)
    shapes: dict[int, dict[int, list[Part]]] = {}
    for t, frame in enumerate(frames):
        for one in frame.objects or ():
            shapes.setdefault(t, {}).setdefault(ids[one.key], []).extend(one.parts)
        if frame.objects is not None:
            shapes.setdefault(t, {})
    classes = {ids[key]: class_name for key, class_name in keys.items()}
    images = [frame.image for frame in frames]
    return LabelledVideo(images, min(sizes, default=None), shapes, classes, frames[0].source, [f.name for f in frames])


def ids_of(keys: Iterable[Any]) -> dict[Any, int]:
    """Key of each object -> id above 0: a number itself, plus 1 where one is 0; names by their numbers or order."""
    keys = list(keys)
    if all(isinstance(key, int) for key in keys):
        return {key: key + (0 in keys) for key in keys}
    names = object_ids([str(key) for key in keys])
    return {key: names[str(key)] for key in keys}


def open_labelled(domain: str, window: Window | None, video_id: str, entry: LabelledVideo) -> Video:
    """Opens a video; an image that is missing is an error that names it."""
    for path in [entry.frames] if isinstance(entry.frames, Path) else entry.frames:
        if isinstance(path, Path) and not path.is_file():
            raise SampleError(f"{entry.source}: there is no file {path}")
    is_file = isinstance(entry.frames, Path)
    frames = read_video(entry.frames) if is_file else ImageFrames(entry.frames, window, entry.names, video_id)
    if entry.size not in (None, tuple(frames.size)):
        (height, width), shown = entry.size, tuple(frames.size)
        raise SampleError(f"{entry.source}: {video_id} is labelled as {height} x {width} pixels, but shown as {shown}")
    ids = sorted(set().union(*entry.shapes.values()))
    return Video(video_id, frames, Shapes(entry.shapes, ids, frames.size, entry.source), domain, classes=entry.classes)


def find_image(name: str, folders: Sequence[Path], source: str | Path) -> Path:
    """The file of a name below one of some folders; in the first of them where there is none."""
    check_inside(name, source)
    return next((folder / name for folder in folders if (folder / name).is_file()), folders[0] / name)


# --- Writing


def classes_of(videos: Sequence[Video]) -> list[str]:
    """The names of all classes, in order; "object" where an object has none."""
    return sorted({video.classes.get(i, NO_CLASS) for video in videos for i in video.object_ids} or {NO_CLASS})


def check_names(videos: Sequence[Video]) -> None:
    """Raises `InputError` where two videos, or two frames of one, have a name."""
    names = [("videos", [video.video_id for video in videos])]
    names += [(f"frames of {video.video_id}", video.frames.names) for video in videos]
    for what, own in names:
        name, count = Counter(own).most_common(1)[0]
        if count > 1:
            raise InputError(f"two {what} are called {name!r}; files of labels tell them by their names")


def write_frames(video: Video, folder: Path) -> list[str]:
    """Writes a video's frames as images, upright, and returns the names of the files; JPEGs and PNGs as they are."""
    check_inside(video.video_id, "the video's name")
    folder.mkdir(parents=True, exist_ok=True)
    names, frames = [], video.frames
    for t, name in enumerate(frames.names):
        check_inside(name, video.video_id)
        path = frames.sources[t] if isinstance(frames, ImageFrames) else None
        is_kept = (
            isinstance(path, Path) and path.suffix.lower() in UPRIGHT and not frames.is_deep and frames.window is None
        )
        if is_kept:
            with Image.open(path) as image:
                is_kept = image.format in ("JPEG", "PNG") and image.getexif().get(274, 1) == 1
        suffix = path.suffix.lower() if is_kept else ".png"
        (folder / f"{name}{suffix}").write_bytes(path.read_bytes() if is_kept else encode_png(frames[t]))
        names.append(f"{name}{suffix}")
    return names


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
