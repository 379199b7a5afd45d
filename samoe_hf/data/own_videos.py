"""Videos of one's own, in folders as people keep them: found by a table of patterns, by two patterns, or by a list."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice, product
from pathlib import Path
from typing import Any, Literal

from samoe_hf.errors import InputError

from .frames import SampleError, bare_name, frame_order, natural_key, one_form, say_once
from .image_files import IMAGE_SUFFIXES, describe_unread, open_image
from .images import ImageFrames
from .layouts import choose_split, has_words
from .pair_lists import LIST_SUFFIXES, read_pairs
from .pairing import FRAME_WORDS, MASK_WORDS, PICTURE_WORDS, MaskFile, Source, is_stack, pair_masks, split_by_name
from .schema import Video, VideoList
from .video_io import VIDEO_SUFFIXES, read_video

logger = logging.getLogger(__name__)

# What stands for what in a pattern. Those of the second group are for `PATTERNS` alone.
TOKENS = {"*": r"[^/]*", "{video}": r".+?", "{object}": r"[^/]+?", "{frame}": r"[^/]+?"}
GUESSED_TOKENS = {
    "{frames}": rf"(?<![^\W_]){FRAME_WORDS}(?![^\W_])",
    "{masks}": rf"(?<![^\W_]){MASK_WORDS}(?![^\W_])",
    "{part}": r"[^/]+",
    "{folder}": r"[^/]+",
    "{sep}": r"[ _.-]",
    "{movie}": rf"(?i:{'|'.join(suffix[1:] for suffix in VIDEO_SUFFIXES)})",
    "{jpeg}": r"(?i:jpe?g)",
    "{png}": r"(?i:png|bmp|tiff?)",
}
# Layouts of frames and masks, the first that fits is taken. `**/` is any number of folders, and part of the video's
# name. Masks may also be in a folder for each object, or each frame. Masks that no word tells must be images
# of ids.
PATTERNS = (
    ("**/{frames}/*", "**/{masks}/*"),
    ("**/{frames}/**/*", "**/{masks}/**/*"),
    ("**/{frames}/**/{video}.{movie}", "**/{masks}/**/{video}/*"),
    ("**/{video}.{movie}", "**/{masks}/**/{video}/*"),
    ("**/{video}.{movie}", "**/{video}/{masks}/*"),
    ("**/*.{movie}", "**/{masks}/*"),
    ("**/*", "**/{masks}/*"),
    ("**/{video}/*", "**/{video}{sep}{masks}/*"),
    ("**/{folder}/*", "**/{masks}/*"),
    ("{folder}/**/*", "{masks}/**/*"),
    ("**/{video}{sep}{frames}/*", "**/{video}{sep}{masks}/*"),
    ("**/{frames}{sep}{video}/*", "**/{masks}{sep}{video}/*"),
    ("**/{video}{sep}{frames}.{movie}", "**/{video}{sep}{masks}/*"),
    ("**/{video}.{movie}", "**/{video}{sep}{masks}/*"),
    ("**/*{frames}*/*", "**/*{masks}*/*"),
    ("**/*.{movie}", "**/*{masks}*/*"),
    ("**/*", "**/*{masks}*/*"),
    ("**/*", "**/*{masks}*"),
    ("**/{video}.{movie}", "**/{video}/*"),
    ("**/*.{jpeg}", "**/*.{png}"),
)
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
EXPECTED = (
    "{video}/frames/* with {video}/masks/*; frames/{video}/* with masks/{video}/*; videos/{video}.mp4 with "
    "masks/{video}/*; frames and masks in one folder; a CSV or JSON of pairs; or the layout of a public dataset "
    "(`frames` may also be called images, JPEGImages, rgb, …, and `masks` labels, Annotations, gt, …)"
)
# What tools export that holds no masks as images, and words that its files have.
EXPORTS = {
    "an export of VIA (VGG Image Annotator)": "shape_attributes region",
    "an export of Supervisely": '"classTitle" "objects"',
    "an export of Datumaro": '"items" "categories" "infos"',
    "a file of boxes, as Pascal VOC has them": "<annotation> <bndbox>",
}
COCO = '"images" "annotations" "categories" "segmentation"'
EXPORT_SUFFIXES = (*LIST_SUFFIXES, ".xml")
MAX_NAMED, MAX_LISTED = 8, 100_000


def read_files(
    root: str | Path,
    split: str | None = None,
    frames: str | None = None,
    masks: str | None = None,
    binary: bool | None = None,
    ignore_ids: Collection[int] | None = None,
    first: Literal[0, 1] | None = None,
) -> VideoList:
    """Videos of one's own: frames as images or video files, and masks as images, in folders of any names.

    Masks belong to frames by their names, see `samoe_hf.data.pairing`. A frame has one label image, or one image for
    each object. Videos without masks are left out, and named.

    Args:
        root: the folder, or a CSV or JSON file with a row for each frame (`frame`, `mask`, `video`, `object`).
        split: the folder of a split (train, val, …), below or beside those of frames and masks; of several, the
            training split by default.
        frames: where the frames are, such as `{video}/pictures/*.jpg` or `clips/{video}.mp4`; `**/` is any number of
            folders.
        masks: where the masks are, such as `masks/{video}/{object}/*.png` or `{video}/{frame}_{object}.png`. A last
            folder `*` is each object's or each frame's.
        binary: True if every value above 0 is the object; False if white is an id as others are. By default, masks of
            black and white are one object.
        ignore_ids: values that are no objects. By default, white beside other ids.
        first: the number that masks give the first frame, 0 or 1. By default, masks have the numbers of frames; those
            of a video file count from 0 if there is a mask 0, and from 1 if there is one for the last frame then.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the layout is not recognized; says what was found, what was expected, and how to name it.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder")
    if (frames is None) != (masks is None):
        raise InputError("`frames` goes with `masks`; give both")
    if frames is not None and masks is not None:
        found = find_by_patterns(root, frames, masks)
    else:
        found = guess(root)
        count = f"{len(found.sources)} video{'s'[: len(found.sources) != 1]}"
        logger.warning("%s: %s, frames in %s, masks in %s", root, count, found.frames, found.masks)
    for reason, names in found.left_out.items():
        if names:
            more = f", … ({len(names)})" if len(names) > MAX_NAMED else ""
            shown = ", ".join(name or root.name for name in names[:MAX_NAMED])
            logger.warning("%s: %s: %s%s", root, reason, shown, more)
    sources = _of_split(found.sources, split, root)
    name = bare_name(root.resolve())
    while name in sources:  # the folder is a video, and one in it has its name
        name += "_"
    entries = {key or name: source for key, source in sources.items()}
    options = {"binary": binary, "ignore_ids": ignore_ids, "first": first}
    return VideoList(entries, partial(_open_source, options))


