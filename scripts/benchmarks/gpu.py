"""All figures of a GPU in one run that can be gone on with: what was measured is kept, one file for each task."""

import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gpu_tasks import DRY_PLAN, GPU_PLAN, Plan, Task, list_tasks
from measure import describe_machine
from samoe_hf.errors import InputError
from samoe_hf.model.weights_io import write_text

RESULTS = "parts"


@dataclass
class GpuRun:
    """What a folder holds after a run. `failures`: task -> its error. `missing`: tasks for which no time was left."""

    machine: str
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def benchmark_gpu(device: torch.device, output: Path, minutes: float, dry_run: bool = False) -> GpuRun:
    """Runs the tasks that `output` has no result of, in order of importance, until the time is up.

    Args:
        device: a GPU; with `dry_run` any.
        minutes: how long to go on. A task is not begun if it would probably take longer than what is left.
        dry_run: runs the same tasks on small models, to see that they run. Their figures mean nothing.

    Raises:
        ValueError: if `device` is no GPU, or if `output` has results of another machine.
    """
    if device.type != "cuda" and not dry_run:
        raise InputError(f"`--device` must be a GPU, such as cuda, got {device}; `--dry-run` runs on any device.")
    run = GpuRun(describe_machine(device) + (", DRY RUN: sizes are tiny" if dry_run else ""))
    plan = DRY_PLAN if dry_run else GPU_PLAN
    tasks = list_tasks(plan, device, output, with_sam2=find_spec("sam2") is not None)
    _read_results(run, output, tasks)
    deadline = time.monotonic() + 60 * minutes
    with tqdm(tasks, "measure", disable=None) as bar:
        for task in bar:
            if task.name not in run.results:
                bar.set_postfix_str(task.name)
                _run_task(run, task, plan, output, deadline)
    return run


def _read_results(run: GpuRun, output: Path, tasks: Sequence[Task]) -> None:
    for task in tasks:
        path = _result_path(output, task)
        if not path.exists():
            continue
        document = json.loads(path.read_text())
        if document["machine"] != run.machine:
            raise InputError(
                f"`--output` must be a folder without results of another machine or of other versions: {path} is from "
                f"{document['machine']!r}, and this is {run.machine!r}."
            )
        run.results[task.name] = document["result"]


def _result_path(output: Path, task: Task) -> Path:
    return output / RESULTS / f"{task.name.replace(' ', '-')}.json"


def _run_task(run: GpuRun, task: Task, plan: Plan, output: Path, deadline: float) -> None:
    """Runs a task and keeps its result; an error is kept too, since the other tasks can do without it."""
    if time.monotonic() + (task.seconds if plan.compiles else 0) > deadline:
        run.missing.append(task.name)
        return
    start = time.monotonic()
    try:
        result = task.run()
    except Exception as error:  # whatever it is, it is reported, and the command fails in the end
        run.failures[task.name] = "".join(traceback.format_exception(error)[-12:])
        return
    run.results[task.name] = result
    document = {"machine": run.machine, "took": time.monotonic() - start, "result": result}
    write_text(_result_path(output, task), json.dumps(document, indent=1))
