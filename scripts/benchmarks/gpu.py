"""Every figure of a GPU in one run that can be stopped and continued: each task's result is kept in a file of its own.

    python scripts/benchmarks/gpu.py --output DIR

Tracking beside others, eager and compiled; agreement and gradients; experts; training and its device memory; FSDP. It
ends after `--minutes`, and continues where it stopped when it is run again. `--dry-run` runs the same with tiny sizes
on any device.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experts import benchmark_kernel, benchmark_layer, benchmark_memory_attention
from gpu_report import GpuRun, write_gpu_report
from measure import autocast, describe_machine, measure, synchronize
from peers import Sam2Tracker, TransformersTracker, base_of, sam2_of
from samoe_hf.commands.options import add_device_option
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.model.expert_layer import expert_modules
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.prompt_recipe import PromptRecipe
from samoe_hf.whole_files import write_text
from tracking import FIRST_TIMED_FRAME, track_once
from training import example_clip

# Contenders of tracking beside ours as it is, under autocast: with weights in bfloat16, and then with fewer memories;
# compiled, and compiled into CUDA graphs; and those of others.
CAST = {"samoe_hf bfloat16": {}, "samoe_hf pooled": {"recent_memory_pooling": 4, "older_memory_pooling": 4}}
COMPILED = {"samoe_hf compiled": {}, "samoe_hf graphs": {"mode": "reduce-overhead"}}
PEERS = ("transformers", "sam2", "sam2 compiled")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        models: name -> its YAML.
        frames: of a tracked video.
        clip: frames and objects of a training clip.
        compiles: whether what is to be compiled is.
    """

    models: Mapping[str, str]
    objects: tuple[int, ...] = (1, 16, 64, 128)
    frames: int = 13
    repeats: int = 3
    dtype: torch.dtype = torch.bfloat16
    clip: tuple[int, int] = (8, 3)
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
    expert_tokens=256,
    compiles=False,
)


@dataclass(frozen=True)
class Task:
    """A measurement, which returns plain numbers. `seconds`: about how long it takes on an H100; it is not begun with
    less time left."""

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]] = field(compare=False)


def _is_compiled(contender: str) -> bool:
    return contender in COMPILED or contender == "sam2 compiled"


