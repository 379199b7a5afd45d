"""`load_videos`: any dataset by the name of its kind, and the command line's options for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import yaml

from .configs import find_config
from .options import check_options, check_types, nearest_name
from .readers import read_coco, read_davis, read_ocid, read_sa_v, read_sa_v_val, read_vos
from .schema import Video, VideoList, videos_from_dataset
from .synthetic import SyntheticVideos
from .video_io import DAMAGE, SampleError
from .volumes import read_nifti, read_npz


def read_dataset(root: str | Path, split: str = "train", streaming: bool = False) -> Sequence[Video] | Iterable[Video]:
    """A dataset made by `to_datasets`: a folder of `save_to_disk`, or anything `datasets.load_dataset` takes.

    Args:
        root: folder, or name on the Hub.
        split: of `load_dataset`.
        streaming: nothing is downloaded ahead; gives an iterable, for `ClipStream`.
    """
    if (Path(root) / "state.json").is_file():
        try:
            dataset = datasets.load_from_disk(str(root))
        except DAMAGE as error:
            raise SampleError(f"{root}: not a dataset of `save_to_disk` ({error!r})") from error
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
        ValueError: an unknown kind, option or video (names the nearest known one), or a value of another type.
        FileNotFoundError: root does not exist.
    """
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(f"unknown kind of dataset {kind!r}{nearest_name(kind, READERS)}")
    given = {"root": root, "split": split, "domain": domain}
    options |= {name: value for name, value in given.items() if value is not None}
    owner = f"datasets of kind {kind!r}"
    check_options(READERS[kind], options, owner)
    check_types(load_videos, {"video_ids": video_ids}, owner)
    videos = READERS[kind](**options)
    if video_ids is None:
        return videos
    if not isinstance(videos, VideoList):
        raise ValueError(f"video_ids cannot choose among the videos of kind {kind!r}")
    return videos.select(video_ids)


def videos_from_entry(entry: Mapping[str, Any], owner: str) -> Sequence[Video]:
    """The videos of an entry of a run's `train_data` or `eval_data`.

    Args:
        entry: the arguments of [`load_videos`].
        owner: what to call it in messages, such as "train_data[0]".

    Raises:
        ValueError: not a mapping, no kind, a stream, or what `load_videos` raises.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{owner} must be the arguments of `load_videos`, such as {{kind: davis}}, not {entry!r}")
    if "kind" not in entry:
        raise ValueError(f"{owner} names no `kind`, one of {', '.join(READERS)}, but {', '.join(map(repr, entry))}")
    try:
        videos = load_videos(**{str(name): value for name, value in entry.items()})
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error
    if not isinstance(videos, Sequence):
        raise ValueError(f"{owner}: videos that are streamed have no length; leave out `streaming`")
    return videos


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command line that name videos; [`videos_from_arguments`] opens them."""
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
        FileNotFoundError: the root does not exist.
    """
    if Path(arguments.dataset).suffix in (".yaml", ".yml"):
        for name in ("root", "split", "domain", "option"):
            if getattr(arguments, name):
                raise ValueError(f"`--{name}` does not go with a run's YAML ({arguments.dataset}).")
        entries = read_yaml(arguments.dataset).get("eval_data") or []
        if not isinstance(entries, list):
            raise ValueError(f"`eval_data` of {arguments.dataset} must be a list of datasets, not {entries!r}.")
        videos = [v for i, entry in enumerate(entries) for v in videos_from_entry(entry, f"eval_data[{i}]")]
    else:
        options = {}
        for text in arguments.option:
            name, equals_sign, value = text.partition("=")
            if not equals_sign:
                raise ValueError(f"`--option` must be NAME=VALUE, got {text!r}.")
            options[name] = parse_yaml(value, f"`--option {name}`")
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

    Args:
        path: a file, or the name of a configuration that comes with the package, see [`~configs.find_config`].

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if it is no YAML or holds no mapping.
    """
    content = parse_yaml(find_config(path).read_bytes(), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}.")
    return content


def parse_yaml(text: str | bytes, name: str) -> Any:
    """YAML as data; `ValueError` where it is none."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:  # dates raise ValueError
        raise ValueError(f"{name} is not YAML: {error}") from error
