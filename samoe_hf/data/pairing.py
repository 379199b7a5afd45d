"""Which mask belongs to which frame, and to which object, by the names of the files.

A mask belongs to the frame whose name it has, or holds (`00001_obj2.png`), or whose numbers it has (`mask_1.png` for
`frame_0001.jpg`): the most exact of these ways that fits all masks of a video. What a name has beside that tells the
object, as a folder does (`2/00001.png`, `00001/2.png`). Where names can be read in two ways that differ, they are
refused.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import mul
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .annotations import Annotations, LabelImages, ObjectImages
from .containers import ContainerFrames
from .frames import FrameSequence, SampleError, natural_key, one_form
from .image_files import Page, image_info
from .images import ImageFrames, read_label_png

FRAME_WORDS = r"(?i:frames?|images?|imgs?|jpegimages|pictures?|rgb|colou?r|inputs?|raw|videos?)"
MASK_WORDS = (
    r"(?i:masks?|labels?|gt|ground[\W_]?truths?|truth|anns?|annos?|annotations?|segs?|segm|segmentations?"
    r"|segmentation[\W_]?object(?:png)?)"
)
OBJECT_WORDS = r"(?i:(?<![a-z])(?:obj|object|id|inst|instance)s?(?![a-z]))"
BEFORE_FRAMES = re.compile(r"(?i)(?<![a-z])(?:frames?|images?|img|f|t)[\W_]*$")
# A word of objects, or letters right before a number that are no word of frames or masks (`person2`).
BEFORE_OBJECTS = re.compile(
    rf"{OBJECT_WORDS}[\W_]*$|(?i:(?<![a-z])(?!(?:frames?|images?|imgs?|f|t|m|masks?|labels?|gt|segs?)$)[a-z]+$)"
)
# Words at an end of the name of a picture that tools write beside a mask.
PICTURE_WORDS = r"vi[sz]|visual\w*|colou?r\w*|overlay\w*|blend\w*|previews?|thumb\w*|rgb|heatmap|human"
CLASS_WORDS = r"semantic\w*|class\w*|categor\w*|label(?:train)?ids?"  # of label images beside those of instances
INSTANCE_WORDS = r"(?i)(?:^|[\W_])instance"
# A date and a time, or a number.
DAY = r"(?:(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:[0-2]\d|3[01])|[0-3]\d([-_.])[0-3]\d\2(?:19|20)\d\d)"
TIME = r"(?:[01]\d|2[0-3])[-_.:hH]?[0-5]\d[-_.:mM]?[0-5]\d[-_.:sS]?\d*"
CLOCK = r"^\d\d[-_:]\d\d[-_:]\d\d(?:\.\d+|[-:]\d{3})?(?!\d)"  # with milliseconds, or without
NUMBER = rf"{DAY}[-_.T ]{{1,3}}{TIME}|{CLOCK}|\d{{9,}}[-_.]\d+|^\d+\.\d+|\d+"
# Ends of names that are times where they lie at even distances, and what their numbers count, in the last one's unit.
TIMES = (
    (r"(.*\D)?(\d\d)[-_.:](\d\d)[-_.:](\d\d)[-.:](\d{3})", (3_600_000, 60_000, 1000, 1)),
    (r"(.*\D)?(\d\d)[-_.:](\d\d)[-_.:](\d\d)", (3600, 60, 1)),
    (r"(.*\D)?(\d+)[-.:](\d{3})", (1000, 1)),
)
ROBOFLOW = re.compile(r"_[A-Za-z]{3,4}\.rf\.\w+?(?=_mask$|$)")
LABEL_STUDIO = re.compile(r"task-\d+-annotation-")
HINT = 'name them: `masks` takes a pattern such as "masks/{video}/{frame}_{object}.png"'


class MaskFile(NamedTuple):
    """A mask of a video: an image or a page of one, and what is told of it otherwise than by the image's name."""

    path: Path
    object_name: str | None = None
    frame_name: str | int | None = None  # or its number
    folder: str | None = None  # its folder's name, where that may be the object's or the frame's
    page: int | None = None

    @property
    def image(self) -> Path | Page:
        """What is read."""
        return self.path if self.page is None else Page(self.path, self.page)


