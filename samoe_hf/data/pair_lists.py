"""Videos by a list of pairs of a frame and its mask: a CSV, JSON or JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from samoe_hf.errors import InputError

from .folders import VIDEO_SUFFIXES, Found, Key, Source, role_by_name, split_path
from .pairing import MaskFile
from .video_io import SampleError, check_inside, natural_key

LIST_SUFFIXES = (".csv", ".json", ".jsonl")
# What a column may be called, the usual name first.
COLUMNS = {
    "frame": ("frame", "image", "frame_path", "image_path", "img", "img_path", "frames", "images"),
    "mask": (
        "mask",
        "mask_path",
        "label",
        "label_path",
        "annotation",
        "annotation_path",
        "masks",
        "labels",
        "annotations",
    ),
    "video": ("video", "video_id", "video_path", "sequence", "clip"),
    "object": ("object", "object_id", "obj_id", "instance", "instance_id"),
    "frame_number": ("frame_number", "frame_index", "frame_idx", "frame_id"),
}
EXPECTED = (
    "a CSV or JSON with a row for each frame: the columns `frame` and `mask` (paths beside the file), and optionally "
    "`video` and `object`; or `video` (a video file), `frame_number` (from 0) and `mask`"
)


def read_pairs(path: Path) -> Found:
    """The videos of a list. Rows without a mask are frames without annotation.

    Raises:
        SampleError: the file is no such list, or names a file that is not there.
    """
    rows = _rows(path)
    columns = {role: _column(rows, names) for role, names in COLUMNS.items()}
    if columns["mask"] is None or (columns["frame"] is None and None in (columns["video"], columns["frame_number"])):
        found = ", ".join(map(str, rows[0])) if rows else "no rows"
        raise SampleError(f"{path}: has {found}; expected {EXPECTED}")
    sources: dict[Key, Source] = {}
    seen: dict[Key, dict[Path, None]] = {}
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        values = {role: _text(row.get(column)) for role, column in columns.items() if column is not None}
        key, frame, name = _frame_of(values, path, where)
        if key not in sources:
            sources[key], seen[key] = Source([] if name is None else frame), {}
        if isinstance(sources[key].frames, list) != (name is None):
            raise SampleError(f"{where}: the video has both a file and images")
        if name is None:
            seen[key].setdefault(frame)
        if values["mask"]:
            mask = _existing(values["mask"], path, where)
            sources[key].masks.append(MaskFile(mask, (), values.get("object") or None, name or frame.stem))
    for key, source in sources.items():
        if isinstance(source.frames, list):
            source.frames = list(seen[key])
    found = {key: source for key, source in sorted(sources.items(), key=_order) if source.masks}
    if not found:
        raise SampleError(f"{path}: no row has a mask")
    return Found(found, (f"column {columns['frame'] or columns['video']}", f"column {columns['mask']}"),
                 [key for key in sources if key not in found])  # fmt: skip


def _order(item: tuple[Key, Source]) -> list:
    return natural_key("/".join(item[0]))


def _frame_of(values: Mapping[str, str], path: Path, where: str) -> tuple[Key, Any, str | None]:
    """The video's key, its file or the image, and, of a video file, the frame's name."""
    of_file = Path(values.get("video", "")).suffix.lower() in VIDEO_SUFFIXES
    number = values.get("frame_number") or (values.get("frame", "") if of_file else "")
    if of_file and number.isdecimal():
        return (Path(values["video"]).stem,), _existing(values["video"], path, where), f"{int(number):05d}"
    if not values.get("frame"):
        raise SampleError(f"{where}: names no frame; expected {EXPECTED}")
    image = _existing(values["frame"], path, where)
    if values.get("video"):
        return (values["video"],), image, None
    return split_path(Path(values["frame"]).parent.parts, role_by_name)[1], image, None


def _existing(name: str, path: Path, where: str) -> Path:
    check_inside(name, where)
    file = path.parent / name
    if not file.is_file():
        raise FileNotFoundError(f"{where}: no such file {file}")
    return file


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN is an empty cell
        return ""
    return str(value).strip()


def _column(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str | None:
    """The first of the names that the rows have, in any case."""
    present = {str(column).strip().lower(): column for column in (rows[0] if rows else {})}
    return next((present[name] for name in names if name in present), None)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix.lower() == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
            return table.to_dict("records")
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".jsonl":
            return _expand([json.loads(line) for line in text.splitlines() if line.strip()])
        return _expand(json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SampleError(f"{path}: cannot be read as a list ({error}); expected {EXPECTED}") from error


def _expand(data: Any) -> list[dict[str, Any]]:
    """Rows of JSON: a list of them, a mapping of videos to theirs, or videos that have lists of frames and masks."""
    if isinstance(data, Mapping):
        lists = [value for value in data.values() if isinstance(value, list)]
        if len(data) == 1 and lists and all(isinstance(item, Mapping) for item in lists[0]):
            data = lists[0]
        else:
            data = [
                {"video": name, **row}
                for name, rows in data.items()
                for row in (rows if isinstance(rows, list) else [rows])
            ]
    expanded = []
    for row in data:
        many = {name: value for name, value in row.items() if isinstance(value, list)}
        if not many:
            expanded.append(dict(row))
            continue
        if len({len(value) for value in many.values()}) > 1:
            raise InputError(f"lists of different length in {list(many)}")
        single = {name: value for name, value in row.items() if name not in many}
        expanded += [single | dict(zip(many, values, strict=True)) for values in zip(*many.values(), strict=True)]
    return expanded
