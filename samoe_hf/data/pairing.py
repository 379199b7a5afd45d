"""Which mask belongs to which frame, and to which object, by the names of the files.

Names may differ but for a prefix, a suffix or the padding of a number (`frame_0001.jpg`, `mask_1.png`), and a frame may
have one file for each object (`00001_obj2.png`, `2/00001.png`, `00001/2.png`).
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .annotations import Annotations, LabelImages, ObjectImages
from .video_io import ContainerFrames, FrameSequence, SampleError, natural_key

OBJECT_WORDS = re.compile(r"(?i)(?:^|[^a-z])(?:obj|object|id|inst|instance)s?(?:[^a-z]|$)")


class MaskFile(NamedTuple):
    """A mask of a video.

    Attributes:
        path: the image.
        folders: those between the video's folder of masks and the image.
        object_name: whose mask it is, where that is told otherwise than by its name.
        frame_name: name of its frame, where that is told otherwise than by its name.
    """

    path: Path
    folders: tuple[str, ...] = ()
    object_name: str | None = None
    frame_name: str | None = None


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
    pairs = _object_pairs(frames, masks)
    objects = dict.fromkeys(name for _, name, _ in pairs)
    paths: dict[str | None, dict[int, Path]] = {name: {} for name in objects}
    for frame, name, path in pairs:
        if frame in paths[name]:
            whose = "" if name is None else f" of object {name}"
            raise SampleError(f"{path}: frame {frames.names[frame]} has another mask{whose}, {paths[name][frame]}")
        paths[name][frame] = path
    if None in paths:
        if len(paths) > 1:
            stray = next(path for _, name, path in pairs if name is None)
            raise SampleError(f"{stray}: names no object, as other masks of the video do")
        return LabelImages(paths[None], binary)
    ids = object_ids([name for name in objects if name is not None])
    return ObjectImages({ids[name]: of_frame for name, of_frame in paths.items() if name is not None})


def object_ids(names: Sequence[str]) -> dict[str, int]:
    """Name of each object -> id above 0: the number in it, plus 1 where one is 0; else its place in natural order."""
    numbers = {name: re.findall(r"\d+", name) for name in names}
    values = {name: int(found[-1]) for name, found in numbers.items() if found}
    if len(set(values.values())) < len(names):
        return {name: place for place, name in enumerate(sorted(names, key=natural_key), 1)}
    first = 1 if 0 in values.values() else 0
    return {name: value + first for name, value in values.items()}


def _object_pairs(frames: FrameSequence, masks: Sequence[MaskFile]) -> list[tuple[int, str | None, Path]]:
    """Frame index, name of the object (None where a frame has one image) and path of each mask."""
    told = [mask for mask in masks if mask.frame_name is not None]
    names = [str(mask.frame_name) for mask in told]
    if set(names) <= set(frames.names):
        indices = [frames.names.index(name) for name in names]
    else:
        indices = [match.frame for match in match_names(frames, names, [mask.path for mask in told], names)]
    pairs = [(index, mask.object_name, mask.path) for index, mask in zip(indices, told, strict=True)]
    left = [mask for mask in masks if mask.frame_name is None]
    if any(mask.folders for mask in left):
        return pairs + _pairs_in_folders(frames, left)
    matches = match_names(frames, [mask.path.stem for mask in left], [mask.path for mask in left])
    has_objects = _name_objects(matches)
    for mask, match in zip(left, matches, strict=True):
        pairs.append((match.frame, match.rest if has_objects else None, mask.path))
    return pairs


def _pairs_in_folders(frames: FrameSequence, masks: Sequence[MaskFile]) -> list[tuple[int, str | None, Path]]:
    """Pairs of masks in folders: of each object, or of each frame."""
    odd = next((mask for mask in masks if len(mask.folders) != 1), None)
    if odd is not None:
        raise SampleError(f"{odd.path}: beside folders of objects, or deeper than these")
    paths, folders, stems = [m.path for m in masks], [m.folders[0] for m in masks], [m.path.stem for m in masks]
    ways = [(names, _try_names(frames, others, paths, names)) for names, others in ((folders, stems), (stems, folders))]
    ways = [(names, matches) for names, matches in ways if matches is not None]
    if not ways:
        match_names(frames, stems, paths, folders)  # which says what is wrong
    names, matches = max(ways, key=lambda way: len({match.frame for match in way[1]}))
    return [(match.frame, name, path) for match, name, path in zip(matches, names, paths, strict=True)]


def _try_names(
    frames: FrameSequence, stems: Sequence[str], paths: Sequence[Path], objects: Sequence[str]
) -> list[Match] | None:
    try:
        return match_names(frames, stems, paths, objects)
    except SampleError:
        return None


def _name_objects(matches: Sequence[Match]) -> bool:
    """Whether what names have beside the frame's number tells objects apart."""
    if len({match.rest for match in matches}) < 2:
        return False
    repeated = max(Counter(match.frame for match in matches).values()) > 1
    return repeated or all(OBJECT_WORDS.search(match.rest) for match in matches)


