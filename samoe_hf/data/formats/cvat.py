"""CVAT's XML: "CVAT for video 1.1", whose tracks are objects, and "CVAT for images 1.1"."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from samoe_hf.data.frames import SampleError, frame_order, named_errors, natural_key, say_once
from samoe_hf.data.image_files import IMAGE_SUFFIXES
from samoe_hf.data.layouts import CVAT
from samoe_hf.data.schema import Video, VideoList
from samoe_hf.data.video_io import VIDEO_SUFFIXES
from samoe_hf.data.windows import Window, check_window

from . import labels
from .labels import LabelledFrame, LabelledObject, LabelledVideo, Part

NO_AREA = ("polyline", "points", "cuboid", "skeleton")
LABELLED = "labelled_frames"  # in the file's `meta`, which CVAT does not read


def read_cvat(
    root: str | Path, split: str | None = None, domain: str = "cvat", window: Window | None = None
) -> VideoList:
    """Exports of CVAT, each a folder with an XML, and its frames beside it: `images/`, or the video file.

    A track is an object, and its id the object's (plus 1 in a video that has 0); tracks of one group and label are
    parts of one. A track is absent before its first shape, where it is outside, and after that. CVAT exports the shapes
    between keyframes too; frames that a file lacks there are not annotated, which is said, and neither are those after
    a last shape that is not outside. Boxes and ellipses are filled, which is said; lines, points, cuboids and skeletons
    are refused. In "CVAT for images" nothing tells which objects of two images are the same.

    Args:
        root: the folder; searched at any depth, a folder with an XML is a video.
        split: only what is below this folder.
        domain: name for routing and metrics.
        window: intensities that become black and white, of images with more than 8 bits.
    """
    check_window(window)
    root = Path(root) / (split or "")
    entries: dict[str, LabelledVideo] = {}
    images: list[LabelledFrame] = []
    for path in labels.files_with(root, ".xml", CVAT):
        with named_errors(path, "not an XML of CVAT", (*_DAMAGE, ElementTree.ParseError)):
            document = ElementTree.parse(path).getroot()
            if document.find("meta/project") is not None:
                raise SampleError("an export of a whole project, whose frames are of several tasks; export each task")
            folder = path.parent.relative_to(root).as_posix().removeprefix(".")
            if document.find("track") is None and document.find("image") is not None:
                images += _images(path, document, folder)
                continue
            name = folder or Path(document.findtext("meta/task/name") or root.resolve().name).stem
            name = name if name not in entries else f"{name}/{path.stem}"
            entries[name] = _tracks(path, document)
    if images and entries:
        raise SampleError(f"{root}: holds CVAT's files for video and for images; give the folder of one of them")
    if images:
        return labels.read_frames(images, domain, window, str(root))
    if not entries:
        raise SampleError(f"{root}: no XML of CVAT")
    return VideoList(entries, partial(labels.open_labelled, domain, window))


_DAMAGE = (ValueError, TypeError, LookupError, AttributeError)


def _frames(path: Path, source: str) -> Path | list[Path]:
    """The frames beside an XML: images, or the task's video file."""
    folder = path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    found = sorted(folder.rglob("*"), key=lambda file: natural_key(file.as_posix()))
    videos = [file for file in found if file.suffix.lower() in VIDEO_SUFFIXES]
    own = [file for file in videos if file.name == Path(source).name] or videos
    if len(own) == 1:
        return own[0]
    images = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise SampleError(f"no frames beside it: `images/` (export with images), or the video file {source}")
    return frame_order(images) if len({image.parent for image in images}) == 1 else images


def _numbers(meta: ElementTree.Element, frames: Path | Sequence[Path]) -> Mapping[int, int] | None:
    """CVAT's number -> index of each frame; None where they are the same."""
    if isinstance(frames, Path) or meta.find(LABELLED) is not None:
        return None
    stems = [frame.stem.removeprefix("frame_") for frame in frames]
    if all(stem.isdecimal() and f"frame_{stem}" == frame.stem for stem, frame in zip(stems, frames, strict=True)):
        return {int(stem): i for i, stem in enumerate(stems)}
    start = int(meta.findtext("task/start_frame") or meta.findtext("job/start_frame") or 0)
    step = int(
        (meta.findtext("task/frame_filter") or meta.findtext("job/frame_filter") or "step=1").partition("=")[2] or 1
    )
    return {start + i * step: i for i in range(len(frames))}


