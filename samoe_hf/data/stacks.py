"""Masks in files of several pages: the frames of a video, of all objects or of one, or the objects of a frame."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .annotations import Annotations, LabelImages, ObjectImages
from .frames import FrameSequence, SampleError
from .image_files import Page, image_info
from .images import read_label_png
from .pairing import MaskFile, object_ids, pair_masks


def is_stack(path: Path) -> bool:
    """Whether an image file has several pages; not where it is damaged, which is said when it is read."""
    try:
        return len(image_info(path).pages) > 1
    except (SampleError, FileNotFoundError):
        return False


def pair_stacks(
    frames: FrameSequence, masks: Sequence[MaskFile], first: Literal[0, 1] | None = None, **values: Any
) -> Annotations:
    """The annotations of a video whose masks may be files of several pages; see [`pair_masks`] for arguments.

    A file with as many pages as the video has frames has their masks in order. One such file is of all objects; of
    several, each is of an object. Else a file is of a frame, and its pages are of objects. Others are a `SampleError`.
    """
    if not is_stack(masks[0].path):
        return pair_masks(frames, masks, first, **values)
    pages = {mask.path: image_info(mask.path).pages for mask in masks}
    are_frames = all(len(own) == len(frames) for own in pages.values())
    if are_frames and len(masks) == 1:
        annotations: Annotations = LabelImages(dict(enumerate(_pages(masks[0].path))), **values)
        annotations.note(f"{masks[0].path}: its pages are the masks of the video's frames, in order")
    elif are_frames and not {mask.path.stem for mask in masks} <= set(frames.names):
        names = {mask.path: mask.object_name or mask.path.stem for mask in masks}
        ids = object_ids(list(names.values()))
        of_ids = {ids[name]: dict(enumerate(_pages(path))) for path, name in names.items()}
        annotations = ObjectImages(of_ids, **values)
        annotations.note(f"{masks[0].path.parent}: each file has the masks of an object, a page for each frame")
    elif len(masks) == 1 and len(frames) > 1:
        count = len(pages[masks[0].path])
        raise SampleError(f"{masks[0].path}: {count} pages for {len(frames)} frames; a mask is expected for each")
    else:
        by_name = pair_masks(frames, [mask._replace(folder=None) for mask in masks], first)
        if not isinstance(by_name, LabelImages):
            raise SampleError(f"{masks[0].path}: names an object, and has {len(pages[masks[0].path])} pages of objects")
        of_frames = {frame: Path(str(path)) for frame, path in by_name.images.items()}
        annotations = _objects_by_page(of_frames, **values)
    return annotations


def _pages(path: Path) -> list[Page]:
    return [Page(path, number) for number in image_info(path).pages]


def _objects_by_page(
    of_frames: dict[int, Path], binary: bool | None = None, ignore_ids: Collection[int] | None = None
) -> Annotations:
    """Objects that are the pages of each frame's file: by the value of each page, or its number if all are the same."""
    values: dict[Page, int] = {}
    for page in (page for path in of_frames.values() for page in _pages(path)):
        present = np.setdiff1d(read_label_png(page), [0, *(ignore_ids or ())]).tolist()
        if len(present) > 1 and not binary:
            raise SampleError(f"{page}: holds the values {present[:5]}; expected the mask of one object on each page")
        values[page] = present[0] if present else 0
    by_value = len(set(values.values()) - {0}) > 1 and not binary
    counts = {len(_pages(path)): path for path in of_frames.values()}
    if not by_value and len(counts) > 1:
        few, many = min(counts), max(counts)
        raise SampleError(f"{counts[few]}: {few} pages, but {counts[many]} has {many}: which page is which object's?")
    of_ids: dict[int, dict[int, Page]] = {value: {} for value in sorted({*values.values()} - {0}) if by_value}
    for frame, path in of_frames.items():
        for place, page in enumerate(_pages(path), 1):
            if values[page] and frame in of_ids.get(values[page], {}):
                raise SampleError(f"{page}: another page of this frame has the value {values[page]} as well")
            if values[page] or not by_value:
                of_ids.setdefault(values[page] if by_value else place, {})[frame] = page
        if not any(frame in own for own in of_ids.values()):
            next(iter(of_ids.values()))[frame] = _pages(path)[0]  # no object is on this frame
    annotations = ObjectImages(of_ids, binary, ignore_ids)
    told = "the values of the pages" if by_value else "the pages' numbers, from 1"
    annotations.note(f"{next(iter(of_frames.values())).parent}: a file has the masks of a frame; objects are {told}")
    return annotations
