"""What a frame of tracking and a training step hold, by part: predicted from the model's code, and measured.

What is predicted comes from a run on tensors without data (see [`~training.memory_fit`]) and from sizes in the
configuration; what is measured, from the device's allocator, or on a CPU from PyTorch's profiler.
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves, tree_map_only

from measure import COLORS, autocast, memory_changes, peak_bytes, trace_events
from meta_order import without_dropout
from parts import recorded_calls
from peers import TransformersTracker
from samoe_hf.evaluation.report import format_table
from samoe_hf.model.base_modules import build_on_meta
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.frame_step import image_features
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.prompts import PromptRecipe
from samoe_hf.model.quantization import weight_bytes
from samoe_hf.model.tracking import FRAMES_AHEAD
from samoe_hf.training.memory_fit import LiveBytes, RunMemory, Workload
from tracking import FIRST_TIMED_FRAME
from training import example_clip

ATTENTION, LOSS = "memory attention", "loss"
TRAINED_PARTS = {"mask_decoder": "mask decoder", "memory_encoder": "memory encoder"}


@dataclass(frozen=True)
class Held:
    """Bytes that one thing takes, predicted and measured."""

    what: str
    predicted: int
    measured: int


def tracking_memory(config: SamoeConfig, num_objects: int, device: torch.device, dtype: torch.dtype) -> list[Held]:
    """What is kept while objects are tracked, and the most that each part of a frame's work needs beyond it.

    Args:
        dtype: bfloat16 and float16 by autocast.
    """
    model, weights = _build(config, device)
    model.eval()
    size, hidden = config.image_size, model.hidden_dim
    fine, middle, coarse = (height * width for height, width in model.backbone_feature_sizes)
    frames = torch.randn(FIRST_TIMED_FRAME + 4 * FRAMES_AHEAD, 3, size, size, device=device)
    points = torch.rand(num_objects, 2) * size
    with recorded_calls(model) as calls, autocast(device, dtype):
        list(TransformersTracker(model, config).track(frames[:FIRST_TIMED_FRAME], points))
    with torch.inference_mode(), autocast(device, dtype):
        features = image_features(model, frames[:1])
    itemsize = features.coarse.element_size()
    of_frame = itemsize * (fine * hidden // 8 + middle * hidden // 4 + coarse * hidden)
    # A memory in bfloat16, a pointer and a mask's logits in float32, and a score.
    of_object = 2 * coarse * model.mem_dim + 4 * hidden + 4 * fine + 4
    by_frame = _kept_by_frame(model, frames, points, device, dtype)
    rows = [
        weights,
        Held("features of a frame", of_frame, sum(x.nbytes for x in features[:3])),
        Held("memory and mask of an object on a frame", of_object, by_frame),
    ]
    for name, (_, call) in calls.items():
        rows.append(Held(f"{name}, at most", _predicted_peak(call, device, dtype), _real_peak(call, device, dtype)))
    return rows


def _build(config: SamoeConfig, device: torch.device) -> tuple[SamoeModel, Held]:
    """A model with random weights, and what they take."""
    torch.manual_seed(0)
    models = []
    grown, _ = _growth(lambda: models.append(SamoeModel(config).to(device)), device)
    return models[0], Held("weights", weight_bytes(build_on_meta(config, with_experts=True)), grown)


def _kept_by_frame(model: SamoeModel, frames: Tensor, points: Tensor, device: torch.device, dtype: torch.dtype) -> int:
    """By how many bytes a session of transformers grows with each frame, for each object."""
    tracked = TransformersTracker(model, model.config).track(frames, points)
    count = 2 * FRAMES_AHEAD

    def go_on(frames: int) -> None:
        for _ in range(frames):
            next(tracked)

    with autocast(device, dtype):
        go_on(len(frames) - count - FRAMES_AHEAD)
        # The profiler does not tell when something is freed that was there before it was first used.
        _growth(lambda: go_on(FRAMES_AHEAD), device)
        grown, _ = _growth(lambda: go_on(count), device)
    return round(grown / count / len(points))


def _predicted_peak(call: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> int:
    mode, counter = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    arguments = tree_map_only(Tensor, mode.from_tensor, (call.args, call.keywords))
    counter.add(x for x in tree_leaves(arguments) if isinstance(x, Tensor))
    before = counter.live
    with torch.inference_mode(), mode, counter, autocast(device, dtype):
        call.func(*arguments[0], **arguments[1])
    return counter.peak - before


def _real_peak(call: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> int:
    def run() -> None:
        with torch.inference_mode(), autocast(device, dtype):
            call()

    run()
    return peak_bytes(run, device)


def training_memory(
    config: SamoeConfig, num_frames: int, num_objects: int, device: torch.device, dtype: torch.dtype
) -> list[Held]:
    """What a training step of experts holds: what is always there, what each part keeps for its gradients, and the most
    at once. The clip has mask prompts and no clicks, and nothing is dropped.

    Args:
        dtype: bfloat16 and float16 by autocast.
    """
    model, weights = _build(config, device)
    without_dropout(model.train())
    recipe = PromptRecipe(point_probability=0.0, num_correction_clicks=0, max_initial_frames=1)
    counted = _PartMemory(model, Workload(num_frames, num_objects, recipe, dtype))
    peak = counted.step(1, checkpointing=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9)
    clip = example_clip(config.image_size, num_frames, num_objects, device)

    def forward() -> Tensor:
        with autocast(device, dtype):
            return model(**clip, prompts="mask").loss

    forward().backward()
    optimizer.step()
    moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.numel() > 1)
    gradients = sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    optimizer.zero_grad()
    _, kept = _growth(forward, device, model)
    optimizer.zero_grad()
    most = weights.measured + moments + peak_bytes(lambda: forward().backward(), device)
    own = 3 * sum(parameter.nbytes for parameter in trained)
    with autocast(device, dtype), torch.no_grad():
        one = sum(x.nbytes for x in image_features(model, clip["pixel_values"][0, :1])[:3])
    names = (ATTENTION, *TRAINED_PARTS.values(), LOSS)
    return [
        weights,
        Held("gradients and AdamW's moments", own, gradients + moments),
        Held("features of the frames", num_frames * counted.frame_bytes(), num_frames * one),
        *(Held(f"{name}, kept", counted.kept[name], kept[name]) for name in names),
        Held("all, at most", peak, most),
    ]


class _PartMemory(RunMemory):
    """Also counts what each part of a step has added to the tensors that are alive when it is done: `kept`."""

    def __init__(self, model: SamoeModel, work: Workload):
        super().__init__(model, work)
        self.kept: dict[str, int] = defaultdict(int)

    @contextmanager
    def _without_data(self) -> Iterator[tuple[FakeTensorMode, LiveBytes, SamoeModel]]:
        with super()._without_data() as (mode, counter, model):

            @contextmanager
            def count(name: str) -> Iterator[None]:
                before = counter.live
                yield
                self.kept[name] += counter.live - before

            with _watched(model, count):
                yield mode, counter, model


@contextmanager
def _watched(model: SamoeModel, watch: Callable[[str], Any]) -> Iterator[None]:
    """While it is open, each call of a part of the model runs within `watch(name)`."""

    def wrap(name: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with watch(name):
                return function(*args, **kwargs)

        return run

    modules = {model.get_submodule(name): part for name, part in TRAINED_PARTS.items()}
    attend, loss = model.attend_to_memory, model.segmentation_loss
    for module, part in modules.items():
        module.forward = wrap(part, module.forward)
    model.attend_to_memory = wrap(ATTENTION, attend)
    model.segmentation_loss = _WatchedLoss(wrap(LOSS, loss), loss)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
        model.attend_to_memory, model.segmentation_loss = attend, loss


class _WatchedLoss:
    def __init__(self, call: Callable, loss: Any):
        self.call, self.total = call, loss.total

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def _growth(
    run: Callable[[], Any], device: torch.device, model: SamoeModel | None = None
) -> tuple[int, dict[str, int]]:
    """By how many bytes what is allocated grows in a run, and in each part of a model."""
    gc.collect()
    by_part: dict[str, int] = defaultdict(int)
    if device.type == "cuda":

        @contextmanager
        def watch(part: str) -> Iterator[None]:
            before = torch.cuda.memory_allocated(device)
            yield
            by_part[part] += torch.cuda.memory_allocated(device) - before

        before = torch.cuda.memory_allocated(device)
        with nullcontext() if model is None else _watched(model, watch):
            kept = run()
        gc.collect()
        total = torch.cuda.memory_allocated(device) - before
    else:
        activities = [ProfilerActivity.CPU]
        with profile(activities=activities, profile_memory=True) as profiler:
            with nullcontext() if model is None else _watched(model, record_function):
                kept = run()
            gc.collect()
        events = trace_events(profiler)
        changes = memory_changes(events)
        total = sum(change for _, change in changes)
        for event in events:
            if event.get("cat") == "user_annotation" and "dur" in event:
                start, end = event["ts"], event["ts"] + event["dur"]
                by_part[event["name"]] += sum(change for time, change in changes if start <= time <= end)
    del kept
    return total, by_part


def memory_table(rows: list[Held]) -> str:
    """A Markdown table, in MB."""
    cells = [[row.what, f"{row.predicted / 1e6:.2f}", f"{row.measured / 1e6:.2f}"] for row in rows]
    return format_table(["what", "predicted, MB", "measured, MB"], cells, markdown=True)


def plot_memory(tables: dict[str, list[Held]], path: Path, machine: str) -> None:
    """Bars of what is predicted and measured, a panel for each table."""
    figure = Figure(figsize=(10, 1 + 0.4 * max(map(len, tables.values()))), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        places = range(len(rows))
        for column, name in enumerate(("predicted", "measured")):
            values = [getattr(row, name) / 1e6 for row in rows]
            offsets = [place + 0.4 * column - 0.2 for place in places]
            bars = axes.barh(offsets, values, 0.4, color=COLORS[column], label=name)
            axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        axes.set_yticks(places, [row.what for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.set_xlabel("MB (log scale)")
        axes.set_title(title, fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(machine, fontsize=7)
    figure.savefig(path, dpi=150)
