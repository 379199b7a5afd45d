"""Videos of one's own, in folders as people keep them: found by the names of folders and files, or by two patterns.

A folder's path tells a role (frames or masks) by one of its parts, and the video by all others. So `<video>/frames`
with `<video>/masks`, `images/<video>` with `labels/<video>`, and deeper or shallower ones are one case.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from samoe_hf.errors import InputError

from .pairing import MaskFile, pair_masks, split_by_prefix
from .schema import Video, VideoList
from .video_io import IMAGE_SUFFIXES, ImageFrames, natural_key, open_image, read_video

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
FRAME_NAMES = {
    *(
        "frame",
        "frames",
        "image",
        "images",
        "img",
        "imgs",
        "jpegimages",
        "picture",
        "pictures",
        "rgb",
        "color",
        "colour",
    ),
    *("input", "inputs", "raw", "video", "videos"),
}
MASK_NAMES = {
    *("annotation", "annotations", "gt", "groundtruth", "groundtruths", "label", "labels", "mask", "masks", "seg"),
    *("segm", "segmentation", "segmentations", "segmentationobject", "segs", "ann", "anns", "anno", "annos", "truth"),
}
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
MAX_LISTED = 6

Key = tuple[str, ...]  # the parts of a path that tell the video


@dataclass
class Source:
    """Where a video's files are.

    Attributes:
        frames: a video file, or images in order.
        masks: the masks of any of its frames.
    """

    frames: Path | list[Path]
    masks: list[MaskFile] = field(default_factory=list)


@dataclass
class Folder:
    """A folder's images and videos; its path is relative to the root, in parts."""

    parts: Key
    images: list[Path] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)


@dataclass
class Found:
    """Videos that were found, and how.

    Attributes:
        sources: key of each video -> its files.
        layout: the frames' and the masks' pattern, as `read_files` takes them.
        without_masks: videos that were left out, since they have none.
    """

    sources: dict[Key, Source]
    layout: tuple[str, str]
    without_masks: list[Key] = field(default_factory=list)


def read_folders(root: Path) -> dict[Key, Folder]:
    """All folders within a folder that have images or videos, links followed, hidden ones left out."""
    folders: dict[Key, Folder] = {}
    seen = set()
    for path, names, files in os.walk(root, followlinks=True):
        real = os.path.realpath(path)
        names[:] = [] if real in seen else sorted((n for n in names if not n.startswith((".", "__"))), key=natural_key)
        if real in seen:
            continue
        seen.add(real)
        folder = Folder(Path(path).relative_to(root).parts)
        for name in sorted((name for name in files if not name.startswith(".")), key=natural_key):
            suffix = Path(name).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                folder.images.append(Path(path, name))
            elif suffix in VIDEO_SUFFIXES:
                folder.videos.append(Path(path, name))
        if folder.images or folder.videos:
            folders[folder.parts] = folder
    return folders


# --- Roles


def words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", name.lower()) if word]


def role_by_name(part: str) -> tuple[str | None, str]:
    """The role that a whole name has, and what is left of it for the video."""
    name = "".join(words(part))
    return ("masks" if name in MASK_NAMES else "frames" if name in FRAME_NAMES else None), ""


def role_by_word(part: str) -> tuple[str | None, str]:
    """The role that a word of a name has (`dog_masks`), and the others."""
    found = set(words(part))
    role = "masks" if MASK_NAMES & found else "frames" if FRAME_NAMES & found else None
    rest = re.sub(rf"(?i)(^|[\W_]+)({'|'.join(MASK_NAMES | FRAME_NAMES)})(?=$|[\W_])", "", part)
    return role, rest.strip(" _-.")


def role_by_word_alone(part: str) -> tuple[str | None, str]:
    """As [`role_by_word`], where the other words tell nothing (`binary_masks`)."""
    return role_by_word(part)[0], ""


def split_path(parts: Key, role_of: Callable[[str], tuple[str | None, str]]) -> tuple[str | None, Key]:
    """A folder's role, None if no part tells it, and the parts that tell the video."""
    role, key = None, []
    for part in parts:
        found, rest = role_of(part)
        if found is None:
            key.append(part)
        else:
            role = "masks" if "masks" in (found, role) else "frames"
            key += [rest] if rest else []
    return role, tuple(key)


# --- Finding


