"""Which mask belongs to which frame, and to which object, by the names of the files.

Names may differ but for a prefix, a suffix or the padding of a number (`frame_0001.jpg`, `mask_1.png`), and a frame may
have one file for each object (`00001_obj2.png`, `2/00001.png`, `00001/2.png`).
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .annotations import Annotations, LabelImages, ObjectImages
from .frames import FrameSequence, SampleError, natural_key
from .video_io import ContainerFrames

FRAME_WORDS = r"(?i:frames?|images?|imgs?|jpegimages|pictures?|rgb|colou?r|inputs?|raw|videos?)"
MASK_WORDS = (
    r"(?i:masks?|labels?|gt|ground[\W_]?truths?|truth|anns?|annos?|annotations?|segs?|segm|segmentations?"
    r"|segmentation[\W_]?object)"
)
OBJECT_WORDS = re.compile(r"(?i)(?:^|[^a-z])(?:obj|object|id|inst|instance)s?(?:[^a-z]|$)")


class MaskFile(NamedTuple):
    """A mask of a video.

    Attributes:
        path: the image.
        object_name: whose mask it is, where that is told otherwise than by the image's name. Without a `frame_name`
            it may turn out to be the frame's, and the image's name the object's.
        frame_name: name of its frame, where that is told otherwise than by the image's name.
    """

    path: Path
    object_name: str | None = None
    frame_name: str | None = None


@dataclass
class Source:
    """Where a video's files are.

    Attributes:
        frames: a video file, or images in order.
        masks: the masks of any of its frames, which all tell object and frame in the same way.
    """

    frames: Path | list[Path]
    masks: list[MaskFile] = field(default_factory=list)


class Match(NamedTuple):
    """What a name tells: the index of its frame, and the rest of the name."""

    frame: int
    rest: str


def pair_masks(frames: FrameSequence, masks: Sequence[MaskFile], binary: bool = False) -> Annotations:
    """The annotations of a video.

    Args:
        frames: the video's.
        masks: all its masks: a label image for each frame, or a binary image for each object and frame. Frames may have
            none.
        binary: every label above 0 is object 1, where a frame has one image.

    Raises:
        SampleError: a mask without a frame, or two of one frame (and object); names the file.
    """
    paths: dict[str | None, dict[int, Path]] = {}
    for mask, (frame, name) in zip(masks, _frames_and_objects(frames, masks), strict=True):
        before = paths.setdefault(name, {}).setdefault(frame, mask.path)
        if before is not mask.path:
            whose = "" if name is None else f" of object {name}"
            raise SampleError(f"{mask.path}: frame {frames.names[frame]} has another mask{whose}, {before}")
    if None not in paths:
        ids = object_ids([name for name in paths if name is not None])
        return ObjectImages({ids[name]: of_frame for name, of_frame in paths.items() if name is not None})
    if len(paths) > 1:
        stray = next(iter(paths[None].values()))
        raise SampleError(f"{stray}: names no object, as other masks of the video do")
    return LabelImages(paths[None], binary)


def object_ids(names: Sequence[str]) -> dict[str, int]:
    """Name of each object -> id above 0: the number in it, plus 1 where one is 0; else its place in natural order."""
    numbers = {name: re.findall(r"\d+", name) for name in names}
    values = {name: int(found[-1]) for name, found in numbers.items() if found}
    if len(set(values.values())) < len(names):
        return {name: place for place, name in enumerate(sorted(names, key=natural_key), 1)}
    first = 1 if 0 in values.values() else 0
    return {name: value + first for name, value in values.items()}


def _frames_and_objects(frames: FrameSequence, masks: Sequence[MaskFile]) -> list[tuple[int, str | None]]:
    """Frame index, and name of the object (None where a frame has one image), of each mask."""
    paths, stems = [mask.path for mask in masks], [mask.path.stem for mask in masks]
    folders = [mask.object_name or "" for mask in masks]
    if masks[0].frame_name is not None:
        names, index = [mask.frame_name or "" for mask in masks], {name: i for i, name in enumerate(frames.names)}
        told = [index[name] for name in names if name in index]
        if len(told) < len(names):
            told = [match.frame for match in match_names(frames, names, paths, names)]
        return [(frame, mask.object_name) for frame, mask in zip(told, masks, strict=True)]
    if not any(folders):
        matches = match_names(frames, stems, paths)
        is_told = _tells_objects(matches)
        return [(match.frame, match.rest if is_told else None) for match in matches]
    # Folders of objects with an image for each frame, or of frames with one for each object.
    ways: list[list[tuple[int, str | None]]] = []
    errors = []
    for names, whose in ((stems, folders), (folders, stems)):
        try:
            matches = match_names(frames, names, paths, whose)
            ways.append([(match.frame, name) for match, name in zip(matches, whose, strict=True)])
        except SampleError as error:
            errors.append(error)
    if not ways:
        raise errors[0]
    return max(ways, key=lambda way: len({frame for frame, _ in way}))


def _tells_objects(matches: Sequence[Match]) -> bool:
    """Whether what names have beside the frame's number tells objects apart."""
    if len({match.rest for match in matches}) < 2:
        return False
    repeated = max(Counter(match.frame for match in matches).values()) > 1
    return repeated or all(OBJECT_WORDS.search(match.rest) for match in matches)


