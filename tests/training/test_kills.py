"""Runs that are killed at random moments, saves included, go on to the same tensors. Minutes, so a slow test."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samoe_hf.commands import train as command

NUM_KILLS = int(os.environ.get("SAMOE_NUM_KILLS", "6"))


def run_command(arguments: list[str], errors: Path) -> None:
    try:
        command.run(command.parse_arguments(arguments))
    except ValueError as error:
        errors.write_text(str(error))
        raise


def is_saving(output: Path, known: set[Path]) -> bool:
    """Whether a checkpoint is being written that was not there before: its state comes last."""
    folders = set(output.glob("checkpoint-*")) - known
    return any(not (folder / "trainer_state.json").exists() for folder in folders)


def train(
    config: Path, output: Path, *options: str, kill_after: float | None = None, in_save: bool = False
) -> tuple[int, str]:
    """Runs `samoe train`: its exit status and error.

    It gets a SIGKILL after `kill_after` seconds, or, with `in_save`, at the first save after that.
    """
    errors = output.with_suffix(".txt")
    errors.unlink(missing_ok=True)
    known = set(output.glob("checkpoint-*"))
    # A fork has everything imported, which takes longer than such a run. This process cannot be forked: other tests
    # have computed gradients in it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["samoe_hf.commands.train", "samoe_hf.training.trainer"])
    arguments = [str(config), "--output_dir", str(output), *options]
    process = context.Process(target=run_command, args=(arguments, errors))
    process.start()
    process.join(kill_after)
    while in_save and process.is_alive() and not is_saving(output, known):
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode, errors.read_text() if errors.exists() else ""


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
    train(config, tmp_path / "first")  # the server that forks starts here
    start = time.monotonic()
    status, errors = train(config, tmp_path / "whole")
    duration = time.monotonic() - start
    assert status == 0, errors
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    rng = random.Random(0)
    kills = damaged = 0
    while kills < NUM_KILLS:
        output = tmp_path / f"cut_{kills}"
        options: tuple[str, ...] = ()
        for _ in range(3):
            status, _ = train(
                config, output, *options, kill_after=rng.uniform(0.2, 0.9) * duration, in_save=rng.random() < 0.5
            )
            damaged += any(not (folder / "trainer_state.json").exists() for folder in output.glob("checkpoint-*"))
            kills += status == -signal.SIGKILL
            options = ("--resume_from_checkpoint", "last")
        status, errors = train(config, output, *options)
        if "finds no whole checkpoint" in errors:
            status, errors = train(config, output, "--overwrite_output_dir", "true")
        assert status == 0, errors
        found = load_file(output / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert damaged > 0, "no kill came while a checkpoint was written"
