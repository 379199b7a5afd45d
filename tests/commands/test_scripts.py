"""The command lines, run as users run them."""

import os
import subprocess
import sys

import pytest
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from helpers.reference import ROOT, shared_data
from samoe_hf.cli import main
from samoe_hf.data import SyntheticVideos, write_video


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a script in this process, at the repository's root, and returns all that it printed."""

    def run(script: str, *arguments: object, fails: bool = False) -> str:
        monkeypatch.chdir(ROOT)
        command = [script.removesuffix(".py"), *map(str, arguments)]
        if not fails:
            main(command)
            return "".join(capfd.readouterr())
        with pytest.raises(SystemExit) as exit_info:
            main(command)
        message = exit_info.value.code
        assert isinstance(message, str) and message.startswith("error: "), message
        return message

    return run


@pytest.fixture(scope="module")
def video():
    return SyntheticVideos(1, 5, (96, 128), seed=3)[0]


@pytest.mark.slow  # a process of its own takes seconds to import all; in the fast tests, test_cli.py ends in that line
def test_scripts_run_on_their_own(model_folder, video, tmp_path):
    write_video(tmp_path / "in.mp4", video.frames, fps=5)
    command = [sys.executable, "-m", "samoe_hf", "track", model_folder, tmp_path / "in.mp4", "--box", "10,10,60"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "--output", tmp_path / "o.mp4"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "error: `--box` must be 4 numbers with commas between, got '10,10,60'.\n"


@pytest.fixture
def smoke_config(model_folder, tmp_path):
    """A run of two steps on synthetic videos, from the nano reference."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
model_name_or_path: {model_folder}
train_data: [{{kind: synthetic, num_videos: 4, num_frames: 3, image_size: [96, 96]}}]
eval_data: [{{kind: synthetic, num_videos: 1, num_frames: 3, image_size: [96, 96], seed: 5}}]
num_frames: 3
max_steps: 2
per_device_train_batch_size: 2
learning_rate: 1.0e-3
save_strategy: "no"
report_to: none
output_dir: {tmp_path / "out"}
"""
    )
    return path


def test_train_writes_a_model_that_loads_and_tracks(run, smoke_config, model_folder, tmp_path, video):
    from samoe_hf import SamoeModel

    printed = run("train.py", smoke_config, "--max_steps", "3", "--logging_steps", "1")
    assert "trainable      68,672 (2.37 %)" in printed and printed.count("'loss'") == 3
    assert f"Written: the model and its processor in {tmp_path / 'out'}\n" in printed and "pin_memory" not in printed
    assert printed.count("eval_J&F ") == printed.count("eval_shapes_J&F") == 2
    assert "loss_focal" in printed and "router_entropy/shapes" in printed and "expert_usage/shapes/3" in printed
    before, after = (SamoeModel.from_pretrained(folder) for folder in (model_folder, tmp_path / "out"))
    changed = {
        name
        for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True)
        if (a != b).any()
    }
    assert changed and all("lora_" in name or "router" in name for name in changed)
    write_video(tmp_path / "in.mp4", video.frames, fps=5)
    run("track.py", tmp_path / "out", tmp_path / "in.mp4", "--box", "10,10,60,60", "--output", tmp_path / "out.mp4")


@pytest.mark.parametrize(
    "line, message",
    [
        ("learning_rat: 1.0", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("trainable: [expert]", "'expert'"),
        ("model_config: model_nano", "Exactly one of `model_name_or_path` and `model_config`"),
        ("box_probability: 1.5", "`box_probability` must be from 0 to 1, got 1.5"),
        ("learning_rates: {experts: fast}", "Rates of `learning_rates` must be numbers from 0 on"),
        ("train_data: []", "`train_data` must name at least one dataset"),
        ("train_data: [{kind: davi}]", "'davi'"),
        (": [", "is not YAML"),
        ("model_name_or_path: base.pt", "base.pt: no such file"),
    ],
)
def test_train_refuses_bad_configurations_in_one_line(run, smoke_config, line, message):
    kept = [kept for kept in smoke_config.read_text().splitlines() if not kept.startswith(line.partition(":")[0] + ":")]
    smoke_config.write_text("\n".join([*kept, line]))
    printed = run("train.py", smoke_config, fails=True)
    assert message in printed


def test_experts_of_another_number_are_trained_anew(run, smoke_config, tmp_path):
    from samoe_hf import SamoeModel

    with CaptureLogger(logging.get_logger("transformers.samoe_hf.model.loading")) as said:
        run("train.py", smoke_config, "--num_experts", "3", "--ignore_mismatched_sizes", "--max_steps", "1")
    assert said.out.count("expert tensors are not in") == 1
    assert SamoeModel.from_pretrained(tmp_path / "out").summary().experts[0].num_experts == 3


@pytest.mark.slow
def test_the_configuration_for_davis_runs(run, model_folder, tmp_path):
    davis = shared_data("davis")
    config = tmp_path / "run.yaml"
    text = (ROOT / "configs" / "finetune_davis.yaml").read_text().replace("data/DAVIS", str(davis))
    config.write_text(text.replace("facebook/sam2.1-hiera-base-plus", str(model_folder)))
    printed = run("train.py", config, "--output_dir", tmp_path, "--max_steps", "4")
    assert "train_loss" in printed and (tmp_path / "model.safetensors").is_file()
