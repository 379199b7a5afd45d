"""Fixtures of the tests of training."""

import pytest


@pytest.fixture
def run_config(model_folder, tmp_path):
    """A run of six steps over two domains, with a checkpoint after each two."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
model_name_or_path: {model_folder}
train_data:
  - {{kind: synthetic, num_videos: 6, num_frames: 3, image_size: [64, 64]}}
  - {{kind: synthetic, domain: blobs, num_videos: 6, num_frames: 3, image_size: [64, 64], weight: 3}}
eval_data:
  - {{kind: synthetic, num_videos: 1, num_frames: 3, image_size: [64, 64], seed: 5}}
  - {{kind: synthetic, domain: blobs, num_videos: 1, num_frames: 3, image_size: [64, 64], seed: 5}}
num_frames: 3
num_correction_clicks: 1
max_steps: 6
per_device_train_batch_size: 1
learning_rate: 1.0e-3
logging_steps: 1
save_steps: 2
report_to: none
disable_tqdm: true
output_dir: {tmp_path / "out"}
"""
    )
    return path
