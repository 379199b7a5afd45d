"""Videos written as one of the formats that people label in, and read back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from samoe_hf.data.check import caught_sentences
from samoe_hf.data.frames import SampleError
from samoe_hf.data.layouts import LAYOUTS, WRITTEN
from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError

from .labels import check_unlike, objects_on


class Kept(NamedTuple):
    """What was read back: videos, frames, objects, pixels of masks and those that differ, and what else does."""

    videos: int
    frames: int
    objects: int
    pixels: int
    lost: int
    differences: list[str]


def write_videos(kind: str, videos: Sequence[Video], folder: Path, polygons: bool = False) -> Kept:
    """Writes videos with their frames and masks into an empty folder, and reads them back.

    Args:
        kind: one of `samoe_hf.data.layouts.WRITTEN`.
        polygons: write outlines of masks, and not their pixels, where the format has both.

    Raises:
        InputError: for another kind, polygons where it has none, names that do not differ, videos without any object
            where the format has no form for them, or masks of so many parts that their polygons would not be read.
    """
    if kind not in WRITTEN:
        raise InputError(f"the format must be one of {', '.join(WRITTEN)}, not {kind!r}")
    layout = LAYOUTS[kind]
    if polygons and "polygons" not in inspect.signature(layout.write).parameters:
        why = "has polygons alone" if kind == "yolo" else "is written as masks alone"
        raise InputError(f"`polygons` does not go with {kind}, which {why}")
    renamed = []
    if kind == "davis":  # it has no folders of videos
        flat = [replace(video, video_id=video.video_id.replace("/", "_")) for video in videos]
        pairs = [(one.video_id, other.video_id) for one, other in zip(videos, flat, strict=True)]
        renamed, videos = [f"{one} is called {other}" for one, other in pairs if one != other], flat
    check_unlike(f"names of videos, as {kind} has them", [video.video_id for video in videos])
    for video in videos:  # files of labels tell frames by their names
        check_unlike(f"frames of {video.video_id}", video.frames.names)
    layout.write(videos, folder, **({"polygons": True} if polygons else {}))
    options = layout.detect(folder)
    if options is None:
        raise InputError(f"{kind} cannot be written without any object, and none of the {len(videos)} videos has one")
    try:
        with caught_sentences():  # of guesses at what was just written
            kept = compare(videos, layout.read(root=folder, **options[0]))
    except SampleError as error:
        if isinstance(cause := error.__cause__, InputError) and (polygons or kind == "yolo"):
            where = str(error).partition(": ")[2].partition(": ")[0]
            raise InputError(f"{where}: {cause}, since it has so many parts; `coco` keeps masks as pixels") from error
        # A fault of the writer, and no user's.
        raise RuntimeError(f"what was written as {kind} cannot be read back") from error
    return kept._replace(differences=renamed + kept.differences)


def compare(videos: Sequence[Video], others: Sequence[Video]) -> Kept:
    """How videos that were read back differ from what they were; frames are the same by their names."""
    by_id, differences = {video.video_id: video for video in others}, []
    frames = objects = pixels = lost = 0
    for video in videos:
        other = by_id.pop(video.video_id, None)
        if other is None:
            differences.append(f"{video.video_id}: not there")
            continue
        is_like, nothing = tuple(video.size) == tuple(other.size), np.zeros(video.size, dtype=bool)
        seen, seen_again = set[int](), set[int]()
        found = {other.frames.names[t]: t for t in other.annotated_frames}
        for t in video.annotated_frames:
            masks = {i: mask for i, _, mask in objects_on(video, t)}
            place = found.get(video.frames.names[t])
            again = {} if place is None else {i: mask for i, _, mask in objects_on(other, place)}
            seen, seen_again = seen | masks.keys(), seen_again | again.keys()
            again = again if is_like else {}
            pixels += sum(int(mask.sum()) for mask in masks.values())
            either = masks.keys() | again.keys()
            lost += sum(int((masks.get(i, nothing) ^ again.get(i, nothing)).sum()) for i in either)
        for what, one, two in (
            ("frames", video.frames.names, other.frames.names),
            ("size", tuple(video.size), tuple(other.size)),
            ("annotated frames", video.annotated_frames, other.annotated_frames),
            ("objects that are seen", sorted(seen), sorted(seen_again)),
        ):
            if one != two:
                differences.append(f"{video.video_id}: {what} were {_short(one)}, are {_short(two)}")
        frames, objects = frames + len(other), objects + len(other.object_ids)
    differences += [f"{name}: was not there" for name in by_id]
    return Kept(len(others), frames, objects, pixels, lost, differences)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:80]}…"
