"""`load_videos`: any dataset by the name of its kind."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from samoe_hf.errors import InputError, did_you_mean

from .configs import expand_home, find_config
from .frames import bare_name
from .images import check_window
from .items import shown_as
from .layouts import LAYOUTS, recognize
from .options import check_options, check_types
from .schema import Video, VideoList

logger = logging.getLogger(__name__)


def load_videos(
    kind: str | Path | None = None,
    root: str | Path | None = None,
    split: str | None = None,
    domain: str | None = None,
    video_ids: Sequence[str] | None = None,
    window: tuple[float, float] | None = None,
    **options: Any,
) -> Sequence[Video] | Iterable[Video]:
    """Opens a dataset.

    Args:
        kind: a folder, whose layout is recognized and logged; or a kind of dataset: "files" (videos of your own),
            "davis", "youtube_vos", "mose", "lvos", "frames" (`JPEGImages` and `Annotations` of any source), "sa_v",
            "sa_v_val", "ocid", "npz", "nifti", "coco", "ytvis", "yolo", "cvat", "labelme", "labelstudio", "synthetic"
            or "dataset" (on the Hub or on disk).
        root: its folder or name; none for "synthetic". Without a kind, its layout is recognized.
        split: as the reader of that kind understands it.
        domain: the videos' domain, the name for routing and metrics; by default the kind's, and the folder's for videos
            of your own. Of "synthetic", which videos to draw.
        video_ids: only these videos.
        window: intensities that become black and white, such as (-160, 240) Hounsfield units for soft tissue in CT.
            By default, images of 8 bits are taken as they are, and of deeper gray images and volumes the 0.5 and 99.5
            percentiles over a video, which is said.
        options: what else the kind's reader takes, see `samoe_hf.data.layouts.LAYOUTS`.

    Raises:
        ValueError: an unknown kind, layout, option or video (names the nearest known one), or a value of another type.
        FileNotFoundError: root does not exist.
    """
    kind, root, recognized = name_kind(kind, root, split, options)
    owner, layout = f"datasets of kind {kind!r}", LAYOUTS[kind]
    check_types(load_videos, {"domain": domain, "video_ids": video_ids, "window": window}, owner)
    check_window(window)
    given = {"root": root, "split": split, "domain": domain, "window": window}
    of_reader = inspect.signature(layout.read).parameters
    given = {k: v for k, v in given.items() if v is not None and (k in of_reader or k in ("root", "split"))}
    options = recognized | options | given
    check_options(layout.read, options, owner)
    videos = layout.read(**options)
    if video_ids is not None:
        if not isinstance(videos, VideoList) or not videos.video_ids:
            raise InputError(f"video_ids cannot choose among the videos of kind {kind!r}")
        videos = videos.select(video_ids)
    default = {"files": bare_name(Path(str(root)).resolve()), "sa_v_val": "sa_v", "dataset": None}.get(kind, kind)
    shown = {"domain": domain or default, "window": window}
    return shown_as(videos, **{name: value for name, value in shown.items() if name not in of_reader})


def name_kind(
    kind: str | Path | None, root: str | Path | None, split: str | None = None, options: Collection[str] = ()
) -> tuple[str, str | Path | None, dict[str, Any]]:
    """The kind of a dataset, its root, and options of its reader that its layout tells.

    Arguments are those of [`load_videos`]; of `options`, those that only videos of one's own have tell the kind.
    """
    if isinstance(kind, str) and kind in LAYOUTS:
        return kind, root, {}
    given = root if kind is None else kind
    if given is None:
        raise InputError(f"name a folder, or a kind of dataset: {', '.join(LAYOUTS)}")
    path = Path(str(given))
    if kind is None and not path.exists():
        raise FileNotFoundError(f"{path}: no such folder")
    if kind is not None and (root is not None or not path.exists()):
        raise InputError(f"unknown kind of dataset {str(kind)!r}, and no folder{did_you_mean(kind, LAYOUTS)}")
    if {"frames", "masks"} & set(options):
        return "files", path, {}
    try:
        layout, recognized, reason = recognize(path, split)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if reason:
        logger.warning("%s: read as %s (%s)", path, layout.kind, reason)
    return layout.kind, path, recognized


def videos_from_entry(entry: Mapping[str, Any] | str, owner: str) -> Sequence[Video]:
    """The videos of an entry of a run's `train_data` or `eval_data`: the arguments of [`load_videos`], or a folder.

    Errors name it by its `owner`, such as "train_data[0]".
    """
    if isinstance(entry, (str, Path)) and Path(entry).exists():
        entry = {"root": entry}
    if not isinstance(entry, Mapping):
        hint = f"; did you mean {{kind: {entry}}}?" if isinstance(entry, str) and entry in LAYOUTS else ""
        raise InputError(f"{owner} must be a folder or the arguments of `load_videos`, not {entry!r}{hint}")
    if not {"kind", "root"} & set(entry):
        raise InputError(f"{owner} names no `kind` or `root`, but {', '.join(map(repr, entry))}")
    try:
        videos = load_videos(**{str(name): value for name, value in entry.items()})
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{owner}: {error}") from error
    if not isinstance(videos, Sequence):
        raise InputError(f"{owner}: videos that are streamed have no length; leave out `streaming`")
    return videos


def dataset_entries(run: Mapping[str, Any], key: str, owner: str) -> list[Any]:
    """The entries of a run's `train_data` or `eval_data`, which may be one alone."""
    entries = run.get(key) or []
    if isinstance(entries, (str, Mapping)):
        return [entries]
    if not isinstance(entries, list):
        raise InputError(f"`{key}` of {owner} must be a folder or a list of datasets, not {entries!r}.")
    return entries


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file, or a configuration that comes with the package (see [`~configs.find_config`]), as data.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if it is no YAML or holds no mapping.
    """
    content = parse_yaml(find_config(path).read_bytes(), str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a mapping, got {type(content).__name__}.")
    return content


def parse_yaml(text: str | bytes, name: str) -> Any:
    """YAML as data; `ValueError` where it is none."""
    try:
        return expand_home(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:  # dates raise ValueError
        raise InputError(f"{name} is not YAML: {error}") from error
