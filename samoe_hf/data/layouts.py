"""The layouts in which datasets come: how each is recognized, read and evaluated; a new one is a line of `LAYOUTS`."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from glob import escape
from importlib import import_module
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Literal

from samoe_hf.errors import InputError

MaskFormat = Literal["davis", "youtube_vos", "sa_v"]
Protocol = Literal["davis", "sav", "youtube_vos", "all"]


@dataclass(frozen=True)
class Layout:
    """A layout of datasets.

    Attributes:
        kind: its name in YAML files and on the command line.
        reader: "module.name" of `samoe_hf.data`; its parameters are the options of that kind, checked by their types.
        patterns: what a folder of this layout holds; one of them suffices. A pattern is one or more globs with spaces
            between them; all must match. `{split}` is a folder that becomes the option `split`, and
            `{annotations:manual|auto}` the first of two values that fits.
        check: what else is asked of the folder, or of that of the split.
        protocol: which frames count in the evaluation, see `samoe_hf.evaluation.metrics.counted_frames`.
        masks: the format of predicted masks, see [`~samoe_hf.data.predictions.MaskFiles`].
        writer: named as the reader is; takes videos, a new folder and, where it can, whether masks become `polygons`.
    """

    kind: str
    reader: str
    patterns: tuple[str, ...] = ()
    check: Callable[[Path], bool] | None = None
    protocol: Protocol = "youtube_vos"
    masks: MaskFormat = "davis"
    writer: str | None = None

    @property
    def read(self) -> Callable[..., Any]:
        """The reader, which returns a sequence of `Video`, or an iterable of them."""
        return _imported(self.reader)

    @property
    def write(self) -> Callable[..., None]:
        """The writer, of a layout that has one."""
        assert self.writer is not None
        return _imported(self.writer)

    def detect(self, root: Path, split: str | None = None) -> tuple[dict[str, str], str] | None:
        """The reader's options that a folder tells, and what it was recognized by; None if it has another layout."""
        for pattern in self.patterns:
            option, values = _option_values(root, pattern)
            if values and (self.check is None or self.check(root / values[0] if option == "split" else root)):
                value = values[0] if option is None or ":" in pattern else choose_split(values, split)
                return ({} if option is None else {option: value}), _fill(pattern, value)
        return None


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    return getattr(import_module(f"samoe_hf.data.{module}"), function)


def choose_split(names: list[str], split: str | None) -> str:
    """The split that is wanted, or else that for training, or else the only one; else an `InputError`."""
    if split is not None and split not in names:
        raise InputError(f"no split {split!r}; there are: {', '.join(names) or 'none'}")
    if split is not None:
        return split
    training = [name for name in names if name.lower().startswith("tr")]
    if len(names) > 1 and not training:
        raise InputError(f"name one of the splits as `split`: {', '.join(names)}")
    return (training or names)[0]


def _fill(pattern: str, value: str) -> str:
    return re.sub(r"\{.*?\}", lambda _: value, pattern)


def _option_values(root: Path, pattern: str) -> tuple[str | None, list[str]]:
    """The option that a pattern tells, if any, and its values for which all globs match; [""] where it tells none."""
    option = re.search(r"\{(\w+):?(.*?)\}", pattern)
    if option is None:
        values = [""]
    elif option[2]:
        values = option[2].split("|")
    else:
        first = pattern.split()[0]
        expression = re.compile(_fill(re.escape(first).replace(r"\{", "{").replace(r"\}", "}"), "([^/]+)"))
        found = (expression.fullmatch(path.relative_to(root).as_posix()) for path in root.glob(_fill(first, "*")))
        values = sorted({match[1] for match in found if match})
    globs = [[_fill(glob, escape(value)) for glob in pattern.split()] for value in values]
    fitting = [v for v, own in zip(values, globs, strict=True) if all(any(root.glob(glob)) for glob in own)]
    return (None if option is None else option[1]), fitting


def _is_named(words: str, folder: Path) -> bool:
    """Whether a folder, or the one above it, has one of the words in its name."""
    names = "".join(folder.resolve().parts[-2:]).lower()
    return re.search(words, re.sub(r"[\W_]+", "", names)) is not None


def _is_youtube_vos(folder: Path) -> bool:
    return (folder / "meta.json").is_file() or _is_named("youtubevos|ytvos", folder)


def _has_volumes(folder: Path) -> bool:
    """Whether the first `.npz` of a folder has images and their labels."""
    path = next(folder.glob("*.npz"))
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"imgs.npy", "gts.npy"} <= set(archive.namelist())


def _holds(suffix: str, words: str, folder: Path) -> bool:
    """Whether a file of a folder, one of the first few, has all of some words, as those of a tool have."""
    some = islice((path for path in folder.rglob(f"*{suffix}") if path.is_file()), MAX_LOOKED_AT)
    return any(has_words(path, words) for path in some)


