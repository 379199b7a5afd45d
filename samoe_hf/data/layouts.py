"""Which layout a folder of videos and masks has, for those who do not name it."""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from samoe_hf.errors import InputError

from .folders import SPLITS, Found, describe_contents, find_by_patterns, find_videos, to_videos
from .pair_lists import LIST_SUFFIXES, read_pairs
from .schema import VideoList
from .video_io import SampleError

logger = logging.getLogger(__name__)
EXPECTED = (
    "<video>/frames/* with <video>/masks/*; frames/<video>/* with masks/<video>/*; videos/<video>.mp4 with "
    "masks/<video>/*; frames and masks in one folder; a CSV or JSON of pairs; or the layout of a public dataset "
    "(`frames` may also be called images, JPEGImages, rgb, …, and `masks` labels, Annotations, gt, …)"
)
MAX_NAMED = 8


class Layout(NamedTuple):
    """A layout that was recognized: the kind of dataset, its reader's options, and what it was recognized by."""

    kind: str
    options: dict[str, Any]
    reason: str


def recognize(root: Path, split: str | None = None) -> Layout:
    """The layout of a folder, or of a list of pairs. What is none of a public dataset's is a matter of `read_files`.

    Args:
        root: the folder, or the CSV or JSON file.
        split: the split that is wanted, if any; otherwise of several the training split.
    """
    if root.is_dir():
        for find in (_dataset, _davis, _sa_v_val, _vos, _nifti, _npz, _coco, _sa_v, _ocid):
            found = find(root, split)
            if found is not None:
                return found
    return Layout("files", {}, "")


def _dataset(root: Path, split: str | None) -> Layout | None:
    if (root / "state.json").is_file():
        return Layout("dataset", {}, "state.json of `save_to_disk`")
    if any(root.glob("*.parquet")) or any(root.glob("data/*.parquet")):
        return Layout("dataset", {}, "Parquet files")
    return None


def _davis(root: Path, split: str | None) -> Layout | None:
    for resolution in ("480p", "Full-Resolution"):
        folders = [root / name / resolution for name in ("JPEGImages", "Annotations")]
        if (root / "ImageSets").is_dir() and all(folder.is_dir() for folder in folders):
            return Layout("davis", {"resolution": resolution}, f"JPEGImages/{resolution} and ImageSets")
    return None


def _sa_v_val(root: Path, split: str | None) -> Layout | None:
    if (root / "JPEGImages_24fps").is_dir() and (root / "Annotations_6fps").is_dir():
        return Layout("sa_v_val", {}, "JPEGImages_24fps and Annotations_6fps")
    names = [name for name in ("sav_val", "sav_test") if (root / name / "JPEGImages_24fps").is_dir()]
    if not names:
        return None
    return Layout("sa_v_val", {"split": split or names[0]}, f"{', '.join(names)} with JPEGImages_24fps")


def _vos(root: Path, split: str | None) -> Layout | None:
    """YouTube-VOS, MOSE and LVOS, which the names of folders or `meta.json` tell."""
    splits = [path.parent.name for path in sorted(root.glob("*/JPEGImages")) if any(p.is_dir() for p in path.iterdir())]
    wanted = choose_split(splits, split) if splits and not (root / "JPEGImages").is_dir() else None
    folder = root if wanted is None else root / wanted
    frames, labels = folder / "JPEGImages", folder / "Annotations"
    if not frames.is_dir() or not labels.is_dir() or any(path.is_file() for path in frames.iterdir()):
        return None
    text = re.sub(r"[\W_]+", "", "".join(folder.resolve().parts[-2:]).lower())
    kind = next((kind for kind in ("mose", "lvos") if kind in text), None)
    if kind is None and ((folder / "meta.json").is_file() or "youtubevos" in text or "ytvos" in text):
        kind = "youtube_vos"
    if kind is None:
        return None
    return Layout(kind, {"split": wanted} if wanted else {}, "JPEGImages and Annotations")


def _nifti(root: Path, split: str | None) -> Layout | None:
    names = sorted(path.name.removeprefix("labels") for path in root.glob("labels*") if path.is_dir())
    names = [name for name in names if (root / f"images{name}").is_dir() and any(root.glob(f"labels{name}/*.nii*"))]
    if not names:
        return None
    return Layout(
        "nifti", {"split": split or ("Tr" if "Tr" in names else names[0])}, f"images{names[0]} and its labels"
    )


def _npz(root: Path, split: str | None) -> Layout | None:
    splits = sorted({path.parent.name for path in root.glob("*/*.npz")})
    wanted = None if any(root.glob("*.npz")) or not splits else choose_split(splits, split)
    path = next((root if wanted is None else root / wanted).glob("*.npz"), None)
    if path is None or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if not {"imgs.npy", "gts.npy"} <= set(archive.namelist()):
            return None
    return Layout("npz", {"split": wanted} if wanted else {}, f"{path.name} with imgs and gts")


def _coco(root: Path, split: str | None) -> Layout | None:
    files = {path.stem.removeprefix("instances_"): path for path in root.glob("annotations/instances_*.json")}
    names = [name for name in files if (root / name).is_dir()]
    if names:
        return Layout("coco", {"split": choose_split(sorted(names), split)}, "annotations/instances_*.json")
    exports = [path.parent for path in sorted(root.glob("**/_annotations.coco.json"))]
    if not exports:
        return None
    folders = {folder.relative_to(root).as_posix(): folder for folder in exports}
    name = choose_split(list(folders), split)
    options = {"images": name, "annotations": f"{name}/_annotations.coco.json"}
    return Layout("coco", options, f"{options['annotations']}")