def _open_source(options: dict[str, Any], video_id: str, source: Source) -> Video:
    """Opens a video; all its errors name a file."""
    frames = read_video(source.frames) if isinstance(source.frames, Path) else ImageFrames(source.frames)
    return Video(video_id, frames, pair_masks(frames, source.masks, **options))


@dataclass
class Found:
    """Videos that were found by two patterns, which are as [`read_files`] takes them."""

    sources: dict[str, Source]  # by the videos' names; "" where the folder is one video
    frames: str
    masks: str
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> names of videos or files


@dataclass(eq=False)
class Folder:
    """A folder's images and videos; its path is relative to the root, in parts."""

    parts: tuple[str, ...]
    images: list[Path]
    videos: list[Path]
    stacks: list[Path]  # the images that have several pages, if the first one of their suffix has


def read_folders(root: Path) -> list[Folder]:
    """All folders within a folder that have images or videos; links are followed, but to a folder that they are in."""
    folders: list[Folder] = []
    for path, names, files in os.walk(root, followlinks=True):
        names[:] = sorted((n for n in names if not n.startswith((".", "__"))), key=natural_key)
        real = os.path.realpath(path)
        names[:] = [n for n in names if not Path(real).is_relative_to(os.path.realpath(os.path.join(path, n)))]
        paths = [Path(path, name) for name in sorted(files, key=natural_key) if not name.startswith(".")]
        images, videos = ([p for p in paths if p.suffix.lower() in kind] for kind in (IMAGE_SUFFIXES, VIDEO_SUFFIXES))
        if unread := describe_unread(paths):
            say_once(f"{path} holds {unread}")
        if overlays := [video for video in videos if _is_overlay(video)]:
            videos = [video for video in videos if video not in overlays]
            names_of = ", ".join(video.name for video in overlays[:5])
            say_once(f"{path}: left out, since `samoe track` has drawn masks into them: {names_of}")
        if images or videos:
            firsts = {image.suffix: image for image in reversed(images)}
            paged = [suffix for suffix, image in firsts.items() if is_stack(image)]
            stacks = [image for image in images if image.suffix in paged and is_stack(image)]
            folders.append(Folder(Path(path).relative_to(root).parts, images, videos, stacks))
    return folders