class Bench:
    """Measures; holds the contenders of one model at a time.

    Args:
        output: folder for what runs of training leave for a while.
    """

    def __init__(self, plan: Plan, device: torch.device, output: Path):
        self.plan, self.device, self.output = plan, device, output
        self._model: str | None = None
        self._trackers: dict[str, TransformersTracker | Sam2Tracker] = {}

    def tasks(self, with_sam2: bool) -> list[Task]:
        """All tasks; those that matter most come first."""
        plan = self.plan
        few, many = [n for n in plan.objects if n <= 16], [n for n in plan.objects if n > 16]
        few, many = (few, many) if many else (few[:1], few[1:])
        peers = ["transformers", "sam2"] if with_sam2 else ["transformers"]

        def track(model: str, contender: str, counts: Sequence[int], seconds: float) -> list[Task]:
            run = partial(self.track, model, contender)
            return [Task(f"track {model} {contender} {n}", seconds, partial(run, n)) for n in counts]

        tasks = [Task("experts", 20, partial(self.measure_experts, "tiny"))]
        for model in plan.models:
            for contender in ("samoe_hf", *CAST):
                tasks += track(model, contender, [*few, *many], 5)
            tasks += [task for peer in peers for task in track(model, peer, few, 10)]
        tasks.append(Task("agreement tiny", 8, partial(self.compare_masks, "tiny", peers)))
        tasks.append(Task("gradients tiny", 8, partial(self.compare_gradients, "tiny")))
        for model in ("base_plus", "large"):
            for checkpointing in (False, True):
                name = f"train {model} {'with' if checkpointing else 'without'} checkpointing"
                tasks.append(Task(name, 15, partial(self.train, model, checkpointing)))
        tasks.append(Task("fsdp", 45, self.compare_fsdp))
        # To compile a model takes two minutes, so a second run may be needed.
        for contender in COMPILED:
            for model in plan.models:
                tasks += track(model, contender, few, 150) + track(model, contender, many, 20)
        for model in plan.models:
            tasks += [task for peer in peers for task in track(model, peer, many, 30)]
        for model in plan.models:
            tasks += track(model, "sam2 compiled", few, 150) if with_sam2 else []
        return tasks

    # --- Models

    def _config(self, model: str, **settings: Any) -> SamoeConfig:
        return SamoeConfig(**{**read_yaml(self.plan.models[model]), **settings})

    def _build(self, model: str, **settings: Any) -> SamoeModel:
        torch.manual_seed(0)
        with torch.device(self.device):
            return SamoeModel(self._config(model, **settings))

    def _tracker(self, model: str, contender: str) -> TransformersTracker | Sam2Tracker:
        if model != self._model:
            self._free()
            self._model = model
        if contender not in self._trackers:
            # The compiled form of a model takes its place, and no two compiled forms are held at once.
            self._trackers = {key: x for key, x in self._trackers.items() if not _is_compiled(key)}
            self._trackers[contender] = self._new_tracker(model, contender)
        return self._trackers[contender]

    def _new_tracker(self, model: str, contender: str) -> TransformersTracker | Sam2Tracker:
        built = self._build(model, **CAST.get(contender, {})).eval()
        if contender == "transformers":
            return TransformersTracker(base_of(built), built.config)
        if _is_compiled(contender):
            torch.compiler.reset()
        if contender in PEERS:
            return Sam2Tracker(sam2_of(built, compiled=_is_compiled(contender)))
        if contender in CAST:
            built.to(self.plan.dtype)
        elif contender in COMPILED:
            built.compile_for_tracking(**COMPILED[contender])
        return TransformersTracker(built, built.config)

    def _in_training(self, model: str) -> SamoeModel:
        """A model whose experts have an effect; those that were tracked with are freed."""
        self._free()
        built = self._build(model).train()
        for _, module in expert_modules(built):
            nn.init.normal_(module.lora_B, std=0.02)
        return built

    def _free(self) -> None:
        self._trackers.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _noise(self, model: str, objects: int) -> tuple[Tensor, Tensor]:
        """Frames, and a point in the first for each object."""
        generator, size = torch.Generator().manual_seed(0), self._config(model).image_size
        points = torch.rand(objects, 2, generator=generator) * size
        return torch.randn(self.plan.frames, 3, size, size, generator=generator).to(self.device), points

    # --- What is measured

    def track(self, model: str, contender: str, objects: int) -> dict[str, Any]:
        """Seconds per frame with full memory of objects that are each given by a point; see `benchmark_tracking`."""
        frames, points = self._noise(model, objects)
        tracker, autocast_to = self._tracker(model, contender), self.plan.dtype
        if contender in CAST:
            frames, autocast_to = frames.to(self.plan.dtype), torch.float32
        run = partial(track_once, tracker, frames, points, self.device, autocast_to)
        with nullcontext() if self.plan.compiles else torch.compiler.set_stance("force_eager"):
            if objects == 1 or _is_compiled(contender):
                run()  # kernels are chosen, code is compiled, graphs are recorded for each number of memories
            # One object's time is the work of the host, and varies; that of many does not. The first frames warm up.
            measured = [run() for _ in range(self.plan.repeats if objects == 1 else 1)]
        return {"seconds": [m.seconds for m in measured], "peak_bytes": measured[-1].peak_bytes}

    def compare_masks(self, model: str, peers: Sequence[str]) -> dict[str, Any]:
        """How far logits of the last frame are from transformers' in float32, and by how much bfloat16 moves each."""
        frames, points = self._noise(model, 1)
        masks = {}
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for contender in ("samoe_hf", *peers):
                for dtype in (torch.float32, torch.bfloat16):
                    run = track_once(self._tracker(model, contender), frames, points, self.device, dtype)
                    masks[contender, dtype] = run.masks
        reference = masks["transformers", torch.float32]
        return {
            contender: {
                "to transformers": (masks[contender, torch.float32] - reference).abs().mean().item(),
                "bfloat16": (masks[contender, torch.bfloat16] - masks[contender, torch.float32]).abs().mean().item(),
                "size of logits": reference.abs().mean().item(),
            }
            for contender in ("samoe_hf", *peers)
        }

    def compare_gradients(self, model: str) -> dict[str, Any]:
        """The largest relative distance of the experts' gradients with checkpointing from those without, with dropout,
        and of two runs that are the same, since a GPU does not always add in the same order."""
        built = self._in_training(model)
        clip = example_clip(built.config.image_size, *self.plan.clip, self.device)

        def gradients(checkpointing: bool) -> dict[str, Tensor]:
            built.gradient_checkpointing_enable() if checkpointing else built.gradient_checkpointing_disable()
            built.zero_grad()
            torch.manual_seed(1)
            built(**clip, prompts="point").loss.backward()
            return {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}

        first, again, checkpointed = gradients(False), gradients(False), gradients(True)
        size = torch.stack([x.norm() for x in first.values()]).norm()

        def distance(second: dict[str, Tensor]) -> float:
            return (torch.stack([(x - second[name]).norm() for name, x in first.items()]).max() / size).item()

        dropout = max(m.p for m in built.modules() if isinstance(m, nn.Dropout))
        found = {"checkpointed": distance(checkpointed), "same again": distance(again)}
        return {**found, "dropout": dropout, "tensors": len(first)}

    def measure_experts(self, model: str) -> dict[str, Any]:
        """The layer with experts beside the plain one, their kernel beside PyTorch, and the memory attention."""
        dtype = self.plan.dtype
        found = benchmark_layer(20, self.device, dtype, tokens=self.plan.expert_tokens)
        if self.device.type == "cuda":
            for tokens in (64, self.plan.expert_tokens, 16 * self.plan.expert_tokens):
                found += benchmark_kernel(20, self.device, dtype, tokens)
        found += benchmark_memory_attention(self._config(model), self.plan.repeats, self.device, dtype)
        rows = [
            {"case": m.case, "contender": m.contender, "seconds": m.median, "peak_bytes": m.peak_bytes} for m in found
        ]
        return {"rows": rows}

    def train(self, model: str, checkpointing: bool) -> dict[str, Any]:
        """Seconds of a step on one clip, experts trained, and the most device memory that it holds, weights included.

        Each clip has the most that SAM 2's recipe draws: a box on the first frame, and clicks on two.
        """
        built = self._in_training(model)
        if checkpointing:
            built.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=1e-9)
        clip = example_clip(built.config.image_size, *self.plan.clip, self.device)
        recipe = PromptRecipe(point_probability=1, max_initial_frames=1, max_corrected_frames=2)

        def step() -> None:
            optimizer.zero_grad()
            torch.manual_seed(3)  # the same prompts each time: two corrected frames
            with autocast(self.device, self.plan.dtype):
                loss = built(**clip, prompts=recipe).loss
            loss.backward()
            optimizer.step()

        step()
        synchronize(self.device)
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        (measured,) = measure(model, {"samoe_hf": step}, self.plan.repeats, self.device)
        return {
            "seconds": measured.seconds,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if is_cuda else None,
            "reserved_bytes": torch.cuda.max_memory_reserved(self.device) if is_cuda else None,
        }

    def compare_fsdp(self) -> dict[str, Any]:
        """Losses of a short training run sharded by FSDP through accelerate, and of the same run without."""
        sharded = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
        sharded += ["--fsdp_state_dict_type", "FULL_STATE_DICT"]
        runs = {"alone": [], "FSDP": sharded if self.device.type == "cuda" else []}
        losses = {name: self._losses_of_run(options) for name, options in runs.items()}
        return {"losses": losses, "largest difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True))}

    def _losses_of_run(self, options: Sequence[str]) -> list[float]:
        self.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.output) as folder:
            command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
            command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *options]
            command += ["--cpu"] if self.device.type == "cpu" else []
            command += ["-m", "samoe_hf", "train", "smoke", "--output_dir", f"{folder}/run", "--max_steps", "3"]
            command += ["--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "3", "--disable_tqdm", "1"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr[-3000:]}")
            state = json.loads(Path(folder, "run", "checkpoint-3", "trainer_state.json").read_text(encoding="utf-8"))
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


