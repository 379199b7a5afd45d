"""Track objects through a video and write an overlay video and masks.

    samoe track MODEL dog.mp4 --point 420,230 --point 700,60:0 --box 2=300,100,560,380 --output out.mp4

A prompt is `[ID=]PROMPT[@FRAME]`: an object's id before it (1 if none), the frame it is given on behind it (that of
`--frame` if none). Several points, and a box, may be given for an object on a frame. With `--end 2=40` object 2 leaves:
it is gone from frame 40 on.

`samoe label` tracks the objects of all videos of a dataset.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from samoe_hf.data.layouts import WRITTEN
from samoe_hf.errors import InputError, input_errors

from . import options

if TYPE_CHECKING:
    from samoe_hf.data.frames import FrameSequence
    from samoe_hf.inference import VideoPrompt
    from samoe_hf.tracks import TrackRow

MAX_OBJECT_ID = 255  # of a palette PNG
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")  # containers for H.264
DEFAULT_FPS = 24  # of folders of frames
SHOWN_LOOKS = 5


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.command_parser("track", __doc__)
    model = options.add_model_option(parser)
    options.add_memory_option(model)
    model.add_argument(
        "--domain", default="auto", metavar="NAME", help="of a model with domains: auto (default), none, or a domain"
    )
    options.add_unknown_option(model)
    video = parser.add_argument_group("video")
    video.add_argument("video", type=Path, metavar="VIDEO", help="a video file or a folder of frames")
    help_text = "what becomes black and white in images of 16 bits; by default the video's 0.5 and 99.5 percentiles"
    video.add_argument("--window", metavar="BLACK,WHITE", help=help_text)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--point", action="append", default=[], metavar="X,Y[:LABEL]", help="label 1: in, 0: out")
    prompts.add_argument("--box", action="append", default=[], metavar="X0,Y0,X1,Y1", help="around an object")
    prompts.add_argument("--mask", action="append", default=[], metavar="FILE", help="one object, or a map of ids")
    prompts.add_argument("--end", action="append", default=[], metavar="[ID=]FRAME", help="where an object leaves")
    prompts.add_argument("--frame", type=int, default=0, metavar="N", help="frame of prompts that name none")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, required=True, metavar="OUT.mp4", help="the overlay video; a new file")
    output.add_argument("--masks", type=Path, metavar="DIR", help="new folder for the masks; OUT_masks if not given")
    output.add_argument("--layout", choices=WRITTEN, help="masks and frames for a label tool, not PNGs")
    output.add_argument("--overwrite", action="store_true", help="replace the overlay and the masks of an earlier run")
    options.add_tracking_options(parser)
    return parser.parse_args(arguments)


def split_prompt(text: str, frame: int) -> tuple[int | None, str, int]:
    """Splits `[ID=]PROMPT[@FRAME]` into the object's id, the prompt and its frame."""
    match = re.fullmatch(r"(?:(\d+)=)?(.+?)(?:@(\d+))?", text)
    if match is None:
        raise InputError(f"A prompt must be [ID=]PROMPT[@FRAME], got {text!r}.")
    object_id, prompt, frame_idx = match.groups()
    return None if object_id is None else int(object_id), prompt, frame if frame_idx is None else int(frame_idx)