def _sa_v(root: Path, split: str | None) -> Layout | None:
    for source in ("manual", "auto"):
        path = next(root.rglob(f"*_{source}.json"), None)
        if path is not None and path.with_name(path.name.replace(f"_{source}.json", ".mp4")).is_file():
            return Layout("sa_v", {"annotations": source}, path.relative_to(root).as_posix())
    return None


def _ocid(root: Path, split: str | None) -> Layout | None:
    for path in root.rglob("seq[0-9]*"):
        if (path / "rgb").is_dir() and (path / "label").is_dir():
            return Layout("ocid", {}, f"{path.relative_to(root).as_posix()}/{{rgb,label}}")
    return None


def choose_split(names: list[str], split: str | None) -> str:
    """The split that is wanted, or else that for training, or else the only one.

    Raises:
        ValueError: there is no such split, or none is wanted of several.
    """
    if split is not None:
        if split not in names:
            raise InputError(f"no split {split!r}; there are: {', '.join(names)}")
        return split
    training = [name for name in names if name.lower().startswith("train")]
    if len(names) > 1 and not training:
        raise InputError(f"name one of the splits as `split`: {', '.join(names)}")
    return (training or names)[0]


# --- Videos of one's own


def read_files(
    root: str | Path,
    split: str | None = None,
    domain: str | None = None,
    frames: str | None = None,
    masks: str | None = None,
    binary: bool = False,
) -> VideoList:
    """Videos of one's own: frames as images or video files, and masks as images, in folders of any names.

    Masks belong to frames by their names, which may differ in a prefix, a suffix or the padding of a number. A frame
    has one label image, or one image for each object. Videos without masks are left out.

    Args:
        root: the folder, or a CSV or JSON file with a row for each frame (`frame`, `mask`, `video`, `object`).
        split: the folder of a split (train, val, …), below or beside those of frames and masks; of several, the
            training split by default.
        domain: name for routing and metrics, by default the folder's.
        frames: where the frames are, such as `<video>/pictures/*.jpg` or `clips/<video>.mp4`.
        masks: where the masks are, such as `<video>/outlines/*.png` or `masks/<video>/<object>/*.png`; also
            `<video>/<frame>_<object>.png`.
        binary: every label above 0 is object 1.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the layout is not recognized; says what was found, what was expected, and how to name it.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder")
    if (frames is None) != (masks is None):
        given, missing = ("frames", "masks") if masks is None else ("masks", "frames")
        raise InputError(f"`{given}` goes with `{missing}`, where {'they' if missing == 'masks' else 'these'} are")
    if frames is not None and masks is not None:
        found = find_by_patterns(root, frames, masks)
    else:
        found = _find(root)
        logger.warning(
            "%s: %d video%s, frames in %s, masks in %s", root, len(found.sources), "s"[: len(found.sources) != 1],
            *found.layout,
        )  # fmt: skip
    found = _of_split(found, split, root)
    if found.without_masks:
        names = ", ".join("/".join(key) or root.name for key in found.without_masks[:MAX_NAMED])
        logger.warning("%s: left out for want of masks: %s", root, names)
    return to_videos(found, root, domain or root.resolve().stem, binary)


def _find(root: Path) -> Found:
    if root.is_file():
        if root.suffix.lower() in LIST_SUFFIXES:
            return read_pairs(root)
        raise InputError(f"{root}: a folder is expected, or a list of pairs ({', '.join(LIST_SUFFIXES)})")
    found = find_videos(root)
    if found is not None:
        return found
    reasons = []
    for path in sorted(path for path in root.iterdir() if path.suffix.lower() in LIST_SUFFIXES):
        try:
            return read_pairs(path)
        except SampleError as error:
            reasons.append(str(error))
    raise InputError(
        f"{root}: no layout of videos and masks is recognized. Found: {describe_contents(root)}. "
        f"{' '.join(f'{reason}.' for reason in reasons[:2])}Expected: {EXPECTED}. If it is another, name it: "
        f"{{kind: files, root: {root}, frames: <video>/FRAMES/*, masks: <video>/MASKS/*}}"
    )


def _of_split(found: Found, split: str | None, root: Path) -> Found:
    """The videos of one split, if the first part of each video's path is one; their ids leave it out."""
    firsts = sorted({key[0] if key else "" for key in found.sources})
    if not all(name.lower() in SPLITS for name in firsts) and split is None:
        return found
    if split is not None and split not in firsts:
        known = [name for name in firsts if name.lower() in SPLITS]
        raise InputError(f"{root}: no split {split!r}; there are: {', '.join(known) or 'none'}")
    chosen = choose_split(firsts, split)
    if len(firsts) > 1 and split is None:
        logger.warning("%s: the split %s is taken; others are %s", root, chosen, [n for n in firsts if n != chosen])
    sources = {key[1:]: source for key, source in found.sources.items() if key[0] == chosen}
    return Found(sources, found.layout, [key[1:] for key in found.without_masks if key[:1] == (chosen,)])
