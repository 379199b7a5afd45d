"""`samoe data convert`, and `--layout` of commands that track: what label tools read, with the ids of objects."""

import json
import shutil

import numpy as np
import pytest

from helpers.formats import odd_videos
from helpers.reference import ROOT
from samoe_hf.cli import main
from samoe_hf.data import SyntheticVideos, load_videos, write_video
from samoe_hf.data.formats.convert import compare, write_videos
from samoe_hf.data.layouts import WRITTEN

TRAINING = ["--eval_strategy", "no", "--model_config", str(ROOT / "configs" / "model_nano.yaml"), "--num_frames", "3"]
TRAINING += ["--max_objects", "2", "--max_steps", "2", "--logging_steps", "1", "--use_cpu", "--report_to", "none"]
TRAINING += ["--per_device_train_batch_size", "1", "--save_strategy", "steps", "--save_steps", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two videos of different ids and sizes, as LabelMe has them."""
    root = tmp_path_factory.mktemp("data")
    videos = odd_videos(root / "frames")
    (root / "labelme").mkdir()
    write_videos("labelme", videos, root / "labelme")
    return root / "labelme"


def test_a_dataset_is_converted_and_what_differs_is_printed(samoe, data, tmp_path):
    said = samoe("data", "convert", data, "--to", "cvat", "--polygons", "--output", tmp_path / "cvat")
    assert "2 videos, 9 frames, 4 objects" in said and ", 0 differ" in said and "Not kept" not in said
    assert not compare(load_videos(data), load_videos(tmp_path / "cvat")).differences
    said = samoe("data", "convert", data, "--to", "labelme", "--output", tmp_path / "labelme")
    assert ".labelme." not in said, "a temporary folder"
    shutil.rmtree(tmp_path / "labelme")
    said = samoe("data", "convert", data, "--to", "davis", "--output", tmp_path / "davis")
    assert "set/b is called set_b" in said and ", 0 differ" not in said, "overlaps are lost"
    taken = tmp_path / "davis"
    assert "not an empty folder" in samoe("data", "convert", data, "--to", "yolo", "--output", taken, fails=True)
    within = data / "new"
    assert "lies in the folder" in samoe("data", "convert", data, "--to", "yolo", "--output", within, fails=True)
    message = samoe("data", "convert", data, "--to", "yolo", "--polygons", "--output", tmp_path / "new", fails=True)
    assert "has polygons alone" in message and sorted(tmp_path.iterdir()) == [tmp_path / "cvat", tmp_path / "davis"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("data convert DATA", "`convert` needs `--to`"), ("data check DATA --to coco", "go with `convert`"),
        ("data convert DATA --to coco", "`convert` needs `--output`"), ("data convert DATA --to x", "labelstudio"),
        ("evaluate --predictions x --dataset DATA --layout coco --output y", "`--predictions` are images, not coco"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(data, capfd, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments.replace("DATA", str(data)).split())
    assert message in capfd.readouterr().err


def test_a_tracked_video_is_written_for_a_label_tool(samoe, model_folder, tmp_path):
    write_video(tmp_path / "dog.mp4", SyntheticVideos(1, 3, (96, 128), seed=3)[0].frames, fps=10)
    output = ["--point", "40,30", "--point", "7=100,80", "--output", tmp_path / "out.mp4"]
    samoe("track", model_folder, tmp_path / "dog.mp4", *output, "--layout", "cvat", "--device", "cpu")
    (video,) = load_videos(tmp_path / "out_masks")
    assert (video.video_id, video.annotated_frames, video.object_ids) == ("dog", [0, 1, 2], [1, 7])
    again = ["track", model_folder, tmp_path / "dog.mp4", *output[2:], "--device", "cpu", "--overwrite"]
    samoe(*again, "--layout", "cvat")
    assert load_videos(tmp_path / "out_masks")[0].object_ids == [7]
    for layout in (["--layout", "coco"], []):  # what is there is of another form
        form = "format coco" if layout else "masks alone"
        assert f"or with `--overwrite` one of {'the ' if layout else ''}{form}" in samoe(*again, *layout, fails=True)
    assert load_videos(tmp_path / "out_masks")[0].object_ids == [7]


def test_labels_for_a_tool_stay_when_a_run_is_called_again(samoe, model_folder, tmp_path):
    write_videos("labelme", SyntheticVideos(1, 2, (64, 64)), tmp_path)
    labels = tmp_path.with_name("labels")
    arguments = ["label", model_folder, "--dataset", tmp_path, "--output", labels, "--layout", "cvat"]
    folder = labels / "cvat"
    assert "Written and read back" in samoe(*arguments, "--device", "cpu")
    (file,) = folder.rglob("*.xml")
    file.write_text(file.read_text().replace("object", "mine"))
    said = samoe(*arguments, "--device", "cpu")
    assert f"{folder} is there already, and stays as it is" in said and "mine" in file.read_text()
    assert "Written and read back" in samoe(*arguments, "--device", "cpu", "--overwrite")
    assert "mine" not in file.read_text()
    shutil.rmtree(folder)
    write_videos("coco", SyntheticVideos(1, 2, (64, 64)), folder)
    assert f"{folder} holds something else" in samoe(*arguments, "--device", "cpu", "--overwrite", fails=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITTEN)
def test_two_steps_are_trained_on_each_format(samoe, data, tmp_path, kind):
    samoe("data", "convert", data, "--to", kind, "--output", tmp_path / kind)
    samoe("train", "smoke", "--train_data", tmp_path / kind, *TRAINING, "--output_dir", tmp_path / "out")
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and all(np.isfinite(one["loss"]) for one in state["log_history"] if "loss" in one)


@pytest.mark.slow
@pytest.mark.parametrize("command, kind, place", [("label", "coco", ""), ("evaluate", "ytvis", "runs/*")])
def test_a_tracked_dataset_is_written_for_a_label_tool(samoe, model_folder, data, tmp_path, command, kind, place):
    arguments = [command, model_folder, "--dataset", data, "--output", tmp_path, "--layout", kind, "--device", "cpu"]
    assert ", 0 differ" in samoe(*arguments)
    (folder,) = tmp_path.glob(f"{place}/{kind}".lstrip("/"))
    videos = {video.video_id: video for video in load_videos(folder)}
    assert {name: video.object_ids for name, video in videos.items()} == {"turned": [1, 7, 300], "set/b": [2]}
    assert all(len(video.annotated_frames) == len(video) for video in videos.values())
    assert videos["turned"].classes == {1: "cat", 7: "dog", 300: "cat"} and np.any(videos["set/b"].masks(0))
    assert f"{folder} is there already" in samoe(*arguments)