def find_videos(root: Path) -> Found | None:
    """The videos of a folder with their masks; None where no layout is recognized.

    Raises:
        ValueError: two folders that could be the frames, or the masks, of one video.
    """
    folders = read_folders(root)
    for role_of in (role_by_name, role_by_word, role_by_word_alone):
        roles: dict[str | None, list[tuple[Key, Folder]]] = defaultdict(list)
        for folder in folders.values():
            role, key = split_path(folder.parts, role_of)
            roles[role].append((key, folder))
        deeper = {folder.parts for _, folder in roles["masks"] if role_of(folder.parts[-1])[0] is None}
        found = _join(_frames_by_key(roles), roles["masks"], deeper, root) if roles["masks"] else None
        if found is not None:
            return _by_prefix(found)
    found = _by_content(folders, root) or _in_one_folder(folders, root)
    return None if found is None else _by_prefix(found)


def _by_prefix(found: Found) -> Found:
    """Takes videos apart whose images lie in one folder, and have their video's name before a number."""
    sources: dict[Key, Source] = {}
    layout = found.layout
    for key, source in found.sources.items():
        groups = split_by_prefix(source.frames, source.masks) if isinstance(source.frames, list) else {}
        if groups:
            sources |= {(*key, name): Source(frames, masks) for name, (frames, masks) in groups.items()}
            name, (frames, _) = next(iter(groups.items()))
            named = re.sub(r"\d.*$", "", f"<video>{frames[0].stem.partition(name)[2]}")
            layout = tuple(re.sub(r"(^|/)\*", rf"\1{named}*", pattern) for pattern in found.layout)  # type: ignore
        else:
            sources[key] = source
    return Found(sources, layout, found.without_masks)


def _frames_by_key(roles: Mapping[str | None, list[tuple[Key, Folder]]]) -> dict[Key, list[Source]]:
    """Key of each video -> what could be its frames: those of a folder with that role first, then of any other."""
    mask_keys = {key for key, _ in roles["masks"]}
    mask_keys |= {key[:-1] for key in mask_keys}
    frames: dict[Key, list[Source]] = defaultdict(list)
    for role in ("frames", None):
        for key, folder in roles[role]:
            for video in folder.videos:
                _, of_name = split_path((video.stem,), role_by_word)
                names = [(*key, video.stem), (*key, *of_name), *([key] if len(folder.videos) == 1 else [])]
                frames[next((name for name in names if name in mask_keys), names[0])].append(Source(video))
            keys = [key] if role == "frames" else [key, key[:-1], key[1:]]
            chosen = next((k for k in keys if k in mask_keys and (role == "frames" or k not in frames)), None)
            if folder.images and (role == "frames" or chosen is not None):
                frames[key if chosen is None else chosen].append(Source(list(folder.images)))
    return frames


def _join(
    frames: Mapping[Key, list[Source]], mask_folders: Sequence[tuple[Key, Folder]], deeper: Collection[Key], root: Path
) -> Found | None:
    """Videos whose frames and masks have one key.

    Args:
        deeper: folders of masks that may belong to one object, or one frame, of the video of the folder above them.
    """
    masks: dict[Key, list[MaskFile]] = defaultdict(list)
    origin: dict[Key, Folder] = {}
    for key, folder in mask_folders:
        owner = key if key in frames or folder.parts not in deeper else key[:-1]
        if owner not in frames or not folder.images:
            continue
        masks[owner] += [MaskFile(path, key[len(owner) :]) for path in folder.images]
        before = origin.setdefault(owner, folder)
        if key == owner and before is not folder:
            _refuse_choice(root, "masks", owner, [before.parts, folder.parts])
    if not masks:
        return None
    sources = {}
    for key in sorted(masks, key=_key_order):
        if len(frames[key]) > 1:
            _refuse_choice(root, "frames", key, [_parts(source, root) for source in frames[key]])
        sources[key] = Source(frames[key][0].frames, masks[key])
    first = next(iter(sources))
    parts = origin[first].parts
    if any(mask.folders for mask in masks[first]):
        last = len(parts) - 1 - parts[::-1].index(masks[first][0].folders[0])
        parts = (*parts[:last], "<object>", *parts[last + 1 :])
    layout = _pattern(_parts(sources[first], root), first), _pattern(parts, first)
    return Found(sources, layout, [key for key in frames if key not in masks])


def _parts(source: Source, root: Path) -> Key:
    """A source's folder, or video file, relative to the root."""
    path = source.frames if isinstance(source.frames, Path) else source.frames[0].parent
    return path.relative_to(root).parts


