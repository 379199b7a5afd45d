"""`samoe data convert`, and `--layout` of commands that track: what label tools read, with the ids of what was tracked."""

import numpy as np
import pytest

from helpers.formats import odd_videos
from samoe_hf.data import SyntheticVideos, load_videos, write_video
from samoe_hf.data.formats.convert import compare, write_videos


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
    said = samoe("data", "convert", data, "--to", "davis", "--output", tmp_path / "davis")
    assert "set/b is called set_b" in said and ", 0 differ" not in said, "overlaps are lost"
    assert "not an empty folder" in samoe("data", "convert", data, "--to", "yolo", "--output", data, fails=True)
    message = samoe("data", "convert", data, "--to", "yolo", "--polygons", "--output", tmp_path / "new", fails=True)
    assert "has polygons alone" in message and sorted(tmp_path.iterdir()) == [tmp_path / "cvat", tmp_path / "davis"]


@pytest.mark.parametrize(
    "arguments", [["convert"], ["convert", "--to", "coco"], ["check", "--to", "coco"]], ids=" ".join
)
def test_what_convert_needs_is_said(samoe, data, arguments):
    action, *rest = arguments
    assert "`convert` needs" in samoe("data", action, data, *rest, fails=True)


def test_a_tracked_video_is_written_for_a_label_tool(samoe, model_folder, tmp_path):
    write_video(tmp_path / "dog.mp4", SyntheticVideos(1, 3, (96, 128), seed=3)[0].frames, fps=10)
    output = ["--point", "40,30", "--point", "7=100,80", "--output", tmp_path / "out.mp4"]
    samoe("track", model_folder, tmp_path / "dog.mp4", *output, "--layout", "cvat", "--device", "cpu")
    (video,) = load_videos(tmp_path / "out_masks")
    assert (video.video_id, video.annotated_frames, video.object_ids) == ("dog", [0, 1, 2], [1, 7])


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
    assert f"{folder} exists" in samoe(*arguments, fails=True)


def test_masks_to_be_scored_are_images(samoe, data, tmp_path):
    message = samoe(
        "evaluate", "--predictions", data, "--dataset", data, "--layout", "coco", "--output", "x", fails=True
    )
    assert "`--predictions` are images, not coco" in message
