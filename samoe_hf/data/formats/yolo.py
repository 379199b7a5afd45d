"""Ultralytics' folders of YOLO segmentation: `data.yaml`, images, and a text file of polygons for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from samoe_hf.data.frames import SampleError, frame_order, named_errors, natural_key
from samoe_hf.data.image_files import IMAGE_SUFFIXES, image_info
from samoe_hf.data.schema import Video, VideoList
from samoe_hf.data.windows import Window

from . import labels
from .labels import LabelledFrame, LabelledObject, Part


def read_yolo(root: str | Path, split: str = "train", domain: str = "yolo", window: Window | None = None) -> VideoList:
    """YOLO segmentation; a folder of images is a video.

    A polygon's id is behind its points, as `yolo track save_txt=True` writes it, or in the same line of a file below
    `tracks/`, as it is written here. Where there is none, nothing tells which objects of two images are the same, and
    each image is a video of one frame. Images without a file of labels are not annotated; one with an empty file shows
    no object. Boxes are refused.

    Args:
        root: holds `data.yaml`.
        split: a key of `data.yaml`.
        domain: name for routing and metrics.
        window: intensities that become black and white, of images with more than 8 bits.
    """
    root = Path(root)
    path = root / "data.yaml"
    with named_errors(path, "not the data.yaml of a YOLO data set", (*_DAMAGE, yaml.YAMLError)):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        names = data["names"]
        names = {int(i): str(name) for i, name in (names.items() if isinstance(names, dict) else enumerate(names))}
        if split not in data or not data[split]:
            raise SampleError(
                f"no split {split!r}; there are: {', '.join(s for s in ('train', 'val', 'test') if data.get(s))}"
            )
        base = root / (data.get("path") or ".")
        folders = data[split] if isinstance(data[split], list) else [data[split]]
    images: list[tuple[str, Path]] = []
    for name in folders:
        places = [base / name, root / name, root / str(name).removeprefix("../")]
        folder = next((place for place in places if place.exists()), None)
        if folder is None:
            raise SampleError(f"{path}: {split} is {name!r}, which is neither below {base} nor {root}")
        if folder.is_file():
            lines = [line.strip() for line in folder.read_text(encoding="utf-8").splitlines() if line.strip()]
            found = [folder.parent / line for line in lines]
            images += [(file.parent.name if file.parent.name != "images" else "", file) for file in found]
            continue
        found = sorted(
            (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES), key=lambda p: natural_key(str(p))
        )
        videos = list(dict.fromkeys(image.parent for image in found))
        for video in videos:
            key = video.relative_to(folder).as_posix().removeprefix(".")
            images += [(key, image) for image in frame_order(p for p in found if p.parent == video)]
    return labels.read_frames([_frame(video, image, names) for video, image in images], domain, window, str(root))


_DAMAGE = (ValueError, TypeError, LookupError, AttributeError)


def _beside(image: Path, name: str) -> Path:
    """The text file of an image, in the folder `name` in place of the last `images`."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        place = len(parts) - 2 - parts[:-1][::-1].index("images")
        parts[place] = name
    return Path(*parts).with_suffix(".txt")


def _frame(video: str, image: Path, names: dict[int, str]) -> LabelledFrame:
    path, ids_path = _beside(image, "labels"), _beside(image, "tracks")
    if not image.is_file():
        raise SampleError(f"there is no image {image}")
    if not path.is_file():
        return LabelledFrame(video, image, None, None, str(path))
    size = image_info(image).size
    with named_errors(path, "not YOLO's labels"):
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        ids = ids_path.read_text().split() if ids_path.is_file() and ids_path != path else []
        if ids and len(ids) != len(lines):
            raise SampleError(f"{len(lines)} polygons, but {len(ids)} ids in {ids_path}")
        objects = []
        for number, line in enumerate(lines):
            values = [float(value) for value in line]
            if len(values) == 5:
                raise SampleError(f"line {number + 1} is a box; polygons are read, which are masks")
            key: Any = int(ids[number]) if ids else None
            if len(values) % 2 == 0:
                key, values = int(values[-1]), values[:-1]
            if len(values) < 7 or int(values[0]) not in names:
                raise SampleError(f"line {number + 1} is no polygon of one of the classes {names}")
            points: Part = (np.reshape(values[1:], (-1, 2)) * size[::-1]).ravel().tolist()
            objects.append(LabelledObject(key, names[int(values[0])], [points]))
    return LabelledFrame(video, image, size, objects, str(path))


def write_yolo(videos: Sequence[Video], folder: Path) -> None:
    """Writes `data.yaml`, `images/<video>/`, `labels/<video>/`, and `tracks/<video>/` with the id of each line.

    Ids behind the points, as Ultralytics' tracking writes them, would be refused by its training. The parts of an
    object are one polygon, joined by lines to and fro.
    """
    classes = labels.classes_of(videos)
    for video in videos:
        names = labels.write_frames(video, folder / "images" / video.video_id)
        for place in ("labels", "tracks"):
            (folder / place / video.video_id).mkdir(parents=True, exist_ok=True)
        for t in video.annotated_frames:
            ids, lines = video.visible(t), []
            for object_id, mask in zip(ids, video.masks(t, ids), strict=True):
                points = np.reshape(labels.joined(labels.polygons_of(mask)), (-1, 2)) / video.size[::-1]
                number = classes.index(video.classes.get(object_id, labels.NO_CLASS))
                lines.append(" ".join([str(number), *(f"{value:.8g}" for value in points.ravel())]))
            name = f"{Path(names[t]).stem}.txt"
            (folder / "labels" / video.video_id / name).write_text("".join(f"{line}\n" for line in lines))
            (folder / "tracks" / video.video_id / name).write_text("".join(f"{one}\n" for one in ids))
    content = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(classes))}
    (folder / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
