"""Runs that are killed at random moments, saves included, go on to the same tensors. Minutes, so a slow test."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.reference import ROOT

NUM_KILLS = int(os.environ.get("SAMOE_NUM_KILLS", "5"))


def train(config: Path, output: Path, *options: str, kill_after: float | None = None) -> tuple[int, str]:
    """Runs `train.py`: its exit status and what it printed to stderr. After `kill_after` seconds of it, SIGKILL."""
    command = [sys.executable, "scripts/train.py", str(config), "--output_dir", str(output), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
    return process.returncode, errors


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_tensors(model_folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model_name_or_path: {model_folder}
train_data: [{{kind: synthetic, num_videos: 6, num_frames: 3, image_size: [64, 64]}}]
num_frames: 3
num_correction_clicks: 1
max_steps: 6
per_device_train_batch_size: 1
learning_rate: 1.0e-3
save_steps: 1
logging_steps: 1
report_to: none
disable_tqdm: true
use_cpu: true
"""
    )
    start = time.monotonic()
    status, errors = train(config, tmp_path / "whole")
    duration = time.monotonic() - start
    assert status == 0, errors
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    rng = random.Random(0)
    kills = 0
    while kills < NUM_KILLS:
        output = tmp_path / f"cut_{kills}"
        options: tuple[str, ...] = ()
        for _ in range(3):
            status, _ = train(config, output, *options, kill_after=rng.uniform(0.3, 1.1) * duration)
            kills += status == -signal.SIGKILL
            options = ("--resume_from_checkpoint", "last")
        status, errors = train(config, output, *options)
        if "finds no whole checkpoint" in errors:
            status, errors = train(config, output, "--overwrite_output_dir", "true")
        assert status == 0, errors
        found = load_file(output / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
