"""Label Studio's JSON: brushes and polygons on images."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlparse

import numpy as np

from samoe_hf.data.frames import SampleError, named_errors, one_form, say_once
from samoe_hf.data.image_files import IMAGE_SUFFIXES
from samoe_hf.data.layouts import LABEL_STUDIO
from samoe_hf.data.schema import Video, VideoList
from samoe_hf.data.shapes import Part, box, runs_of

from . import labels
from .labels import LabelledFrame

NO_PLACE = ("choices", "textarea", "rating", "taxonomy", "number", "relation", "datetime", "pairwise", "ranker")
RUN_BITS = (3, 4, 8, 16)  # in which a run's length less 1 is written


def read_label_studio(root: str | Path, split: str | None = None) -> VideoList:
    """Label Studio's JSON export, with the images below the same folder.

    An image is found by its path behind `?d=`, or by its name, with or without the eight digits and the minus that an
    upload puts before it. The folder of an image is its video, without a first
    `images`. A region whose id is `object-N`, as written here, is object N; else each label is an object where it is on
    no frame twice, which is said; else nothing tells which objects of two images are the same, and each image is a
    video of one frame. Of a task's annotations the last one counts that was not cancelled; tasks without any are not
    annotated. Brushes, polygons and (filled, which is said) rectangles and ellipses are read, other regions with a
    place are refused. With a `split`, only what is below this folder.
    """
    root = Path(root) / (split or "")
    files: dict[tuple[str, ...], list[Path]] = defaultdict(list)  # by the ends of their paths
    for file in labels.images_in(root, "**/*"):
        parts = PurePosixPath(one_form(file.relative_to(root).as_posix())).parts
        for start in range(len(parts)):
            files[parts[start:]].append(file)
    frames: list[LabelledFrame] = []
    for path in labels.files_with(root, ".json", LABEL_STUDIO):
        with named_errors(path, "not Label Studio's JSON"):
            tasks = json.loads(path.read_bytes())
            for task in tasks if isinstance(tasks, list) else [tasks]:
                image = _image(task, root, files)
                valid = [one for one in task.get("annotations") or () if not one.get("was_cancelled")]
                if len(valid) > 1:
                    say_once(f"{path}: tasks, such as {task.get('id')}, have several annotations; the last one counts")
                regions = _regions(valid[-1]["result"] if valid else ())
                size = next(((int(r["original_height"]), int(r["original_width"])) for r in regions), None)
                objects = labels.grouped((_label(r), _number(r), _part(r, path)) for r in regions)
                parts = image.parent.relative_to(root).parts
                video = "/".join(parts[parts[:1] == ("images",) :])
                frames.append(LabelledFrame(video, image, size, objects if valid else None, str(path)))
    return labels.read_frames(labels.name_objects(frames), str(root))


def _image(task: dict[str, Any], root: Path, files: Mapping[tuple[str, ...], list[Path]]) -> Path:
    """The file of a task's image; `files` are those of each end of a path."""
    texts = [text for text in task["data"].values() if isinstance(text, str)]
    paths = [parse_qs(url.query).get("d", [unquote(url.path)])[0] for url in map(urlparse, texts)]
    name = next((path for path in paths if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES), None)
    if name is None:
        raise SampleError(f"task {task.get('id')} has {texts}, no image; videos have boxes there, no masks")
    parts = PurePosixPath(one_form(name.replace("\\", "/"))).parts  # as a server on Windows writes paths
    without_hash = (*parts[:-1], re.sub(r"^[0-9a-f]{8}-(?=.)", "", parts[-1]))
    for own in (files.get(one[start:], ()) for one in (parts, without_hash) for start in range(len(parts))):
        if len(own) == 1:
            return own[0]
        if own:
            raise SampleError(f"task {task.get('id')}: {name!r} may be {own[0]} or {own[1]}")
    raise SampleError(f"task {task.get('id')}: there is no image {parts[-1]!r} below {root}")