def match_names(
    frames: FrameSequence, names: Sequence[str], paths: Sequence[Path], objects: Sequence[str] | None = None
) -> list[Match]:
    """The frame of each name: that of the same name, of the same number, or the one whose name it contains.

    Args:
        frames: the video's.
        names: what tells the frames.
        paths: the files that they are of, for messages.
        objects: whose masks they are, where that is told otherwise than by the names.

    Raises:
        SampleError: a name without a frame.
    """
    index = {name: i for i, name in enumerate(frames.names)}
    if len(index) < len(frames.names):
        twice, _ = Counter(frames.names).most_common(1)[0]
        raise SampleError(f"{paths[0].parent}: the video has several frames of one name, {twice}")
    length = len(frames) if isinstance(frames, ContainerFrames) else None
    if length is None and all(name in index for name in names):
        return [Match(index[name], "") for name in names]
    numbers = _frame_numbers(frames.names)
    matches = _match_numbers(numbers, names, objects or [""] * len(names), length, paths[0].parent)
    if matches is not None:
        return matches
    matches = []
    for name, path in zip(names, paths, strict=True):
        last = int((re.findall(r"\d+", name) or [-1])[-1])
        match = _containing(index, name) or (Match(numbers[last], "") if last in numbers else None)
        if match is None:
            wanted = f"named {name} or numbered {last}" if last >= 0 and numbers else f"of this name ({name})"
            raise SampleError(f"{path}: no frame {wanted}; the frames are {frames.names[0]} to {frames.names[-1]}")
        matches.append(match)
    return matches


def _frame_numbers(names: Sequence[str]) -> dict[int, int]:
    """Number -> frame index, by the last of the numbers in the names that tells all of them apart; {} if none does."""
    found = [re.findall(r"\d+", name) for name in names]
    for position in range(1, min(map(len, found)) + 1):
        values = {int(numbers[-position]): i for i, numbers in enumerate(found)}
        if len(values) == len(names):
            return values
    return {}


def _match_numbers(
    numbers: Mapping[int, int], names: Sequence[str], objects: Sequence[str], container_length: int | None, folder: Path
) -> list[Match] | None:
    """Matches by the number in each name whose values are all those of frames, if there is one.

    Of several, the one is taken beside which the names are equal, or else the one that is no object's by a word before
    it, that tells the most frames, and that has the most digits.
    """
    found = [list(re.finditer(r"\d+", name)) for name in names]
    best: tuple[tuple[bool, bool, int, int], list[int], list[Match]] | None = None
    count = min(map(len, found))
    for position in [*range(-1, -count - 1, -1), *range(count)]:
        chosen = [numbers_of[position] for numbers_of in found]
        values = [int(match.group()) for match in chosen]
        first = 0 if container_length is None else _first_number(set(values), container_length)
        if any(value - first not in numbers for value in values):
            continue
        rests = [name[: m.start()] + name[m.end() :] for name, m in zip(names, chosen, strict=True)]
        matches = [Match(numbers[value - first], rest) for value, rest in zip(values, rests, strict=True)]
        if len(set(zip(matches, objects, strict=True))) < len(matches):
            continue
        of_object = any(OBJECT_WORDS.search(number.string[: number.start()]) for number in chosen)
        digits = max(len(number.group()) for number in chosen)
        rank = (len(set(rests)) == 1, not of_object, len({match.frame for match in matches}), digits)
        if best is None or rank > best[0]:
            best = rank, values, matches
    if best is None:
        return None
    _, values, matches = best
    if container_length is not None and 0 not in values and max(values) != container_length:
        warnings.warn(
            f"{folder}: masks {min(values)} to {max(values)} of a video file with {container_length} frames are taken "
            f"as counted from {_first_number(set(values), container_length)}",
            stacklevel=2,
        )
    return matches


def _first_number(values: set[int], length: int) -> int:
    """Whether masks of a video file count its frames from 0, or from 1 as ffmpeg names what it extracts."""
    return int(0 not in values and (length in values or 1 in values))


def _containing(index: Mapping[str, int], stem: str) -> Match | None:
    """The frame of this name, or with the longest name that a mask's name begins or ends with."""
    best = None
    for name in sorted(index, key=len):
        match = re.fullmatch(rf"{re.escape(name)}((?:[\W_].*)?)|(.*[\W_]){re.escape(name)}", stem)
        best = Match(index[name], match[1] or match[2] or "") if match else best
    return best


def split_by_prefix(source: Source) -> dict[str, Source]:
    """Videos whose images lie in one folder: name before the last number -> its frames and masks.

    Empty where the names are those of one video: one name alone, one that a single image has, or a mask of none.
    """
    groups: dict[str, tuple[list[Path], list[MaskFile]]] = {}
    for path in source.frames if isinstance(source.frames, list) else ():
        prefix = re.sub(r"\d+\D*$", "", path.stem).strip(" _-.")
        groups.setdefault(prefix, ([], []))[0].append(path)
    if len(groups) < 2 or "" in groups or min(len(images) for images, _ in groups.values()) < 2:
        return {}
    for mask in source.masks:
        names = [name for name in groups if re.search(rf"(^|[\W_]){re.escape(name)}([\W_\d]|$)", mask.path.stem)]
        if not names:
            return {}
        groups[max(names, key=len)][1].append(mask)
    return {name: Source(frames, masks) for name, (frames, masks) in groups.items() if masks}
