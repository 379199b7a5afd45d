"""Track objects through a video and write an overlay video and masks.

    samoe track MODEL dog.mp4 --point 420,230 --point 700,60:0 --box 2=300,100,560,380 --output out.mp4

A prompt is `[ID=]PROMPT[@FRAME]`: an object's id before it (1 if none), the frame it is given on behind it (that of
`--frame` if none). Several points, and a box, may be given for an object on a frame.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from samoe_hf import SamoeModel
from samoe_hf.data.video_io import read_label_png, read_video, write_palette_png, write_video
from samoe_hf.inference import VideoPrompt, track_video
from samoe_hf.model.processor import load_processor
from samoe_hf.plots.experts import overlay_masks

from .options import add_device_option, command_parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("track", __doc__)
    parser.add_argument("model", help="a SamoeModel, a SAM 2 video model or an original .pt")
    parser.add_argument("video", type=Path, help="a video file or a folder of frames")
    parser.add_argument("--point", action="append", default=[], metavar="X,Y[:LABEL]", help="label 1: in, 0: out")
    parser.add_argument("--box", action="append", default=[], metavar="X0,Y0,X1,Y1")
    parser.add_argument("--mask", action="append", default=[], metavar="FILE", help="one object, or a map of ids")
    parser.add_argument("--frame", type=int, default=0, metavar="N", help="frame of prompts that name none")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.mp4", help="the overlay video")
    parser.add_argument("--masks", type=Path, help="folder for the masks; OUT_masks if not given")
    add_device_option(parser)
    return parser.parse_args(arguments)


def parse_prompt(text: str, frame: int) -> tuple[int | None, str, int]:
    """Splits `[ID=]PROMPT[@FRAME]` into the object's id, the prompt and its frame."""
    match = re.fullmatch(r"(?:(\d+)=)?(.+?)(?:@(\d+))?", text)
    if match is None:
        raise ValueError(f"A prompt must be [ID=]PROMPT[@FRAME], got {text!r}.")
    object_id, prompt, at = match.groups()
    return object_id and int(object_id), prompt, frame if at is None else int(at)


def parse_numbers(name: str, text: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise ValueError(f"`--{name}` must be {count} numbers with commas between, got {text!r}.")
    return numbers


def collect_prompts(points: Iterable[str], boxes: Iterable[str], masks: Iterable[str], frame: int) -> list[VideoPrompt]:
    """Joins what is given of each object on each frame into one prompt."""
    prompts: dict[tuple[int, int], VideoPrompt] = {}

    def of(object_id: int | None, at: int) -> VideoPrompt:
        key = (object_id or 1, at)
        return prompts.setdefault(key, VideoPrompt(*key, points=[], labels=[]))

    for text in points:
        object_id, given, at = parse_prompt(text, frame)
        position, _, label = given.partition(":")
        if label not in ("", "0", "1"):
            raise ValueError(f"The label of `--point` must be 0 or 1, got {label!r}.")
        prompt = of(object_id, at)
        prompt.points.append(parse_numbers("point", position, 2))
        prompt.labels.append(int(label or 1))
    for text in boxes:
        object_id, given, at = parse_prompt(text, frame)
        of(object_id, at).box = parse_numbers("box", given, 4)
    for text in masks:
        object_id, given, at = parse_prompt(text, frame)
        ids = read_label_png(given)
        found = sorted(set(ids[ids > 0].tolist()))
        if not found:
            raise ValueError(f"`--mask` {given} holds no object.")
        for value in found:
            # A map of one value is one object, whatever the value.
            single = object_id is not None or len(found) == 1
            of(object_id if single else value, at).mask = ids > 0 if single else ids == value
    for prompt in prompts.values():
        if prompt.mask is not None and (prompt.points or prompt.box is not None):
            raise ValueError(f"Object {prompt.object_id} has a mask and points or a box on frame {prompt.frame_idx}.")
    return list(prompts.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    prompts = collect_prompts(parsed.point, parsed.box, parsed.mask, parsed.frame)
    frames = read_video(parsed.video)
    model = SamoeModel.from_pretrained(parsed.model).to(parsed.device)
    processor = load_processor(parsed.model, model)
    tracked = track_video(model, processor, frames, prompts, show_progress_bar=True)
    id_maps = {frame.frame_idx: frame.id_map() for frame in tracked}

    masks = parsed.masks or parsed.output.with_name(f"{parsed.output.stem}_masks")
    masks.mkdir(parents=True, exist_ok=True)
    for frame_idx, ids in id_maps.items():
        write_palette_png(masks / f"{frames.names[frame_idx]}.png", ids)
    write_video(parsed.output, (overlay_masks(frame, id_maps[t]) for t, frame in enumerate(frames)))
    print(f"Tracked {len(prompts)} prompts through {len(frames)} frames: {parsed.output}, {masks}{'/'}")
