"""What the formats of label tools have in common: videos of labelled frames, and images beside what is written."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from samoe_hf.data.annotations import Shapes
from samoe_hf.data.clips import warn_one_frame
from samoe_hf.data.frames import SampleError, check_folder, check_inside, frame_order, natural_key, on_disk, say_once
from samoe_hf.data.image_files import IMAGE_SUFFIXES
from samoe_hf.data.images import ImageFrames, encode_png
from samoe_hf.data.layouts import has_words
from samoe_hf.data.pairing import object_ids
from samoe_hf.data.schema import Video, VideoList
from samoe_hf.data.shapes import Part
from samoe_hf.data.video_io import read_video

NO_CLASS = "object"
UPRIGHT = (".jpg", ".jpeg", ".png")  # files that every tool reads


class LabelledObject(NamedTuple):
    """An object on a frame."""

    key: int | str | None  # tells which one it is throughout the video; None where nothing does
    class_name: str  # "object" where none is told
    parts: list[Part]  # their union is its mask; it is absent where there are none
    group: int | None = None  # what the tool says of shapes that belong together


@dataclass
class LabelledFrame:
    """A frame as a file of labels has it."""

    video: str  # its video's name
    image: Path | bytes  # its file, or the bytes of one
    size: tuple[int, int] | None  # (height, width), where it is told
    objects: list[LabelledObject] | None  # what is on it; None if it is not annotated
    source: str  # the file of labels, for messages
    name: str = ""  # by default the file's stem
    alone: str = ""  # its video's name where that is of this frame alone; by default `video/name`

    def __post_init__(self) -> None:
        if isinstance(self.image, Path):
            self.image = on_disk(self.image)
        if not self.name and isinstance(self.image, Path):
            self.name = self.image.stem


@dataclass
class LabelledVideo:
    """A video before it is opened: `frames` are a video file or images, `shapes` frame -> object -> its parts."""

    frames: Path | Sequence[Path | bytes]
    source: str
    size: tuple[int, int] | None = None
    shapes: dict[int, dict[int, list[Part]]] = field(default_factory=dict)
    classes: dict[int, str] = field(default_factory=dict)
    names: list[str] | None = None


# --- Reading


def files_with(root: Path, suffix: str, words: str) -> list[Path]:
    """The files below a folder with all of some words at their beginning or end, in natural order."""
    paths = sorted(check_folder(root).rglob(f"*{suffix}"), key=lambda path: natural_key(path.as_posix()))
    return [path for path in paths if has_words(path, words)]


def _twice(names: Iterable[Any]) -> list[Any]:
    """Those of some names or numbers that are there more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def check_unlike(what: str, names: Iterable[Any]) -> None:
    """Raises `SampleError` where two of some names or numbers are the same."""
    if twice := _twice(names):
        raise SampleError(f"{what}: {twice[0]!r} is there twice")


def grouped(shapes: Iterable[tuple[str, int | None, Part]]) -> list[LabelledObject]:
    """The objects of a frame's shapes (label, group, part); those of one label and group are one, without a key."""
    objects: dict[Any, LabelledObject] = {}
    for i, (name, group, part) in enumerate(shapes):
        key = (i,) if group is None else (name, group)
        objects.setdefault(key, LabelledObject(None, name, [], group)).parts.append(part)
    return list(objects.values())


