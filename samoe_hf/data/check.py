"""What a dataset holds, and what in it is likely a mistake."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from .frames import SampleError
from .schema import Video

LARGE_SHARE = 0.95


@dataclass
class VideoReport:
    """What was found in a video."""

    video_id: str
    num_frames: int = 0
    num_annotated: int = 0  # frames with masks
    size: tuple[int, int] = (0, 0)  # height, width
    object_ids: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # what is likely a mistake
    notes: list[str] = field(default_factory=list)  # what was guessed
    error: str | None = None  # why the video cannot be used, if so


def check_video(
    video_id: str, open_video: Callable[[], Video], progress: Callable[[], object] = lambda: None
) -> tuple[VideoReport, Video | None]:
    """Opens a video and reads all its frames and masks; None is in place of a video that cannot be opened."""
    report, video, errors = VideoReport(video_id), None, []
    with caught_sentences() as sentences, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            video = open_video()
            report.video_id, report.num_frames, report.size = video.video_id, len(video), video.size
            errors += _read_frames(video, progress)
            _read_masks(video, report, errors)
        except (SampleError, OSError) as error:
            errors += [] if str(error) in errors else [str(error)]
    if errors:
        more = f"; and {len(errors) - 1} more, the last: {errors[-1]}" if len(errors) > 1 else ""
        report.error = f"{errors[0]}{more}"
    report.notes += video.annotations.notes if video is not None else []
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    report.warnings += [m for m in dict.fromkeys([*messages, *sentences]) if m not in report.notes]
    return report, video


@contextmanager
def caught_sentences() -> Iterator[list[str]]:
    """What the data room says in its log, which goes into a report instead."""
    logger, said = logging.getLogger(__package__), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def _read_frames(video: Video, progress: Callable[[], object]) -> list[str]:
    """Reads all frames, and returns what is wrong."""
    errors = []
    for frame in range(len(video)):
        try:
            video.frames[frame]
        except (SampleError, OSError) as error:
            errors.append(str(error))
        progress()
    return errors


def _read_masks(video: Video, report: VideoReport, errors: list[str]) -> None:
    """Reads all masks, and says of them what is wrong and what is likely a mistake."""
    report.num_annotated = len(video.annotated_frames)
    seen: Counter[int] = Counter()
    largest = 0.0
    for frame in video.annotated_frames:
        try:
            visible = video.visible(frame)
            masks = video.masks(frame, visible)
        except (SampleError, OSError) as error:
            errors.append(str(error))
            continue
        seen.update(visible)
        largest = max(largest, *masks.mean(axis=(1, 2)).tolist(), 0.0)
    if errors:
        return
    report.object_ids = video.object_ids
    doubts, missing = report.warnings, report.num_frames - report.num_annotated
    if not seen:
        doubts.append("no frame shows an object")
        return
    if report.num_annotated == 1 and missing:
        doubts.append("one frame alone has masks: a clip for training needs several")
    elif missing:
        doubts.append(f"{missing} of {report.num_frames} frames have no mask, and are not used for training")
    if report.num_frames == 1:
        doubts.append("one frame: it does not train the memory attention")
    once = [i for i in report.object_ids if seen[i] == 1 and report.num_annotated > 1]
    if once:
        doubts.append(f"objects that one frame alone shows: {_short(once)}")
    if largest > LARGE_SHARE:
        doubts.append(f"an object covers {100 * largest:.0f} % of a frame: is the mask inverted?")


def _short(numbers: Sequence[int]) -> str:
    text = ", ".join(map(str, numbers[:8]))
    return f"{text}, … ({len(numbers)})" if len(numbers) > 8 else text


def report_table(reports: Sequence[VideoReport]) -> str:
    """A line for each video, and below it its warnings and how its files were read where that is a guess."""
    width = max([len(report.video_id) for report in reports] + [len("video")])
    lines = [f"{'video':{width}s}  {'size':>11s} {'frames':>7s} {'masks':>6s} {'objects':>7s}  ids"]
    for report in reports:
        if report.error is not None:
            lines.append(f"{report.video_id:{width}s}  error: {report.error}")
            continue
        size, ids = f"{report.size[1]} x {report.size[0]}", report.object_ids
        counts = f"{size:>11s} {report.num_frames:7d} {report.num_annotated:6d} {len(ids):7d}"
        lines.append(f"{report.video_id:{width}s}  {counts}  {_short(ids)}")
        lines += [f"{'':{width}s}  warning: {warning}" for warning in report.warnings]
        lines += [f"{'':{width}s}  read as: {note}" for note in report.notes]
    return "\n".join(lines)
