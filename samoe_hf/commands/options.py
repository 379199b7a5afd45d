"""What several commands have in common: their options, and how they open what these name.

Options are declared without PyTorch and transformers, so that a help text is there at once.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from samoe_hf.data.layouts import LAYOUTS, WRITTEN, MaskFormat, layout_of
from samoe_hf.errors import InputError, did_you_mean, file_in_the_way, input_errors

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from samoe_hf.data.schema import Video
    from samoe_hf.model.modeling_samoe import SamoeModel
    from samoe_hf.model.processing_samoe import VideoProcessor


FORMATS = tuple(kind for kind in WRITTEN if kind not in get_args(MaskFormat))  # of label tools


class CommandParser(argparse.ArgumentParser):
    """Names the nearest known option beside an unknown one."""

    def parse_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            hint = did_you_mean(unknown[0].partition("=")[0], known)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed


def command_parser(name: str, description: str | None) -> CommandParser:
    """A parser for `samoe NAME`, which shows the description as it is."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(prog=f"samoe {name}", description=description, formatter_class=formatter)
    # `samoe_hf.cli` looks for it.
    help_text = "show where an error comes from"
    parser.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=help_text)
    return parser


def add_device_option(parser: argparse.ArgumentParser, shared: bool = False) -> argparse._ArgumentGroup:
    """Adds `--device`, by default a GPU if there is one, or `shared`, that of each process ([`start_processes`])."""
    machine = parser.add_argument_group("machine")
    help_text = "such as cuda:1 or cpu; by default a GPU if there is one"
    machine.add_argument("--device", type=usable_device, default=None if shared else "best", help=help_text)
    return machine


def add_tracking_options(
    parser: argparse.ArgumentParser, shared: bool = False, compiles: bool = True
) -> argparse._ArgumentGroup:
    """Adds `--device`, `--dtype`, `--image-size` and `--compile`, for [`tracking_options`]."""
    machine = add_device_option(parser, shared)
    help_text = "of the weights, and of what is computed; auto: bfloat16 on a GPU that has it, else float32"
    machine.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=help_text)
    add_size_option(machine)
    if compiles:
        help_text = "compile the model; the first frames take minutes, later ones less time"
        machine.add_argument("--compile", action="store_true", help=help_text)
    return machine


def add_videos_option(group: argparse._ArgumentGroup) -> None:
    """Adds `--videos-at-once`, None for "auto"."""
    help_text = "videos that are tracked in one batch; by default as many as pay on the device, 8 at most"
    group.add_argument("--videos-at-once", type=_count_or_auto, metavar="N|auto", help=help_text)


def _count_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 on, or auto, got {text!r}")
    return int(text)


def tracking_options(parsed: argparse.Namespace, memory_selection: str | None = None) -> dict[str, Any]:
    """What `--dtype`, `--compile`, `--unknown` and `--memory-selection` say, for [`~samoe_hf.inference.load_tracker`].

    Args:
        memory_selection: of several that were given.
    """
    options = {"dtype": getattr(parsed, "dtype", None), "compiled": getattr(parsed, "compile", False)}
    for name in ("image_size", "unknown"):
        if (value := getattr(parsed, name, None)) is not None:
            options[name] = value
    if isinstance(given := getattr(parsed, "memory_selection", None), str):
        memory_selection = given
    return options if memory_selection is None else {**options, "memory_selection": memory_selection}