def name_objects(frames: Iterable[LabelledFrame]) -> list[LabelledFrame]:
    """Frames in the order of their names, whose objects have keys by their groups, or else by their labels.

    Where a video has objects with a group and some without, or a label that is on a frame twice, no object of any video
    has a key. What is guessed is said.
    """
    videos: dict[str, list[LabelledFrame]] = defaultdict(list)
    for frame in frames:
        videos[frame.video].append(frame)
    for own in videos.values():
        files = {Path(frame.source).parent / f"{frame.name}.png": None for frame in own}
        places = {path.name: place for place, path in enumerate(frame_order(files))}
        own.sort(key=lambda frame: places[f"{frame.name}.png"])
    named, guesses = [], defaultdict[str, list[str]](list)
    for video, own in videos.items():
        kinds = sorted({(one.class_name, one.group) for frame in own for one in frame.objects or ()}, key=str)
        groups = {group for _, group in kinds}
        if None not in groups and len(groups) == len(kinds):
            keys = {kind: kind[1] for kind in kinds}
            how = "each group is taken as one object"
        elif None not in groups:
            keys = {kind: i for i, kind in enumerate(kinds, 1)}
            how = "each pair of a label and a group is taken as one object, numbered in order"
        elif groups == {None} and not any(_twice(one.class_name for one in frame.objects or ()) for frame in own):
            keys = {kind: kind[0] for kind in kinds}
            how = "shapes have no group, so each label is taken as one object"
        else:
            return [frame for own in videos.values() for frame in own]
        if kinds:
            guesses[how].append(video or "the folder")
        for frame in own:
            objects = [one._replace(key=keys[one.class_name, one.group]) for one in frame.objects or ()]
            named.append(frame if frame.objects is None else replace(frame, objects=objects))
    for how, names in guesses.items():
        say_once(f"{named[0].source}: {how} throughout {', '.join(names[:5])}{' and others' if names[5:] else ''}")
    return named


def read_frames(frames: Iterable[LabelledFrame], whose: str) -> VideoList:
    """The videos of labelled frames, which are in the order of their numbers; `whose` is the dataset, for messages.

    Images in the folder of a video's frames that are not among them are frames without annotation. Where something has
    no key, nothing tells which objects of two frames are the same: then each image that shows something is a video of
    one frame, which is said. Two frames of a video, or two videos, of one name, and none at all, are a `SampleError`.
    """
    frames = list(frames)
    if not any(frame.objects is not None for frame in frames):
        raise SampleError(f"{whose}: no labelled frames")
    videos: dict[str, list[LabelledFrame]] = defaultdict(list)
    if any(one.key is None for frame in frames for one in frame.objects or ()):
        say_once(f"{whose}: nothing tells which objects of two images are the same, so each image is a video")
        warn_one_frame(f"Images in {whose}")
        frames = [frame for frame in frames if frame.objects]
        for frame in frames:
            objects = [one._replace(key=i) for i, one in enumerate(frame.objects or (), 1)]
            name = frame.alone or f"{frame.video}/{frame.name}".lstrip("/")
            videos[name].append(replace(frame, objects=objects))
    else:
        for frame in frames:
            videos[frame.video].append(frame)
        owners: dict[Path, set[str]] = defaultdict(set)
        for frame in frames:
            if isinstance(frame.image, Path):
                owners[frame.image.parent].add(frame.video)
        videos = {video: _with_unlabelled(own, owners) for video, own in videos.items()}
    entries = {name or Path(whose).resolve().name: _video_of(name, own) for name, own in videos.items()}
    return VideoList(entries, open_labelled)


def _with_unlabelled(frames: list[LabelledFrame], owners: Mapping[Path, set[str]]) -> list[LabelledFrame]:
    """A video's frames and the other images of their folder, if it is theirs alone and all are in its order."""
    own = {frame.image: frame for frame in frames if isinstance(frame.image, Path)}
    folders = {path.parent for path in own}
    if len(folders) != 1 or len(own) < len(frames) or len(owners[min(folders)]) > 1:
        return frames
    paths = frame_order(images_in(min(folders)))
    if [path for path in paths if path in own] != list(own):
        return frames
    return [own.get(path) or LabelledFrame(frames[0].video, path, None, None, frames[0].source) for path in paths]


def _video_of(name: str, frames: Sequence[LabelledFrame]) -> LabelledVideo:
    source, names = frames[0].source, [frame.name for frame in frames]
    owner = f"{source}: video {name!r}"
    check_unlike(f"{owner}: frames", names)
    sizes = sorted({frame.size for frame in frames if frame.size is not None})
    if len(sizes) > 1:
        raise SampleError(f"{owner} has frames of the sizes (height, width) {', '.join(map(str, sizes))}")
    ids = ids_of(dict.fromkeys(one.key for frame in frames for one in frame.objects or ()))
    video = LabelledVideo([frame.image for frame in frames], source, max(sizes, default=None), names=names)
    for t, frame in enumerate(frames):
        if frame.objects is None:
            continue
        own, seen = video.shapes.setdefault(t, {}), {}
        for one in frame.objects:
            i, name = ids[one.key], one.class_name
            if one.parts and seen.setdefault(i, name) != name:
                raise SampleError(f"{owner}, frame {frame.name}: {seen[i]!r} and {name!r} have the same id, {one.key}")
            if one.parts and own.get(i):
                say_once(f"{owner}: shapes of one id on a frame, as of {one.key} on {frame.name}, are one object")
            own.setdefault(i, []).extend(one.parts)
            if (known := video.classes.setdefault(i, name)) != name:
                say_once(f"{owner}: object {one.key} is {known!r} and {name!r}; the first counts")
    return video


