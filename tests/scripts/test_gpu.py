"""`gpu`: what was measured is kept and gone on with, and the report tells all of it."""

import json
from pathlib import Path

import pytest
import torch

import gpu
from benchmark import main
from gpu import GpuRun, benchmark_gpu
from gpu_report import write_gpu_report
from gpu_tasks import DRY_PLAN, GPU_PLAN, Task, list_tasks

CPU = torch.device("cpu")
TRACKED = {"seconds": [0.1, 0.05, 0.2], "peak_bytes": 2 * 10**9}


@pytest.fixture
def tasks(monkeypatch):
    """Tasks that tell when they run; their outcomes may be changed."""
    ran, outcomes = [], {"one": {"value": 1}, "two": {"value": 2}, "three": {"value": 3}}

    def run(name):
        ran.append(name)
        if isinstance(outcomes[name], Exception):
            raise outcomes[name]
        return outcomes[name]

    listed = [Task(name, 0.0, lambda name=name: run(name)) for name in outcomes]
    monkeypatch.setattr(gpu, "list_tasks", lambda *args, **kwargs: listed)
    return ran, outcomes


def test_what_was_measured_is_not_measured_again(tasks, tmp_path):
    ran, outcomes = tasks
    outcomes["two"] = RuntimeError("no kernel")
    run = benchmark_gpu(CPU, tmp_path, 1, dry_run=True)
    assert run.results == {"one": {"value": 1}, "three": {"value": 3}}
    assert list(run.failures) == ["two"] and "no kernel" in run.failures["two"]
    outcomes["two"] = {"value": 2}
    run = benchmark_gpu(CPU, tmp_path, 1, dry_run=True)
    assert ran == ["one", "two", "three", "two"]
    assert sorted(run.results) == ["one", "three", "two"] and not run.failures


def test_a_task_is_not_begun_without_time(tasks, tmp_path):
    ran, _ = tasks
    run = benchmark_gpu(CPU, tmp_path, 0, dry_run=True)
    assert ran == [] and run.missing == ["one", "two", "three"] and not (tmp_path / "parts").exists()
    assert "- one: no time was left" in write_gpu_report(run, tmp_path).read_text()


def test_results_of_another_machine_are_refused(tasks, tmp_path):
    benchmark_gpu(CPU, tmp_path, 1, dry_run=True)
    path = tmp_path / "parts" / "one.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "another GPU"}))
    with pytest.raises(ValueError, match="`--output` must be a folder without results of another machine"):
        benchmark_gpu(CPU, tmp_path, 1, dry_run=True)


def test_it_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="`--device` must be a GPU, such as cuda, got cpu"):
        main(["gpu", "--device", "cpu", "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_the_dry_run_has_the_tasks_of_the_real_one():
    def kinds(plan):
        return {" ".join(task.name.split()[:-1]) for task in list_tasks(plan, CPU, Path("out"), with_sam2=True)}

    assert kinds(DRY_PLAN) == kinds(GPU_PLAN)


def test_the_report_has_tables_and_a_picture(tmp_path):
    results = {
        "track tiny samoe_hf 1": TRACKED,
        "track tiny samoe_hf 16": TRACKED,
        "track tiny sam2 compiled 1": TRACKED,
    }
    results["train large with checkpointing"] = {"seconds": [0.5], "peak_bytes": 6 * 10**9, "reserved_bytes": 7 * 10**9}
    results["fsdp"] = {"losses": {"alone": [1.0], "FSDP": [1.5]}, "largest difference": 0.5}
    text = write_gpu_report(GpuRun("a GPU", results, {"experts": "Traceback\nValueError: why"}), tmp_path).read_text()
    assert "| tiny | samoe_hf | 10.0 | 10.0 |" in text and "| tiny | sam2 compiled | 10.0 |  |" in text
    assert "| large | with | 500 | 2.00 | 6.0 GB | 7.0 GB |" in text
    assert "differ from those of the same run without by at most 0.5" in text
    assert "- experts: ValueError: why" in text and "64.1" in text
    assert (tmp_path / "tracking.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_dry_run_runs_every_line(tmp_path, capsys):
    main(["gpu", "--dry-run", "--device", "cpu", "--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "Not measured" not in text and "DRY RUN" in text and text.count("\n## ") == 6
    assert "Written:" in capsys.readouterr().out
