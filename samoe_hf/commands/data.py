"""Look at a dataset before it is trained on: its videos, objects, sizes, ids, and what is likely a mistake.

    samoe data check my_videos
    samoe data check davis --root DAVIS --split val --output outputs/davis-check

It lists the videos, and writes a contact sheet: frames with their objects, of up to 12 videos.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from samoe_hf.data import Video, VideoList
from samoe_hf.data.check import VideoReport, check_video, report_table
from samoe_hf.data.registry import add_dataset_arguments, datasets_from_arguments
from samoe_hf.errors import InputError
from samoe_hf.model.weights_io import whole_file
from samoe_hf.plots.masks import overlay_masks, plot_sheet

from .options import command_parser

SHEET = "contact_sheet.png"
MAX_ROWS, NUM_COLUMNS, MIN_HEIGHT = 12, 5, 240


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("data", __doc__)
    action = parser.add_argument_group("action")
    action.add_argument("action", choices=["check"], help="check: list videos and what is likely a mistake")
    add_dataset_arguments(parser, positional=True)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, default=Path("outputs/data-check"), metavar="DIR", help=f"for {SHEET} (%(default)s)"
    )
    return parser.parse_args(arguments)


def draw_sheet(videos: Sequence[Video], path: Path) -> None:
    """Draws some frames of each video with their objects."""
    rows = {}
    for video in videos:
        frames = video.annotated_frames
        places = np.unique(np.linspace(0, len(frames) - 1, NUM_COLUMNS).round().astype(int))
        shown = [overlay_masks(video.frames[frames[i]], video.id_map(frames[i]), MIN_HEIGHT) for i in places]
        rows[f"{video.video_id}: {len(video)} frames, {len(video.object_ids)} objects"] = shown
    plot_sheet(rows, path, "First to last frame with masks")


def check_all(arguments: argparse.Namespace) -> tuple[list[VideoReport], list[Video]]:
    """What was found in each video, and the videos that can be used."""
    reports, usable = [], []
    entries = [(videos, i) for videos in datasets_from_arguments(arguments) for i in range(len(videos))]
    for videos, i in tqdm(entries, unit="video", leave=False):
        video_id = videos.video_ids[i] if isinstance(videos, VideoList) else videos[i].video_id
        if arguments.video and video_id not in arguments.video:
            continue
        report, video = check_video(video_id, partial(videos.__getitem__, i))
        reports.append(report)
        if report.error is None and report.object_ids:
            usable.append(video)
    if not reports:
        raise InputError(f"{arguments.dataset} has no videos{' of these ids' if arguments.video else ''}.")
    return reports, usable


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    reports, usable = check_all(parsed)
    print(report_table(reports))
    doubtful = sum(bool(report.warnings) for report in reports)
    print(f"{len(reports)} videos, {sum(len(r.object_ids) for r in reports)} objects; {doubtful} videos with warnings")
    if usable:
        places = np.unique(np.linspace(0, len(usable) - 1, MAX_ROWS).round().astype(int))
        parsed.output.mkdir(parents=True, exist_ok=True)
        with whole_file(parsed.output / SHEET) as path:
            draw_sheet([usable[i] for i in places], path)
        print(f"Written: {parsed.output / SHEET}")
    broken = sum(report.error is not None for report in reports)
    if broken:
        raise InputError(f"{broken} of {len(reports)} videos cannot be used, see above.")
