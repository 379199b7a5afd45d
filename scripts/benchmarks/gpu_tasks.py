"""What a GPU is asked: each task measures one thing, and returns plain numbers."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import parts
from experts import benchmark_layer, benchmark_memory_attention
from measure import Measurement, autocast, measure, synchronize
from peers import Sam2Tracker, TransformersTracker, base_of, sam2_of
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.expert_layer import expert_modules
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.prompts import PromptRecipe
from tracking import FIRST_TIMED_FRAME, benchmark_long_video, track_once
from training import example_clip

# Contenders of tracking beside ours as it is, under autocast: with weights in bfloat16, and then with fewer memories;
# compiled, and compiled into CUDA graphs; and those of others.
CAST = {"samoe_hf bfloat16": {}, "samoe_hf pooled": {"recent_memory_pooling": 4, "older_memory_pooling": 4}}
COMPILED = {"samoe_hf compiled": {}, "samoe_hf graphs": {"mode": "reduce-overhead"}}
PEERS = ("transformers", "sam2", "sam2 compiled")


@dataclass(frozen=True)
class Plan:
    """What is measured. `models`: name -> its YAML. `frames`: of a tracked video. `clip`: its frames and objects.
    `compiles`: whether what is to be compiled is."""

    models: Mapping[str, str]
    objects: tuple[int, ...] = (1, 16, 64, 128)
    frames: int = 13
    repeats: int = 3
    dtype: torch.dtype = torch.bfloat16
    clip: tuple[int, int] = (8, 3)
    long_frames: int = 2000
    expert_tokens: int = 4096
    compiles: bool = True


GPU_PLAN = Plan({"tiny": "model_tiny", "base_plus": "model_base_plus", "large": "model_large"})
# Every line of the same on a CPU: other models in the same places, and what is compiled runs as it is.
DRY_PLAN = Plan(
    dict.fromkeys(("tiny", "base_plus", "large"), "model_micro"),
    objects=(1, 2),
    frames=FIRST_TIMED_FRAME + 1,
    repeats=1,
    clip=(3, 2),
    long_frames=30,
    expert_tokens=256,
    compiles=False,
)


@dataclass(frozen=True)
class Task:
    """A measurement. `seconds`: about how long it takes on an H100; it is not begun with less time left."""

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]] = field(compare=False)


class Models:
    """Builds models and contenders of one configuration at a time; those of the one before are freed."""

    def __init__(self, plan: Plan, device: torch.device):
        self.plan, self.device = plan, device
        self._name: str | None = None
        self._trackers: dict[str, TransformersTracker | Sam2Tracker] = {}

    def config(self, name: str) -> SamoeConfig:
        return SamoeConfig(**read_yaml(self.plan.models[name]))

    def build(self, name: str, **settings) -> SamoeModel:
        torch.manual_seed(0)
        with torch.device(self.device):
            return SamoeModel(SamoeConfig(**{**read_yaml(self.plan.models[name]), **settings}))

    def tracker(self, name: str, contender: str) -> TransformersTracker | Sam2Tracker:
        if name != self._name:
            self.free()
            self._name = name
        if contender not in self._trackers:
            # The compiled form of a model takes its place, and no two compiled forms are held at once.
            self._trackers = {key: x for key, x in self._trackers.items() if not _is_compiled(key)}
            self._trackers[contender] = self._new_tracker(name, contender)
        return self._trackers[contender]

    def _new_tracker(self, name: str, contender: str) -> TransformersTracker | Sam2Tracker:
        model = self.build(name, **CAST.get(contender, {})).eval()
        if contender in CAST:
            model.to(self.plan.dtype)
        elif contender in COMPILED:
            torch.compiler.reset()
            model.compile_for_tracking(**COMPILED[contender])
        elif contender == "transformers":
            return TransformersTracker(base_of(model), model.config)
        elif contender in PEERS:
            torch.compiler.reset()
            return Sam2Tracker(sam2_of(model, compiled=_is_compiled(contender)))
        return TransformersTracker(model, model.config)

    def free(self) -> None:
        self._trackers.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_compiled(contender: str) -> bool:
    return contender in COMPILED or contender == "sam2 compiled"


def list_tasks(plan: Plan, device: torch.device, output: Path, with_sam2: bool) -> list[Task]:
    """All tasks; those that matter most come first."""
    models = Models(plan, device)
    few, many = [n for n in plan.objects if n <= 16], [n for n in plan.objects if n > 16]
    few, many = (few, many) if many else (few[:1], few[1:])
    peers = [peer for peer in PEERS if with_sam2 or not peer.startswith("sam2")]
    eager = ["samoe_hf", *(peer for peer in peers if not _is_compiled(peer))]

    def track(name: str, contender: str, counts: list[int], seconds: float) -> list[Task]:
        run = partial(time_tracking, models, name, contender)
        return [Task(f"track {name} {contender} {n}", seconds, partial(run, n)) for n in counts]

    tasks = [Task("peaks", 5, partial(measure_peaks, plan, device))]
    for name in plan.models:
        tasks += track(name, "samoe_hf", [*few, *many], 5)
        for contender in CAST:
            tasks += track(name, contender, [*few, *many], 5)
        tasks += [task for peer in eager[1:] for task in track(name, peer, few, 10)]
        tasks.append(Task(f"parts {name}", 6, partial(measure_parts, models, name)))
    tasks.append(Task("agreement tiny", 8, partial(compare_masks, models, "tiny", peers)))
    tasks.append(Task("gradients tiny", 8, partial(compare_gradients, models, "tiny")))
    tasks.append(Task("experts", 4, partial(measure_experts, models, "tiny")))
    for name in ("base_plus", "large"):
        for checkpointing in (False, True):
            label = f"train {name} {'with' if checkpointing else 'without'} checkpointing"
            tasks.append(Task(label, 15, partial(time_training, models, name, checkpointing)))
    tasks.append(Task("fsdp", 45, partial(compare_fsdp, device, output)))
    tasks.append(Task("long tiny", 80, partial(track_long, models, "tiny")))
    # To compile a model takes two minutes, so a second run may be needed.
    for contender in COMPILED:
        for name in ("tiny", "base_plus", "large"):
            tasks += track(name, contender, few, 150) + track(name, contender, many, 20)
    for name in plan.models:
        for contender in eager[1:]:
            tasks += track(name, contender, many, 30)
    for name in plan.models:
        tasks += track(name, "sam2 compiled", few, 150) if with_sam2 else []
    return tasks


def measure_peaks(plan: Plan, device: torch.device) -> dict[str, Any]:
    """What the device reaches with large products and copies."""
    peaks = parts.Peaks.of(device, plan.dtype)
    return {"flops": peaks.flops, "bandwidth": peaks.bandwidth}


def time_tracking(models: Models, name: str, contender: str, num_objects: int) -> dict[str, Any]:
    """Seconds per frame with full memory of objects that are each given by a point; see `benchmark_tracking`."""
    plan, device = models.plan, models.device
    frames, points = _noise(models.config(name).image_size, plan.frames, num_objects, device)
    tracker, autocast_to = models.tracker(name, contender), plan.dtype
    if contender in CAST:
        frames, autocast_to = frames.to(plan.dtype), torch.float32
    run = partial(track_once, tracker, frames, points, device, autocast_to)
    with nullcontext() if plan.compiles else torch.compiler.set_stance("force_eager"):
        if num_objects == 1 or _is_compiled(contender):
            run()  # kernels are chosen, code is compiled, graphs are recorded for each number of memories
        # One object's time is the work of the host, and varies; that of many does not. The first frames warm up.
        measured = [run() for _ in range(plan.repeats if num_objects == 1 else 1)]
    return {"seconds": [m.seconds for m in measured], "peak_bytes": measured[-1].peak_bytes}


def _noise(size: int, frames: int, objects: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(objects, 2, generator=generator) * size
    return torch.randn(frames, 3, size, size, generator=generator).to(device), points


def measure_parts(models: Models, name: str) -> dict[str, Any]:
    """The parts of a frame's work beside their floors, and attention by each kernel."""
    plan, device, config = models.plan, models.device, models.config(name)
    settings = (config, 1, plan.repeats, device, plan.dtype)
    rows = [
        {
            "part": part.measurement.case,
            "seconds": part.measurement.median / part.frames,
            "flops": part.flops / part.frames,
            "bytes": part.bytes / part.frames,
            "kernels": list(part.kernels),
        }
        for part in parts.benchmark_parts(*settings)
    ]
    attention = {m.contender: m.median for m in parts.benchmark_attention(*settings)}
    return {"parts": rows, "attention": attention}