def _is_overlay(video: Path) -> bool:
    """Whether `samoe track` wrote it: its table of tracks lies beside it."""
    table = video.with_name(f"{video.stem}_tracks.csv")
    if not table.is_file():
        return False
    with table.open("rb") as file:
        return file.readline().startswith(b"frame,time,object,score,")


# --- Patterns


def find_by_patterns(root: Path, frames: str, masks: str) -> Found:
    """The videos whose frames and masks are where two patterns say."""
    for option, pattern in (("frames", frames), ("masks", masks)):
        unknown = set(re.findall(r"\{.*?\}|<\w+>", pattern)) - set(TOKENS)
        if not pattern or unknown or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            known = "*, {video}, {frame} and {object}"
            raise InputError(f"`{option}` must be a pattern below {root}, of {known}, got {pattern!r}")
    folders = read_folders(root)
    files = [path for folder in folders for path in (*folder.images, *folder.videos)]
    stacks = {path for folder in folders for path in folder.stacks}
    of_masks = match_files(root, files, masks) or match_files(root, files, masks, stacks)
    others = [path for path in files if path not in of_masks]
    of_frames = match_files(root, others, frames)
    videos = {names["video"] for names in of_frames.values()}
    if not videos or (stacks & of_frames.keys() and len(of_frames) > len(videos)):
        of_frames = match_files(root, others, frames, stacks) or of_frames
    for option, pattern, matched in (("frames", frames, of_frames), ("masks", masks, of_masks)):
        if not matched:
            raise InputError(f"`{option}`: no image or video below {root} is named by {pattern!r}")
    found = _join(root, files, of_frames, of_masks, frames, masks)
    if not found.sources:
        some = [next(iter(matched.values()))["video"] for matched in (of_frames, of_masks)]
        raise InputError(f"`frames` and `masks` name no video in common: {some[0]!r} and {some[1]!r} below {root}")
    return found


def match_files(
    root: Path, files: list[Path], pattern: str, stacks: Collection[Path] = ()
) -> dict[Path, dict[str, str]]:
    """The files whose path below `root` is as a pattern says -> what stands for its names; "video" is always one.

    Those among `stacks` are taken for folders of their pages.
    """
    expression, tokens, folders = "", TOKENS | GUESSED_TOKENS, 0
    pattern = re.sub(r"(^|/)\*(/[^/]*)$", r"\1{part}\2", pattern)
    for part in re.split(r"(\{\w+\}|\*\*/|\*)", pattern):
        name = part.strip("{}")
        if part == "**/":
            expression += rf"(?P<folders{folders}>(?:[^/]+/)*?)"
            folders += 1
        elif part not in tokens or part == "*":
            expression += tokens.get(part) or re.escape(part)
        elif f"(?P<{name}>" in expression:
            expression += f"(?P={name})"
        else:
            expression += f"(?P<{name}>{r'[^/]+?' if part == '{video}' and folders else tokens[part]})"
    compiled, matched = re.compile(one_form(expression)), {}
    for path in files:
        place = path.with_suffix("") / "0" if path in stacks else path
        match = compiled.fullmatch(one_form(place.relative_to(root).as_posix()))
        if match:
            names = match.groupdict()
            above = "".join(names[f"folders{i}"] for i in range(folders))
            matched[path] = names | {"video": f"{above}{names.get('video', '')}".rstrip("/")}
    return matched


