"""Tracking beside `transformers`' and `sam2`'s, for more and more objects.

python scripts/benchmarks/tracking.py --objects 1 4 16
python scripts/benchmarks/tracking.py --model model_base_plus --peers sam2 "sam2 compiled" --dtype bfloat16
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from measure import Measurement, at_least, autocast, benchmark_parser, prepare, to_markdown, write_results
from peers import Sam2Tracker, TransformersTracker, base_of, sam2_of
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.modeling_samoe import SamoeModel

# The memory is full from this frame on; those before are not timed. Ours may encode 4 frames at once, from frame 1 on.
FIRST_TIMED_FRAME = 9
PEERS = ("transformers", "sam2", "sam2 compiled")
POOLED = "samoe_hf pooled"


def build_tracker(model: SamoeModel, name: str) -> TransformersTracker | Sam2Tracker:
    """A contender with the weights of a model, in evaluation mode.

    Args:
        name: "samoe_hf"; "samoe_hf compiled"; "samoe_hf pooled R O", with memories of `recent_memory_pooling` R and
            `older_memory_pooling` O; or one of [`PEERS`].
    """
    if name == "transformers":
        return TransformersTracker(base_of(model), model.config)
    if name.startswith("sam2"):
        return Sam2Tracker(sam2_of(model, compiled=name == "sam2 compiled"))
    if name != "samoe_hf":
        recent, older = map(int, name.removeprefix(POOLED).split()) if name.startswith(POOLED) else (1, 1)
        settings = {"recent_memory_pooling": recent, "older_memory_pooling": older}
        copy = SamoeModel(SamoeConfig(**{**model.config.to_dict(), **settings})).to(model.device, model.dtype).eval()
        copy.load_state_dict(model.state_dict())
        model = copy
        if name == "samoe_hf compiled":
            model.compile_for_tracking()
    return TransformersTracker(model, model.config)


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
    torch.manual_seed(0)
    model = SamoeModel(config).to(device).eval()
    trackers = {contender: build_tracker(model, contender) for contender in contenders}
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
                check_equal({name: x for name, x in masks.items() if not name.startswith(POOLED)})
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


def check_equal(masks: dict[str, Tensor]) -> None:
    (first, expected), *others = masks.items()
    for name, found in others:
        difference = (found - expected).abs().mean().item()
        if difference > 1e-2:
            raise AssertionError(f"{name} and {first} do not agree: logits differ by {difference:.3g} on average.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--objects", type=at_least(1), nargs="+", default=[1, 4, 16], help="(%(default)s)")
    parser.add_argument("--frames", type=at_least(FIRST_TIMED_FRAME + 1), default=17, help="(%(default)s)")
    parser.add_argument("--peers", nargs="*", default=["transformers", "sam2"], choices=PEERS)
    parser.add_argument("--compile", action="store_true", help="also our model, compiled")
    parser.add_argument(
        "--pooling",
        type=at_least(1),
        nargs=2,
        metavar=("RECENT", "OLDER"),
        help="also our model with memories averaged over squares of so many tokens a side",
    )
    parsed = parser.parse_args(arguments)
    config, dtype = prepare(parsed)
    contenders = ["samoe_hf", *(["samoe_hf compiled"] if parsed.compile else []), *parsed.peers]
    if parsed.pooling:
        contenders.append(f"{POOLED} {parsed.pooling[0]} {parsed.pooling[1]}")
    name = parsed.model.removesuffix(".yaml").rpartition("/")[2].removeprefix("model_")
    shape = (parsed.objects, parsed.frames, parsed.repeats, parsed.device, dtype)
    measurements = benchmark_tracking(config, name, contenders, *shape)
    table = to_markdown(measurements, "samoe_hf", "frame")
    write_results(parsed.output, "track", f"Tracking: time per frame, {dtype}", measurements, table, parsed.device)


if __name__ == "__main__":
    main()