def _refuse_choice(root: Path, role: str, key: Key, candidates: Sequence[Key]) -> None:
    names = " and ".join("/".join(parts) or "." for parts in candidates[:2])
    of_video = f" of video {'/'.join(key)}" if key else ""
    raise InputError(f"{root}: both {names} could be the {role}{of_video}. {name_them(root, candidates[0], key, role)}")


def name_them(root: Path, parts: Key, key: Key, role: str) -> str:
    """The end of a message: how to name frames and masks explicitly."""
    frames, masks = "<video>/frames/*", "<video>/masks/*"
    if role == "frames":
        frames = _pattern(parts, key)
    else:
        masks = _pattern(parts, key)
    return f"Name them: {{kind: files, root: {root}, frames: {frames}, masks: {masks}}}"


def _pattern(parts: Key, key: Key) -> str:
    """The pattern of a folder's, or a video file's, path: the parts that tell the video become `<video>`."""
    shown = list(parts)
    path = Path(*parts) if parts else Path()
    suffix = path.suffix if path.suffix.lower() in VIDEO_SUFFIXES else ""
    if suffix:
        shown[-1] = path.stem
    for part in key:
        if part in shown:
            shown[shown.index(part)] = "<video>"
        else:  # a word of a name
            shown = [re.sub(re.escape(part), "<video>", name, count=1) for name in shown]
    text = re.sub(r"<video>(/<video>)+", "<video>", "/".join(shown))
    return f"{text}{suffix}" if suffix else f"{text}/*".removeprefix("/")


def _key_order(key: Key) -> list:
    return natural_key("/".join(key))


def is_label_image(path: Path) -> bool:
    """Whether an image may hold ids: a palette, gray or 16-bit image in a format that keeps them."""
    with open_image(path) as image:
        return image.format != "JPEG" and (image.mode in ("1", "L", "P") or image.mode.startswith("I"))


def _by_content(folders: Mapping[Key, Folder], root: Path) -> Found | None:
    """Two kinds of folders side by side, of which one alone holds label images; or such folders and video files."""
    sources = {}
    for folder in folders.values():
        for video in folder.videos:
            masks = folders.get((*folder.parts, video.stem))
            if masks is not None and masks.images and is_label_image(masks.images[0]):
                sources[(*folder.parts, video.stem)] = Source(video, [MaskFile(path) for path in masks.images])
    if sources:
        suffix = next(iter(sources.values())).frames.suffix  # type: ignore[union-attr]
        return Found(sources, (f"<video>{suffix}", "<video>/*"))
    with_images = [folder for folder in folders.values() if folder.parts and folder.images]
    for position in (-1, 0):
        names = {folder.parts[position] for folder in with_images}
        of_masks = {f.parts[position] for f in with_images if is_label_image(f.images[0])} if len(names) == 2 else set()
        if len(of_masks) != 1:
            continue
        frames: dict[Key, list[Source]] = defaultdict(list)
        masks_found = []
        for folder in with_images:
            key = folder.parts[:-1] if position == -1 else folder.parts[1:]
            if folder.parts[position] in of_masks:
                masks_found.append((key, folder))
            else:
                frames[key].append(Source(list(folder.images)))
        found = _join(frames, masks_found, (), root)
        if found is not None:
            return found
    return None


def _in_one_folder(folders: Mapping[Key, Folder], root: Path) -> Found | None:
    """Frames and masks in one folder: told apart by a word of the name, or JPEGs with label images."""
    sources, layout, without = {}, ("", ""), []
    for key, folder in folders.items():
        masks = [path for path in folder.images if MASK_NAMES & set(words(path.stem))]
        word = next((f"*{word}*" for word in words(masks[0].stem) if word in MASK_NAMES), "") if masks else ""
        if not masks:
            masks = [path for path in folder.images if path.suffix.lower() not in (".jpg", ".jpeg")]
            masks = masks if masks and is_label_image(masks[0]) else []
        chosen = set(masks)
        frames = [path for path in folder.images if path not in chosen]
        if frames and masks:
            sources[key] = Source(frames, [MaskFile(path) for path in masks])
            layout = (f"<video>/*{frames[0].suffix}", f"<video>/{word or f'*{masks[0].suffix}'}")
        elif frames:
            without.append(key)
    if not sources:
        return None
    if list(sources) == [()]:
        layout = tuple(pattern.removeprefix("<video>/") for pattern in layout)  # type: ignore[assignment]
    return Found(dict(sorted(sources.items(), key=lambda item: _key_order(item[0]))), layout, without)