def _join(
    root: Path,
    files: Iterable[Path],
    of_frames: Mapping[Path, Mapping[str, str]],
    of_masks: Mapping[Path, Mapping[str, str]],
    frames: str,
    masks: str,
) -> Found:
    """The videos that have both frames and masks, in natural order."""
    paths: dict[str, list[Path]] = defaultdict(list)
    mask_files: dict[str, list[MaskFile]] = defaultdict(list)
    for path, names in of_frames.items():
        paths[names["video"]].append(path)
    for path, names in of_masks.items():
        mask_files[names["video"]].append(MaskFile(path, names.get("object"), names.get("frame"), names.get("part")))
    sources = {}
    for key in sorted(paths.keys() & mask_files.keys(), key=natural_key):
        first, *others = paths[key]
        is_video = first.suffix.lower() in VIDEO_SUFFIXES
        if is_video and others:
            raise InputError(f"`frames`: {first} and {others[0]} are both named by {frames!r}, as one video")
        by_folder = groupby(paths[key], lambda path: path.parent)  # which may hold other files
        own = first if is_video else [path for _, files_in in by_folder for path in frame_order(files_in)]
        sources[key] = Source(own, mask_files[key])
    left_out = {
        "left out for want of masks": [key for key in paths if key not in mask_files],
        "left out for want of frames": [key for key in mask_files if key not in paths],
        "neither frames nor masks": [
            path.relative_to(root).as_posix() for path in files if path not in of_frames and path not in of_masks
        ],
    }
    return Found(sources, frames, masks, left_out)


# --- Guesses


def guess(root: Path) -> Found:
    """The videos of a list of pairs, or of a folder, by the one list in it, or by the first of `PATTERNS` that fits."""
    if root.is_file():
        if root.suffix.lower() in LIST_SUFFIXES:
            return _by_list(root)
        raise InputError(f"{root}: a folder is expected, or a list of pairs ({', '.join(LIST_SUFFIXES)})")
    reason, lists = "", {}  # which were written to say what names may not
    for path in sorted(path for path in root.iterdir() if path.suffix.lower() in LIST_SUFFIXES)[:MAX_NAMED]:
        try:
            if not has_words(path, COCO):  # which may be large
                lists[path] = _by_list(path)
        except (SampleError, OSError) as error:
            reason = f"{error}. "
            if f"{path}, row" in reason:
                logger.warning("%sThe list is not used", reason)
    if len(lists) > 1:
        raise InputError(f"{root} holds several lists of pairs; give one in place of it: {', '.join(map(str, lists))}")
    if lists:
        return lists.popitem()[1]
    folders = read_folders(root)
    is_picture = re.compile(rf"{MASK_WORDS}[\W_]?(?i:{PICTURE_WORDS})(?:png)?")
    pictures = dict.fromkeys(folder for folder in folders if is_picture.fullmatch((folder.parts or ("",))[-1]))
    folders = [folder for folder in folders if folder not in pictures]
    kinds = ("images", "videos", "stacks")
    images, videos, stacks = ([p for folder in folders for p in getattr(folder, kind)] for kind in kinds)
    patterns = (*PATTERNS, *_patterns_by_content(folders))
    for as_folders, (frames, masks) in product([set(stacks), set()] if stacks else [set()], patterns):
        of_objects = re.sub(r"/\*$", "/*/*", masks)
        for of_masks in dict.fromkeys([masks, of_objects] if re.search("{masks}|{movie}", masks + frames) else [masks]):
            found = _try(root, images, videos, as_folders, frames, of_masks)
            if found is not None:
                found.left_out["pictures of masks are left out"] = ["/".join(folder.parts) for folder in pictures]
                return _by_name(found)
    held = [path for path in islice(root.rglob("*"), MAX_LISTED) if path.is_file()]
    if any(path.name.endswith((".nii", ".nii.gz")) for path in held):
        reason = "Volumes are read from imagesTr/NAME.nii.gz with labelsTr/NAME.nii.gz (the kind nifti). "
    files = sorted(path for path in held if path.suffix.lower() in EXPORT_SUFFIXES)
    for path in files[:MAX_NAMED]:
        if has_words(path, COCO):
            name = path.relative_to(root).as_posix()
            reason = (
                f"{path} is COCO's JSON: name the kind `coco` with `annotations: {name}`, and `images`, its folder. "
            )
        for tool in (tool for tool in EXPORTS if has_words(path, EXPORTS[tool])):
            reason = f"{path} is {tool}, which is not read: export masks as images, or COCO's JSON (the kind coco). "
    raise InputError(
        f"{root}: no layout of videos and masks is recognized. {reason}Found: {_describe_contents(root, held)}. "
        f"Expected: {EXPECTED}. If it is another, name it: "
        f'{{kind: files, root: {root}, frames: "{{video}}/FRAMES/*", masks: "{{video}}/MASKS/*"}}'
    )


