"""What a dataset holds, and what in it is likely a mistake."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .frames import SampleError
from .schema import Video

ONE_MASK = 255  # by which a gray image stores one object
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
    error: str | None = None  # why the video cannot be used, if so


def check_video(video_id: str, open_video: Callable[[], Video]) -> tuple[VideoReport, Video | None]:
    """Opens a video and reads all its masks, and one frame; None is in place of a video that cannot be opened."""
    report, video = VideoReport(video_id), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            video = open_video()
            _read(video, report)
        except (SampleError, OSError) as error:
            report.error = str(error)
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    report.warnings += dict.fromkeys(messages)
    return report, video


def _read(video: Video, report: VideoReport) -> None:
    """Reads a video's masks and one frame, and says of them what is likely a mistake."""
    report.num_frames, report.size, report.num_annotated = len(video), video.size, len(video.annotated_frames)
    video.frames[0]
    report.object_ids = video.object_ids
    seen: Counter[int] = Counter()
    largest = 0.0
    for frame in video.annotated_frames:
        masks = video.masks(frame)
        seen.update(i for i, mask in zip(video.object_ids, masks, strict=True) if mask.any())
        largest = max(largest, *masks.mean(axis=(1, 2)).tolist(), 0.0)
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
    if report.object_ids == [ONE_MASK]:
        doubts.append(f"one object, whose id is {ONE_MASK}: `binary: true` makes it 1")
    once = [i for i in report.object_ids if seen[i] == 1 and report.num_annotated > 1]
    if once:
        doubts.append(f"objects that one frame alone shows: {_short(once)}")
    if largest > LARGE_SHARE:
        doubts.append(f"an object covers {100 * largest:.0f} % of a frame: is the mask inverted?")


def _short(numbers: Sequence[int], limit: int = 8) -> str:
    text = ", ".join(map(str, numbers[:limit]))
    return f"{text}, … ({len(numbers)})" if len(numbers) > limit else text


def report_table(reports: Sequence[VideoReport]) -> str:
    """A line for each video, and its warnings below it."""
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
    return "\n".join(lines)
