"""What a domain has won: videos tracked by the base and by its experts, side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samoe_hf.data.schema import Video, evenly_chosen
from samoe_hf.evaluation.evaluate import evaluate_video
from samoe_hf.evaluation.metrics import summarize
from samoe_hf.evaluation.report import format_number, format_table
from samoe_hf.inference import evaluation_mode
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.plots.masks import overlay_masks, plot_sheet
from samoe_hf.whole_files import whole_file

from .fit_gate import decide_videos

SHOWN_VIDEOS, SHOWN_FRAMES, HEIGHT = 3, 6, 240
KEPT_ASIDE, TRAINED_ON = "kept aside", "trained on"


@dataclass(frozen=True)
class Compared:
    """A video, tracked by the base and by a domain's experts: J&F from 0 to 1 of both.

    `experts_of`: whose experts the gate gives it, a domain's or "base", and how sure it is, from 0 to 1.
    """

    domain: str
    video: str
    base: float
    own: float
    experts_of: str
    confidence: float


def compare(
    model: SamoeModel,
    processor: VideoProcessor,
    domain: str,
    videos: Sequence[Video],
    picture: Path | None = None,
    which: str = KEPT_ASIDE,
) -> list[Compared]:
    """Tracks videos from the masks of the first frames, without experts and with a domain's, and scores both.

    `picture` is a file that shows some frames of up to [`SHOWN_VIDEOS`] of them; `which` says in its title which they
    are.
    """
    compared, rows = [], {}
    decisions = decide_videos(model, processor, videos)
    for number, (video, decision) in enumerate(zip(videos, decisions, strict=True)):
        assert decision is not None and decision.confidence is not None
        shown = evenly_chosen(video.annotated_frames, SHOWN_FRAMES)
        scores, masks = {}, {}
        for name in (None, domain):
            scores[name], masks[name] = _track(model, processor, video, name, shown)
        confidence = round(decision.confidence, 4)
        experts_of = decision.domain or "base"
        compared.append(Compared(video.domain, video.video_id, scores[None], scores[domain], experts_of, confidence))
        if number < SHOWN_VIDEOS:
            title = f"{video.video_id}: "
            rows[f"{title}truth"] = _drawn(video, {t: video.id_map(t) for t in shown})
            for name, label in ((None, "the base"), (domain, f"with {domain}")):
                rows[f"{title}{label}, J&F {percent(scores[name])}"] = _drawn(video, masks[name])
    if picture is not None and rows:
        with whole_file(picture) as path:
            plot_sheet(rows, path, f"Videos that were {which}, tracked from the masks of the first frame")
    return compared


def _track(
    model: SamoeModel, processor: VideoProcessor, video: Video, domain: str | None, shown: Sequence[int]
) -> tuple[float, dict[int, np.ndarray]]:
    """J&F of tracking with a domain's experts, and maps of ids of some frames."""
    id_maps: dict[int, np.ndarray] = {}

    def keep(_: Video, frame: int, masks: np.ndarray) -> None:
        if frame in shown:
            ids = np.array(video.object_ids)[:, None, None]
            id_maps[frame] = (masks * ids).max(axis=0)

    with evaluation_mode(model):
        result = evaluate_video(model, processor, video, domain=domain, write=keep)
    return summarize({video.video_id: result.scores}, protocol="youtube_vos")["J&F_mean"], id_maps


def _drawn(video: Video, id_maps: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    return [overlay_masks(video.frames[frame], id_map, HEIGHT) for frame, id_map in id_maps.items()]


def percent(score: float, sign: str = "") -> str:
    """A score from 0 to 1 as 0 to 100, with a dash for none."""
    return format_number(100 * score, 1, sign)


def means(compared: Sequence[Compared]) -> tuple[float, float]:
    """The mean J&F of the base and of the domain, over the videos that have one."""
    scores = np.array([(one.base, one.own) for one in compared]).reshape(-1, 2)
    scores = scores[~np.isnan(scores).any(axis=1)]
    return tuple(scores.mean(axis=0).tolist()) if len(scores) else (math.nan, math.nan)


def comparison_table(domain: str, compared: Sequence[Compared], which: str) -> str:
    """The videos, which are kept aside or trained on, and their mean, as text."""
    rows = [
        [one.video, *_scores(one.base, one.own), f"{one.experts_of}, {one.confidence:.0%} sure"] for one in compared
    ]
    mean = [["mean", *_scores(*means(compared)), ""]] if len(compared) > 1 else []
    heading = [which, "J&F of the base", f"of {domain}", "change", "the gate gives it"]
    return format_table(heading, [*rows, *mean], left=(0, len(heading) - 1))


def _scores(base: float, own: float) -> list[str]:
    return [percent(base), percent(own), percent(own - base, "+")]
