"""CVAT's XML: "CVAT for video 1.1", whose tracks are objects, and "CVAT for images 1.1"."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from samoe_hf.data.frames import DAMAGE, SampleError, frame_order, named_errors, natural_key, say_once
from samoe_hf.data.layouts import CVAT
from samoe_hf.data.schema import Video, VideoList
from samoe_hf.data.shapes import Part, box, cropped, decode_rle, joined, place, polygons_of, runs_of
from samoe_hf.data.video_io import VIDEO_SUFFIXES, read_video

from . import labels
from .labels import LabelledFrame, LabelledVideo

LABELLED = "labelled_frames"  # in the file's `meta`, which CVAT does not read


def read_cvat(root: str | Path, split: str | None = None) -> VideoList:
    """Exports of CVAT, each a folder with an XML, and its frames beside it: `images/`, or the video file.

    A track is an object, and its id the object's (plus 1 in a video that has 0); tracks of one group and label are
    parts of one. A track is absent before its first shape, where it is outside, and after that. CVAT exports the shapes
    between keyframes too; frames that a file lacks there are not annotated, which is said, and neither are those after
    a last shape that is not outside. Boxes and ellipses are filled, which is said; lines, points, cuboids and skeletons
    are refused. In "CVAT for images" nothing tells which objects of two images are the same.

    `root` is searched at any depth; with a `split`, only what is below this folder.
    """
    root = Path(root) / (split or "")
    entries: dict[str, tuple[Path, ElementTree.Element]] = {}
    images: list[LabelledFrame] = []
    for path in labels.files_with(root, ".xml", CVAT):
        with named_errors(path, "not an XML of CVAT", (*DAMAGE, ElementTree.ParseError)):
            document = ElementTree.parse(path).getroot()
            if document.find("meta/project") is not None:
                raise SampleError("an export of a whole project, whose frames are of several tasks; export each task")
            folder = path.parent.relative_to(root).as_posix().removeprefix(".")
            if document.find("track") is None and document.find("image") is not None:
                images += _images(path, document, folder)
                continue
            name = folder or Path(document.findtext("meta/task/name") or root.resolve().name).stem
            name = name if name not in entries else f"{name}/{path.stem}"
            entries[name] = path, document
    if images and entries:
        raise SampleError(f"{root}: holds CVAT's files for video and for images; give the folder of one of them")
    if images:
        return labels.read_frames(images, str(root))
    if not entries:
        raise SampleError(f"{root}: no XML of CVAT")
    return VideoList(entries, _open)


def _open(video_id: str, entry: tuple[Path, ElementTree.Element]) -> Video:
    """Reads the tracks of an XML, and its frames, which say how many there are."""
    with named_errors(entry[0], "not an XML of CVAT"):
        video = _tracks(*entry)
    return labels.open_labelled(video_id, video)


def _frames(path: Path, source: str) -> Path | list[Path]:
    """The frames beside an XML: images, or the task's video file."""
    folder = path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    found = (file for file in folder.rglob("*") if not file.name.startswith("."))
    videos = [file for file in found if file.suffix.lower() in VIDEO_SUFFIXES]
    own = [file for file in videos if file.name == Path(source).name] or videos
    if len(own) == 1:
        return own[0]
    images = sorted(labels.images_in(folder, "**/*"), key=lambda file: natural_key(file.as_posix()))
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
    start = int(meta.findtext("*/start_frame") or 0)  # of a task or a job
    step = int((meta.findtext("*/frame_filter") or "").partition("=")[2] or 1)
    return {start + i * step: i for i in range(len(frames))}


