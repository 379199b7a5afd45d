"""What a study measures of the gate: its decisions, on domains that it knows and never saw, and its time."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samoe_hf.continual.fit_gate import decide_videos, frame_features
from samoe_hf.data.schema import Video, evenly_chosen
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.inference import evaluation_mode
from samoe_hf.model.domain_choice import AUTO
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.video_session import VideoSession

UNKNOWN = "unknown"  # the decision where a frame looks like no domain that the gate knows
NUM_COMPARED_VIDEOS = 2
NUM_REPETITIONS = 20


def measure_gate(
    build: Callable[[Sequence[str]], SamoeModel],
    base: SamoeModel,
    base_name: str,
    held_out: Mapping[str, Tensor],
    videos: Mapping[str, Sequence[Video]],
) -> dict[str, Any]:
    """Tests the gate on held-out frames of all domains, and on those of each domain that it was never shown.

    Args:
        build: makes the model that knows some domains, beside the base's.
        base: the model without domains.
        base_name: name of the base's domain.
        held_out: domain -> what the gate reads of its frames (frames, features).
        videos: domain -> held-out videos, some of which are tracked.

    Returns:
        `confusion`: domain -> what is decided -> frames. `unseen`: domain -> the same where the gate never saw it;
        `to_base`, the share that gets the base's masks; and `identical`, whether masks of such videos are the base's
        to the bit, or None if there are none.
    """
    learned = [name for name in held_out if name != base_name]
    model = build(learned)
    results: dict[str, Any] = {"confusion": {name: _decisions(model, x) for name, x in held_out.items()}, "unseen": {}}
    for name in learned:
        model = build([other for other in learned if other != name])
        counts = _decisions(model, held_out[name])
        to_base = counts.get(base_name, 0) + counts.get(UNKNOWN, 0)
        results["unseen"][name] = {
            "decisions": counts,
            "to_base": to_base / sum(counts.values()),
            "identical": _is_base(model, base, base_name, videos[name]),
        }
    return results


def held_out_features(model: SamoeModel, videos: Sequence[Video], count: int) -> Tensor:
    """What the gate reads of about so many frames: of each video the first that shows an object, of few videos more.

    Args:
        model: the base, without domains.

    Returns:
        (frames, features).
    """
    processor, features = build_processor(model.config), []
    for video in evenly_chosen(videos, count):
        shown = [t for t in video.annotated_frames if video.visible(t)]
        features.append(frame_features(model, processor, video, evenly_chosen(shown, max(1, count // len(videos)))))
    return torch.cat(features)


def _decisions(model: SamoeModel, features: Tensor) -> dict[str, int]:
    names = [*model.config.domain_names, UNKNOWN]
    return dict(Counter(names[index] for index in model.domain_gate.decide(features).domain.tolist()))


def _is_base(model: SamoeModel, base: SamoeModel, base_name: str, videos: Sequence[Video]) -> bool | None:
    """Whether masks of some videos that get no domain's experts are the base's."""
    processor = build_processor(model.config)
    compared = 0
    for video, decision in zip(videos, decide_videos(model, processor, videos), strict=True):
        if decision.domain in (None, base_name):
            both = (segment_video(one, processor, video) for one in (model, base))
            if not all(np.array_equal(a, b) for a, b in zip(*both, strict=True)):
                return False
            compared += 1
        if compared == NUM_COMPARED_VIDEOS:
            break
    return True if compared else None


def measure_time(model: SamoeModel, domain: str, video: Video, num_frames: int) -> dict[str, float]:
    """Milliseconds per frame of tracking an object with the gate, and with the domain given, by turns.

    Args:
        domain: the video's.
        video: played forward and backward until it has `num_frames`.
    """
    order = [*range(len(video)), *range(len(video) - 2, 0, -1)]
    frames = [np.asarray(video.frames[order[i % len(order)]]) for i in range(num_frames)]
    mask = video.masks(0, video.visible(0)[:1])[0]
    seconds: dict[str, list[float]] = {AUTO: [], domain: []}
    for repetition in range(NUM_REPETITIONS + 1):
        for chosen in list(seconds)[:: (-1) ** repetition]:  # neither always goes first
            start = time.perf_counter()
            _track(model, frames, mask, chosen)
            if repetition:  # the first is slower
                seconds[chosen].append((time.perf_counter() - start) / num_frames)
    with_gate, without = (1000 * statistics.median(measured) for measured in seconds.values())
    return {"with_gate_ms": with_gate, "without_ms": without, "num_frames": num_frames}


@torch.no_grad()
def _track(model: SamoeModel, frames: Sequence[np.ndarray], mask: np.ndarray, domain: str) -> None:
    """Tracks one object through frames, from its mask on the first."""
    processor = build_processor(model.config)
    session = VideoSession(frames, processor, domain=domain, inference_device=model.device, dtype=model.dtype)
    processor.add_inputs_to_inference_session(session, 0, 1, input_masks=mask)
    with evaluation_mode(model):
        for _ in model.propagate_in_video_iterator(session, start_frame_idx=0):
            pass
