"""Look at a dataset before it is trained on, or write it as a label tool or another framework reads it.

    samoe data check my_videos
    samoe data check davis --root DAVIS --split val --output outputs/davis-check
    samoe data convert my_videos --to cvat --output for_cvat

`check` lists the videos, their objects, sizes and ids, and what is likely a mistake, and writes a contact sheet: frames
with their objects, of up to 12 videos. `convert` writes frames and masks into a new folder, reads them back, and says
what is not kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samoe_hf.data.layouts import WRITTEN
from samoe_hf.errors import InputError, input_errors

from .options import add_dataset_options, add_output_option, check_outside, command_parser, open_dataset, write_format

if TYPE_CHECKING:
    from samoe_hf.data.check import VideoReport
    from samoe_hf.data.schema import Video

SHEET = "contact_sheet.png"
MAX_ROWS, NUM_COLUMNS, MIN_HEIGHT = 12, 5, 240


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("data", __doc__)
    action = parser.add_argument_group("action")
    action.add_argument("action", choices=["check", "convert"], help="check: list videos and what is likely a mistake")
    action.add_argument("--to", choices=WRITTEN, help="of convert: the format")
    action.add_argument("--polygons", action="store_true", help="of convert: outlines in place of pixels")
    add_dataset_options(parser, positional=True)
    add_output_option(parser, f"for {SHEET} (outputs/data-check), or the new folder of convert", "outputs/data-check")
    parsed = parser.parse_args(arguments)
    if (parsed.action == "convert") != (parsed.to is not None) or (parsed.polygons and parsed.to is None):
        parser.error("`convert` needs `--to`, and `--to` and `--polygons` go with `convert`")
    if parsed.action == "convert" and parsed.output == parser.get_default("output"):
        parser.error("`convert` needs `--output`, a new folder")
    return parsed


def evenly(count: int, wanted: int) -> list[int]:
    """Up to `wanted` numbers below `count`, evenly from the first to the last."""
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def draw_sheet(videos: Sequence[Video], path: Path) -> None:
    """Draws some frames of each video with their objects."""
    from samoe_hf.plots.masks import overlay_masks, plot_sheet

    rows = {}
    for video in videos:
        frames = [video.annotated_frames[i] for i in evenly(len(video.annotated_frames), NUM_COLUMNS)]
        shown = [overlay_masks(video.frames[frame], video.id_map(frame), MIN_HEIGHT) for frame in frames]
        rows[f"{video.video_id}: {len(video)} frames, {len(video.object_ids)} objects"] = shown
    plot_sheet(rows, path, "First to last frame with masks")


def check_all(parsed: argparse.Namespace) -> tuple[list[VideoReport], list[Video]]:
    """What was found in each video, and the videos that can be used."""
    from tqdm import tqdm

    from samoe_hf.data.check import check_video
    from samoe_hf.data.schema import named_entries

    reports, usable = [], []
    entries = named_entries(*open_dataset(parsed).parts)
    bar = tqdm(unit="frame", leave=False)
    for number, (name, open_video) in enumerate(entries, start=1):
        bar.set_description_str(f"video {number} of {len(entries)}")
        report, video = check_video(name, open_video, bar.update)
        reports.append(report)
        if report.error is None and report.object_ids and report.num_annotated:
            usable.append(video)
    bar.close()
    if not reports:
        raise InputError(f"{parsed.dataset} has no videos.")
    return reports, usable


def run(parsed: argparse.Namespace) -> None:
    if parsed.action == "convert":
        dataset = open_dataset(parsed)
        if dataset.root is not None:
            check_outside(parsed.output, dataset.root)
        from samoe_hf.one_writer import OneWriter

        with OneWriter(parsed.output, inside=False):
            return write_format(parsed.to, dataset.videos(), parsed.output, parsed.polygons)
    from samoe_hf.data.check import report_table
    from samoe_hf.whole_files import whole_file

    reports, usable = check_all(parsed)
    print(report_table(reports))
    doubtful = sum(bool(report.warnings) for report in reports)
    print(f"{len(reports)} videos, {sum(len(r.object_ids) for r in reports)} objects; {doubtful} videos with warnings")
    if usable:
        refused = input_errors(f"`--output` {parsed.output} cannot be written")
        with refused, whole_file(parsed.output / SHEET) as path:
            draw_sheet([usable[i] for i in evenly(len(usable), MAX_ROWS)], path)
        print(f"Written: {parsed.output / SHEET}")
    broken = sum(report.error is not None for report in reports)
    if broken:
        raise InputError(f"{broken} of {len(reports)} videos cannot be used, see above.")
