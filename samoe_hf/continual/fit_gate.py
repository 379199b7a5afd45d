"""What the gate of a model learns of a domain's videos, and what it decides for videos."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from samoe_hf.surgery.domains import confirm_domain, find_domain, fit_domain
from samoe_hf.surgery.gate import fit_row, video_spread
from samoe_hf.video_session import PreparedFrames

# More videos tell more of a domain than more frames of each. Of few videos, so many frames in all are read.
MAX_VIDEOS, MIN_FRAMES, MAX_FRAMES, FRAMES_IN_ALL = 256, 4, 32, 256
MAX_LEFT_OUT = 64
Value = TypeVar("Value")


def fit_gate(
    model: SamoeModel, processor: VideoProcessor, domain: str, videos: Sequence[Video], show_progress_bar: bool = True
) -> int:
    """Lets the gate know a domain of the model by some of its videos, in place of what it knew of it.

    Args:
        videos: with masks; see [`gate_features`].

    Returns:
        how many videos it saw.

    Raises:
        InputError: if there is no such domain, or no video with an object.
    """
    find_domain(model, domain)
    features, numbers = gate_features(model, processor, domain, videos, show_progress_bar)
    fit_domain(model, domain, features, numbers)
    return len(numbers.unique())


@torch.no_grad()
def gate_features(
    model: SamoeModel, processor: VideoProcessor, domain: str, videos: Sequence[Video], show_progress_bar: bool = True
) -> tuple[Tensor, Tensor]:
    """What [`~surgery.domains.fit_domain`] takes of a domain's videos with masks: of many, of [`MAX_VIDEOS`] even ones.

    Returns:
        features (frames, features), and the number of the video of each frame, (frames,).

    Raises:
        InputError: if no video has an object.
    """
    chosen = evenly_chosen(range(len(videos)), MAX_VIDEOS)
    frames_per_video = min(MAX_FRAMES, max(MIN_FRAMES, FRAMES_IN_ALL // max(1, len(chosen))))
    features, numbers = [], []
    with evaluation_mode(model):
        for number in tqdm(chosen, desc=f"gate: {domain}", unit="video", disable=not show_progress_bar):
            video = videos[number]
            frames = [t for t in evenly_chosen(video.annotated_frames, frames_per_video) if video.visible(t)]
            if not frames and video.first_visible is not None:
                frames = [video.first_visible]
            if frames:
                features.append(frame_features(model, processor, video, frames))
                numbers += [number] * len(frames)
    if not features:
        raise InputError(f"None of the {len(chosen)} videos of domain {domain!r} has a frame with an object.")
    return torch.cat(features), torch.tensor(numbers)


def leave_out(model: SamoeModel, domain: str, features: Tensor, numbers: Tensor) -> dict[str, int]:
    """What the gate takes a domain's videos for while it does not know them: each is left out in turn.

    Takes what [`gate_features`] gives; of many videos, [`MAX_LEFT_OUT`] are left out. Gives the name of a domain, or
    "base" -> how many videos; nothing of a single video.
    """
    ids = numbers.unique().tolist()
    assert model.domain_gate is not None
    gate, names = copy.deepcopy(model.domain_gate), [*model.config.domain_names, "base"]
    decided: Counter[str] = Counter()
    spread = video_spread(model.config.image_size)
    for number in evenly_chosen(ids, MAX_LEFT_OUT) if len(ids) > 1 else []:
        others = numbers != number
        fit_row(gate, names.index(domain), features[others], numbers[others], spread)
        decided[names[int(gate.decide(features[~others][:1]).domain)]] += 1
    return dict(decided)


@torch.no_grad()
def frame_features(model: SamoeModel, processor: VideoProcessor, video: Video, frames: Sequence[int]) -> Tensor:
    """What the gate reads of frames of a video: (frames, features)."""
    pixel_values = _pixel_values(model, processor, video, frames)
    with use_domain(None):
        return pooled_features(encode_frames(model, pixel_values), pixel_values)


@torch.no_grad()
def confirm_video(
    model: SamoeModel,
    processor: VideoProcessor,
    domain: str,
    video: Video,
    turns: Callable[[Iterator[Tensor]], Iterable[Tensor]] = iter,
) -> None:
    """Lets the gate know one more video of a domain, by frames that may have no masks; see [`confirm_domain`].

    `turns` goes through the frames, whose features are computed one by one.
    """
    with evaluation_mode(model):
        frames = evenly_chosen(range(len(video)), MAX_FRAMES)
        features = (frame_features(model, processor, video, [frame]) for frame in frames)
        confirm_domain(model, domain, torch.cat([*turns(features)]))


def decide_videos(
    model: SamoeModel, processor: VideoProcessor, videos: Iterable[Video]
) -> Iterator[DomainDecision | None]:
    """What the gate decides for each video, from the first frame that shows an object; None for one without objects."""
    for video in videos:
        first = video.first_visible
        yield None if first is None else decide_frame(model, processor, video, first)


def decide_frame(model: SamoeModel, processor: VideoProcessor, video: Video, frame: int) -> DomainDecision:
    """What the gate decides for a frame of a video."""
    with evaluation_mode(model):
        return decide_domains(model, _pixel_values(model, processor, video, [frame]), None)[0]


def _pixel_values(model: SamoeModel, processor: VideoProcessor, video: Video, frames: Sequence[int]) -> Tensor:
    """Frames as a session prepares them, (frames, 3, S, S)."""
    prepared = PreparedFrames(video.frames, video.size, processor, model.device, model.dtype)
    return torch.stack([prepared[t] for t in frames])


def evenly_chosen(values: Sequence[Value], count: int) -> list[Value]:
    """Up to so many of the values, evenly spread, with the first."""
    number = min(count, len(values))
    return [values[i * len(values) // number] for i in range(number)]
