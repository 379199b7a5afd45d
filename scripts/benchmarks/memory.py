"""What a frame of tracking and a training step hold on the device, by part.

    python scripts/benchmarks/memory.py --model model_tiny --frames 8 --objects 3

On a GPU it is counted by the device's allocator, on a CPU by PyTorch's profiler.
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from measure import (
    COLORS,
    at_least,
    autocast,
    benchmark_parser,
    describe_machine,
    memory_changes,
    peak_bytes,
    prepare,
    trace_events,
    without_dropout,
)
from peers import TransformersTracker
from samoe_hf.evaluation.report import format_table
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.frame_step import encode_frames
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.tracking import FRAMES_AHEAD
from tracking import FIRST_TIMED_FRAME
from training import example_clip

MODULES = {
    "vision_encoder": "image encoder",
    "memory_attention": "memory attention",
    "mask_decoder": "mask decoder",
    "memory_encoder": "memory encoder",
}


class Row(NamedTuple):
    """Bytes that one thing takes."""

    what: str
    bytes: int


@dataclass
class Held:
    """Bytes that a part of the model has added when it is done, over all its calls, and at most during a call."""

    kept: int = 0
    peak: int = 0

    def add(self, kept: int, peak: int) -> None:
        self.kept, self.peak = self.kept + kept, max(self.peak, peak)


def tracking_memory(config: SamoeConfig, num_objects: int, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """What is kept while objects are tracked, and the most that each part of a frame's work needs beyond it.

    Args:
        dtype: bfloat16 and float16 by autocast.
    """
    model, weights = _build(config, device)
    model.eval()
    size = config.image_size
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(FIRST_TIMED_FRAME + 4 * FRAMES_AHEAD, 3, size, size, generator=generator).to(device)
    points = torch.rand(num_objects, 2, generator=generator) * size
    tracked = TransformersTracker(model, config).track(frames, points)
    count = 2 * FRAMES_AHEAD

    def go_on(frames: int) -> None:
        with torch.inference_mode(), autocast(device, dtype):
            for _ in range(frames):
                next(tracked)

    go_on(len(frames) - count - FRAMES_AHEAD)
    # The profiler does not tell when something is freed that was there before it was first used.
    by_part = held_by_part(lambda: go_on(FRAMES_AHEAD), device, model)
    kept = held_by_part(lambda: go_on(count), device)["all"].kept
    with torch.inference_mode(), autocast(device, dtype):
        features = encode_frames(model, frames[:1])
    return [
        weights,
        Row("features of a frame", sum(x.nbytes for x in features[:3])),
        Row("memory and mask of an object on a frame", round(kept / count / num_objects)),
        *(Row(f"{part}, at most", held.peak) for part, held in by_part.items() if part != "all"),
    ]


def training_memory(
    config: SamoeConfig, num_frames: int, num_objects: int, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    """What a training step of experts holds: what is always there, what each part keeps for its gradients, and the most
    at once. The clip has mask prompts and no clicks, and nothing is dropped.

    Args:
        dtype: bfloat16 and float16 by autocast.
    """
    model, weights = _build(config, device)
    without_dropout(model.train())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9)
    clip = example_clip(config.image_size, num_frames, num_objects, device)

    def forward() -> Tensor:
        with autocast(device, dtype):
            return model(**clip, prompts="mask").loss

    forward().backward()
    optimizer.step()
    always = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.numel() > 1)
    always += sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    optimizer.zero_grad()
    by_part = held_by_part(forward, device, model)
    optimizer.zero_grad()
    most = peak_bytes(lambda: forward().backward(), device)
    return [
        weights,
        Row("gradients and AdamW's moments", always),
        *(Row(f"{part}, kept", held.kept) for part, held in by_part.items() if part != "all"),
        Row("a forward pass, kept", by_part["all"].kept),
        Row("all, at most", weights.bytes + always + most),
    ]


def _build(config: SamoeConfig, device: torch.device) -> tuple[SamoeModel, Row]:
    """A model with random weights, and what they take."""
    torch.manual_seed(0)
    model = SamoeModel(config).to(device)
    return model, Row("weights", sum(x.nbytes for x in (*model.parameters(), *model.buffers())))


def held_by_part(run: Callable[[], Any], device: torch.device, model: SamoeModel | None = None) -> dict[str, Held]:
    """What a run has added to what is allocated, what it returns included: in each part of a model, and in "all"."""
    held: dict[str, Held] = defaultdict(Held)
    gc.collect()
    if device.type == "cuda":

        @contextmanager
        def watch(part: str) -> Iterator[None]:
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            yield
            kept = torch.cuda.memory_allocated(device) - before
            held[part].add(kept, torch.cuda.max_memory_allocated(device) - before)

        before = torch.cuda.memory_allocated(device)
        with _watched(model, watch):
            result = run()
        gc.collect()
        held["all"].kept = torch.cuda.memory_allocated(device) - before
        del result
        return held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with _watched(model, record_function):
            result = run()
        gc.collect()
    events = trace_events(profiler)
    changes = sorted(memory_changes(events))
    del result
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"] in MODULES.values():
            end = event["ts"] + event["dur"]
            held[event["name"]].add(*_sum_and_peak([x for time, x in changes if event["ts"] <= time <= end]))
    held["all"].add(*_sum_and_peak([x for _, x in changes]))
    return held


def _sum_and_peak(changes: Sequence[int]) -> tuple[int, int]:
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return total, peak


@contextmanager
def _watched(model: SamoeModel | None, watch: Callable[[str], Any]) -> Iterator[None]:
    """While it is open, each call of a part of the model runs within `watch(name)`."""
    if model is None:
        yield
        return

    def wrap(part: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with watch(part):
                return function(*args, **kwargs)

        return run

    modules: dict[nn.Module, str] = {model.get_submodule(name): part for name, part in MODULES.items()}
    for module, part in modules.items():
        module.forward = wrap(part, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def plot_memory(tables: dict[str, list[Row]], path: Path, machine: str) -> None:
    """Bars of what is held, a panel for each table."""
    figure = Figure(figsize=(10, 1 + 0.35 * max(map(len, tables.values()))), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        bars = axes.barh([row.what for row in rows], [row.bytes / 1e6 for row in rows], color=COLORS[0])
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.set_xlabel("MB (log scale)")
        axes.set_title(title, fontsize=10)
    figure.suptitle(machine, fontsize=7)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--frames", type=at_least(2), default=8, help="of a training clip (%(default)s)")
    parser.add_argument("--objects", type=at_least(1), default=3, help="(%(default)s)")
    parsed = parser.parse_args(arguments)
    config, dtype = prepare(parsed)
    settings = (parsed.objects, parsed.device, dtype)
    tables = {
        f"Tracking {parsed.objects} objects": tracking_memory(config, *settings),
        f"Training on a clip of {parsed.frames} frames": training_memory(config, parsed.frames, *settings),
    }
    machine = describe_machine(parsed.device)
    parsed.output.mkdir(parents=True, exist_ok=True)
    plot_memory(tables, parsed.output / "memory.png", machine)
    parts = [f"# Device memory, {parsed.dtype}", machine]
    for title, rows in tables.items():
        cells = [[row.what, f"{row.bytes / 1e6:.2f}"] for row in rows]
        parts.append(f"## {title}\n\n{format_table(['what', 'MB'], cells, markdown=True)}")
    text = "\n\n".join(parts)
    (parsed.output / "memory.md").write_text(f"{text}\n", encoding="utf-8")
    print(f"{text}\n\nWritten: memory.md and memory.png in {parsed.output}")


if __name__ == "__main__":
    main()
