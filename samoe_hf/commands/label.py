"""Label a dataset: track the objects of all its videos, and write their masks.

    samoe label MODEL --dataset my_videos --output labels
    samoe label MODEL --dataset davis --root DAVIS --split val --prompt box --output labels
    samoe label MODEL --dataset clips --prompts prompts.json --output labels
    accelerate launch --num_processes 8 -m samoe_hf label MODEL --dataset clips --prompts prompts.json --output labels

Each object is prompted with its mask, or the box around it, on the first annotated frame that shows it. With
`--prompts` the dataset is a folder of video files and folders of images, with masks or without, and the prompts are
those of a JSON file, a list of

    {"video": "a/b", "object": 1, "frame": 0, "points": [[420, 230]], "labels": [1]}

or with a "box" [x0, y0, x1, y1], or a "mask", an image below the folder of the JSON file, or "end": true where the
object is gone from the frame on. A video is named by its path within the folder, without the suffix.

Each video's masks are kept when it is finished: the same command again goes on with what is left.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samoe_hf.data.layouts import LAYOUTS
from samoe_hf.errors import InputError, input_errors

from . import options


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.command_parser("label", __doc__)
    model = options.add_model_option(parser)
    options.add_memory_option(model)
    options.add_unknown_option(model)
    options.add_dataset_options(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", choices=("mask", "box"), help="(mask)")
    prompts.add_argument("--prompts", type=Path, metavar="FILE.json", help="prompts of a folder of videos")
    output = options.add_output_option(parser, "folder for the masks")
    options.add_layout_option(output)
    output.add_argument("--overwrite", action="store_true", help="replace other labels there")
    output.add_argument("--push-to-hub", metavar="ID", help="upload videos and masks as this dataset of the Hub")
    options.add_videos_option(options.add_tracking_options(parser, shared=True))
    parsed = parser.parse_args(arguments)
    if parsed.prompts is not None and (parsed.dataset in LAYOUTS or parsed.root is not None):
        parser.error("`--prompts` goes with a folder of videos as `--dataset`, not with a kind")
    for name in ("split", "domain", "option", "video", "prompt"):
        if parsed.prompts is not None and getattr(parsed, name):
            raise InputError(f"`--{name}` does not go with `--prompts`.")
    return parsed


def run(parsed: argparse.Namespace) -> None:
    from samoe_hf import labelling
    from samoe_hf.evaluation.report import describe_choices
    from samoe_hf.evaluation.run import identity_of

    state, device = options.start_processes(parsed.device)
    if parsed.prompts is None:
        dataset = options.open_dataset(parsed)
        videos = labelling.from_first_frames(*dataset.parts, kind=parsed.prompt or "mask")
    else:
        options.check_outside(parsed.output, parsed.dataset)
        dataset = options.ChosenDataset("files", Path(parsed.dataset), [])
        with input_errors():
            videos = labelling.from_prompt_file(parsed.prompts, parsed.dataset)
    if not videos:
        raise InputError(f"`--dataset` {parsed.dataset} has no video with an object to track.")
    model, processor = options.load_model(parsed, device)
    identity = identity_of(model, processor, parsed.model) | {"dataset": dataset.describe(parsed)}
    labels = labelling.LabelRun(parsed.output, identity, options.mask_format(parsed.layout, dataset.kind))
    for_tool = options.format_folder(parsed.layout, parsed.output)
    with labels.writer:
        if state.is_main_process:
            for video in videos if parsed.overwrite and parsed.prompts else ():
                video.read()  # while earlier labels are there
            labels.start(parsed.overwrite)
        state.wait_for_everyone()
        summary = labelling.label_videos(model, processor, videos, labels, state, videos_at_once=parsed.videos_at_once)
    if summary is None:
        return
    if parsed.push_to_hub:
        dataset = labelling.labelled_dataset(labels, videos)
        with input_errors():
            dataset.push_to_hub(parsed.push_to_hub)
    if for_tool is not None:
        options.write_for_tool(parsed.layout, labelling.labelled_videos(labels, videos), for_tool, parsed.overwrite)
    if any("experts_of" in video for video in summary["videos"].values()):
        print(describe_choices(summary["videos"]))
    print(describe_summary(summary))
    pushed = f", and the dataset {parsed.push_to_hub}" if parsed.push_to_hub else ""
    written = [str(labels.folder / name) for name in ("masks", "tracks", "where_to_look.csv", "labels.json")]
    print(f"Written: masks in {', '.join(written)}{pushed}")


def describe_summary(summary: Mapping[str, Any]) -> str:
    """How much was labelled, and how fast."""
    total = (
        f"{len(summary['videos'])} videos, {summary['num_frames']} frames, {summary['num_objects']} objects; "
        f"{summary['worth_a_look']} frames are worth a look"
    )
    if not summary["labelled_now"]:
        return f"{total}: all were labelled already"
    processes = "1 process" if summary["num_processes"] == 1 else f"{summary['num_processes']} processes"
    return (
        f"{total}; {summary['labelled_now']} labelled now, {summary['videos_per_hour']:,.0f} videos an hour with "
        f"{processes} on {summary['device']}"
    )
