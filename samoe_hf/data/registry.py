"""`load_videos`: any dataset by the name of its kind, and the command line's options for it."""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import yaml

from .readers import read_coco, read_davis, read_ocid, read_sa_v, read_sa_v_val, read_vos
from .schema import Video, VideoList, videos_from_dataset
from .synthetic import SyntheticVideos
from .volumes import read_nifti, read_npz


def read_dataset(root: str | Path, split: str = "train", streaming: bool = False) -> Sequence[Video] | Iterable[Video]:
    """A dataset made by `to_datasets`: a folder of `save_to_disk`, or anything `datasets.load_dataset` takes.

    Args:
        root: folder, or name on the Hub.
        split: of `load_dataset`.
        streaming: nothing is downloaded ahead; gives an iterable, for `ClipStream`.
    """
    if (Path(root) / "state.json").is_file():
        dataset = datasets.load_from_disk(str(root))
        return videos_from_dataset(dataset.to_iterable_dataset() if streaming else dataset)
    return videos_from_dataset(datasets.load_dataset(str(root), split=split, streaming=streaming))


# A domain that is not given is the kind's name, except where the videos bring their own.
READERS: dict[str, Callable[..., Any]] = {
    "davis": read_davis,
    "frames": partial(read_vos, domain="frames"),
    "youtube_vos": partial(read_vos, domain="youtube_vos"),
    "mose": partial(read_vos, domain="mose"),
    "lvos": partial(read_vos, domain="lvos"),
    "sa_v": read_sa_v,
    "sa_v_val": read_sa_v_val,
    "ocid": read_ocid,
    "npz": read_npz,
    "nifti": read_nifti,
    "coco": read_coco,
    "synthetic": SyntheticVideos,
    "dataset": read_dataset,
}


def load_videos(
    kind: str,
    root: str | Path | None = None,
    split: str | None = None,
    domain: str | None = None,
    video_ids: Sequence[str] | None = None,
    **options: Any,
) -> Sequence[Video] | Iterable[Video]:
    """Opens a dataset.

    Args:
        kind: "davis", "youtube_vos", "mose", "lvos", "frames" (`JPEGImages` and `Annotations` of any source), "sa_v",
            "sa_v_val", "ocid", "npz", "nifti", "coco", "synthetic" or "dataset" (on the Hub or on disk).
        root: its folder or name; none for "synthetic".
        split: as the reader of that kind understands it.
        domain: the videos' domain name, the kind's by default; of "synthetic", which videos to draw.
        video_ids: only these videos.
        options: what else the reader takes, see `samoe_hf.data.readers`, `volumes` and `SyntheticVideos`.

    Raises:
        ValueError: an unknown kind, option or video; names the nearest known one.
        FileNotFoundError: there is nothing at root.
    """
    if kind not in READERS:
        raise ValueError(f"unknown kind of dataset {kind!r}{_nearest(kind, READERS)}")
    given = {"root": root, "split": split, "domain": domain}
    options |= {name: value for name, value in given.items() if value is not None}
    _check_options(kind, options)
    videos = READERS[kind](**options)
    if video_ids is None:
        return videos
    if not isinstance(videos, VideoList):
        raise ValueError(f"video_ids cannot choose among the videos of kind {kind!r}")
    return videos.select(video_ids)


def _check_options(kind: str, options: dict[str, Any]) -> None:
    parameters = inspect.signature(READERS[kind]).parameters
    for name in options:
        if name not in parameters:
            raise ValueError(f"datasets of kind {kind!r} have no option {name!r}{_nearest(name, parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise ValueError(f"datasets of kind {kind!r} need the option {name!r}")


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f"; there are: {', '.join(known)}"


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which a script is told its videos; see [`videos_from_arguments`]."""
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="KIND|RUN.yaml",
        help=f"one of {', '.join(READERS)}; or a run's YAML, for the videos of its `eval_data`",
    )
    parser.add_argument("--root", type=Path, help="folder of the dataset")
    parser.add_argument("--split", help="of the dataset, as its reader understands it")
    parser.add_argument("--domain", help="name under which its results are reported")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="further options of the kind's reader"
    )
    parser.add_argument("--video", action="append", metavar="ID", help="only this video; may be repeated")


def videos_from_arguments(arguments: argparse.Namespace) -> list[Video]:
    """The videos that the options of [`add_dataset_arguments`] name, each opened but not decoded.

    Raises:
        ValueError: an unknown kind, option or video, or options that do not go together.
        FileNotFoundError: there is nothing at the root.
    """
    if Path(arguments.dataset).suffix in (".yaml", ".yml"):
        for name in ("root", "split", "domain", "option"):
            if getattr(arguments, name):
                raise ValueError(f"`--{name}` does not go with a run's YAML ({arguments.dataset}).")
        sources = read_yaml(arguments.dataset).get("eval_data") or []
        videos = [video for source in sources for video in load_videos(**source)]
    else:
        options = {}
        for text in arguments.option:
            name, is_there, value = text.partition("=")
            if not is_there:
                raise ValueError(f"`--option` must be NAME=VALUE, got {text!r}.")
            options[name] = yaml.safe_load(value)
        videos = list(load_videos(arguments.dataset, arguments.root, arguments.split, arguments.domain, **options))
    if arguments.video:
        unknown = set(arguments.video) - {video.video_id for video in videos}
        if unknown:
            raise ValueError(f"`--video` names {sorted(unknown)}, which the dataset does not have.")
        videos = [video for video in videos if video.video_id in arguments.video]
    if not videos:
        raise ValueError(f"`--dataset` {arguments.dataset} has no videos.")
    return videos


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file as data.

    Raises:
        ValueError: if it is no YAML or holds no mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}.")
    return content