def _regions(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results with a place; a label may be a result of its own, with its region's id."""
    regions: dict[Any, dict[str, Any]] = {}
    for i, result in enumerate(results):
        if result.get("type") not in NO_PLACE:
            own = regions.setdefault(result.get("id", i), result)
            if own is not result:
                own["value"] = {**result["value"], **own["value"]}
    return list(regions.values())


def _label(result: dict[str, Any]) -> str:
    value = result["value"]
    own = value.get(result["type"]) or next((value[key] for key in value if key.endswith("labels")), [labels.NO_CLASS])
    return str(own[0])


def _number(result: dict[str, Any]) -> int | None:
    match = re.fullmatch(r"object-(\d+)", str(result.get("id")))
    return int(match[1]) if match else None


def _part(result: dict[str, Any], path: Path) -> Part:
    value, width, height = result["value"], result["original_width"], result["original_height"]
    scale = np.array([width, height]) / 100
    if result.get("image_rotation"):
        raise SampleError(f"region {result.get('id')} is on an image turned by {result['image_rotation']} degrees")
    if "rle" in value:
        return partial(_draw_brush, bytes(value["rle"]), height, width)
    if "points" in value and "polygon" in result["type"]:
        return (np.array(value["points"], dtype=np.float64) * scale).ravel().tolist()
    if "radiusX" in value:
        say_once(f"{path}: ellipses are filled, as masks")
        x, y, rx, ry = (float(value[name]) for name in ("x", "y", "radiusX", "radiusY"))
        return box([*(x - rx, y - ry) * scale, *(x + rx, y + ry) * scale], value.get("rotation", 0), True)
    if {"x", "y", "width", "height"} <= set(value) and not value.get("rotation") and "rectangle" in result["type"]:
        say_once(f"{path}: rectangles are filled, as masks")
        x, y, w, h = (float(value[name]) for name in ("x", "y", "width", "height"))
        return box([*(x, y) * scale, *(x + w, y + h) * scale])
    raise SampleError(f"region {result.get('id')} is of the type {result['type']}; brushes and polygons are read")


def _draw_brush(encoded: bytes, height: int, width: int, size: tuple[int, int]) -> np.ndarray:
    if (height, width) != size:
        raise SampleError(f"a brush on {height} x {width} pixels")
    values = decode_brush(encoded, height * width * 4)
    return values.reshape(height, width, 4)[..., 3] > 0


def decode_brush(encoded: bytes, count: int) -> np.ndarray:
    """The values of Label Studio's run-length encoding, that of `rle-pack`.

    The head is 32 bits for their number, 5 for the bits of a value less 1, and 4 x 4 for the bits of lengths less 1.
    Then come runs: a bit that is 1 where one value is repeated, 2 bits that choose the bits of the length, the length
    less 1, and the value or values. There must be `count` of these.
    """
    bits = "".join(f"{byte:08b}" for byte in encoded)
    number, value_bits = int(bits[:32], 2), int(bits[32:37], 2) + 1
    if number != count or value_bits > 8:
        raise SampleError(f"a brush of {number} values of {value_bits} bits, {count} of 8 are expected")
    sizes = [int(bits[i : i + 4], 2) + 1 for i in range(37, 53, 4)]
    values, place, i = np.zeros(count, dtype=np.uint8), 53, 0
    while i < count:
        if place + 3 > len(bits):
            raise SampleError("a brush ends before its last value")
        is_run, length_bits = bits[place] == "1", sizes[int(bits[place + 1 : place + 3], 2)]
        place += 3 + length_bits
        length = int(bits[place - length_bits : place], 2) + 1
        own = 1 if is_run else length
        raw = bits[place : place + own * value_bits]
        if len(raw) < own * value_bits or i + length > count:
            raise SampleError("a brush's runs do not fit its image")
        values[i : i + length] = [int(raw[k : k + value_bits], 2) for k in range(0, len(raw), value_bits)]
        place, i = place + own * value_bits, i + length
    return values


def encode_brush(mask: np.ndarray) -> list[int]:
    """A mask (H, W) bool as the bytes that [`decode_brush`] reads: 4 values of a pixel, all 0 or 255."""
    bits = [f"{mask.size * 4:032b}", f"{7:05b}", *(f"{size - 1:04b}" for size in RUN_BITS)]
    for value, run in zip(cycle(("0" * 8, "1" * 8)), runs_of(mask), strict=False):
        left = run * 4
        while left:
            length = min(left, 1 << RUN_BITS[-1])
            kind = next(k for k, size in enumerate(RUN_BITS) if length <= 1 << size)
            bits.append(f"1{kind:02b}{length - 1:0{RUN_BITS[kind]}b}{value}")
            left -= length
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def write_label_studio(videos: Sequence[Video], folder: Path) -> None:
    """Writes `tasks.json` and `images/<video>/`.

    The images are named as Label Studio's storage of local files does (`/data/local-files/?d=`), from this folder on.
    A task without annotation has none; one without objects has an empty one.
    """
    tasks = []
    for video in videos:
        names = labels.write_frames(video, folder / "images" / video.video_id)
        annotated = set(video.annotated_frames)
        for t, name in enumerate(names):
            results = [
                {
                    "id": f"object-{object_id}", "type": "brushlabels", "from_name": "tag", "to_name": "image",
                    "original_width": video.size[1], "original_height": video.size[0], "image_rotation": 0,
                    "value": {"format": "rle", "rle": encode_brush(mask), "brushlabels": [label]},
                }
                for object_id, label, mask in (labels.objects_on(video, t) if t in annotated else ())
            ]  # fmt: skip
            data = {"image": f"/data/local-files/?d={quote(f'images/{video.video_id}/{name}')}"}
            annotations = [{"result": results, "was_cancelled": False}] if t in annotated else []
            tasks.append({"id": len(tasks) + 1, "data": data, "annotations": annotations})
    labels.write_json(folder / "tasks.json", tasks)
