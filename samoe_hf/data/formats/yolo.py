"""Ultralytics' folders of YOLO segmentation: `data.yaml`, images, and a text file of polygons for each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from samoe_hf.data.frames import DAMAGE, SampleError, frame_order, named_errors, natural_key, on_disk
from samoe_hf.data.image_files import image_info
from samoe_hf.data.schema import Video, VideoList
from samoe_hf.data.shapes import joined, polygons_of

from . import labels
from .labels import LabelledFrame, LabelledObject


def read_yolo(root: str | Path, split: str = "train") -> VideoList:
    """YOLO segmentation; a folder of images is a video. `split` is a key of `data.yaml`.

    A polygon's id is behind its points, as `yolo track save_txt=True` writes it, or in the same line of a file below
    `tracks/`, as it is written here. Where there is none, nothing tells which objects of two images are the same, and
    each image is a video of one frame. Images without a file of labels are not annotated; one with an empty file shows
    no object. Boxes are refused.
    """
    root = Path(root)
    path = root / "data.yaml"
    with named_errors(path, "not the data.yaml of a YOLO dataset", (*DAMAGE, yaml.YAMLError)):
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        names = data["names"]
        names = {int(i): str(name) for i, name in (names.items() if isinstance(names, dict) else enumerate(names))}
        if not data.get(split):
            known = ", ".join(name for name in ("train", "val", "test") if data.get(name))
            raise SampleError(f"no split {split!r}; there are: {known or 'none'}")
        base = root / (data.get("path") or ".")
        places = [data[split]] if isinstance(data[split], str) else list(data[split])
    frames = []
    for place in (place.replace("\\", "/") for place in places):
        own = [base / place, root / place, root / place.removeprefix("../")]  # Roboflow's are `../train/images`
        folder = next((one for one in own if one.exists()), None)
        if folder is None:
            raise SampleError(f"{path}: {split} is {place!r}, which is neither below {base} nor {root}")
        for video, image in _listed(folder, base) if folder.is_file() else _found(folder):
            frames.append(_frame(video, image, names))
    return labels.read_frames(frames, str(root))


def _found(folder: Path) -> list[tuple[str, Path]]:
    """The images below a folder, each with its folder's name within it."""
    videos: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(labels.images_in(folder, "**/*"), key=lambda path: natural_key(path.as_posix())):
        videos[path.parent].append(path)
    names = {video: video.relative_to(folder).as_posix().removeprefix(".") for video in videos}
    return [(names[video], path) for video, own in videos.items() for path in frame_order(own)]


def _listed(path: Path, base: Path) -> list[tuple[str, Path]]:
    """The images that a text file lists, each with its folder's name; CVAT puts `data/` before their paths."""
    images = []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if name := line.strip().replace("\\", "/").removeprefix("./"):  # as Windows writes paths
            found = labels.find_image(name, [base, path.parent], path)
            images.append(found if found.is_file() else labels.find_image(name.removeprefix("data/"), [base], path))
    return [(image.parent.name.removeprefix("images"), image) for image in images]


def _beside(image: Path, name: str) -> Path:
    """The text file of an image, in the folder `name` in place of the last `images`."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = name
    return on_disk(Path(*parts).with_suffix(".txt"))


def _frame(video: str, image: Path, names: dict[int, str]) -> LabelledFrame:
    path, ids_path = _beside(image, "labels"), _beside(image, "tracks")
    if not image.is_file():
        raise SampleError(f"there is no image {image}")
    if not path.is_file():
        return LabelledFrame(video, image, None, None, str(path))
    size = image_info(image).size
    with named_errors(path, "not YOLO's labels"):
        lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        ids = ids_path.read_text(encoding="utf-8-sig").split() if ids_path.is_file() and ids_path != path else []
        if ids and len(ids) != len(lines):
            raise SampleError(f"{len(lines)} polygons, but {len(ids)} ids in {ids_path}")
        objects = []
        for number, (name, *values) in enumerate(lines, 1):
            if len(values) in (4, 5):
                raise SampleError(f"line {number} is a box; polygons are read, which are masks")
            key = values.pop() if len(values) % 2 else ids[number - 1] if ids else None
            points = np.array(values, dtype=np.float64)
            if len(values) < 6 or int(name) not in names or not ((points > -0.01) & (points < 1.01)).all():
                raise SampleError(f"line {number} is no polygon within the image, of one of the classes {names}")
            part = (points.reshape(-1, 2) * size[::-1]).ravel().tolist()
            objects.append(LabelledObject(None if key is None else int(key), names[int(name)], [part]))
    return LabelledFrame(video, image, size, objects, str(path))


def write_yolo(videos: Sequence[Video], folder: Path) -> None:
    """Writes `data.yaml`, `images/<video>/`, `labels/<video>/`, and `tracks/<video>/` with the id of each line.

    Ids behind the points, as Ultralytics' tracking writes them, would be refused by its training. The parts of an
    object are one polygon, joined by lines to and fro.
    """
    classes = labels.classes_of(videos)
    for video in videos:
        place = folder / "images" / video.video_id
        names = labels.write_frames(video, place)
        for t in video.annotated_frames:
            lines: dict[str, list[str]] = {"labels": [], "tracks": []}
            for object_id, name, mask in labels.objects_on(video, t):
                points = np.reshape(joined(polygons_of(mask)), (-1, 2)) / video.size[::-1]
                values = [str(classes.index(name)), *(f"{value:.8g}" for value in points.ravel())]
                lines["labels"].append(" ".join(values))
                lines["tracks"].append(str(object_id))
            for kind, own in lines.items():
                path = _beside(place / names[t], kind)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(f"{line}\n" for line in own), encoding="utf-8")
    content = {"train": "images", "val": "images", "names": dict(enumerate(classes))}
    (folder / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