# --- The run


def run_tasks(tasks: Sequence[Task], machine: str, output: Path, deadline: float) -> GpuRun:
    """Runs the tasks that a folder has no result of, in order, until the time is up.

    Args:
        machine: what the results are of.
        deadline: by `time.monotonic`. A task is not begun if it would probably end later.

    Raises:
        ValueError: if `output` has results of another machine.
    """
    run = GpuRun(machine)
    with tqdm(tasks, "measure", disable=None) as bar:
        for task in bar:
            bar.set_postfix_str(task.name)
            path = output / "parts" / f"{task.name.replace(' ', '-')}.json"
            if path.is_file():
                document = json.loads(path.read_text(encoding="utf-8"))
                if document["machine"] != machine:
                    raise ValueError(f"{path} is of {document['machine']!r}, and this is {machine!r}.")
                run.results[task.name] = document["result"]
            elif time.monotonic() + task.seconds > deadline:
                run.missing.append(task.name)
            else:
                start = time.monotonic()
                try:
                    result = run.results[task.name] = task.run()
                except Exception as error:  # whatever it is, it is reported, and the program fails in the end
                    run.failures[task.name] = "".join(traceback.format_exception(error)[-12:])
                    continue
                document = {"machine": machine, "took": time.monotonic() - start, "result": result}
                write_text(path, json.dumps(document, indent=1))
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = Path("outputs/benchmark_gpu")
    parser.add_argument("--output", type=Path, default=output, metavar="DIR", help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="how long to go on (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on any device; the figures mean nothing")
    add_device_option(parser)
    parsed = parser.parse_args(arguments)
    if parsed.device.type != "cuda" and not parsed.dry_run:
        parser.error(f"--device must be a GPU, such as cuda, got {parsed.device}; --dry-run runs on any device")
    machine = describe_machine(parsed.device) + (", DRY RUN: sizes are tiny" if parsed.dry_run else "")
    bench = Bench(DRY_PLAN if parsed.dry_run else GPU_PLAN, parsed.device, parsed.output)
    tasks = bench.tasks(with_sam2=find_spec("sam2") is not None)
    run = run_tasks(tasks, machine, parsed.output, time.monotonic() + 60 * parsed.minutes)
    path = write_gpu_report(run, parsed.output)
    print(f"{path.read_text(encoding='utf-8')}\nWritten: {len(run.results)} results and {path}")
    if run.missing:
        print(f"No time was left for {len(run.missing)} of the tasks. Run it again to go on.")
    for name, text in run.failures.items():
        print(f"\n{name}:\n{text}", file=sys.stderr)
    if run.failures:
        sys.exit(f"{len(run.failures)} of the tasks failed: {', '.join(run.failures)}.")


if __name__ == "__main__":
    main()
