"""What a new user does: own videos in a fresh folder, trained on, tracked and evaluated, whatever their layout."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.own_videos import LAYOUTS
from helpers.reference import ROOT
from samoe_hf.cli import main
from samoe_hf.data import load_videos

RUN = r"""
model_config: {config}
expert_modules: memory_attention.layers.1.cross_attn_image.q_proj
num_frames: 2
max_objects: 1
num_correction_clicks: 0
max_steps: 2
per_device_train_batch_size: 1
save_strategy: "no"
report_to: none
use_cpu: true
"""
FAST = ("the_other_way_round",)


def frames_of(root: Path) -> Path:
    """A video of the layout as a video file, or a folder of its frames alone, which some layouts keep beside masks."""
    frames = load_videos(root)[0].frames
    if hasattr(frames, "path"):
        return frames.path
    folder = Path("clip")
    folder.mkdir()
    for path in frames.paths:
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize(
    "layout", [layout if layout in FAST else pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS]
)
def test_own_videos_are_trained_on_tracked_and_evaluated(layout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = LAYOUTS[layout](Path("my_videos"))
    Path("run.yaml").write_text(RUN.format(config=ROOT / "configs" / "model_nano.yaml"))
    main(["data", "check", "my_videos"])
    main(["train", "run.yaml", "--train_data", "my_videos", "--eval_data", "my_videos", "--output_dir", "tuned"])
    main(["track", "tuned", str(frames_of(root)), "--box", "5,5,30,30", "--output", "out.mp4", "--device", "cpu"])
    main(["evaluate", "tuned", "--dataset", "my_videos", "--output", "scores", "--device", "cpu"])
    (scores,) = json.loads(Path("scores/results.json").read_text())["models"]
    assert {row["video"] for row in scores["objects"]} == {video.video_id for video in load_videos(root)}
    assert Path("out.mp4").stat().st_size > 0 and Path("tuned/model.safetensors").is_file()
    assert Path("outputs/data-check/contact_sheet.png").is_file()
    assert "my_videos" in capsys.readouterr().out