def ids_of(keys: Iterable[Any]) -> dict[Any, int]:
    """Key of each object -> id above 0: a number itself, plus 1 where one is 0; names by their numbers or order."""
    keys = list(keys)
    if all(isinstance(key, int) for key in keys):
        return {key: key + (0 in keys) for key in keys}
    names = object_ids([str(key) for key in keys])
    return {key: names[str(key)] for key in keys}


def open_labelled(video_id: str, entry: LabelledVideo) -> Video:
    """Opens a video; an image that is missing is an error that names it."""
    if isinstance(entry.frames, Path):
        frames = read_video(entry.frames)
    else:
        for path in entry.frames:
            if isinstance(path, Path) and not path.is_file():
                raise SampleError(f"{entry.source}: there is no file {path}")
        frames = ImageFrames(entry.frames, names=entry.names, owner=video_id)
    size = tuple(frames.size)
    if entry.size is not None and entry.size != size:
        raise SampleError(
            f"{entry.source}: {video_id} is labelled as {entry.size[0]} x {entry.size[1]} pixels, but shown as {size}"
            + "; it is turned as its EXIF orientation says" * (entry.size[::-1] == size)
        )
    shapes = Shapes(entry.shapes, entry.classes, size, f"{entry.source}: {video_id}")
    return Video(video_id, frames, shapes, classes=entry.classes)


def images_in(folder: Path, pattern: str = "*") -> list[Path]:
    """The images in a folder, without hidden files, such as macOS leaves beside each."""
    found = (path for path in folder.glob(pattern) if path.suffix.lower() in IMAGE_SUFFIXES)
    return [path for path in found if not path.name.startswith(".")]


def find_image(name: str, folders: Sequence[Path], source: str | Path) -> Path:
    """The file of a name below one of some folders; in the first of them where there is none."""
    check_inside(name, source)
    files = [on_disk(folder / name) for folder in folders]
    return next(filter(Path.is_file, files), files[0])


# --- Writing


def classes_of(videos: Sequence[Video]) -> list[str]:
    """The names of all classes, in order; "object" where an object has none."""
    return sorted({video.classes.get(i, NO_CLASS) for video in videos for i in video.object_ids} or {NO_CLASS})


def objects_on(video: Video, frame: int) -> list[tuple[int, str, np.ndarray]]:
    """The id, the class and the mask (H, W) bool of each object that is seen on an annotated frame, by their ids."""
    shown = zip(video.object_ids, video.masks(frame), strict=True)
    return [(i, video.classes.get(i, NO_CLASS), mask) for i, mask in shown if mask.any()]


def write_frames(video: Video, folder: Path) -> list[str]:
    """Writes a video's frames as images, upright, and returns the names of the files; JPEGs and PNGs as they are."""
    check_inside(video.video_id, "the video's name")
    folder.mkdir(parents=True, exist_ok=True)
    names, frames = [], video.frames
    for t, name in enumerate(frames.names):
        check_inside(name, video.video_id)
        kept = _upright_file(frames, t)
        names.append(f"{name}{kept.suffix.lower() if kept else '.png'}")
        (folder / names[-1]).write_bytes(kept.read_bytes() if kept else encode_png(frames[t]))
    return names


def _upright_file(frames: Any, index: int) -> Path | None:
    """The file of a frame, if every tool shows it as it is."""
    path = frames.sources[index] if isinstance(frames, ImageFrames) else None
    if not isinstance(path, Path) or path.suffix.lower() not in UPRIGHT or frames.window or frames.is_deep:
        return None
    with Image.open(path) as image:
        return path if image.format in ("JPEG", "PNG") and image.getexif().get(0x0112, 1) == 1 else None


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