def _by_list(path: Path) -> Found:
    sources, columns = read_pairs(path)
    with_masks = {key: sources[key] for key in sorted(sources, key=natural_key) if sources[key].masks}
    return Found(with_masks, *columns, {"left out for want of masks": [k for k in sources if k not in with_masks]})


def _patterns_by_content(folders: list[Folder]) -> Iterator[tuple[str, str]]:
    """Patterns for two kinds of folders, of any names, of which one alone holds label images."""
    with_images = [folder for folder in folders if folder.parts and folder.images]
    for position, form in ((-1, "**/{}/*"), (0, "{}/**/*")):
        names = {folder.parts[position] for folder in with_images}
        if len(names) == 2 and not re.search(r"[*<]", "".join(names)):
            of_masks = {folder.parts[position] for folder in with_images if is_label_image(folder.images[0])}
            if len(of_masks) == 1:
                yield form.format(*names - of_masks), form.format(*of_masks)


def _try(
    root: Path, images: list[Path], videos: list[Path], stacks: Collection[Path], frames: str, masks: str
) -> Found | None:
    """The videos of two of `PATTERNS`, if there are any; `stacks` are taken for folders of pages."""
    of_masks = match_files(root, images, masks, stacks)
    files = videos if "{movie}" in frames else [path for path in images if path not in of_masks]
    of_frames = match_files(root, files, frames, stacks) if of_masks else {}
    keys = {names["video"] for names in of_frames.values()} & {names["video"] for names in of_masks.values()}
    shared = [path for path, names in of_masks.items() if names["video"] in keys]
    told = (is_label for is_label in map(is_label_image, shared) if is_label is not None)
    if not shared or ("{masks}" not in masks and not next(told, True)):
        return None
    shown = {"frames": _show(frames, list(of_frames.values())), "masks": _show(masks, list(of_masks.values()))}
    for role, matched in (("frames", of_frames), ("masks", of_masks)):
        places: dict[str, Path] = {}
        for path, names in matched.items():
            video, is_video = names["video"], path.suffix.lower() in VIDEO_SUFFIXES
            place = path if is_video else (path / "0" if path in stacks else path).parents["part" in names]
            before = places.setdefault(video, place)
            if before != place and video in keys:
                one, other = (p.relative_to(root).as_posix() for p in (before, place))
                named = Path(one).with_name("{video}" + path.suffix * is_video).as_posix()  # where none has one name
                named = one.replace(video, "{video}") if video else named
                shown[role] = named + "/*" * (not is_video and path not in stacks)
                if is_video and not video:
                    shown["masks"] = re.sub(r"/\*$", "/{video}_*", shown["masks"])
                raise InputError(
                    f"{root}: both {one} and {other} could be the {role} of video {video or root.name}. Name them: "
                    f'{{kind: files, root: {root}, frames: "{shown["frames"]}", masks: "{shown["masks"]}"}}'
                )
    return _join(root, [*images, *videos], of_frames, of_masks, shown["frames"], shown["masks"])


