"""Tracking beside `transformers`' and `sam2`'s, for more and more objects, and through long videos."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from measure import Measurement, autocast, describe_machine, synchronize
from peers import Sam2Tracker, TransformersTracker, base_of, sam2_of
from samoe_hf.errors import InputError
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.model.session import VideoSession

# The memory is full from this frame on; those before are not timed. Ours may encode 4 frames at once, from frame 1 on.
FIRST_TIMED_FRAME = 9
PEERS = ("transformers", "sam2", "sam2 compiled")
POOLED = "samoe_hf pooled"


def build_trackers(model: SamoeModel, names: Sequence[str]) -> dict[str, TransformersTracker | Sam2Tracker]:
    """Our model and the named peers with its base's weights; "samoe_hf compiled" is ours, compiled, and
    "samoe_hf pooled R O" has memories of `recent_memory_pooling` R and `older_memory_pooling` O."""
    builders: dict[str, Callable[[], TransformersTracker | Sam2Tracker]] = {
        "samoe_hf": lambda: TransformersTracker(model, model.config),
        "samoe_hf compiled": lambda: TransformersTracker(_compiled(model), model.config),
        "transformers": lambda: TransformersTracker(base_of(model), model.config),
        "sam2": lambda: Sam2Tracker(sam2_of(model)),
        "sam2 compiled": lambda: Sam2Tracker(sam2_of(model, compiled=True)),
    }
    for name in names:
        if name.startswith(POOLED):
            builders[name] = lambda name=name: TransformersTracker(_pooled(model, name), model.config)
    return {name: builders[name]() for name in names}


def _pooled(model: SamoeModel, name: str) -> SamoeModel:
    recent, older = map(int, name.removeprefix(POOLED).split())
    config = SamoeConfig(**{**model.config.to_dict(), "recent_memory_pooling": recent, "older_memory_pooling": older})
    copy = SamoeModel(config).to(model.device, model.dtype).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def _compiled(model: SamoeModel) -> SamoeModel:
    copy = SamoeModel(model.config).to(model.device, model.dtype).eval()
    copy.load_state_dict(model.state_dict())
    copy.compile_for_tracking()
    return copy


def benchmark_tracking(
    config: SamoeConfig,
    name: str,
    contenders: Sequence[str],
    num_objects: Sequence[int],
    num_frames: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Measurement]:
    """Time per frame once the memory is full, of objects that are each given by a point on the first frame; the mean
    over the frames of a repetition, since not all of them take equally long.

    Experts are without effect, as in a new model, so that all contenders do the same. Masks are resized to the frames'
    size by all.

    Args:
        name: of the model, for the cases.
        num_frames: tracked in each repetition, more than `FIRST_TIMED_FRAME`.
        dtype: bfloat16 and float16 by autocast, as users of all contenders run them.

    Raises:
        AssertionError: in float32, if the contenders' masks differ by more than 1e-2 on average.
    """
    if num_frames <= FIRST_TIMED_FRAME:
        raise InputError(f"`num_frames` must be above {FIRST_TIMED_FRAME}, got {num_frames}.")
    torch.manual_seed(0)
    trackers = build_trackers(SamoeModel(config).to(device).eval(), contenders)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(num_frames, 3, config.image_size, config.image_size, generator=generator).to(device)
    results = []
    for count in num_objects:
        points = torch.rand(count, 2, generator=generator) * config.image_size
        case = f"{name}, {count} object{'s' if count > 1 else ''}"
        found = {tracker: Measurement(case, tracker) for tracker in trackers}
        for repeat in range(repeats + 1):
            masks = {}
            for tracker, measurement in found.items():
                run = track_once(trackers[tracker], frames, points, device, dtype)
                masks[tracker], measurement.peak_bytes = run.masks, run.peak_bytes
                if repeat:  # the first warms up
                    measurement.seconds.append(run.seconds)
            if dtype == torch.float32:
                # What has fewer memories gives other masks, and is made for that.
                _check_equal({name: x for name, x in masks.items() if not name.startswith(POOLED)})
        results += found.values()
    return results


class TrackingRun(NamedTuple):
    """Mean seconds of a frame with full memory, the last masks (N, 1, S / 4, S / 4), and on a GPU the most bytes held
    beyond what was there before."""

    seconds: float
    masks: Tensor
    peak_bytes: int | None


def track_once(
    tracker: TransformersTracker | Sam2Tracker, frames: Tensor, points: Tensor, device: torch.device, dtype: torch.dtype
) -> TrackingRun:
    """Tracks objects, given by points (N, 2) on the first of the frames (T, 3, S, S), under autocast to `dtype`."""
    before, peak = 0, None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with torch.inference_mode(), autocast(device, dtype):
        tracked = list(tracker.track(frames, points))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    return TrackingRun(statistics.mean(s for s, _ in tracked[FIRST_TIMED_FRAME:]), tracked[-1][1].float(), peak)


def _check_equal(masks: dict[str, Tensor]) -> None:
    (first, expected), *others = masks.items()
    for name, found in others:
        difference = (found - expected).abs().mean().item()
        if difference > 1e-2:
            raise AssertionError(f"{name} and {first} do not agree: logits differ by {difference:.3g} on average.")


def benchmark_long_video(
    config: SamoeConfig, num_objects: int, num_frames: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[tuple[int, float, int]]:
    """Tracks through a long video in a [`VideoSession`], whose frames are made as they come.

    Returns:
        100 times or less: the frames tracked so far, the median seconds of each of the last ones, and the bytes held:
        of the device's memory, or of the process on a CPU.
    """
    model, processor = SamoeModel(config).to(device, dtype).eval(), build_processor(config)
    frames = _NoiseFrames(num_frames, config.image_size)
    session = VideoSession(frames, processor, inference_device=device, dtype=dtype)
    points = torch.rand(num_objects, 2, generator=torch.Generator().manual_seed(0)) * config.image_size
    ids = list(range(1, num_objects + 1))
    processor.add_inputs_to_inference_session(
        session, 0, ids, input_points=points[None, :, None].tolist(), input_labels=[[[1]] * num_objects]
    )
    seconds, rows, start = [], [], time.perf_counter()
    for output in tqdm(model.propagate_in_video_iterator(session, start_frame_idx=0), "track", num_frames):
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        done = output.frame_idx + 1
        if done % max(num_frames // 100, 1) == 0:
            is_cuda = device.type == "cuda"
            held = torch.cuda.memory_allocated(device) if is_cuda else psutil.Process().memory_info().rss
            rows.append((done, float(np.median(seconds)), held))
            seconds.clear()
        start = time.perf_counter()
    return rows


class _NoiseFrames:
    """Frames of noise: a few, again and again."""

    def __init__(self, count: int, size: int):
        self.count = count
        self.frames = np.random.default_rng(0).integers(0, 255, (8, size, size, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return self.frames[index % len(self.frames)]


def plot_long_video(rows: Sequence[tuple[int, float, int]], path: Path, device: torch.device) -> None:
    """Draws time per frame and memory over the length of a video."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    frames, seconds, held = zip(*rows, strict=True)
    above.plot(frames, [1e3 * s for s in seconds], color="#0072B2")
    above.set_ylabel("median per frame, ms")
    above.set_ylim(bottom=0)
    below.plot(frames, [b / 2**20 for b in held], color="#D55E00")
    below.set_ylabel("memory held, MB")
    below.set_ylim(bottom=0)
    below.set_xlabel("frames tracked")
    above.set_title(f"One long video\n{describe_machine(device)}", fontsize=9)
    figure.savefig(path, dpi=150)