def _tracks(path: Path, document: ElementTree.Element) -> LabelledVideo:
    meta = document.find("meta")
    assert meta is not None
    frames = _frames(path, meta.findtext("source") or meta.findtext("task/source") or "")
    numbers = _numbers(meta, frames)
    size = meta.find("task/original_size")
    size = meta.find("original_size") if size is None else size
    height_width = None if size is None else (int(size.findtext("height", "")), int(size.findtext("width", "")))
    count = None if isinstance(frames, Path) else len(frames)
    groups: dict[Any, list[ElementTree.Element]] = defaultdict(list)
    for track in document.findall("track"):
        group = track.get("group_id") or "0"
        groups[(track.get("label"), group) if group != "0" else track.get("id")].append(track)
    shapes: dict[int, dict[int, list[Part]]] = defaultdict(dict)
    known = _spans(meta.findtext(LABELLED)) if meta.find(LABELLED) is not None else None
    ids = labels.ids_of([int(tracks[0].attrib["id"]) for tracks in groups.values()])
    classes, doubtful = {}, set[int]()
    for tracks in groups.values():
        object_id = ids[int(tracks[0].attrib["id"])]
        classes[object_id] = tracks[0].get("label") or labels.NO_CLASS
        if len(tracks) > 1:
            say_once(
                f"{path}: the tracks of a group, such as {tracks[0].get('id')} and {tracks[1].get('id')}, are one object"
            )
        for track in tracks:
            last: tuple[int, bool] | None = None
            for shape in sorted((s for s in track if s.tag != "attribute"), key=lambda s: int(s.attrib["frame"])):
                number, is_outside = int(shape.attrib["frame"]), shape.get("outside") == "1"
                index = number if numbers is None else numbers.get(number, -1)
                if index < 0 or (count is not None and index >= count):
                    raise SampleError(
                        f"track {track.get('id')} has a shape on frame {number}, of which there is no image"
                    )
                if last is not None and index == last[0]:
                    raise SampleError(f"track {track.get('id')} has two shapes on frame {number}")
                if last is not None and not last[1]:
                    doubtful |= set(range(last[0] + 1, index))
                last = index, is_outside
                if not is_outside:
                    shapes[index].setdefault(object_id, []).append(_part(shape, path))
            if last is not None and not last[1]:
                doubtful |= {*range(last[0] + 1, _length(frames))}
    labelled = known if known is not None else set(range(_length(frames))) - doubtful
    if known is None and doubtful:
        some = ", ".join(map(str, sorted(doubtful)[:5]))
        say_once(
            f"{path}: tracks have no shape on {len(doubtful)} frames, such as {some}, and are not outside: taken as not annotated"
        )
    return LabelledVideo(
        frames, height_width, {t: shapes.get(t, {}) for t in sorted(labelled)}, classes, str(path)
    )  # fmt: skip


def _length(frames: Path | Sequence[Path]) -> int:
    from samoe_hf.data.video_io import read_video

    return len(read_video(frames)) if isinstance(frames, Path) else len(frames)


def _images(path: Path, document: ElementTree.Element, folder: str) -> Iterable[LabelledFrame]:
    folders = [path.parent / "images", path.parent]
    for image in document.findall("image"):
        objects = []
        for shape in image:
            if shape.tag == "tag":
                continue
            group = int(shape.get("group_id") or 0)
            same = next((one for g, one in objects if group and g == (group, shape.get("label"))), None)
            if same is not None:
                same.parts.append(_part(shape, path))
                continue
            one = LabelledObject(None, shape.get("label") or labels.NO_CLASS, [_part(shape, path)])
            objects.append(((group, shape.get("label")), one))
        name = image.attrib["name"]
        file, size = labels.find_image(name, folders, path), (int(image.attrib["height"]), int(image.attrib["width"]))
        yield LabelledFrame(
            folder, file, size, [one for _, one in objects], str(path), Path(name).with_suffix("").as_posix()
        )


def _part(shape: ElementTree.Element, path: Path) -> Part:
    """A shape of CVAT as a part of a mask."""
    value = {name: float(text) for name, text in shape.attrib.items() if _is_number(text)}
    if shape.tag == "mask":
        runs = [int(run) for run in shape.attrib["rle"].split(",")]
        left, top, width, height = (int(shape.attrib[name]) for name in ("left", "top", "width", "height"))
        if min(runs) < 0 or sum(runs) != width * height:
            raise SampleError(f"a mask's runs do not add up to {width} x {height} pixels")
        return partial(_draw_runs, runs, left, top, width, height)
    if shape.tag == "polygon":
        points = [float(number) for pair in shape.attrib["points"].split(";") for number in pair.split(",")]
        if len(points) < 6:
            raise SampleError("a polygon has fewer than three points")
        return points
    if shape.tag == "box":
        say_once(f"{path}: boxes are filled, as masks")
        return labels.box(*(value[name] for name in ("xtl", "ytl", "xbr", "ybr")), value.get("rotation", 0))
    if shape.tag == "ellipse":
        say_once(f"{path}: ellipses are filled, as masks")
        x, y, rx, ry = (value[name] for name in ("cx", "cy", "rx", "ry"))
        return labels.box(x - rx, y - ry, x + rx, y + ry, value.get("rotation", 0), True)
    raise SampleError(f"a shape is a {shape.tag}, which has no area; masks and polygons are read")


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text)).item()
    except ValueError:
        return False


