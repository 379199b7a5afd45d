"""Readers for the layouts in which video segmentation datasets come.

Folders are listed at once. A video is opened, and its errors are raised, when it is asked for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from samoe_hf.errors import InputError

from .annotations import LabelImages, ObjectImages, Shapes
from .frames import SampleError, check_folder, named_errors, natural_key, on_disk, one_form
from .images import ImageFrames, image_paths, read_label_png
from .schema import Video, VideoList
from .video_io import read_video


def read_davis(
    root: str | Path, split: str | None = None, year: Literal[2016, 2017] | None = None, resolution: str = "480p"
) -> VideoList:
    """DAVIS 2016 (one object, stored as 0 and 255) and 2017 (palette images).

    Args:
        root: holds `JPEGImages`, `Annotations` and `ImageSets`.
        split: "train", "val"…, a list in `ImageSets`; all sequences by default.
        year: whose lists to use; 2016 takes every label as object 1. By default 2017 where `ImageSets/2017` exists.
        resolution: "480p" or "Full-Resolution".
    """
    root = Path(root)
    year = year or (2017 if (root / "ImageSets" / "2017").is_dir() else 2016)
    frames, lists = root / "JPEGImages" / resolution, root / "ImageSets" / str(year)
    if year == 2016 and not lists.is_dir():
        lists = root / "ImageSets" / resolution  # where DAVIS 2016 itself has its lists
    names = _read_list(lists / f"{split}.txt") if split else _folder_names(frames)
    entries = {name: (frames / name, root / "Annotations" / resolution / name) for name in names}
    return VideoList(entries, partial(_open_labelled, {"binary": year == 2016 or None}))


def read_vos(
    root: str | Path, split: str | None = None, binary: bool | None = None, ignore_ids: Collection[int] | None = None
) -> VideoList:
    """YouTube-VOS, MOSE, LVOS, and any `JPEGImages/<video>/*.jpg` with label images `Annotations/<video>/*.png`.

    Frames without labels are not annotated.

    Args:
        root: holds `<split>/JPEGImages` and `<split>/Annotations`, or these two directly.
        split: a folder of root, or a list `ImageSets/<split>.txt` of videos.
        binary, ignore_ids: see [`LabelImages`].
    """
    root, names = Path(root), None
    if split and (root / split).is_dir():
        root = root / split
    elif split:
        names = _read_list(root / "ImageSets" / f"{split}.txt")
    names = names or _folder_names(root / "JPEGImages")
    entries = {name: (root / "JPEGImages" / name, root / "Annotations" / name) for name in names}
    return VideoList(entries, partial(_open_labelled, {"binary": binary, "ignore_ids": ignore_ids}))


def _open_labelled(values: dict[str, Any], video_id: str, folders: tuple[Path, Path]) -> Video:
    frames = ImageFrames(image_paths(on_disk(folders[0])))
    return Video(video_id, frames, LabelImages(_match_to_frames(frames, image_paths(on_disk(folders[1]))), **values))


def read_sa_v_val(root: str | Path, split: str = "sav_val") -> VideoList:
    """SA-V validation and test: frames at 24 per second, a folder of binary masks per object at 6 per second.

    An object's id is its folder's number plus 1, as in SAM 2's code. `root` holds `sav_val` and `sav_test`, or is one.
    """
    root = Path(root) / split if (Path(root) / split).is_dir() else Path(root)
    frames = root / "JPEGImages_24fps"
    names = _read_list(root / f"{split}.txt") if (root / f"{split}.txt").is_file() else _folder_names(frames)
    entries = {name: (frames / name, root / "Annotations_6fps" / name) for name in names}
    return VideoList(entries, _open_per_object)


def _open_per_object(video_id: str, folders: tuple[Path, Path]) -> Video:
    frames, masks = ImageFrames(image_paths(on_disk(folders[0]))), on_disk(folders[1])
    paths = {}
    for name in _folder_names(masks):
        if not name.isdecimal() or int(name) + 1 in paths:
            raise SampleError(f"{masks / name}: an object's folder must be named by a number of its own")
        paths[int(name) + 1] = _match_to_frames(frames, image_paths(masks / name))
    return Video(video_id, frames, ObjectImages(paths))


def read_sa_v(root: str | Path, annotations: Literal["manual", "auto"] = "manual", frame_step: int = 4) -> VideoList:
    """SA-V training: `<video>.mp4` with masklets in `<video>_manual.json` or `<video>_auto.json`, at any depth.

    An object's id is its position in the file plus 1. As in SAM 2's code, a frame for which an object has no masklet
    entry counts as unannotated. `frame_step`: video frames per annotated frame (24 and 6 per second).
    """
    suffix = f"_{annotations}.json"
    files = sorted(check_folder(root).rglob(f"*{suffix}"))
    if not files:
        raise FileNotFoundError(f"{root}: no files *{suffix}")
    if frame_step < 1:
        raise InputError(f"`frame_step` must be at least 1, not {frame_step}")
    entries: dict[str, Path] = {}
    for path in files:
        if entries.setdefault(path.name.removesuffix(suffix), path) != path:
            raise SampleError(f"{path}: another file of this name is {entries[path.name.removesuffix(suffix)]}")
    return VideoList(entries, partial(_open_masklets, frame_step))


def _open_masklets(frame_step: int, video_id: str, path: Path) -> Video:
    with named_errors(path, "not SA-V annotations"):
        data = json.loads(path.read_bytes())
        masklets, size = data["masklet"], (int(data["video_height"]), int(data["video_width"]))
        rles = {
            i * frame_step: {number: [one] for number, one in enumerate(rle, 1)}
            for i, rle in enumerate(masklets)
            if rle and None not in rle
        }
        masks = Shapes(rles, sorted(set().union(*rles.values())), size, str(path))
        return Video(video_id, read_video(on_disk(path.with_name(f"{video_id}.mp4"))), masks)


def read_ocid(
    root: str | Path, split: Literal["train", "val", "test"] | None = None, ignore_ids: Collection[int] = ()
) -> VideoList:
    """OCID: sequences `…/seqNN/{rgb,label}/*.png` at any depth, labels of 16 bits, objects placed one after another.

    As in the original: sequences named `seq13` are the test split, the rest is split 80/20 with seed 42; objects are
    those in a sequence's last label.

    Args:
        root: `ARID10`, `ARID20`, `YCB10` or the folder of them.
        ignore_ids: labels that are no objects, such as OCID's floor and table (1 and 2), which the original counts.
    """
    root = check_folder(root)
    folders = [path.parent for path in root.rglob("rgb") if (path.parent / "label").is_dir()]
    if not folders:
        raise FileNotFoundError(f"{root}: no sequences with the folders rgb and label")
    names = sorted((folder.relative_to(root).as_posix() for folder in folders), key=natural_key)
    if split is not None:
        rest = [name for name in names if Path(name).name != "seq13"]
        random.Random(42).shuffle(rest)
        border = int(0.8 * len(rest))
        splits = {"train": rest[:border], "val": rest[border:], "test": [n for n in names if Path(n).name == "seq13"]}
        names = splits[split]
    return VideoList({name: root / name for name in names}, partial(_open_ocid, frozenset(ignore_ids)))


def _open_ocid(ignore_ids: frozenset[int], video_id: str, folder: Path) -> Video:
    frames = ImageFrames(image_paths(folder / "rgb"))
    paths = _match_to_frames(frames, image_paths(folder / "label"))
    placed = set(np.unique(read_label_png(paths[max(paths)])).tolist())
    return Video(video_id, frames, LabelImages(paths, object_ids=placed - {0} - ignore_ids))


def _match_to_frames(frames: ImageFrames, labels: Iterable[Path]) -> dict[int, Path]:
    """Frame index -> label image, matched by the files' names."""
    index = {one_form(name): i for i, name in enumerate(frames.names)}
    paths = {}
    for path in labels:
        name = one_form(path.stem)
        if name not in index:
            raise SampleError(f"{path}: no frame of this name in {frames.paths[0].parent}")
        paths[index[name]] = path
    return paths


def _folder_names(folder: Path) -> list[str]:
    """Names of the folders within a folder, in natural order."""
    names = [path.name for path in check_folder(folder).iterdir() if path.is_dir() and not path.name.startswith(".")]
    if not names:
        raise FileNotFoundError(f"{folder}: no folders in it")
    return sorted(names, key=natural_key)


def _read_list(path: Path) -> list[str]:
    """Videos in a split's list: one name per line, or (DAVIS 2016) the files of each frame."""
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"{path}: no list for this split; there are: {known}")
    with named_errors(path, "not a list of names"):
        lines = [Path(line.split()[0]) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        names = [(line.suffix and line.parent.name) or line.name for line in lines]
        if not names:
            raise SampleError("this list of videos is empty")
    return list(dict.fromkeys(names))
