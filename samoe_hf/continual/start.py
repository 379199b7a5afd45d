"""Which domain's experts a new domain starts from: those that already track its training videos best."""

import math
from collections.abc import Sequence

from tqdm import tqdm
from transformers import ProcessorMixin

from samoe_hf.data.schema import Video
from samoe_hf.evaluation.evaluate import evaluate_video
from samoe_hf.evaluation.metrics import summarize
from samoe_hf.inference import evaluation_mode
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.surgery.domains import find_domain

from .excerpts import reduced
from .fit_gate import evenly_chosen, first_visible

NUM_VIDEOS, NUM_FRAMES = 8, 8
# How much better than the base's J&F, 0 to 1, that of a domain's experts must be.
MIN_ADVANTAGE = 0.05


def find_start(
    model: SamoeModel,
    processor: ProcessorMixin,
    domain: str,
    videos: Sequence[Video],
    show_progress_bar: bool = True,
) -> str | None:
    """The domain whose experts a new one should start from.

    Some of the new domain's training videos are tracked by the experts of each domain whose experts are of the same
    number, rank and place.

    Args:
        domain: the new one, which the model has.
        videos: of the new domain, with masks.

    Returns:
        the best, if it is clearly better than the base alone; otherwise, and if `domain` has learned something, None.

    Raises:
        ValueError: if there is no such domain.
    """
    kind = {**find_domain(model, domain), "name": None}
    candidates = [d["name"] for d in model.config.domains if d["name"] != domain and {**d, "name": None} == kind]
    if not candidates or any(experts.lora_B.any() for _, experts in domain_modules(model, domain)):
        return None
    excerpts = [_excerpt(video, model.config.image_size) for video in evenly_chosen(videos, NUM_VIDEOS)]
    excerpts = [video for video in excerpts if video is not None]
    tried = tqdm([None, *candidates], desc=f"start of {domain}", unit="domain", disable=not show_progress_bar)
    scores = {name: _score(model, processor, excerpts, name) for name in tried}
    best = max(candidates, key=scores.get)
    return best if scores[best] >= scores[None] + MIN_ADVANTAGE else None


def _excerpt(video: Video, size: int) -> Video | None:
    """The first frames of a video from the one on that shows an object; None if there are no two."""
    first = first_visible(video)
    frames = [] if first is None else [t for t in video.annotated_frames if t >= first][:NUM_FRAMES]
    return reduced(video, size, frames=frames) if len(frames) > 1 else None


def _score(model: SamoeModel, processor: ProcessorMixin, videos: Sequence[Video], domain: str | None) -> float:
    """J&F, 0 to 1, of tracking with a domain's experts, or with none; 0 where there is nothing to score."""
    with evaluation_mode(model):  # several datasets may have videos of one name
        results = [evaluate_video(model, processor, video, domain=domain) for video in videos]
    score = summarize({str(n): result.scores for n, result in enumerate(results)}, protocol="youtube_vos")["J&F_mean"]
    return 0.0 if math.isnan(score) else score
