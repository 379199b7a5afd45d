"""COCO's JSON, of images and of frames of videos, and that of YouTube-VIS."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pycocotools import mask as coco_mask

from samoe_hf.data.frames import SampleError, check_inside, named_errors, natural_key, on_disk, say_once
from samoe_hf.data.layouts import YTVIS
from samoe_hf.data.schema import Video, VideoList
from samoe_hf.data.shapes import Part, encode_rle, polygons_of

from . import labels
from .labels import LabelledFrame, LabelledObject


def read_coco(
    root: str | Path, split: str = "train2017", images: str | None = None, annotations: str | None = None
) -> VideoList:
    """Images with COCO annotations; crowds are left out, which is said.

    Where annotations have a `track_id` (or `instance_id`, or that among their `attributes`, as CVAT writes it), images
    are frames: of the video that `video_id` names, else their folder is. Objects have these ids. An image without
    annotations shows no object; one of the folder that the file does not list is not annotated.

    Else each image is a video of one frame, which does not train the memory attention, and is warned of. Objects are
    numbered from 1 in the file's order, videos are in the order of their ids, and images without annotations are left
    out.

    Args:
        split: names the image folder and `annotations/instances_<split>.json`, or its `_annotations.coco.json`.
        images, annotations: the image folder and the annotation file, where they are named differently.
    """
    root = Path(root)
    folders = [root / name for name in (images or split, f"images/{split}", "images")]
    files = [root / "annotations" / f"instances_{split}.json", root / split / "_annotations.coco.json"]  # or Roboflow's
    if annotations is None and not any(map(Path.is_file, files)) and (root / "result.json").is_file():
        folders, annotations = [root / (images or ".")], "result.json"  # as Label Studio exports it
    folder = next(filter(Path.is_dir, folders), folders[0])
    path = root / annotations if annotations else next(filter(Path.is_file, files), files[0])
    with named_errors(path, "not COCO annotations"):
        data = json.loads(path.read_bytes())
        labels.check_unlike("file names", [image["file_name"] for image in data["images"]])
        classes, of_image = _classes(data), _annotations(data, "image", path)
        tracks = {_track(annotation) for own in of_image.values() for annotation in own}
        if None in tracks and len(tracks) > 1:
            raise SampleError("some annotations have a track_id, and some have none")
        videos = {video["id"]: str(video["name"]) for video in data.get("videos", ())}
        labels.check_unlike("names of videos", videos.values())
        frames: list[tuple[Any, LabelledFrame]] = []
        for image in data["images"]:
            name = image["file_name"].replace("\\", "/")  # as Windows writes paths
            check_inside(name, path)
            parent = Path(name).parent.as_posix().removeprefix(".")
            video = videos.get(image.get("video_id"), str(image.get("video_id", parent)))
            number = image.get("frame_id", image.get("frame_index"))
            order = natural_key(name) if number is None else [(0, number)]
            objects = [_object(_track(one), one, _parts(one["segmentation"]), classes) for one in of_image[image["id"]]]
            frame = LabelledFrame(video, folder / name, _size(image), objects, str(path), alone=name)
            frames.append(((image["id"],) if None in tracks else (video, order), frame))
        ordered = [frame for _, frame in sorted(frames, key=lambda pair: pair[0])]
    return labels.read_frames(ordered, str(root))


def _classes(data: Mapping[str, Any]) -> dict[Any, str]:
    return {one["id"]: str(one["name"]) for one in data.get("categories", ())}


def _size(entry: Mapping[str, Any]) -> tuple[int, int]:
    return int(entry["height"]), int(entry["width"])


def _annotations(data: Mapping[str, Any], kind: Literal["image", "video"], path: Path) -> dict[Any, list[Any]]:
    """The annotations of each image or video by its id; crowds only where they have a track, or CVAT or
    Datumaro have given `attributes`."""
    ids = [entry["id"] for entry in data[f"{kind}s"]]
    labels.check_unlike(f"ids of {kind}s", ids)
    found: dict[Any, list[Any]] = {number: [] for number in ids}
    kept = [
        one for one in data["annotations"] if not one.get("iscrowd") or "attributes" in one or _track(one) is not None
    ]
    if crowds := len(data["annotations"]) - len(kept):
        say_once(f"{path}: {crowds} annotations of crowds are left out")
    for one in kept:
        if one[f"{kind}_id"] not in found:
            raise SampleError(f"an annotation of {kind} {one[f'{kind}_id']!r}, which is not in `{kind}s`")
        found[one[f"{kind}_id"]].append(one)
    return found


def _object(
    key: int | None, annotation: Mapping[str, Any], parts: list[Part], classes: Mapping[Any, str]
) -> LabelledObject:
    number = annotation.get("category_id")
    if classes and number not in classes:
        raise SampleError(f"the category {number!r} is none of {classes}")
    return LabelledObject(key, classes.get(number, labels.NO_CLASS), parts)


def _track(annotation: Mapping[str, Any]) -> int | None:
    for owner in (annotation, annotation.get("attributes") or {}):
        for name in ("track_id", "instance_id"):
            if owner.get(name) is not None:
                return int(str(owner[name]))
    return None


def _parts(segmentation: Any) -> list[Part]:
    """The parts of a `segmentation`: an encoding, or polygons; what is neither is refused when it is drawn."""
    return segmentation if isinstance(segmentation, list) and segmentation else [segmentation]


def read_ytvis(
    root: str | Path, split: str | None = None, images: str | None = None, annotations: str | None = None
) -> VideoList:
    """YouTube-VIS 2019 and 2021, OVIS, and others of their form; crowds are left out.

    An object's id is its annotation's `track_id`, else its `id`, plus 1 in a video that has 0. On frames with null for
    it, it is absent. Images of a video's folder that the file does not list are not annotated.

    Args:
        split: a folder with a JSON, or part of the JSON's name; needed where there are several.
        images: the image folder; by default `JPEGImages` or `images`.
        annotations: the annotation file.
    """
    root = Path(root)
    files = [root / annotations] if annotations else labels.files_with(root, ".json", YTVIS)
    if split is not None and not annotations:
        files = [path for path in files if split in path.relative_to(root).as_posix()]
    if len(files) != 1:
        names = ", ".join(path.relative_to(root).as_posix() for path in files) or "none"
        raise SampleError(f"{root}: one file of YouTube-VIS is expected, found {names}; name it as `annotations`")
    (path,) = files
    with named_errors(path, "not YouTube-VIS annotations"):
        data = json.loads(path.read_bytes())
        classes, of_video = _classes(data), _annotations(data, "video", path)
        places = [root / images] if images else [
            place / name for place in (path.parent, *[root / s for s in (split or "", path.stem)], root)
            for name in ("JPEGImages", "images", "")
        ]  # fmt: skip
        first = next((name.replace("\\", "/") for video in data["videos"] for name in video["file_names"]), "")
        folder = next((place for place in places if on_disk(place / first).is_file()), places[0])
        frames, video_ids = [], []
        for video in data["videos"]:
            names, own = [name.replace("\\", "/") for name in video["file_names"]], of_video[video["id"]]
            folders = {Path(name).parent.as_posix() for name in names}
            by_folder = folders.pop() if len(folders) == 1 and "." not in folders else video["id"]
            video_ids.append(str(video.get("name") or by_folder))
            keys = [int(str(one.get("track_id", one["id"]))) for one in own]
            labels.check_unlike(f"ids of objects in {video_ids[-1]}", keys)
            for one in own:
                if len(one["segmentations"]) != len(names):
                    counts = f"{len(one['segmentations'])} segmentations for {len(names)} frames"
                    raise SampleError(f"annotation {one.get('id')} has {counts}")
            for t, name in enumerate(names):
                check_inside(name, path)
                shown = [one["segmentations"][t] for one in own]
                objects = [
                    _object(key, one, [] if segmentation is None else _parts(segmentation), classes)
                    for key, one, segmentation in zip(keys, own, shown, strict=True)
                ]
                frames.append(LabelledFrame(video_ids[-1], folder / name, _size(video), objects, str(path)))
        labels.check_unlike("names of videos", video_ids)
    return labels.read_frames(frames, str(root))


# --- Writing


def _segmentation(mask: Any, polygons: bool) -> dict[str, Any]:
    rle: Any = encode_rle(mask)
    shape = polygons_of(mask) if polygons else rle
    return {"segmentation": shape, "area": int(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist()}


def _numbered_classes(videos: Sequence[Video]) -> dict[str, int]:
    return {name: i for i, name in enumerate(labels.classes_of(videos), 1)}


def _write(path: Path, classes: Mapping[str, int], **content: Any) -> None:
    labels.write_json(path, content | {"categories": [{"id": i, "name": name} for name, i in classes.items()]})


def annotation_of(
    number: int, image_id: int, category_id: int, object_id: int, mask: Any, polygons: bool = False
) -> dict[str, Any]:
    """An annotation of COCO's JSON with an id, of an object's mask (H, W) bool on an image."""
    about = {"id": number, "image_id": image_id, "category_id": category_id, "track_id": object_id, "iscrowd": 0}
    return about | _segmentation(mask, polygons)


def write_coco(videos: Sequence[Video], folder: Path, polygons: bool = False) -> None:
    """Writes `annotations/instances_default.json` and `images/<video>/`, as [`read_coco`] reads frames of videos."""
    images, annotations, classes = [], [], _numbered_classes(videos)
    for number, video in enumerate(videos, 1):
        names = labels.write_frames(video, folder / "images" / video.video_id)
        height, width = video.size
        for t in video.annotated_frames:
            file_name = f"{video.video_id}/{names[t]}"
            image = {"id": len(images) + 1, "file_name": file_name, "height": height, "width": width}
            images.append(image | {"video_id": number, "frame_id": t})
            for object_id, class_name, mask in labels.objects_on(video, t):
                places = len(annotations) + 1, len(images), classes[class_name]
                own = annotation_of(*places, object_id, mask, polygons)
                annotations.append(own | {"attributes": {"track_id": object_id}})
    named = [{"id": number, "name": video.video_id} for number, video in enumerate(videos, 1)]
    path = folder / "annotations" / "instances_default.json"
    _write(path, classes, images=images, videos=named, annotations=annotations)


def write_ytvis(videos: Sequence[Video], folder: Path, polygons: bool = False) -> None:
    """Writes `instances.json` and `JPEGImages/<video>/`; frames without annotation are not in the file."""
    entries, annotations, classes = [], [], _numbered_classes(videos)
    for number, video in enumerate(videos, 1):
        names, (height, width) = labels.write_frames(video, folder / "JPEGImages" / video.video_id), video.size
        shown = [f"{video.video_id}/{names[t]}" for t in video.annotated_frames]
        about = {"height": height, "width": width, "length": len(shown)}
        entries.append({"id": number, "name": video.video_id, "file_names": shown, **about})
        nothing: dict[str, Any] = dict.fromkeys(("segmentation", "area", "bbox"))
        frames = [
            {i: _segmentation(mask, polygons) for i, _, mask in labels.objects_on(video, t)}
            for t in video.annotated_frames
        ]
        for object_id in video.object_ids:
            seen = [own.get(object_id, nothing) for own in frames]
            own = {"id": len(annotations) + 1, "video_id": number, "iscrowd": 0, "track_id": object_id, **about}
            own["category_id"] = classes[video.classes.get(object_id, labels.NO_CLASS)]
            lists = {"segmentations": "segmentation", "areas": "area", "bboxes": "bbox"}
            annotations.append(own | {name: [t[key] for t in seen] for name, key in lists.items()})
    _write(folder / "instances.json", classes, videos=entries, annotations=annotations)