# --- Patterns


def match_pattern(
    root: Path, files: Sequence[Path], pattern: str, option: str
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Files whose path below `root` is as a pattern says, and what stands for its `<names>`.

    Raises:
        ValueError: the pattern leads out of the root, or has other names than `<video>`, `<object>` and `<frame>`.
    """
    unknown = set(re.findall(r"<(.*?)>", pattern)) - {"video", "object", "frame"}
    if not pattern or unknown or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise InputError(
            f"`{option}` must be a pattern below {root}, of *, <video>, <object> and <frame>, got {pattern!r}"
        )
    expression, names = "", set()
    for part in re.split(r"(<\w+>|\*)", pattern):
        if part == "*":
            expression += "[^/]*"
        elif part.startswith("<"):
            name, wide = part[1:-1], ".+?" if part == "<video>" else "[^/]+?"
            expression += f"(?P={name})" if name in names else f"(?P<{name}>{wide})"
            names.add(name)
        else:
            expression += re.escape(part)
    for path in files:
        match = re.fullmatch(expression, path.relative_to(root).as_posix())
        if match:
            yield path, match.groupdict()


def find_by_patterns(root: Path, frames: str, masks: str) -> Found:
    """The videos whose frames and masks are where two patterns say.

    Raises:
        ValueError: a wrong pattern, or one that no file is named by.
    """
    files: dict[Key, list[Path]] = defaultdict(list)
    of_video: dict[Key, list[MaskFile]] = defaultdict(list)
    all_files = [path for folder in read_folders(root).values() for path in (*folder.images, *folder.videos)]
    named = dict(match_pattern(root, all_files, masks, "masks"))
    for path, names in match_pattern(root, all_files, frames, "frames"):
        if path not in named:
            files[tuple(names.get("video", "").split("/"))].append(path)
    for path, names in named.items():
        mask = MaskFile(path, (), names.get("object"), names.get("frame"))
        if mask.object_name is not None and mask.frame_name is None:
            mask = mask._replace(object_name=None, folders=(mask.object_name,))
        of_video[tuple(names.get("video", "").split("/"))].append(mask)
    for option, pattern, found in (("frames", frames, files), ("masks", masks, of_video)):
        if not found:
            raise InputError(f"`{option}`: no image or video below {root} is named by {pattern!r}")
    sources = {}
    for key in sorted(files, key=_key_order):
        paths = files[key]
        is_video = paths[0].suffix.lower() in VIDEO_SUFFIXES
        if is_video and len(paths) > 1:
            raise InputError(f"`frames`: {paths[0]} and {paths[1]} are both named by {frames!r}, as one video")
        if key in of_video:
            sources[key] = Source(paths[0] if is_video else paths, of_video[key])
    if not sources:
        some = ["/".join(next(iter(found))) for found in (files, of_video)]
        raise InputError(f"`frames` and `masks` name no video in common: {some[0]!r} and {some[1]!r} below {root}")
    return Found(sources, (frames, masks), [key for key in files if key not in of_video])


# --- Opening


def open_source(domain: str, binary: bool, video_id: str, source: Source) -> Video:
    """Opens a video of [`Found`]; all its errors name a file."""
    frames = read_video(source.frames) if isinstance(source.frames, Path) else ImageFrames(source.frames)
    return Video(video_id, frames, pair_masks(frames, source.masks, binary), domain)


def to_videos(found: Found, root: Path, domain: str, binary: bool) -> VideoList:
    """The videos of [`Found`], each opened when it is asked for."""
    entries = {"/".join(key) or root.stem: source for key, source in found.sources.items()}
    return VideoList(entries, partial(open_source, domain, binary))


def describe_contents(root: Path) -> str:
    """What a folder holds, in a few words, for messages."""
    count: Counter = Counter()
    examples: dict[str, str] = {}
    for path, folders, files in os.walk(root, followlinks=False):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_key)
        for name in sorted(files, key=natural_key):
            suffix = Path(name).suffix.lower() or "no suffix"
            count[suffix] += 1
            examples.setdefault(suffix, Path(path, name).relative_to(root).as_posix())
        if sum(count.values()) > 100_000:
            break
    if not count:
        return "no files"
    shown = [f"{number} {suffix} (such as {examples[suffix]})" for suffix, number in count.most_common(MAX_LISTED)]
    return ", ".join(shown)
