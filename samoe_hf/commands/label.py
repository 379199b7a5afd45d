"""Label a dataset: track the objects of all its videos, and write their masks.

    samoe track MODEL --dataset my_videos --output labels
    samoe track MODEL --dataset davis --root DAVIS --split val --prompt box --output labels
    samoe track MODEL --dataset clips --prompts prompts.json --output labels
    accelerate launch --num_processes 8 -m samoe_hf track MODEL --dataset clips --prompts prompts.json --output labels

Each object is prompted with its mask, or the box around it, on the first annotated frame that shows it. With
`--prompts` the dataset is a folder of video files and folders of images, with masks or without, and the prompts are
those of a JSON file, a list of

    {"video": "a/b", "object": 1, "frame": 0, "points": [[420, 230]], "labels": [1]}

or with a "box" [x0, y0, x1, y1], or a "mask", an image below the folder of the JSON file. A video is named by its path
within the folder, without the suffix.

Each video's masks are kept when it is finished: the same command again goes on with what is left.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from samoe_hf import SamoeModel
from samoe_hf.data.layouts import LAYOUTS, MaskFormat, layout_of
from samoe_hf.data.registry import add_dataset_arguments, videos_from_arguments
from samoe_hf.data.schema import to_datasets
from samoe_hf.errors import InputError
from samoe_hf.evaluation.run import describe_model
from samoe_hf.labelling import (
    FirstFramePrompt,
    LabelRun,
    PromptedVideo,
    from_first_frames,
    from_prompt_file,
    label_videos,
    labelled_videos,
)
from samoe_hf.model.processing_samoe import load_processor

from .evaluate import describe_dataset
from .options import add_original_options, command_parser, original_options, start_processes, usable_device


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("track", __doc__)
    model = parser.add_argument_group("model")
    model.add_argument("model", metavar="MODEL", help="a SamoeModel, SAM 2 video, SAM 3, or an original .pt")
    add_original_options(model)
    add_dataset_arguments(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", choices=get_args(FirstFramePrompt), default="mask", help="(%(default)s)")
    prompts.add_argument("--prompts", type=Path, metavar="FILE.json", help="prompts of a folder of videos")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the masks")
    output.add_argument("--layout", choices=get_args(MaskFormat), help="of the masks; by default the dataset's")
    output.add_argument("--overwrite", action="store_true", help="replace other labels there")
    output.add_argument("--push-to-hub", metavar="ID", help="upload videos and masks as this dataset of the Hub")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", type=usable_device, help="such as cuda or cpu; by default the best there is")
    parsed = parser.parse_args(arguments)
    if parsed.prompts is not None and (parsed.dataset in LAYOUTS or parsed.root is not None):
        parser.error("`--prompts` goes with a folder of videos as `--dataset`, not with a kind")
    return parsed


def find_prompted(parsed: argparse.Namespace) -> tuple[list[PromptedVideo], MaskFormat]:
    """The videos that are to be labelled, and the layout of their masks."""
    if parsed.prompts is not None:
        parsed.dataset, parsed.root = "files", Path(parsed.dataset)
        return from_prompt_file(parsed.prompts, parsed.root), parsed.layout or layout_of(parsed.dataset).masks
    videos = from_first_frames(videos_from_arguments(parsed), parsed.prompt)
    return videos, parsed.layout or layout_of(parsed.dataset).masks


def describe_run(model: SamoeModel, parsed: argparse.Namespace) -> dict[str, Any]:
    """What the masks depend on, beside the layout and each video's prompts."""
    return {"model": describe_model(model, parsed.model), "dataset": describe_dataset(parsed)}


def run(parsed: argparse.Namespace) -> None:
    """What `samoe track` does with `--dataset`."""
    state = start_processes(parsed.device)
    videos, layout = find_prompted(parsed)
    if not videos:
        raise InputError(f"`--dataset` {parsed.dataset} has no video with an object to track.")
    model = SamoeModel.from_pretrained(parsed.model, **original_options(parsed)).to(state.device)
    processor = load_processor(parsed.model, model)
    labels = LabelRun(parsed.output, describe_run(model, parsed), layout)
    if state.is_main_process:
        labels.start(parsed.overwrite)
    state.wait_for_everyone()
    summary = label_videos(model, processor, videos, labels, state)
    if summary is None:
        return
    if parsed.push_to_hub:
        to_datasets(labelled_videos(labels, videos)).push_to_hub(parsed.push_to_hub)
    print(describe_summary(summary))
    pushed = f", and the dataset {parsed.push_to_hub}" if parsed.push_to_hub else ""
    print(f"Written: masks in {labels.folder / 'masks'}, {labels.folder / 'labels.json'}{pushed}")


def describe_summary(summary: dict[str, Any]) -> str:
    """How much was labelled, how fast, and what a million videos would take."""
    total = f"{len(summary['videos'])} videos, {summary['num_frames']} frames, {summary['num_objects']} objects"
    if not summary["labelled_now"]:
        return f"{total}: all were labelled already"
    hours = summary["process_hours_for_a_million_videos"]
    return (
        f"{total}; {summary['labelled_now']} labelled now, {summary['videos_per_hour']:,.0f} videos an hour with "
        f"{summary['num_processes']} process{'es' * (summary['num_processes'] > 1)} on {summary['device']}\n"
        f"A million videos like these: {hours:,.0f} hours of one such process, or {hours / 24 / 100:,.1f} days of 100"
    )