def add_model_option(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the model and the options that go with an original checkpoint, for [`load_model`]."""
    group = parser.add_argument_group("model")
    group.add_argument("model", metavar="MODEL", help="a SamoeModel, SAM 2 video, SAM 3, EdgeTAM, or an original .pt")
    add_original_options(group)
    return group


def add_size_option(group: argparse._ArgumentGroup) -> None:
    """Adds `--image-size`, for [`tracking_options`]."""
    help_text = "the model takes frames of S x S pixels; by default those that it was trained on"
    group.add_argument("--image-size", type=int, metavar="S", help=help_text)


def add_memory_option(group: argparse._ArgumentGroup, several: bool = False) -> None:
    """Adds `--memory-selection` beside the model, for [`load_model`]; `several` of them by repeating it."""
    group.add_argument(
        "--memory-selection",
        action="append" if several else "store",
        choices=("recent", "score", "distractor"),
        help="which memories a frame reads: the last ones, those that scored well, or those that tell doubles apart; "
        f"by default as the model is configured{'; repeat it to compare several' if several else ''}",
    )


def add_unknown_option(group: argparse._ArgumentGroup) -> None:
    """Adds `--unknown`, for [`load_model`]."""
    help_text = "of a video that is of no known domain: no experts, the nearest domain's, or half of what they add; "
    help_text += "by default as the model is configured, which is base unless it was changed"
    group.add_argument("--unknown", choices=("base", "nearest", "mix"), help=help_text)


def add_original_options(group: argparse._ArgumentGroup, experts: bool = True) -> None:
    """Adds the options that go with an original checkpoint: `--config` and `--experts`."""
    if experts:
        group.add_argument("--experts", type=Path, metavar="FILE.pt", help="with an original .pt: its experts' file")
    config_help = "with an original .pt: its YAML, needed for sizes other than Meta's"
    group.add_argument("--config", type=Path, metavar="FILE.yaml", help=config_help)


def add_output_option(
    parser: argparse.ArgumentParser, help: str, default: str | None = None
) -> argparse._ArgumentGroup:
    """Adds `--output`, a folder that must be given if there is no default, and returns its group."""
    group = parser.add_argument_group("output")
    path = None if default is None else Path(default)
    group.add_argument("--output", type=_folder, required=path is None, default=path, metavar="DIR", help=help)
    return group


def _folder(text: str) -> Path:
    if (file := file_in_the_way(text)) is not None:
        raise argparse.ArgumentTypeError(f"must be a folder, but {file} is a file")
    return Path(text)


def add_layout_option(group: argparse._ArgumentGroup) -> None:
    """Adds `--layout`, for [`mask_format`] and [`format_folder`]."""
    help_text = "of the masks; by default the dataset's. Those of label tools are written beside them, with the frames"
    group.add_argument("--layout", choices=(*get_args(MaskFormat), *FORMATS), help=help_text)


def mask_format(layout: str | None, kind: str) -> MaskFormat:
    """The format of masks that `--layout` names, else that of a kind of dataset."""
    return layout if layout in get_args(MaskFormat) else layout_of(kind).masks  # pyright: ignore[reportReturnType]


def format_folder(layout: str | None, parent: Path) -> Path | None:
    """The folder for what `--layout` names, if that is a format of a label tool: new, or of that format already."""
    if layout not in FORMATS:
        return None
    folder = parent / layout
    if not is_of_format(folder, layout):
        raise InputError(f"`--layout {layout}`: {folder} holds something else; move it, or give another `--output`.")
    return folder


def is_of_format(folder: Path, layout: str) -> bool:
    """Whether a folder is new, empty, or of a format that `--layout` names."""
    if not folder.exists():
        return True
    return folder.is_dir() and (not any(folder.iterdir()) or layout_of(layout).detect(folder) is not None)


def write_format(
    kind: str, videos: Sequence[Video], folder: Path, polygons: bool = False, overwrite: bool = False
) -> None:
    """Writes videos into a new folder as a label tool reads them, and prints what is not kept."""
    from samoe_hf.data.formats.convert import write_videos
    from samoe_hf.whole_files import new_folder

    with input_errors(), new_folder(folder, overwrite) as place:
        kept = write_videos(kind, videos, place, polygons)
    print(f"Written and read back in {folder}: {kept.videos} videos, {kept.frames} frames, {kept.objects} objects.")
    print(f"Of {kept.pixels} pixels of masks, {kept.lost} differ.")
    for difference in kept.differences:
        print(f"Not kept: {difference}")


def write_for_tool(layout: str, videos: Sequence[Video], folder: Path, overwrite: bool) -> None:
    """Writes into the folder that [`format_folder`] gave; what is there stays, unless `overwrite`."""
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        print(f"{folder} is there already, and stays as it is; remove it, or give `--overwrite`, to have it anew.")
    else:
        write_format(layout, videos, folder, overwrite=True)


def usable_device(name: str) -> torch.device:
    """A device of this machine by its name, or the "best" that there is, as a type of `argparse`."""
    import torch

    if name == "best":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by the device and how it fails
        reason = str(error).split("\n")[0]
        raise argparse.ArgumentTypeError(f"{name!r} is no device that can be used here ({reason})") from error
    return device


def load_model(parsed: argparse.Namespace, device: torch.device) -> tuple[SamoeModel, VideoProcessor]:
    """The model that the options of [`add_model_option`] name, and its processor."""
    from samoe_hf.inference import load_tracker

    options = {"experts": parsed.experts, "original_config": parsed.config, **tracking_options(parsed)}
    with input_errors(parsed.model):
        return load_tracker(parsed.model, device, **options)


def start_processes(device: torch.device | None) -> tuple[PartialState, torch.device]:
    """The processes that share the work, of `accelerate launch` or `torchrun`, or this one alone; and its device."""
    import torch
    from accelerate import PartialState

    is_cpu = device.type == "cpu" if device else not torch.accelerator.is_available()
    state = PartialState(cpu=is_cpu)  # without this it shares nothing among processes on CPUs
    if device and device.index is not None:
        state.device = device
    assert state.device is not None
    return state, state.device


class ChosenDataset(NamedTuple):
    """What the options of [`add_dataset_options`] name. Videos are opened when they are asked for.

    `kind`: of the dataset, or the run's YAML. `parts`: the dataset, or those of the run, with the chosen videos.
    """

    kind: str
    root: Path | None
    parts: list[Sequence[Video]]

    def videos(self) -> list[Video]:
        """The videos, each opened but not decoded."""
        with input_errors():
            videos = [video for part in self.parts for video in part]
        if not videos:
            raise InputError(f"`--dataset` {self.root or self.kind} has no videos.")
        return videos

    def describe(self, parsed: argparse.Namespace) -> dict[str, Any]:
        """What identifies the dataset among the results of a run."""
        root = self.root and str(self.root.resolve() if self.root.exists() else self.root)
        return {
            "kind": self.kind, "root": root, "split": parsed.split, "domain": parsed.domain, "option": parsed.option
        }  # fmt: skip


def add_dataset_options(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    """Adds the options that name videos, for [`open_dataset`]; `positional`, without `--dataset` before them."""
    group = parser.add_argument_group("videos")
    dataset = group.add_argument(
        "dataset" if positional else "--dataset",
        metavar="FOLDER|KIND|RUN.yaml",
        help=f"a folder of videos and masks; a kind of dataset ({', '.join(LAYOUTS)}); or a run's YAML, for the videos "
        "of its `eval_data`",
    )
    dataset.required = True
    group.add_argument("--root", type=Path, help="folder of the dataset, where its kind is given")
    group.add_argument("--split", help="of the dataset, as its reader understands it")
    group.add_argument("--domain", help="name under which its results are reported")
    group.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="further options of the kind's reader"
    )
    group.add_argument("--video", action="append", metavar="ID", help="only this video; may be repeated")


@input_errors()
def videos_of_run(path: str, key: str) -> list[Sequence[Video]]:
    """The datasets of a run's `train_data` or `eval_data`."""
    from samoe_hf.data.registry import dataset_entries, read_yaml, videos_from_entry

    entries = dataset_entries(read_yaml(path), key, path)
    without_weights = [{k: v for k, v in e.items() if k != "weight"} if isinstance(e, dict) else e for e in entries]
    return [videos_from_entry(entry, f"{key}[{index}]") for index, entry in enumerate(without_weights)]


@input_errors()
def open_dataset(parsed: argparse.Namespace) -> ChosenDataset:
    """What the options of [`add_dataset_options`] name."""
    from samoe_hf.data.configs import names_config
    from samoe_hf.data.registry import load_videos, name_kind, parse_yaml

    kind, root = parsed.dataset, parsed.root
    if names_config(kind):
        for name in ("root", "split", "domain", "option"):
            if getattr(parsed, name):
                raise InputError(f"`--{name}` does not go with a run's YAML ({kind}).")
        return ChosenDataset(kind, None, _choose(videos_of_run(kind, "eval_data"), parsed.video))
    options = {}
    for text in parsed.option:
        name, equals_sign, value = text.partition("=")
        if not equals_sign:
            raise InputError(f"`--option` must be NAME=VALUE, got {text!r}.")
        if name in ("kind", "root", "split", "domain"):
            raise InputError(f"`--option {text}`: it is `{'--dataset' if name == 'kind' else f'--{name}'}`.")
        # Braces of a pattern are none of YAML.
        options[name] = value if name in ("frames", "masks") else parse_yaml(value, f"`--option {name}`")
    if kind not in LAYOUTS and root is None:
        kind, root, found = name_kind(kind, None, parsed.split, options)
        options = found | options
    if kind == "files" and root is not None:
        check_outside(getattr(parsed, "output", None), root)
    options |= {name: getattr(parsed, name) for name in ("split", "domain") if getattr(parsed, name) is not None}
    videos = load_videos(kind, root, **options)
    videos = videos if isinstance(videos, Sequence) else list(videos)
    return ChosenDataset(kind, None if root is None else Path(root), _choose([videos], parsed.video))


def check_outside(output: Path | None, root: str | Path) -> None:
    """Refuses an output within a folder of videos, whose layout would not be recognized with it."""
    if output is not None and output.resolve().is_relative_to(Path(root).resolve()):
        raise InputError(f"`--output` {output} lies in the folder of the videos, {root}; give one elsewhere.")


def _choose(parts: list[Sequence[Video]], video_ids: Sequence[str] | None) -> list[Sequence[Video]]:
    """The videos of the given ids, or all. Others are opened only where ids are not told before."""
    from samoe_hf.data.frames import one_form
    from samoe_hf.data.schema import VideoList, named_entries

    if not video_ids:
        return parts
    chosen, known, unreadable = [], set(), []
    video_ids = [one_form(video_id) for video_id in video_ids]
    for part in parts:
        if isinstance(part, VideoList) and part.video_ids:
            part = part.select([video_id for video_id in part.video_ids if one_form(video_id) in video_ids])
            known.update(map(one_form, part.video_ids))
        else:
            entries, part = named_entries(part), []
            for name, open_video in entries:
                try:
                    video = open_video()
                except (InputError, OSError) as error:
                    unreadable.append(f"{name}: {error}")
                    continue
                if one_form(video.video_id) in video_ids:
                    part.append(video)
                    known.add(one_form(video.video_id))
        chosen.append(part)
    if unknown := set(video_ids) - known:
        also = f"; {len(unreadable)} of its videos cannot be read, the first: {unreadable[0]}" if unreadable else ""
        raise InputError(f"`--video` names {sorted(unknown)}, which the dataset does not have{also}.")
    return chosen


def unique_names(names: Iterable[str]) -> list[str]:
    """Names for files or folders, all different: other characters become underscores, equal names get numbers."""
    unique: list[str] = []
    for name in names:
        name = re.sub(r"[^\w.+-]", "_", name)
        taken = {other.casefold() for other in unique}  # as some file systems tell names apart
        candidates = (name if number == 1 else f"{name}_{number}" for number in count(1))
        unique.append(next(candidate for candidate in candidates if candidate.casefold() not in taken))
    return unique