def _draw_runs(runs: list[int], left: int, top: int, width: int, height: int, size: tuple[int, int]) -> np.ndarray:
    """CVAT's runs of background and object in turn, along the rows of a box."""
    patch = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    return labels.place(patch, left, top, size)


def _spans(text: str | None) -> set[int]:
    pairs = [span.partition("-") for span in (text or "").split(",") if span]
    return {t for first, _, last in pairs for t in range(int(first), int(last or first) + 1)}


# --- Writing


def write_cvat(videos: Sequence[Video], folder: Path, polygons: bool = False) -> None:
    """Writes a folder for each video: `annotations.xml` ("CVAT for video 1.1") and `images/`.

    CVAT has a shape of a track on every frame until it is outside, so that an object stays on frames without
    annotation there; `labelled_frames` in the file's `meta` tells them, for [`read_cvat`].
    """
    for video in videos:
        place = folder / video.video_id
        labels.write_frames(video, place / "images")
        document = ElementTree.Element("annotations")
        ElementTree.SubElement(document, "version").text = "1.1"
        meta = ElementTree.SubElement(document, "meta")
        task = ElementTree.SubElement(meta, "task")
        for name, value in (("name", video.video_id), ("size", len(video)), ("mode", "interpolation")):
            ElementTree.SubElement(task, name).text = str(value)
        for name, value in (("start_frame", 0), ("stop_frame", len(video) - 1)):
            ElementTree.SubElement(task, name).text = str(value)
        known = ElementTree.SubElement(task, "labels")
        for name in labels.classes_of([video]):
            ElementTree.SubElement(ElementTree.SubElement(known, "label"), "name").text = name
        size = ElementTree.SubElement(task, "original_size")
        for name, value in zip(("height", "width"), video.size, strict=True):
            ElementTree.SubElement(size, name).text = str(value)
        ElementTree.SubElement(meta, LABELLED).text = ",".join(map(str, video.annotated_frames))
        for object_id in video.object_ids:
            label = video.classes.get(object_id, labels.NO_CLASS)
            track = ElementTree.SubElement(document, "track", id=str(object_id), label=label, source="manual")
            last: Mapping[str, str] | None = None
            for t in video.annotated_frames:
                mask = video.masks(t, [object_id])[0]
                if mask.any():
                    last = {"tag": "polygon", "points": _points(mask)} if polygons else {"tag": "mask", **_runs(mask)}
                    _add(track, last, t, False)
                elif last is not None:
                    _add(track, last, t, True)
                    last = None
        place.mkdir(parents=True, exist_ok=True)
        ElementTree.indent(document)
        ElementTree.ElementTree(document).write(place / "annotations.xml", encoding="utf-8", xml_declaration=True)


def _add(track: ElementTree.Element, shape: Mapping[str, str], frame: int, is_outside: bool) -> None:
    about = {"frame": str(frame), "keyframe": "1", "outside": str(int(is_outside)), "occluded": "0"}
    own = {name: value for name, value in shape.items() if name != "tag"}
    ElementTree.SubElement(track, shape["tag"], **about, **own, z_order="0")


def _points(mask: np.ndarray) -> str:
    points = np.reshape(labels.joined(labels.polygons_of(mask)), (-1, 2))
    return ";".join(f"{x:.2f},{y:.2f}" for x, y in points)


def _runs(mask: np.ndarray) -> dict[str, str]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    patch = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    values = patch.ravel()
    ends = np.flatnonzero(values[1:] != values[:-1]) + 1
    runs = np.diff([0, *ends, values.size]).tolist()
    place = {"left": columns[0], "top": rows[0], "width": patch.shape[1], "height": patch.shape[0]}
    runs = [0, *runs] if values[0] else runs
    return {"rle": ", ".join(map(str, runs)), **{name: str(value) for name, value in place.items()}}