def match_names(
    frames: FrameSequence, stems: Sequence[str], paths: Sequence[Path], objects: Sequence[str] | None = None
) -> list[Match]:
    """The frame of each name: that of the same name, of the same number, or the one whose name it contains.

    Args:
        frames: the video's.
        stems: names that tell frames.
        paths: the files that they are of, for messages.
        objects: whose masks they are, where that is told otherwise than by the names.

    Raises:
        SampleError: a name without a frame.
    """
    if not stems:
        return []
    index = {name: i for i, name in enumerate(frames.names)}
    if len(index) < len(frames.names):
        twice = next(name for name, count in Counter(frames.names).items() if count > 1)
        raise SampleError(f"{paths[0].parent}: the video has several frames of one name, {twice}")
    is_container = isinstance(frames, ContainerFrames)
    if not is_container and all(stem in index for stem in stems):
        return [Match(index[stem], "") for stem in stems]
    numbers = _frame_numbers(frames.names)
    objects = [""] * len(stems) if objects is None else objects
    by_number = _match_numbers(numbers, stems, objects, len(frames) if is_container else None, paths[0].parent)
    if by_number is not None:
        return by_number
    found = []
    for stem, path in zip(stems, paths, strict=True):
        last = int((re.findall(r"\d+", stem) or [-1])[-1])
        if stem in index:
            found.append(Match(index[stem], ""))
        elif (match := _containing(index, stem)) is not None:
            found.append(match)
        elif numbers is not None and last in numbers:
            found.append(Match(numbers[last], ""))
        else:
            wanted = f"named {stem} or numbered {last}" if last >= 0 and numbers else f"of this name ({stem})"
            raise SampleError(f"{path}: no frame {wanted}; {_known(frames.names)}")
    return found


def _known(names: Sequence[str]) -> str:
    return f"the frames are {names[0]} to {names[-1]}" if len(names) > 1 else f"the only frame is {names[0]}"


def _numbers(name: str) -> list[re.Match[str]]:
    return list(re.finditer(r"\d+", name))


def _frame_numbers(names: Sequence[str]) -> dict[int, int] | None:
    """Number -> frame index, by the last of the numbers in the names that tells all of them apart."""
    found = [_numbers(name) for name in names]
    for position in range(1, min(map(len, found), default=0) + 1):
        values = {int(numbers[-position].group()): i for i, numbers in enumerate(found)}
        if len(values) == len(names):
            return values
    return None


def _match_numbers(
    numbers: Mapping[int, int] | None,
    stems: Sequence[str],
    objects: Sequence[str],
    container_length: int | None,
    folder: Path,
) -> list[Match] | None:
    """Matches by the number in each name whose values are all those of frames, if there is one."""
    if numbers is None:
        return None
    found = [_numbers(stem) for stem in stems]
    count = min(map(len, found), default=0)
    candidates = []
    for position in [*range(-1, -count - 1, -1), *range(count)]:
        chosen = [numbers_of[position] for numbers_of in found]
        values = [int(match.group()) for match in chosen]
        first = 0 if container_length is None else _first_number(set(values), container_length)
        if any(value - first not in numbers for value in values):
            continue
        rests = [stem[: m.start()] + stem[m.end() :] for stem, m in zip(stems, chosen, strict=True)]
        matches = [Match(numbers[value - first], rest) for value, rest in zip(values, rests, strict=True)]
        if len(set(zip(matches, objects, strict=True))) == len(matches):
            candidates.append((_plausibility(matches, chosen), values, matches))
    if not candidates:
        return None
    _, values, matches = max(candidates, key=lambda candidate: candidate[0])
    if container_length is not None and 0 not in values and max(values) != container_length:
        warnings.warn(
            f"{folder}: masks {min(values)} to {max(values)} of a video file with {container_length} frames are taken "
            f"as counted from {_first_number(set(values), container_length)}",
            stacklevel=2,
        )
    return matches


def _plausibility(matches: Sequence[Match], chosen: Sequence[re.Match[str]]) -> tuple[bool, bool, int, int]:
    """How well a number of the names serves as that of frames: the others are then those of objects."""
    same_rest = len({match.rest for match in matches}) == 1
    is_object = any(OBJECT_WORDS.search(number.string[: number.start()]) for number in chosen)
    frames = len({match.frame for match in matches})
    return same_rest, not is_object, frames, max(len(number.group()) for number in chosen)


def _first_number(values: set[int], length: int) -> int:
    """Whether masks of a video file count its frames from 0, or from 1 as ffmpeg names what it extracts."""
    return int(0 not in values and (length in values or 1 in values))


def _containing(index: Mapping[str, int], stem: str) -> Match | None:
    """The frame with the longest name that a mask's name begins or ends with."""
    found = {name: re.fullmatch(rf"{re.escape(name)}([\W_].*)|(.*[\W_]){re.escape(name)}", stem) for name in index}
    names = [name for name, match in found.items() if match]
    if not names:
        return None
    name = max(names, key=len)
    return Match(index[name], "".join(filter(None, found[name].groups())))


def split_by_prefix(frames: Sequence[Path], masks: Sequence[MaskFile]) -> dict[str, tuple[list[Path], list[MaskFile]]]:
    """Videos whose images lie in one folder: name before the last number -> its frames and masks.

    Empty where the names are those of one video: one name alone, one that a single image has, or a mask of none.
    """
    groups: dict[str, tuple[list[Path], list[MaskFile]]] = {}
    for path in frames:
        prefix = re.sub(r"\d+\D*$", "", path.stem).strip(" _-.")
        groups.setdefault(prefix, ([], []))[0].append(path)
    if len(groups) < 2 or "" in groups or min(len(images) for images, _ in groups.values()) < 2:
        return {}
    for mask in masks:
        names = [name for name in groups if re.search(rf"(^|[\W_]){re.escape(name)}([\W_\d]|$)", mask.path.stem)]
        if not names:
            return {}
        groups[max(names, key=len)][1].append(mask)
    return {name: group for name, group in groups.items() if group[1]}