@dataclass
class Source:
    """Where a video's files are: a video file or images in order, and masks of any of its frames.

    All masks tell object and frame in the same way.
    """

    frames: Path | list[Path]
    masks: list[MaskFile] = field(default_factory=list)


class Told(NamedTuple):
    """What a mask's name tells: where its frame's name or number begins and ends, and which frame or number it is."""

    text: str
    start: int
    end: int
    frame: int

    @property
    def part(self) -> str:
        return self.text[self.start : self.end]

    @property
    def before(self) -> str:
        return self.text[: self.start]

    @property
    def behind(self) -> str:
        return self.text[self.end :]

    def overlaps(self, other: Told) -> bool:
        """Whether both are of one name, and of the same part of it."""
        return self.text == other.text and self.start < other.end and other.start < self.end


def pair_masks(
    frames: FrameSequence, masks: Sequence[MaskFile], first: Literal[0, 1] | None = None, **values: Any
) -> Annotations:
    """The annotations of a video.

    Args:
        masks: a label image for each frame, or a binary image for each object and frame, or files of several pages, see
            [`pages_of`]. Frames may have none.
        first: the number that masks give the first frame; by default, what the frames' names say.
        values: `binary` and `ignore_ids` of [`LabelImages`].

    Raises:
        SampleError: a mask without a frame, two of one frame (and object), or names that can be read in several ways.
    """
    masks, notes = _without_pictures(masks)
    if are_pages := is_stack(masks[0].path):
        masks = pages_of(frames, masks, first or 0, notes, **values)
    if isinstance(masks[0].frame_name, int):
        first = first or 0
    pairs = list(zip(masks, _Names(frames, first, notes).pair(masks), strict=True))
    of_names: dict[str | None, dict[int, MaskFile]] = {}
    for mask, (frame, name) in pairs:
        before = of_names.setdefault(name, {}).setdefault(frame, mask)
        if before is not mask:
            whose = "" if name is None else f" of object {name}"
            raise SampleError(f"{mask.image}: frame {frames.names[frame]} has another mask{whose}, {before.image}")
    images = {name: {frame: mask.image for frame, mask in own.items()} for name, own in of_names.items()}
    ids = object_ids([name for name in images if name is not None])
    if not ids:
        annotations: Annotations = LabelImages(images[None], **values)
    elif None in images:
        stray = next(iter(images[None].values()))
        raise SampleError(f"{stray}: names no object, as other masks of the video do, such as {masks[0].path.name}")
    else:
        annotations = ObjectImages({ids[name]: own for name, own in images.items() if name is not None}, **values)
    for note in notes:
        annotations.note(note)
    if not are_pages and (ids or any(frames.names[frame] != mask.path.stem for mask, (frame, _) in pairs)):
        for mask, (frame, name) in dict.fromkeys((pairs[0], pairs[-1])):
            whose = "" if name is None else f"object {ids[name]} of "
            annotations.notes.append(f"{'/'.join(mask.path.parts[-3:])}: {whose}frame {frame} ({frames.names[frame]})")
    return annotations


def object_ids(names: Sequence[str]) -> dict[str, int]:
    """Name of each object -> id above 0: a number that tells them apart, plus 1 where one is 0; else their order."""
    values = [int(number) for number in _telling_numbers(names)]
    if values:
        return {name: value + (0 in values) for name, value in zip(names, values, strict=True)}
    return {name: place for place, name in enumerate(sorted(names, key=natural_key), 1)}


def _telling_numbers(names: Sequence[str]) -> list[str]:
    """The last number of each name, or one before it, in which all differ; none where there is no such."""
    found = [re.findall(r"\d+", name) for name in names]
    for position in range(1, min(map(len, found), default=0) + 1):
        numbers = [own[-position] for own in found]
        if len({int(number) for number in numbers}) == len(names):
            return numbers
    return []


def plain_name(stem: str) -> str:
    """A file's name, to compare it, without what tools add: a second suffix (`00001.jpg.png`), Roboflow's hash."""
    return re.sub(r"(?i)\.(?:jpe?g|png|bmp|tiff?|webp)$", "", ROBOFLOW.sub("", one_form(stem)))