def _tracks(path: Path, document: ElementTree.Element) -> LabelledVideo:
    meta = document.find("meta")
    assert meta is not None
    frames = _frames(path, meta.findtext(".//source", ""))
    numbers, count = _numbers(meta, frames), len(read_video(frames) if isinstance(frames, Path) else frames)
    size = meta.find(".//original_size")
    video = LabelledVideo(frames, str(path))
    if size is not None:
        video.size = int(size.findtext("height", "")), int(size.findtext("width", ""))
    groups: dict[Any, list[ElementTree.Element]] = defaultdict(list)
    for track in document.findall("track"):
        group = track.get("group_id", "0")
        groups[track.attrib["id"] if group == "0" else (track.get("label"), group)].append(track)
    labels.check_unlike("ids of tracks", [track.attrib["id"] for track in document.findall("track")])
    ids = labels.ids_of([int(own[0].attrib["id"]) for own in groups.values()])
    shapes: dict[int, dict[int, list[Part]]] = defaultdict(dict)
    doubtful = set[int]()
    for own in groups.values():
        object_id = ids[int(own[0].attrib["id"])]
        video.classes[object_id] = own[0].get("label") or labels.NO_CLASS
        if len(own) > 1:
            say_once(
                f"{path}: tracks of one group and label, as {own[0].get('id')} and {own[1].get('id')}, are one object"
            )
        for track in own:
            keyed = {}
            for shape in track:
                number = int(shape.get("frame", -1))
                index = number if numbers is None else numbers.get(number, -1)
                if shape.tag == "attribute":
                    continue
                if not 0 <= index < count:
                    raise SampleError(f"track {track.get('id')} has a shape on frame {number}, of which there is none")
                if keyed.setdefault(index, shape) is not shape:
                    raise SampleError(f"track {track.get('id')} has two shapes on frame {number}")
            order = sorted(keyed)
            for index, following in pairwise([*order, count]):
                if keyed[index].get("outside") != "1":
                    shapes[index].setdefault(object_id, []).append(_part(keyed[index], path))
                    doubtful |= {*range(index + 1, following)}
    if (labelled := meta.findtext(LABELLED)) is not None:
        doubtful = set(range(count)) - {int(number) for number in labelled.split(",") if number}
    elif doubtful:
        say_once(
            f"{path}: tracks have no shape on {len(doubtful)} frames, such as {min(doubtful)}, and are not outside: "
            "taken as not annotated; an export of CVAT has the shapes between keyframes too"
        )
    video.shapes = {t: shapes.get(t, {}) for t in range(count) if t not in doubtful}
    return video


def _images(path: Path, document: ElementTree.Element, folder: str) -> Iterable[LabelledFrame]:
    folders = [path.parent / "images", path.parent]
    for image in document.findall("image"):
        own = [shape for shape in image if shape.tag != "tag"]
        objects = labels.grouped(
            (shape.get("label") or labels.NO_CLASS, int(shape.get("group_id") or 0) or None, _part(shape, path))
            for shape in own
        )
        name, size = image.attrib["name"], (int(image.attrib["height"]), int(image.attrib["width"]))
        # Of a video's frame CVAT leaves out the suffix.
        file = labels.find_image(name if Path(name).suffix else f"{name}.PNG", folders, path)
        yield LabelledFrame(folder, file, size, objects, str(path), Path(name).with_suffix("").as_posix())


def _part(shape: ElementTree.Element, path: Path) -> Part:
    """A shape of CVAT as a part of a mask."""
    turned = float(shape.get("rotation", 0))
    if shape.tag == "mask":
        runs = [int(run) for run in shape.attrib["rle"].split(",")]
        left, top, width, height = (int(shape.attrib[name]) for name in ("left", "top", "width", "height"))
        return partial(draw_runs, runs, left, top, width, height)
    if shape.tag == "polygon":
        points = [float(number) for pair in shape.attrib["points"].split(";") for number in pair.split(",")]
        if len(points) < 6:
            raise SampleError("a polygon has fewer than three points")
        return points
    if shape.tag == "box":
        say_once(f"{path}: boxes are filled, as masks")
        return box([float(shape.attrib[name]) for name in ("xtl", "ytl", "xbr", "ybr")], turned)
    if shape.tag == "ellipse":
        say_once(f"{path}: ellipses are filled, as masks")
        x, y, rx, ry = (float(shape.attrib[name]) for name in ("cx", "cy", "rx", "ry"))
        return box([x - rx, y - ry, x + rx, y + ry], turned, True)
    raise SampleError(f"a shape is a {shape.tag}, which has no area; masks and polygons are read")


