"""`samoe train`, run as users run it."""

import pytest

from samoe_hf import SamoeModel
from samoe_hf.inference import load_tracker


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
num_correction_clicks: 1
max_steps: 2
per_device_train_batch_size: 2
learning_rate: 1.0e-3
save_strategy: "no"
report_to: none
output_dir: {tmp_path / "out"}
"""
    )
    return path


def test_it_writes_a_model_whose_experts_alone_have_changed(samoe, smoke_config, model_folder, tmp_path):
    printed = samoe("train", smoke_config, "--max_steps", "3", "--logging_steps", "1")
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


@pytest.mark.parametrize(
    "line, message",
    [
        ("trainable: [expert]", "'expert'"),
        ("model_config: model_nano", "Exactly one of `model_name_or_path` and `model_config`"),
        ("box_probability: 1.5", "`box_probability` must be from 0 to 1, got 1.5"),
        ("train_data: []", "`train_data` must name at least one dataset"),
        ("train_data: [{kind: davi}]", "'davi'"),
        (": [", "is not YAML"),
        ("metric_for_best_model: loss", "`metric_for_best_model` must be one of J, F, J&F, shapes_J"),
        ("model_name_or_path: base.pt", "base.pt: no such file"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(samoe, smoke_config, line, message):
    kept = [kept for kept in smoke_config.read_text().splitlines() if not kept.startswith(line.partition(":")[0] + ":")]
    smoke_config.write_text("\n".join([*kept, line]))
    assert message in samoe("train", smoke_config, fails=True)


def test_a_model_is_trained_at_the_image_size_of_the_run(samoe, smoke_config, tmp_path):
    short = ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    samoe("train", smoke_config, "--image_size", "64", *short)
    model, processor = load_tracker(tmp_path / "out", "cpu")
    assert model.config.image_size == processor.target_size == 64
    printed = samoe("train", smoke_config, *short, "--resume_from_checkpoint", "last", fails=True)
    assert "`config.image_size` is 64, not 128" in printed


def test_a_new_model_has_the_image_size_of_the_run(samoe, smoke_config, tmp_path):
    text = smoke_config.read_text()
    smoke_config.write_text(text.replace(text.splitlines()[1], "model_config: model_nano"))
    samoe("train", smoke_config, "--image_size", "64", "--max_steps", "1")
    assert SamoeModel.from_pretrained(tmp_path / "out").config.image_size == 64