def _without_pictures(masks: Sequence[MaskFile]) -> tuple[Sequence[MaskFile], list[str]]:
    """The masks without pictures of masks (`00001_vis.png`), where there are others; and a sentence that says so."""
    words = PICTURE_WORDS
    if any(re.search(INSTANCE_WORDS, mask.path.stem) for mask in masks):
        words += f"|{CLASS_WORDS}"
    picture = re.compile(rf"(?i)(?:{words})(?:[\W_].*)?|(?:.*[\W_])?(?:{words})")
    kept = [m for m in masks if not picture.fullmatch(m.path.stem) and not picture.fullmatch(m.folder or "")]
    if not kept or len(kept) == len(masks):
        return masks, []
    left = next(mask for mask, stays in zip(masks, [*kept, None], strict=False) if mask is not stays)
    return kept, [f"{len(masks) - len(kept)} files such as {left.path} are taken for pictures of masks and left out"]


class _Names:
    """The frames of a video by their names and numbers."""

    def __init__(self, frames: FrameSequence, first: int | None, notes: list[str]):
        self.names = [plain_name(name) for name in frames.names]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.length, self.first, self.notes = len(frames), first, notes
        self.is_file = isinstance(frames, ContainerFrames) or (isinstance(frames, ImageFrames) and frames.has_pages)
        self.is_counted = self.is_file or first is not None
        self.of_number, self.written = self._numbers_of_frames()

    def pair(self, masks: Sequence[MaskFile]) -> list[tuple[int, str | None]]:
        """The frame's index, and the object's name (None where a frame has one image), of each mask."""
        if len(self.index) < self.length:
            twice = Counter(self.names).most_common(1)[0][0]
            raise SampleError(f"{masks[0].path.parent}: the video has several frames of one name, {twice}")
        is_named = masks[0].frame_name is not None
        stems = [plain_name(str(mask.frame_name) if is_named else mask.path.stem) for mask in masks]
        if LABEL_STUDIO.match(stems[0]):
            raise SampleError(f"{masks[0].path}: Label Studio's masks name tasks instead of frames; export its JSON")
        folders = [one_form(mask.folder or "") for mask in masks]
        told = self._choose(masks, [stems, folders] if all(folders) and not is_named else [stems])
        frames = self._frames(told, masks)
        if is_named or masks[0].object_name is not None:
            return [(frame, mask.object_name) for frame, mask in zip(frames, masks, strict=True)]
        of_stems = [one.text for one in told] == stems
        rests = [
            (f"{folder}/{one.before}{one.behind}" if of_stems
             else f"{one.before}{one.behind}/{stem.removeprefix(folder) or stem}").strip("/")
            for one, stem, folder in zip(told, stems, folders, strict=True)
        ]  # fmt: skip
        is_told = self._tells_objects(frames, rests, masks, of_stems and folders[0])
        return [(frame, rest if is_told else None) for frame, rest in zip(frames, rests, strict=True)]

    # --- Which part of a name is the frame's

    def _choose(self, masks: Sequence[MaskFile], parts: Sequence[Sequence[str]]) -> list[Told]:
        """What each mask tells of its frame, in the most exact way that fits all masks.

        Args:
            parts: the names of all masks, and of their folders if these may be the frames'.
        """
        for of_objects in (False, True):
            ways: list[list[Told]] = []
            for level in self._levels():
                for way in (way for texts in parts for way in level(texts)):
                    is_known = any(all(one.overlaps(other) for one, other in zip(way, w, strict=True)) for w in ways)
                    if not is_known and (of_objects or not any(BEFORE_OBJECTS.search(one.before) for one in way)):
                        ways.append(way)
                if ways and not any(one.part.isdecimal() and len(one.part) < 3 for one in ways[0]):
                    break  # else it may be an object's number, and what is less exact the frame's
            ways = [way for way in ways if all(BEFORE_FRAMES.search(one.before) for one in way)] or ways
            if len(ways) > 1:
                one, other = (way[-1].part for way in ways[:2])
                raise SampleError(f"{masks[-1].path}: both {one!r} and {other!r} may be its frame or object; {HINT}")
            if ways:
                return ways[0]
        named = zip((mask.path for mask in masks), parts[0], strict=True)
        unknown = (one for one in named if not any(level([one[1]]) for level in self._levels()))
        path, name = next(unknown, (masks[0].path, parts[0][0]))
        last = (_numbers(name) or (-1,))[-1]
        is_numbered = last >= 0 and self.of_number
        wanted = f"named {name} or numbered {last}" if is_numbered else f"of this name ({name})"
        hint = f"{HINT}, `first` the number that masks give the first frame" if is_numbered else HINT
        raise SampleError(f"{path}: no frame {wanted}; the frames are {self.names[0]} to {self.names[-1]}; {hint}")

    def _levels(self) -> Iterator[Callable[[Sequence[str]], list[list[Told]]]]:
        """Ways to read names, the most exact first; each gives the readings that fit all of some names."""
        if self.first is None:
            yield self._held
            if not self.is_file:
                yield self._all_numbers
        yield lambda texts: self._number_at(texts, self._is_written)
        yield lambda texts: self._number_at(texts, lambda number: int(number) in self.of_number)

    def _held(self, texts: Sequence[str]) -> list[list[Told]]:
        """The frame's name is at the beginning of each name (or all of it), at the end, or within."""
        held = [self._names_in(text) for text in texts]
        places = (lambda one: not one.before, lambda one: not one.behind, lambda one: one.before and one.behind)
        ways = [[next(filter(place, own), None) for own in held] for place in places]
        return [[*filter(None, way)] for way in ways if all(way)]

    def _names_in(self, text: str) -> list[Told]:
        """Frames' names within a name, between characters such as `_`, the longest first."""
        borders = [match.start() for match in re.finditer(r"[\W_]|$", text)]
        starts = [0, *(border + 1 for border in borders[:-1])]
        spans = sorted(((s, e) for s in starts for e in borders if s < e), key=lambda span: span[0] - span[1])
        return [Told(text, s, e, self.index[text[s:e]]) for s, e in spans if text[s:e] in self.index]

    def _all_numbers(self, texts: Sequence[str]) -> list[list[Told]]:
        """The numbers in a name are those of one frame."""
        frames = {numbers: i for i, name in enumerate(self.names) if (numbers := _numbers(name))}
        if len(frames) < self.length or not all(_numbers(text) in frames for text in texts):
            return []
        spans = [[match.span() for match in re.finditer(r"\d+", text)] for text in texts]
        own = zip(texts, spans, strict=True)
        return [[Told(text, span[0][0], span[-1][1], frames[_numbers(text)]) for text, span in own]]

    def _number_at(self, texts: Sequence[str], fits: Callable[[str], bool]) -> list[list[Told]]:
        """A number of each name, the same one from the left or from the right, is a frame's."""
        found = [
            [Told(text, *match.span(), self.of_number.get(int(match[0]), -1)) for match in re.finditer(r"\d+", text)]
            for text in texts
        ]
        count = min(map(len, found))
        ways = [[told[position] for told in found] for position in (*range(-1, -count - 1, -1), *range(count))]
        ways = [way for way in ways if all(fits(one.part) for one in way)]
        common = len(commonprefix([*texts, *self.names]))  # noqa: RUF071 (characters; numbers within are a camera's)
        ways = [way for way in ways if way[0].end > common] or ways
        # What is before the number, or behind it, is the same in all names.
        even = [way for way in ways if len({t.before for t in way}) == 1 or len({t.behind for t in way}) == 1]
        return even or ways

    def _is_written(self, number: str) -> bool:
        """Whether a number is written as a frame's is, with its zeros; of a video file, as frames usually are."""
        return len(number) > 2 and int(number) in self.of_number if self.is_counted else number in self.written

    # --- Which frame it is

    def _numbers_of_frames(self) -> tuple[dict[int, int], set[str]]:
        """Number -> frame, and as they are written, of the last numbers in the names that tell all of them apart."""
        if self.is_counted:  # from 0 or from 1, as is known when all masks are
            return {number: number for number in range(self.length + 1)}, set()
        numbers = _telling_numbers(self.names)
        return {int(number): i for i, number in enumerate(numbers)}, set(numbers)

    def _frames(self, told: Sequence[Told], masks: Sequence[MaskFile]) -> list[int]:
        """The frames that names tell."""
        values = [one.frame for one in told]
        if not self.is_counted:
            return values
        first = self.first if self.first is not None else self._first(values, [one.part for one in told], masks)
        for value, mask in zip(values, masks, strict=True):
            if not 0 <= value - first < self.length:
                raise SampleError(
                    f"{mask.path}: no frame numbered {value}; there are {self.length} frames, counted from {first} "
                    "(`first` tells another number)"
                )
        return [value - first for value in values]

    def _first(self, values: Sequence[int], parts: Sequence[str], masks: Sequence[MaskFile]) -> int:
        """The number of a video file's first frame: 0 where a mask has it, 1 where one has that behind the last."""
        if 0 in values or self.length in values:
            return int(0 not in values)
        which = f"masks {min(values)} to {max(values)} of a video file of {self.length} frames"
        if not all(part in self.index for part in parts):
            raise SampleError(
                f"{masks[0].path}: {which} may count from 0 or, as ffmpeg does, from 1; say `first: 0` or `first: 1`"
            )
        self.notes.append(f"{masks[0].path.parent}: {which} are taken as counted from 0; `first: 1` counts from 1")
        return 0

    # --- Whose mask it is

    def _tells_objects(
        self, frames: Sequence[int], rests: Sequence[str], masks: Sequence[MaskFile], folder: str | Literal[False]
    ) -> bool:
        """Whether what names have beside the frame tells objects apart; `folder` is the first one's, if beside."""
        kinds = set(rests)
        if len(kinds) == 1:
            return bool(re.search(r"\d", folder or "") or re.search(rf"{OBJECT_WORDS}[\W_]*\d", rests[0]))
        has_words = all(re.search(OBJECT_WORDS, rest) for rest in rests)
        if masks[0].folder is not None or has_words or (all(kinds) and max(Counter(frames).values()) > 1):
            return True
        one, other = (masks[rests.index(rest)].path for rest in sorted(kinds)[:2])
        raise SampleError(f"{other}: unlike {one.name}, it names something beside its frame, perhaps an object; {HINT}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def split_by_name(source: Source) -> dict[str, Source]:
    """Videos whose images lie in one folder: what names have beside the last number or time -> its frames and masks.

    Empty where all have the same beside the number, or one image alone has it. A mask that names none of several videos
    is a `SampleError`.
    """
    groups: dict[tuple[str, str], tuple[list[Path], list[MaskFile]]] = {}
    for path in source.frames if isinstance(source.frames, list) else ():
        stem = plain_name(path.stem)
        number = re.search(rf"(?:{NUMBER})(?=\D*$)", stem)
        parts = (stem[: number.start()], stem[number.end() :]) if number else (stem, "")
        groups.setdefault((parts[0].strip(" _-."), parts[1].strip(" _-.")), ([], []))[0].append(path)
    if len(groups) < 2 or ("", "") in groups or min(len(images) for images, _ in groups.values()) < 2:
        return {}
    if _are_times([path.stem for images, _ in groups.values() for path in images]):
        return {}
    # A mask is looked up by the parts that it has, and not compared with each video.
    order = {parts: place for place, parts in enumerate(groups)}
    counts = Counter(part for parts in groups for part in parts if part)
    with_part: dict[str, list[tuple[str, str]]] = defaultdict(list)  # by the part that fewer of them have
    for parts in groups:
        with_part[min(filter(None, parts), key=counts.__getitem__)].append(parts)
    lengths = {len(part) for part in counts}
    for mask in source.masks:
        text = f"{one_form(mask.folder or '')}/{plain_name(mask.path.stem)}"
        starts = [match.start() for match in re.finditer(r"(?<![^\W_])", text)]
        held = {text[s : s + n] for s in starts for n in lengths if re.match(r"[\W_\d]|$", text[s + n :])}
        own = [parts for part in held for parts in with_part.get(part, ()) if held.issuperset(filter(None, parts))]
        if not own:
            names = ", ".join(" ".join(filter(None, parts)) for parts in sorted(groups)[:3])
            raise SampleError(
                f"{mask.path}: names none of the {len(groups)} videos whose frames are beside each other in "
                f"{groups.popitem()[1][0][0].parent} ({names}); if they are one, {HINT}"
            )
        groups[min(own, key=lambda parts: (-len("".join(parts)), order[parts]))][1].append(mask)
    return {"_".join(filter(None, parts)): Source(*files) for parts, files in groups.items() if files[1]}


def _are_times(stems: Sequence[str]) -> bool:
    """Whether names are times of one video, at even distances: `cam-12-30-45`, or seconds and milliseconds, `11-250`.

    Distances of 1 are none of times where a group is as long as its numbers allow, as a clip of 60 frames is.
    """
    for pattern, units in TIMES:
        found = [match for stem in stems if (match := re.fullmatch(pattern, stem))]
        if len(found) == len(stems) and len({match[1] for match in found}) == 1:
            numbers = (map(int, match.groups()[1:]) for match in found)
            times = sorted(sum(map(mul, own, units)) for own in numbers)
            steps = [after - before for before, after in pairwise(times)]
            is_full = times[0] % units[-2] == 0 and (times[-1] + 1) % units[-2] == 0
            return max(steps) <= 1.5 * min(steps) and not (is_full and min(steps) == 1)
    return False


# --- Masks in files of several pages


def is_stack(path: Path) -> bool:
    """Whether an image file has several pages; not where it is damaged, which is said when it is read."""
    try:
        return len(image_info(path).pages) > 1
    except (SampleError, FileNotFoundError):
        return False


def pages_of(
    frames: FrameSequence, masks: Sequence[MaskFile], first: int, notes: list[str], **values: Any
) -> list[MaskFile]:
    """The pages of masks that are files of several pages, each with its frame, and its object if it is of one.

    A file with as many pages as the video has frames has their masks in order: of all objects if it is the only one,
    else of one object. Else a file is of a frame, and its pages are of objects: that of their value, or of their place
    if they have one value. Others are a `SampleError`. What is guessed goes into `notes`.
    """
    pages = {mask.path: image_info(mask.path).pages for mask in masks}
    path, *others = pages
    if others:
        of_objects = {mask.path: mask.object_name or mask.path.stem for mask in masks}
        note = f"{path.parent}: each file has the masks of an object, a page for each frame"
    else:
        of_objects, note = {}, f"{path}: its pages are the masks of the video's frames, in order"
    if all(len(own) == len(frames) for own in pages.values()):
        if not others or not {path.stem for path in pages} <= set(frames.names):
            notes.append(note)
            numbered = ((path, t, page) for path, own in pages.items() for t, page in enumerate(own, first))
            return [MaskFile(path, of_objects.get(path), t, page=page) for path, t, page in numbered]
    elif not others and len(frames) > 1:
        raise SampleError(f"{path}: {len(pages[path])} pages for {len(frames)} frames; a mask is expected for each")
    return _pages_of_frames(masks, pages, notes, **values)


def _pages_of_frames(
    masks: Sequence[MaskFile], pages: Mapping[Path, Sequence[int]], notes: list[str], **values: Any
) -> list[MaskFile]:
    """The pages of masks that are a frame's each."""
    value_of = {(path, page): _value_of(Page(path, page), **values) for path, own in pages.items() for page in own}
    present = {*value_of.values()} - {0}
    by_value = len(present) > 1 and not values.get("binary")
    counts = {len(own): path for path, own in pages.items()}
    if not by_value and len(counts) > 1:
        few, many = min(counts), max(counts)
        raise SampleError(f"{counts[few]}: {few} pages, but {counts[many]} has {many}: which page is which object's?")
    told = "the values of the pages" if by_value else "the pages' numbers, from 1"
    notes.append(f"{masks[0].path.parent}: a file has the masks of a frame; objects are {told}")
    found = []
    for path, _, frame_name, *_ in masks:
        named = enumerate(pages[path], 1)
        if by_value:
            own = [(value_of[path, page], page) for page in pages[path] if value_of[path, page]]
            named = own or [(min(present), pages[path][0])]  # no object is on this frame
        found += [MaskFile(path, str(name), frame_name or path.stem, page=page) for name, page in named]
    return found


def _value_of(page: Page, binary: bool | None = None, ignore_ids: Collection[int] | None = None) -> int:
    """The value of the object on a page, 0 where there is none."""
    present = np.setdiff1d(read_label_png(page), [0, *(ignore_ids or ())]).tolist()
    if len(present) > 1 and not binary:
        raise SampleError(f"{page}: holds the values {present[:5]}; expected the mask of one object on each page")
    return present[0] if present else 0