def compare_masks(models: Models, name: str, peers: list[str]) -> dict[str, Any]:
    """How far logits of the last frame are from transformers' in float32, and by how much bfloat16 moves each."""
    frames, points = _noise(models.config(name).image_size, models.plan.frames, 1, models.device)
    names = ["samoe_hf", *(peer for peer in peers if not _is_compiled(peer))]
    masks = {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for contender in names:
            for dtype in (torch.float32, torch.bfloat16):
                run = track_once(models.tracker(name, contender), frames, points, models.device, dtype)
                masks[contender, dtype] = run.masks
    reference = masks["transformers", torch.float32]
    return {
        contender: {
            "to transformers": (masks[contender, torch.float32] - reference).abs().mean().item(),
            "bfloat16": (masks[contender, torch.bfloat16] - masks[contender, torch.float32]).abs().mean().item(),
            "size of logits": reference.abs().mean().item(),
        }
        for contender in names
    }


def compare_gradients(models: Models, name: str) -> dict[str, Any]:
    """The largest relative distance of the experts' gradients with checkpointing from those without, with dropout, and
    of two runs that are the same, since a GPU does not always add in the same order."""
    model = _model_in_training(models, name)
    clip = example_clip(model.config.image_size, *models.plan.clip, models.device)
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model.gradient_checkpointing_enable() if checkpointing else model.gradient_checkpointing_disable()
        model.zero_grad()
        torch.manual_seed(1)
        model(**clip, prompts="point").loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    first, again, checkpointed = gradients(False), gradients(False), gradients(True)
    return {
        "checkpointed": _largest_distance(first, checkpointed),
        "same again": _largest_distance(first, again),
        "dropout": max(dropouts),
        "tensors": len(first),
    }


def _largest_distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    whole = torch.stack([x.norm() for x in first.values()]).norm()
    differences = torch.stack([(x - second[name]).norm() for name, x in first.items()])
    return (differences.max() / whole).item()


def _model_in_training(models: Models, name: str) -> SamoeModel:
    """A model whose experts have an effect."""
    models.free()
    model = models.build(name).train()
    for _, module in expert_modules(model):
        nn.init.normal_(module.lora_B, std=0.02)
    return model


def measure_experts(models: Models, name: str) -> dict[str, Any]:
    """The layer with experts beside the plain one, and the memory attention."""
    plan, device = models.plan, models.device
    found: list[Measurement] = benchmark_layer(20, device, plan.dtype, tokens=plan.expert_tokens)
    found += benchmark_memory_attention(models.config(name), plan.repeats, device, plan.dtype)
    rows = [{"case": m.case, "contender": m.contender, "seconds": m.median, "peak_bytes": m.peak_bytes} for m in found]
    return {"rows": rows}


def time_training(models: Models, name: str, checkpointing: bool) -> dict[str, Any]:
    """Seconds of a step on one clip, experts trained, and the most memory that it holds, weights included.

    Each clip has the most that SAM 2's recipe draws: a box on the first frame, and clicks on two.
    """
    plan, device = models.plan, models.device
    model = _model_in_training(models, name)
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    clip = example_clip(model.config.image_size, *plan.clip, device)
    recipe = PromptRecipe(point_probability=1, max_initial_frames=1, max_corrected_frames=2)

    def step() -> None:
        optimizer.zero_grad()
        torch.manual_seed(3)  # the same prompts each time: two corrected frames
        with autocast(device, plan.dtype):
            loss = model(**clip, prompts=recipe).loss
        loss.backward()
        optimizer.step()

    step()
    synchronize(device)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    (measured,) = measure(name, {"samoe_hf": step}, plan.repeats, device)
    return {
        "seconds": measured.seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if is_cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if is_cuda else None,
    }


def track_long(models: Models, name: str) -> dict[str, Any]:
    """Memory and time through a long video."""
    models.free()
    rows = benchmark_long_video(models.config(name), 1, models.plan.long_frames, models.device, models.plan.dtype)
    return {"rows": [list(row) for row in rows]}


def compare_fsdp(device: torch.device, output: Path) -> dict[str, Any]:
    """Losses of a short training run sharded by FSDP through accelerate, and of the same run without."""
    losses = {}
    sharded = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    sharded += ["--fsdp_state_dict_type", "FULL_STATE_DICT"]
    for name, options in {"alone": [], "FSDP": sharded if device.type == "cuda" else []}.items():
        losses[name] = _losses_of_run(options, device, output)
    return {"losses": losses, "largest difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True))}


def _losses_of_run(options: list[str], device: torch.device, output: Path) -> list[float]:
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", *options]
        command += ["--cpu"] if device.type == "cpu" else []
        command += ["-m", "samoe_hf", "train", "smoke", "--output_dir", f"{folder}/run", "--max_steps", "3"]
        command += ["--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "3", "--disable_tqdm", "true"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr[-3000:]}")
        state = json.loads(Path(folder, "run", "checkpoint-3", "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]
