"""What the gate of a model learns of a domain's videos, and what it decides for videos."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError
from samoe_hf.inference import evaluation_mode
from samoe_hf.model.domain_choice import DomainDecision, decide_domains
from samoe_hf.model.domain_experts import use_domain
from samoe_hf.model.domain_gate import pooled_features
from samoe_hf.model.frame_step import encode_frames
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.model.session import PreparedFrames
from samoe_hf.surgery.domains import fit_domain

# More videos tell more of a domain than more frames of each. Of few videos, so many frames in all are read.
MAX_VIDEOS, MIN_FRAMES, MAX_FRAMES, FRAMES_IN_ALL = 256, 4, 32, 256
Value = TypeVar("Value")


@torch.no_grad()
def fit_gate(
    model: SamoeModel,
    processor: VideoProcessor,
    domain: str,
    videos: Sequence[Video],
    show_progress_bar: bool = True,
) -> int:
    """Lets the gate know a domain of the model by some of its videos, in place of what it knew of it.

    Args:
        videos: with masks; of many, [`MAX_VIDEOS`] evenly chosen ones are read.

    Returns:
        how many videos it saw.

    Raises:
        InputError: if there is no such domain, or no video with an object.
    """
    chosen = evenly_chosen(range(len(videos)), MAX_VIDEOS)
    frames_per_video = min(MAX_FRAMES, max(MIN_FRAMES, FRAMES_IN_ALL // max(1, len(chosen))))
    features, numbers = [], []
    with evaluation_mode(model):
        for number in tqdm(chosen, desc=f"gate: {domain}", unit="video", disable=not show_progress_bar):
            video = videos[number]
            frames = [t for t in evenly_chosen(video.annotated_frames, frames_per_video) if video.visible(t)]
            if not frames and (first := first_visible(video)) is not None:
                frames = [first]
            if frames:
                features.append(frame_features(model, processor, video, frames))
                numbers += [number] * len(frames)
    if not features:
        raise InputError(f"`videos` of domain {domain!r}: none of {len(chosen)} has a frame with an object.")
    fit_domain(model, domain, torch.cat(features), torch.tensor(numbers))
    return len(features)


@torch.no_grad()
def frame_features(model: SamoeModel, processor: VideoProcessor, video: Video, frames: Sequence[int]) -> Tensor:
    """What the gate reads of frames of a video: (frames, features)."""
    pixel_values = _pixel_values(model, processor, video, frames)
    with use_domain(None):
        return pooled_features(encode_frames(model, pixel_values), pixel_values)


def decide_videos(
    model: SamoeModel, processor: VideoProcessor, videos: Iterable[Video]
) -> Iterator[DomainDecision | None]:
    """What the gate decides for each video, from the first frame that shows an object; None for one without objects."""
    for video in videos:
        first = first_visible(video)
        if first is None:
            yield None
            continue
        with evaluation_mode(model):
            yield decide_domains(model, _pixel_values(model, processor, video, [first]), None)[0]


def first_visible(video: Video) -> int | None:
    """The first annotated frame that shows an object."""
    return next((t for t in video.annotated_frames if video.visible(t)), None)


def _pixel_values(model: SamoeModel, processor: VideoProcessor, video: Video, frames: Sequence[int]) -> Tensor:
    """Frames as a session prepares them, (frames, 3, S, S)."""
    prepared = PreparedFrames(video.frames, processor, model.device, model.dtype)
    return torch.stack([prepared[t] for t in frames])


def evenly_chosen(values: Sequence[Value], count: int) -> list[Value]:
    """Up to so many of the values, evenly spread, with the first."""
    number = min(count, len(values))
    return [values[i * len(values) // number] for i in range(number)]