def _show(pattern: str, matched: list[dict[str, str]]) -> str:
    """One of `PATTERNS` with the words that the files have, `*` where these differ; what tells the video becomes
    `{video}`."""
    folders = re.findall(r"\*\*/", pattern)
    filled = [i for i in range(len(folders)) if any(names[f"folders{i}"] for names in matched)]
    always = [i for i in filled if all(names[f"folders{i}"] for names in matched)]
    for i in range(len(folders)):
        is_video = "{video}" not in pattern and filled[-1:] == [i] and i in always
        pattern = pattern.replace("**/", "{video}/" if is_video else "{folders}" if i in filled else "", 1)
    for token in GUESSED_TOKENS:
        words = {names.get(token.strip("{}"), "") for names in matched}
        pattern = pattern.replace(token, words.pop() if len(words) == 1 else "*")
    return pattern.replace("{folders}", "**/")


def _by_name(found: Found) -> Found:
    """Takes videos apart whose images lie in one folder, and have their video's name before or behind a number."""
    sources: dict[str, Source] = {}
    for key, source in found.sources.items():
        groups = split_by_name(source)
        own = {f"{key}/{name}".lstrip("/"): group for name, group in groups.items()} or {key: source}
        if twice := own.keys() & (sources.keys() | found.sources.keys() - {key}):
            raise InputError(f"{next(iter(source.masks)).path.parent}: there are two videos {min(twice)}")
        sources |= own
        for name, group in list(groups.items())[:1]:
            assert isinstance(group.frames, list)
            before, is_whole, behind = group.frames[0].stem.partition(name)
            named = "{video}" + re.sub(r"\d.*$", "", behind) + "*" if not before else f"*{before[-1]}{{video}}*"
            if is_whole:
                found.frames, found.masks = (
                    re.sub(r"(^|/)\*(?!\*)", rf"\1{named}", pattern) for pattern in (found.frames, found.masks)
                )
    found.sources = sources
    return found


def is_label_image(path: Path) -> bool | None:
    """Whether an image may hold ids: a palette, gray or 16-bit image in a format that keeps them; None where it is
    damaged, which is said when it is read."""
    with suppress(SampleError, FileNotFoundError), open_image(path) as image:
        return image.format != "JPEG" and (image.mode in ("1", "L", "P") or image.mode.startswith("I"))


def _of_split(sources: dict[str, Source], split: str | None, root: Path) -> dict[str, Source]:
    """The videos of one split, if the first folder in which their names differ, or one above, is such; they leave it
    out."""
    parts = {key: key.split("/") for key in sources}
    levels = [(depth, sorted(set(own))) for depth, own in enumerate(zip(*parts.values(), strict=False))]
    depth, folders = next((one for one in levels if len(one[1]) > 1 or one[1][0].lower() in SPLITS), levels[0])
    splits = [name for name in folders if name.lower() in SPLITS]
    if split is None and splits != folders and len(splits) < 2:  # a video may be called so
        return sources
    try:
        chosen = choose_split(folders if split in folders else splits, split)
    except InputError as error:
        raise InputError(f"{root}: {error}") from error
    if len(folders) > 1 and split is None:
        logger.warning("%s: the split %s is taken; others are %s", root, chosen, [n for n in folders if n != chosen])
    names = {key: "/".join(own[:depth] + own[depth + 1 :]) for key, own in parts.items() if own[depth] == chosen}
    return {name: sources[key] for key, name in names.items()}


def _describe_contents(root: Path, files: Iterable[Path]) -> str:
    """What a folder holds, in a few words."""
    by_suffix: dict[str, list[str]] = defaultdict(list)
    for path in files:
        by_suffix[path.suffix.lower() or "no suffix"].append(path.relative_to(root).as_posix())
    most = sorted(by_suffix.items(), key=lambda item: -len(item[1]))[:MAX_NAMED]
    shown = [f"{len(names)} {suffix} (such as {min(names, key=natural_key)})" for suffix, names in most]
    return ", ".join(shown) or "no files"
