"""Which domain's experts a new domain starts from: those that already track its training videos best."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from samoe_hf.data.schema import Video, evenly_chosen
from samoe_hf.evaluation.evaluate import evaluate_video
from samoe_hf.evaluation.metrics import summarize
from samoe_hf.inference import evaluation_mode
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.surgery.domains import find_domain, fits_in

NUM_VIDEOS, NUM_FRAMES = 8, 8
# How much better than the base's J&F, 0 to 1, that of a domain's experts must be.
MIN_ADVANTAGE = 0.05


def find_start(
    model: SamoeModel, processor: VideoProcessor, domain: str, videos: Sequence[Video], show_progress_bar: bool = True
) -> str | None:
    """The domain whose experts a new one should start from.

    Some of the new domain's training videos are tracked by the experts of each domain whose experts fit into the new
    ones, see [`~surgery.domains.fits_in`]. The best is given if it is clearly better than the base alone; otherwise,
    and if the new `domain` has learned something, None.
    """
    find_domain(model, domain)
    candidates = [
        name
        for name in model.config.domain_names
        if fits_in(model, name, domain) and any(experts.lora_B.any() for _, experts in domain_modules(model, name))
    ]
    if not candidates:
        return None
    excerpts = read_excerpts(model, videos)
    base = domain_score(model, processor, excerpts, None)
    tried = tqdm(candidates, desc=f"start of {domain}", unit="domain", disable=not show_progress_bar)
    scores = {name: domain_score(model, processor, excerpts, name) for name in tried}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= base + MIN_ADVANTAGE else None


def read_excerpts(model: SamoeModel, videos: Sequence[Video]) -> list[Video]:
    """The first frames of some videos from one with an object on, of the model's size, in RAM; videos without two such
    frames are left out."""
    size = model.config.image_size
    assert isinstance(size, int)
    excerpts = []
    for video in evenly_chosen(videos, NUM_VIDEOS):
        first = video.first_visible
        frames = [] if first is None else [t for t in video.annotated_frames if t >= first][:NUM_FRAMES]
        if len(frames) > 1:
            excerpts.append(reduced(video, size, frames))
    return excerpts


def domain_score(model: SamoeModel, processor: VideoProcessor, videos: Sequence[Video], domain: str | None) -> float:
    """J&F, 0 to 1, of tracking with a domain's experts, or with none; 0 where there is nothing to score."""
    scores = [score for score in video_scores(model, processor, videos, domain) if not math.isnan(score)]
    return sum(scores) / len(scores) if scores else 0.0


def video_scores(
    model: SamoeModel, processor: VideoProcessor, videos: Sequence[Video], domain: str | None
) -> list[float]:
    """J&F of each video, 0 to 1, of tracking with a domain's experts, or with none; NaN where nothing is to score."""
    with evaluation_mode(model):
        results = [evaluate_video(model, processor, video, domain=domain) for video in videos]
    return [summarize({"": result.scores}, protocol="youtube_vos")["J&F_mean"] for result in results]


def reduced(video: Video, size: int, frames: Sequence[int]) -> Video:
    """Some annotated frames of a video, in RAM, `size` pixels high and wide."""
    pixels = [_resized(np.asarray(video.frames[t]), size) for t in frames]
    masks = [[_resized(255 * mask.astype(np.uint8), size) >= 128 for mask in video.masks(t)] for t in frames]
    return Video.from_arrays(video.video_id, np.stack(pixels), np.array(masks), video.object_ids, domain=video.domain)


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
