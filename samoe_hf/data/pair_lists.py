"""Videos by a list of pairs of a frame and its mask: a CSV, JSON or JSON Lines file."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from .frames import SampleError, check_inside, frame_order, named_errors, on_disk, say_once
from .pairing import FRAME_WORDS, MaskFile, Source
from .video_io import VIDEO_SUFFIXES

LIST_SUFFIXES = (".csv", ".json", ".jsonl")
MAX_NAME = 255  # characters of a file's; a list of a label tool may have shapes in place of paths
# What a column may be called, the usual name first.
COLUMNS = {
    "frame": "frame image frame_path image_path img img_path frames images file filename",
    "number": "frame_number frame_index frame_idx frame_no",
    "mask": "mask mask_path label label_path annotation annotation_path masks labels annotations",
    "video": "video video_id video_path sequence clip",
    "object": "object object_id obj_id instance instance_id",
}
EXPECTED = (
    "a CSV or JSON with a row for each frame: the columns `frame` and `mask` (paths beside the file), and optionally "
    "`frame_number`, `video` and `object`; `video` may be a video file, and the frame then a number from 0"
)


def read_pairs(path: Path) -> tuple[dict[str, Source], tuple[str, str]]:
    """The videos of a list by their names, and what to call the columns of frames and masks.

    Rows without a mask are frames without annotation. Without a column `video`, frames of a folder are a video. Frames
    are in the order of `frame_number`, else of the numbers in their names, else of the rows. What is no such list is a
    `SampleError`.
    """
    with named_errors(path, f"cannot be read as a list; expected {EXPECTED}"):
        table = _read_table(path)
    present = {str(column).strip().lower(): column for column in table}
    columns = {role: next((present[n] for n in names.split() if n in present), None) for role, names in COLUMNS.items()}
    columns["frame"] = columns["number"] if columns["frame"] is None else columns["frame"]
    if columns["frame"] is None or columns["mask"] is None:
        raise SampleError(f"{path}: has {', '.join(map(str, table)) or 'no rows'}; expected {EXPECTED}")
    sources: dict[str, Source] = {}
    numbers: dict[str, dict[Path, float]] = defaultdict(dict)
    for row_number, row in enumerate(table.to_dict("records"), 1):
        where = f"{path}, row {row_number}"
        values = {role: "" if column is None else str(row[column]).strip() for role, column in columns.items()}
        for role in ("video", "frame", "mask"):
            if max(map(len, values[role].split("/"))) > MAX_NAME:
                raise SampleError(f"{where}: {columns[role]} must be a path, not {values[role][:60]}…")
            if not (path.parent / values[role]).exists():
                values[role] = values[role].replace("\\", "/")  # as Windows writes paths
        video, frame, number = values["video"], values["frame"], values["number"]
        of_file = Path(video).suffix.lower() in VIDEO_SUFFIXES and frame.isdecimal()
        file = _existing(video if of_file else frame, path, where)
        folders = [part for part in Path(frame).parts[:-1] if not re.fullmatch(FRAME_WORDS, part)]
        key = Path(video).with_suffix("").as_posix() if of_file else video or "/".join(folders)
        source = sources.setdefault(key, Source(file if of_file else []))
        if isinstance(source.frames, list) == of_file or (of_file and source.frames != file):
            raise SampleError(f"{where}: the video {key} has both {file} and other files")
        if isinstance(source.frames, list):
            source.frames.append(file)
            if columns["number"] is not None and columns["number"] != columns["frame"]:
                value = _number(number, where, str(columns["number"]))
                if numbers[key].setdefault(file, value) != value:
                    raise SampleError(f"{where}: {file} has the number {numbers[key][file]:g} in another row")
        if values["mask"]:
            name = int(frame) if of_file else file.stem
            source.masks.append(MaskFile(_existing(values["mask"], path, where), values["object"] or None, name))
    for key, source in sources.items():
        if isinstance(source.frames, list):  # a frame has a row for each object
            unlike = list(dict.fromkeys(source.frames))
            source.frames = _in_order(unlike, numbers[key], f"{path}: video {key or path.stem}")
    if not any(source.masks for source in sources.values()):
        raise SampleError(f"{path}: no row has a mask")
    return sources, (f"column {columns['frame']}", f"column {columns['mask']}")


def _number(text: str, where: str, column: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise SampleError(f"{where}: {column} must be a number, not {text!r}") from error


def _in_order(files: list[Path], numbers: Mapping[Path, float], owner: str) -> list[Path]:
    """A video's frames by their numbers, or the numbers in their names, or as they are if these tell nothing."""
    if numbers:
        twice = [n for n, count in Counter(numbers.values()).items() if count > 1]
        if twice:
            raise SampleError(f"{owner} has several frames of the number {twice[0]:g}")
        return sorted(files, key=lambda file: numbers[file])
    ordered = frame_order(files)
    if ordered == files or len({re.sub(r"\d+", "#", file.stem) for file in files}) > 1:
        return files
    say_once(f"{owner}: its rows are put in the order of names, {ordered[0].name} first; `frame_number` tells another")
    return ordered


def _existing(name: str, path: Path, where: str) -> Path:
    check_inside(name, where)
    file = on_disk(path.parent / name)
    if not file.is_file():
        raise FileNotFoundError(f"{where}: no such file {file}")
    return file


def _read_table(path: Path) -> pd.DataFrame:
    """The rows of a list. In JSON, those of a video may be one, with lists of frames and masks."""
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8-sig") as file:
            separator = ";" if "," not in file.readline() else ","
        return pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True, sep=separator)
    text = path.read_text(encoding="utf-8-sig")
    is_lines = path.suffix.lower() == ".jsonl"
    rows = [json.loads(line) for line in text.splitlines() if line.strip()] if is_lines else json.loads(text)
    if isinstance(rows, dict):
        (rows,) = rows.values()
    table = pd.DataFrame(rows, dtype=object)
    lists = [column for column in table if any(isinstance(value, list) for value in table[column])]
    table = table.explode(lists) if lists else table
    return table.where(table.notna(), "")
