"""Videos by a list of pairs of a frame and its mask: a CSV, JSON or JSON Lines file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from samoe_hf.errors import InputError

from .pairing import FRAME_WORDS, MaskFile, Source
from .video_io import VIDEO_SUFFIXES, SampleError, check_inside

LIST_SUFFIXES = (".csv", ".json", ".jsonl")
# What a column may be called, the usual name first.
COLUMNS = {
    "frame": "frame image frame_path image_path img img_path frames images",
    "mask": "mask mask_path label label_path annotation annotation_path masks labels annotations",
    "video": "video video_id video_path sequence clip",
    "object": "object object_id obj_id instance instance_id",
    "frame_number": "frame_number frame_index frame_idx frame_id",
}
EXPECTED = (
    "a CSV or JSON with a row for each frame: the columns `frame` and `mask` (paths beside the file), and optionally "
    "`video` and `object`; or `video` (a video file), `frame_number` (from 0) and `mask`"
)


def read_pairs(path: Path) -> tuple[dict[str, Source], tuple[str, str]]:
    """The videos of a list by their names, and what to call the columns of frames and masks.

    Rows without a mask are frames without annotation. Without a column `video`, frames of a folder are a video.

    Raises:
        SampleError: the file is no such list, or has no masks.
        FileNotFoundError: it names a file that is not there.
    """
    rows = _rows(path)
    present = {str(column).strip().lower(): column for column in (rows[0] if rows else {})}
    columns = {role: next((present[n] for n in names.split() if n in present), None) for role, names in COLUMNS.items()}
    if columns["mask"] is None or (columns["frame"] is None and None in (columns["video"], columns["frame_number"])):
        found = ", ".join(map(str, rows[0])) if rows else "no rows"
        raise SampleError(f"{path}: has {found}; expected {EXPECTED}")
    sources: dict[str, Source] = {}
    seen: set[tuple[str, Path]] = set()
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        values = {role: "" if column is None else _text(row.get(column)) for role, column in columns.items()}
        of_file = Path(values["video"]).suffix.lower() in VIDEO_SUFFIXES
        count = values["frame_number"] or values["frame"]
        if of_file and count.isdecimal():
            key, frames, name = Path(values["video"]).stem, _existing(values["video"], path, where), f"{int(count):05d}"
        elif values["frame"]:
            image = _existing(values["frame"], path, where)
            folders = [part for part in Path(values["frame"]).parts[:-1] if not re.fullmatch(FRAME_WORDS, part)]
            key, frames, name = values["video"] or "/".join(folders), image, image.stem
        else:
            raise SampleError(f"{where}: names no frame; expected {EXPECTED}")
        is_image = frames.suffix.lower() not in VIDEO_SUFFIXES
        source = sources.setdefault(key, Source([] if is_image else frames))
        if isinstance(source.frames, list) != is_image:
            raise SampleError(f"{where}: the video has both a file and images")
        if isinstance(source.frames, list) and (key, frames) not in seen:
            source.frames.append(frames)
        seen.add((key, frames))
        if values["mask"]:
            source.masks.append(MaskFile(_existing(values["mask"], path, where), values["object"] or None, name))
    if not any(source.masks for source in sources.values()):
        raise SampleError(f"{path}: no row has a mask")
    return sources, (f"column {columns['frame'] or columns['video']}", f"column {columns['mask']}")


def _existing(name: str, path: Path, where: str) -> Path:
    check_inside(name, where)
    file = path.parent / name
    if not file.is_file():
        raise FileNotFoundError(f"{where}: no such file {file}")
    return file


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip()  # NaN is an empty cell


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix.lower() == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
            return [dict(row) for row in table.to_dict("records")]
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".jsonl":
            return _expand([json.loads(line) for line in text.splitlines() if line.strip()])
        return _expand(json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SampleError(f"{path}: cannot be read as a list ({error}); expected {EXPECTED}") from error


def _expand(data: Any) -> list[dict[str, Any]]:
    """Rows of JSON: a list of them, a mapping of videos to theirs, or videos that have lists of frames and masks."""
    if isinstance(data, Mapping):
        values = list(data.values())
        if len(values) == 1 and isinstance(values[0], list) and all(isinstance(row, Mapping) for row in values[0]):
            data = values[0]
        else:
            lists = {video: rows if isinstance(rows, list) else [rows] for video, rows in data.items()}
            data = [{"video": video, **row} for video, rows in lists.items() for row in rows]
    expanded = []
    for row in data:
        many = {name: value for name, value in row.items() if isinstance(value, list)}
        if len({len(value) for value in many.values()}) > 1:
            raise InputError(f"lists of different length in {list(many)}")
        for values in zip(*many.values(), strict=True) if many else [()]:
            expanded.append({**row, **dict(zip(many, values, strict=True))})
    return expanded