def has_words(path: Path, words: str) -> bool:
    """Whether all of some words are in a file."""
    if not path.stat().st_size:
        return False  # there is no mapping of an empty file
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
        return all(text.find(word.encode()) >= 0 for word in words.split())


MAX_LOOKED_AT = 8
# Words of what label tools write.
YTVIS, CVAT = '"videos" "file_names" "segmentations"', "<annotations> <version> <meta>"
LABELME, LABEL_STUDIO = '"shapes" "imagePath"', '"annotations" "data" "result"'
_VOS = ("JPEGImages/*/ Annotations/", "{split}/JPEGImages {split}/JPEGImages/*/ {split}/Annotations/")

# A folder has the first layout that recognizes it, else "files". A domain that is not given is the kind's name, except
# where the videos bring their own.
LAYOUTS = {
    layout.kind: layout
    for layout in (
        Layout("files", "own_videos.read_files", masks="youtube_vos"),
        Layout("dataset", "hub_datasets.read_dataset", ("state.json", "*/state.json", "*.parquet", "data/*.parquet")),
        Layout(
            "davis", "readers.read_davis",
            ("JPEGImages/{resolution:480p|Full-Resolution}/ Annotations/{resolution}/ ImageSets/",), protocol="davis",
            writer="formats.davis.write_davis",
        ),
        Layout(
            "sa_v_val", "readers.read_sa_v_val",
            ("JPEGImages_24fps/ Annotations_6fps/", "{split:sav_val|sav_test}/JPEGImages_24fps/"),
            protocol="sav", masks="sa_v",
        ),
        *(
            Layout(name, "readers.read_vos", _VOS, partial(_is_named, name), "davis", "youtube_vos")
            for name in ("mose", "lvos")
        ),
        Layout("youtube_vos", "readers.read_vos", _VOS, _is_youtube_vos, masks="youtube_vos"),
        Layout("frames", "readers.read_vos", masks="youtube_vos"),
        Layout("nifti", "volumes.read_nifti", ("labels{split} images{split}/ labels{split}/*.nii*",)),
        Layout("npz", "volumes.read_npz", ("*.npz", "{split}/*.npz"), _has_volumes),
        Layout(
            "coco", "formats.coco.read_coco",
            (
                "annotations/instances_{split}.json {split}/", "annotations/instances_{split}.json images/",
                "{split}/_annotations.coco.json", "{split:.}/_annotations.coco.json", "result.json images/",
            ),
            protocol="all", masks="sa_v", writer="formats.coco.write_coco",
        ),
        Layout(
            "ytvis", "formats.coco.read_ytvis", ("**/*.json",), partial(_holds, ".json", YTVIS), masks="sa_v",
            writer="formats.coco.write_ytvis",
        ),
        Layout("yolo", "formats.yolo.read_yolo", ("data.yaml",), masks="sa_v", writer="formats.yolo.write_yolo"),
        Layout(
            "cvat", "formats.cvat.read_cvat", ("**/*.xml",), partial(_holds, ".xml", CVAT), masks="sa_v",
            writer="formats.cvat.write_cvat",
        ),
        Layout(
            "labelme", "formats.labelme.read_labelme", ("**/*.json",), partial(_holds, ".json", LABELME), masks="sa_v",
            writer="formats.labelme.write_labelme",
        ),
        Layout(
            "labelstudio", "formats.label_studio.read_label_studio", ("**/*.json",),
            partial(_holds, ".json", LABEL_STUDIO), masks="sa_v", writer="formats.label_studio.write_label_studio",
        ),
        Layout(
            "sa_v", "readers.read_sa_v", ("**/sav_*_{annotations:manual|auto}.json **/sav_*.mp4",),
            protocol="sav", masks="sa_v",
        ),
        Layout("ocid", "readers.read_ocid", ("**/seq[0-9]*/rgb/ **/seq[0-9]*/label/",)),
        Layout("synthetic", "synthetic.SyntheticVideos"),
    )
}  # fmt: skip


WRITTEN = tuple(kind for kind, layout in LAYOUTS.items() if layout.writer)


def layout_of(kind: str) -> Layout:
    """The layout of a kind; one with the default protocol and masks for what is none, such as a run's YAML."""
    return LAYOUTS.get(kind, LAYOUTS["synthetic"])


def recognize(root: Path, split: str | None = None) -> tuple[Layout, dict[str, Any], str]:
    """The layout of a folder, or of a list of pairs, its reader's options, and what it was recognized by."""
    for layout in LAYOUTS.values() if root.is_dir() else ():
        if (found := layout.detect(root, split)) is not None:
            return layout, *found
    return LAYOUTS["files"], {}, ""
