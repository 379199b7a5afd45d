"""What was measured of a GPU is kept and gone on with, and the report tells all of it."""

import time

import pytest
import torch

import gpu
from gpu import Task, run_tasks
from gpu_report import GpuRun, write_gpu_report

CPU = torch.device("cpu")
TRACKED = {"seconds": [0.1, 0.05, 0.2], "peak_bytes": 2 * 10**9}


@pytest.fixture
def tasks():
    """Tasks, the names of those that were run, and their outcomes, which may be changed."""
    ran, outcomes = [], {"one": {"value": 1}, "two": {"value": 2}, "three": {"value": 3}}

    def run(name):
        ran.append(name)
        if isinstance(outcomes[name], Exception):
            raise outcomes[name]
        return outcomes[name]

    return [Task(name, 9.0, lambda name=name: run(name)) for name in outcomes], ran, outcomes


def test_what_was_measured_is_not_measured_again(tasks, tmp_path):
    listed, ran, outcomes = tasks
    outcomes["two"] = RuntimeError("no kernel")
    deadline = time.monotonic() + 60
    run = run_tasks(listed, "a GPU", tmp_path, deadline)
    assert run.results == {"one": {"value": 1}, "three": {"value": 3}}
    assert list(run.failures) == ["two"] and "no kernel" in run.failures["two"]
    outcomes["two"] = {"value": 2}
    run = run_tasks(listed, "a GPU", tmp_path, deadline)
    assert ran == ["one", "two", "three", "two"]
    assert sorted(run.results) == ["one", "three", "two"] and not run.failures
    with pytest.raises(ValueError, match=r"one.json is of 'a GPU', and this is 'another GPU'"):
        run_tasks(listed, "another GPU", tmp_path, deadline)


def test_the_report_has_tables_and_a_picture(tmp_path):
    results = {f"track tiny {name}": TRACKED for name in ("samoe_hf 1", "samoe_hf 16", "sam2 compiled 1")}
    results["train large with checkpointing"] = {"seconds": [0.5], "peak_bytes": 6 * 10**9, "reserved_bytes": 7 * 10**9}
    results["fsdp"] = {"losses": {"alone": [1.0], "FSDP": [1.5]}, "largest difference": 0.5}
    text = write_gpu_report(GpuRun("a GPU", results, {"experts": "Traceback\nValueError: why"}), tmp_path).read_text()
    assert "| tiny | samoe_hf | 10.0 | 10.0 |" in text and "| tiny | sam2 compiled | 10.0 |  |" in text
    assert "| large | with | 500 | 2.00 | 6.0 GB | 7.0 GB |" in text
    assert "differ from those of the same run without by at most 0.5" in text
    assert "- experts: ValueError: why" in text and "base_plus, objects: 1, A100: 64.1" in text
    assert (tmp_path / "tracking.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_dry_run_runs_every_line(tmp_path, capsys):
    gpu.main(["--dry-run", "--device", "cpu", "--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "Not measured" not in text and "DRY RUN" in text and text.count("\n## ") == 4
    assert "Written:" in capsys.readouterr().out