def draw_runs(runs: list[int], left: int, top: int, width: int, height: int, size: tuple[int, int]) -> np.ndarray:
    """A mask of a size (height, width): CVAT's runs of background and object in turn, along the rows of a box."""
    if height > size[0] or width > size[1]:
        raise SampleError(f"a mask of {height} x {width} pixels on an image of {size[0]} x {size[1]}")
    return place(decode_rle({"size": [width, height], "counts": runs}, (width, height)).T, left, top, size)


# --- Writing


def write_cvat(videos: Sequence[Video], folder: Path, polygons: bool = False) -> None:
    """Writes a folder for each video: `annotations.xml` ("CVAT for video 1.1") and `images/`.

    Frames are numbered in the order of their names, as CVAT and [`read_cvat`] do. CVAT has a shape of a track on every
    frame until it is outside, so that an object stays on frames without annotation there; `labelled_frames` in the
    file's `meta` tells them, for [`read_cvat`].
    """
    for video in videos:
        names = labels.write_frames(video, folder / video.video_id / "images")
        numbers = {path.name: number for number, path in enumerate(frame_order(map(Path, names)))}
        document = ElementTree.Element("annotations")
        ElementTree.SubElement(document, "version").text = "1.1"
        meta = ElementTree.SubElement(document, "meta")
        task = ElementTree.SubElement(meta, "task")
        about = {"name": video.video_id, "size": len(video), "mode": "interpolation"}
        for name, value in (about | {"start_frame": 0, "stop_frame": len(video) - 1}).items():
            ElementTree.SubElement(task, name).text = str(value)
        known = ElementTree.SubElement(task, "labels")
        for name in labels.classes_of([video]):
            ElementTree.SubElement(ElementTree.SubElement(known, "label"), "name").text = name
        size = ElementTree.SubElement(task, "original_size")
        for name, value in zip(("height", "width"), video.size, strict=True):
            ElementTree.SubElement(size, name).text = str(value)
        annotated = sorted((numbers[names[t]], t) for t in video.annotated_frames)
        ElementTree.SubElement(meta, LABELLED).text = ",".join(str(number) for number, _ in annotated)
        tracks: dict[int, ElementTree.Element] = {}
        last: dict[int, Mapping[str, str]] = {}
        for number, t in annotated:
            before, last = last, {}
            for i, label, mask in labels.objects_on(video, t):
                if i not in tracks:
                    tracks[i] = ElementTree.SubElement(document, "track", id=str(i), label=label, source="manual")
                last[i] = _shape(mask, polygons)
                _add(tracks[i], last[i], number, False)
            for i in before.keys() - last.keys():
                _add(tracks[i], before[i], number, True)
        ElementTree.indent(document)
        ElementTree.ElementTree(document).write(
            folder / video.video_id / "annotations.xml", encoding="utf-8", xml_declaration=True
        )


def _add(track: ElementTree.Element, shape: Mapping[str, str], frame: int, is_outside: bool) -> None:
    about = {"frame": str(frame), "keyframe": "1", "outside": str(int(is_outside)), "occluded": "0"}
    own = {name: value for name, value in shape.items() if name != "tag"}
    ElementTree.SubElement(track, shape["tag"], {**about, **own, "z_order": "0"})


def _shape(mask: np.ndarray, polygons: bool) -> dict[str, str]:
    if polygons:
        points = np.reshape(joined(polygons_of(mask)), (-1, 2))
        return {"tag": "polygon", "points": ";".join(f"{x:.2f},{y:.2f}" for x, y in points)}
    patch, left, top = cropped(mask)
    bounds = {"left": left, "top": top, "width": patch.shape[1], "height": patch.shape[0]}
    runs = ", ".join(map(str, runs_of(patch)))
    return {"tag": "mask", "rle": runs, **{name: str(value) for name, value in bounds.items()}}
