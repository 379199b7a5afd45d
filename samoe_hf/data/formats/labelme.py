"""LabelMe's JSON beside each image."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from samoe_hf.data.frames import SampleError, named_errors, on_disk, say_once
from samoe_hf.data.image_files import open_image
from samoe_hf.data.layouts import LABELME
from samoe_hf.data.schema import Video, VideoList
from samoe_hf.data.shapes import Part, box, cropped, place, polygons_of

from . import labels
from .labels import LabelledFrame

# Shapes besides polygons and masks, and how many points each has; X-AnyLabeling gives rectangles four.
FILLED = {"rectangle": (2, 4), "circle": (2,), "oriented_rectangle": (4,), "rotation": (4,)}


def read_labelme(root: str | Path, split: str | None = None) -> VideoList:
    """Folders of images with LabelMe's JSON files, at any depth; a folder is a video. `split`: only what is below it.

    Shapes of one `group_id` and label are one object, whose id is that number. Where no shape of a video has one, and
    each label is on no frame twice, a label is an object. Both are said, since they are guesses. Else nothing tells
    which objects of two images are the same, and each image is a video of one frame. Images without a JSON are not
    annotated; one without shapes shows no object. Rectangles and circles are filled, which is said; lines and points
    are refused. A missing image is taken from `imageData`.
    """
    root = Path(root) / (split or "")
    frames: list[LabelledFrame] = []
    for path in labels.files_with(root, ".json", LABELME):
        with named_errors(path, "not LabelMe's JSON"):
            data = json.loads(path.read_bytes())
            name = PureWindowsPath(data["imagePath"]).as_posix()
            image: Path | bytes = on_disk(path.parent / PureWindowsPath(name).name)
            if not image.is_file() and not Path(name).anchor and on_disk(path.parent / name).is_file():
                image = path.parent / name
            if not image.is_file() and data.get("imageData"):
                image = base64.b64decode(data["imageData"], validate=True)
            size = None if data.get("imageHeight") is None else (int(data["imageHeight"]), int(data["imageWidth"]))
            objects = labels.grouped((str(one["label"]), _group(one), _part(one, path)) for one in data["shapes"])
            video = path.parent.relative_to(root).as_posix().removeprefix(".")
            frames.append(LabelledFrame(video, image, size, objects, str(path), Path(name).stem))
    return labels.read_frames(labels.name_objects(frames), str(root))


def _group(shape: dict[str, Any]) -> int | None:
    return None if shape.get("group_id") is None else int(str(shape["group_id"]))


def _part(shape: dict[str, Any], path: Path) -> Part:
    kind, points = shape.get("shape_type") or "polygon", np.array(shape["points"], dtype=np.float64).reshape(-1, 2)
    if kind == "mask":
        return partial(_draw_patch, shape["mask"], *np.rint(points[0]).astype(int).tolist())
    if kind == "polygon" and len(points) < 3:
        raise SampleError(f"a polygon {shape['label']!r} has {len(points)} points")
    if kind == "polygon":
        return points.ravel().tolist()
    if len(points) not in FILLED.get(kind, ()):
        raise SampleError(f"a shape {shape['label']!r} is a {kind} of {len(points)} points, which has no area")
    say_once(f"{path}: a {kind} is filled, as a mask")
    if kind == "circle":
        (x, y), radius = points[0], float(np.hypot(*(points[1] - points[0])))
        return box([x - radius, y - radius, x + radius, y + radius], is_ellipse=True)
    if kind == "rectangle":
        return box([*points.min(axis=0), *points.max(axis=0)])
    return points.ravel().tolist()


def _draw_patch(encoded: str, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """A mask's PNG in base64 at its place."""
    with open_image(base64.b64decode(encoded, validate=True), "a mask's PNG in base64") as image:
        patch = np.array(image)
    return place(patch.reshape(*patch.shape[:2], -1).max(axis=-1) > 0, left, top, size)


def write_labelme(videos: Sequence[Video], folder: Path, polygons: bool = False) -> None:
    """Writes a folder for each video: its images, and beside each annotated one a JSON."""
    for video in videos:
        names = labels.write_frames(video, folder / video.video_id)
        for t in video.annotated_frames:
            shapes = []
            for object_id, name, mask in labels.objects_on(video, t):
                about = {"label": name, "group_id": object_id, "description": "", "flags": {}}
                if polygons:
                    rings = [np.reshape(ring, (-1, 2)).tolist() for ring in polygons_of(mask)]
                    shapes += [about | {"points": ring, "shape_type": "polygon", "mask": None} for ring in rings]
                else:
                    shapes.append(about | _patch(mask))
            content = {
                "version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": names[t], "imageData": None,
                "imageHeight": video.size[0], "imageWidth": video.size[1],
            }  # fmt: skip
            labels.write_json(folder / video.video_id / f"{video.frames.names[t]}.json", content)


def _patch(mask: np.ndarray) -> dict[str, Any]:
    patch, x, y = cropped(mask)
    file = BytesIO()
    Image.fromarray(patch.astype(np.uint8)).save(file, format="PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    corners = [[x, y], [x + patch.shape[1] - 1, y + patch.shape[0] - 1]]
    return {"points": corners, "shape_type": "mask", "mask": encoded}