def parse_numbers(name: str, text: str, count: int) -> list[float]:
    """The numbers of the option `name`, which have commas between them."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise InputError(f"`--{name}` must be {count} numbers with commas between, got {text!r}.")
    return numbers


def read_prompts(parsed: argparse.Namespace) -> list[VideoPrompt]:
    """What the options give of each object on each frame, as one prompt."""
    from samoe_hf.data.annotations import LabelImages, has_soft_edges, read_object_mask
    from samoe_hf.data.images import read_label_png
    from samoe_hf.inference import VideoPrompt

    prompts: dict[tuple[int, int], VideoPrompt] = {}

    def prompt_of(object_id: int | None, frame_idx: int) -> VideoPrompt:
        object_id = 1 if object_id is None else object_id
        if not 1 <= object_id <= MAX_OBJECT_ID:
            raise InputError(f"The ids of objects must be from 1 to {MAX_OBJECT_ID}, got {object_id}.")
        return prompts.setdefault((object_id, frame_idx), VideoPrompt(object_id, frame_idx))

    for text in parsed.point:
        object_id, given, frame_idx = split_prompt(text, parsed.frame)
        position, _, label = given.partition(":")
        if label not in ("", "0", "1"):
            raise InputError(f"The label of `--point` must be 0 or 1, got {label!r}.")
        prompt = prompt_of(object_id, frame_idx)
        x, y = parse_numbers("point", position, 2)
        prompt.points, prompt.labels = [*prompt.points, (x, y)], [*prompt.labels, int(label or 1)]
    for text in parsed.box:
        object_id, given, frame_idx = split_prompt(text, parsed.frame)
        prompt = prompt_of(object_id, frame_idx)
        if prompt.box is not None:
            raise InputError(f"Object {prompt.object_id} has two boxes on frame {frame_idx}.")
        x0, y0, x1, y1 = parse_numbers("box", given, 4)
        prompt.box = (x0, y0, x1, y1)
    for text in parsed.mask:
        object_id, given, frame_idx = split_prompt(text, parsed.frame)
        if object_id is None and not has_soft_edges(read_label_png(given)):
            labels = LabelImages({0: given})
            # A map of one value is one object, whatever the value.
            ids = [None] if len(labels.object_ids) == 1 else labels.object_ids
            masks = dict(zip(ids, labels.masks(0, labels.object_ids), strict=True))
        else:
            advice = "give a map of ids without an id before it"
            mask = read_object_mask(given, object_id or 1, advice)
            masks = {object_id: mask} if mask.any() else {}
        if not masks:
            raise InputError(f"`--mask` {given} holds no object.")
        for value, mask in masks.items():
            prompt = prompt_of(value, frame_idx)
            if prompt.mask is not None:
                raise InputError(f"Object {prompt.object_id} has two masks on frame {frame_idx}.")
            prompt.mask = mask
    for text in parsed.end:
        match = re.fullmatch(r"(?:(\d+)=)?(\d+)", text)
        if match is None:
            raise InputError(f"`--end` must be [ID=]FRAME, got {text!r}.")
        prompt_of(int(match[1] or 1), int(match[2])).end = True
    if not prompts:
        raise InputError("Give at least one object, by `--point`, `--box` or `--mask`.")
    return list(prompts.values())


def check_outputs(output: Path, masks: Path, tracks: Path, video: Path, overwrite: bool, layout: str | None) -> None:
    """Raises an `InputError` for what would be found only after the video was tracked.

    With `overwrite` only files, and a folder that holds nothing but PNG files or is of `layout`, may be there, and not
    the video itself.
    """
    if output.suffix.lower() not in VIDEO_SUFFIXES:
        *others, last = VIDEO_SUFFIXES
        raise InputError(f"`--output` must end in {', '.join(others)} or {last}, got {output}.")
    for path in (output, tracks):
        if path.is_dir():
            raise InputError(f"{path} is a folder; give another `--output`.")
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists; give another `--output` or `--overwrite`.")
    for name, path in {"output": output, "masks": masks}.items():
        if path.exists() and path.samefile(video):
            raise InputError(f"`--{name}` must not be the video itself, got {path}.")
    if layout is None:
        is_replaced, what = masks.is_dir() and all(file.suffix == ".png" for file in masks.iterdir()), "masks alone"
    else:
        is_replaced, what = options.is_of_format(masks, layout), f"the format {layout}"
    if masks.exists() and not (is_replaced and (overwrite or not any(masks.iterdir()))):
        raise InputError(f"{masks} must be a new folder, or with `--overwrite` one of {what}.")


def run(parsed: argparse.Namespace) -> None:
    from samoe_hf.data.images import ImageFrames
    from samoe_hf.data.video_io import read_video
    from samoe_hf.one_writer import OneWriter

    target = parsed.masks or parsed.output.with_name(f"{parsed.output.stem}_masks")
    tracks = parsed.output.with_name(f"{parsed.output.stem}_tracks.csv")
    for one, other in ((path.resolve(), target.resolve()) for path in (parsed.output, tracks)):
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise InputError(f"`--masks` must be a new folder, apart from {one}, got {target}.")
    with input_errors():
        prompts = read_prompts(parsed)
        frames = read_video(parsed.video)
        if parsed.window is not None:
            if not isinstance(frames, ImageFrames):
                raise InputError(f"`--window` goes with images, which the frames of {parsed.video} are not.")
            black, white = parse_numbers("window", parsed.window, 2)
            if black >= white:
                raise InputError(f"`--window` must have the smaller intensity first, got {parsed.window!r}.")
            frames.window = black, white
    others = OneWriter(target, "`--masks`", inside=False), OneWriter(tracks, inside=False)
    with OneWriter(parsed.output, inside=False) as writer, others[0], others[1]:
        # The overlay is written last: its own masks without it are those of a process that was killed just before.
        was_killed = bool(writer.cleared) and not parsed.output.exists() and parsed.masks is None
        overwrite = parsed.overwrite or was_killed
        check_outputs(parsed.output, target, tracks, parsed.video, overwrite, parsed.layout)
        track(parsed, prompts, frames, target, tracks, overwrite)


def track(
    parsed: argparse.Namespace,
    prompts: list[VideoPrompt],
    frames: FrameSequence,
    target: Path,
    tracks: Path,
    overwrite: bool,
) -> None:
    """Tracks the prompts, and writes masks into the folder `target`, the table of `tracks`, and the overlay."""
    from samoe_hf.data.annotations import LabelImages
    from samoe_hf.data.frames import bare_name
    from samoe_hf.data.images import read_label_png, write_palette_png
    from samoe_hf.data.schema import Video
    from samoe_hf.data.video_io import write_video
    from samoe_hf.evaluation.report import describe_choice
    from samoe_hf.inference import track_video
    from samoe_hf.plots.masks import overlay_masks
    from samoe_hf.tracks import write_tracks
    from samoe_hf.whole_files import new_folder, whole_file

    model, processor = options.load_model(parsed, parsed.device)
    if parsed.domain not in ("auto", "none", *(names := model.config.domain_names)):
        known = ", ".join(names) or "it has none"
        raise InputError(f"`--domain` must be auto, none or one of the model's ({known}), got {parsed.domain!r}.")
    domain, tracked, rows = None if parsed.domain == "none" else parsed.domain, None, []
    with (
        whole_file(parsed.output) as overlay,
        whole_file(tracks) as table,
        TemporaryDirectory() if parsed.layout else new_folder(target, overwrite) as masks,
    ):
        paths = [Path(masks) / f"{name}.png" for name in frames.names]
        for tracked in track_video(model, processor, frames, prompts, show_progress_bar=True, domain=domain):
            id_map, ids, t = tracked.id_map(), tracked.object_ids, tracked.frame_idx
            write_palette_png(paths[t], id_map)
            rows += tracked.rows((id_map == i for i in ids), frames.time(t), prompts)
        # Frames before the first prompted one are tracked last, so the overlay comes from the files.
        overlays = (overlay_masks(frame, read_label_png(path)) for frame, path in zip(frames, paths, strict=True))
        write_video(overlay, overlays, fps=frames.fps or DEFAULT_FPS)
        write_tracks(table, rows)
        if parsed.layout:
            ids = sorted({prompt.object_id for prompt in prompts})
            labels = LabelImages(dict(enumerate(paths)), object_ids=ids)
            video = Video(bare_name(Path(os.path.abspath(parsed.video))), frames, labels)
            options.write_format(parsed.layout, [video], target, overwrite=overwrite)
    if model.config.domains is not None and tracked is not None:
        choice = tracked.domain_confidence, tracked.domain_rivals, tracked.domain_unknown
        print(f"Experts of: {describe_choice(tracked.domain or 'base', *choice)}")
        if tracked.domain_rivals:
            print("It looks like several domains: `--domain` names the one that is meant.")
    print(f"Memory selection: {model.memory_selection}. Computed in {str(model.dtype).removeprefix('torch.')}.")
    given = sum(not prompt.end for prompt in prompts)
    print(f"Tracked {given} prompts through {len(frames)} frames.")
    print(describe_looks(rows))
    print(f"Written: {parsed.output}, {tracks}, masks in {target}")


def describe_looks(rows: Iterable[TrackRow]) -> str:
    """The frames that are worth a look, most important first, a line for each."""
    from samoe_hf.where_to_look import where_to_look

    looks = where_to_look(rows, SHOWN_LOOKS)
    if not looks:
        return "No frame stands out as doubtful."
    lines = [f"  frame {x.frame}{'' if x.time is None else f' ({x.time:.2f} s)'}: {x.reason}" for x in looks]
    return "\n".join(["Worth a look, the most important first:", *lines])
