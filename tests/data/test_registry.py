"""Datasets by the name of their kind, and from a run's YAML."""

import math
from pathlib import Path

import numpy as np
import pytest

from helpers import layouts
from helpers.layouts import SIZE
from helpers.own_videos import save_videos
from samoe_hf.data import SampleError, SyntheticVideos, load_videos, to_datasets
from samoe_hf.data.registry import read_yaml, videos_from_entry


def test_unknown_names_are_refused_with_the_nearest_known_one(tmp_path):
    with pytest.raises(ValueError, match=r"unknown kind .* 'youtubevos', and no folder; did you mean 'youtube_vos'"):
        load_videos("youtubevos", tmp_path)
    with pytest.raises(ValueError, match="no option 'ignore_id'; did you mean 'ignore_ids'"):
        load_videos("ocid", tmp_path, ignore_id=[1])
    with pytest.raises(ValueError, match="kind 'davis' need the option 'root'"):
        load_videos("davis")
    for arguments in ({"kind": "ocid"}, {}):
        with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
            load_videos(root=tmp_path / "nowhere", **arguments)
    with pytest.raises(ValueError, match="name a folder, or a kind of dataset"):
        load_videos()


def test_synthetic_videos_and_saved_datasets_are_kinds_too(tmp_path):
    videos = load_videos("synthetic", num_videos=2, num_frames=3, image_size=SIZE, domain="blobs")
    assert isinstance(videos, SyntheticVideos) and videos[1].domain == "blobs"
    to_datasets(videos, cache_dir=str(tmp_path / "cache")).save_to_disk(tmp_path / "saved")
    saved = load_videos("dataset", tmp_path / "saved")
    assert np.array_equal(saved[1].frames[2], videos[1].frames[2]) and saved[1].domain == "blobs"
    streamed = list(load_videos("dataset", tmp_path / "saved", streaming=True))
    assert [video.video_id for video in streamed] == [video.video_id for video in videos]
    with pytest.raises(ValueError, match="video_ids cannot choose"):
        load_videos("dataset", tmp_path / "saved", video_ids=["x"])


def test_patterns_are_of_videos_of_ones_own_whatever_else_a_folder_holds(tmp_path):
    save_videos(tmp_path / "mine", SyntheticVideos(1, 2, SIZE))
    (tmp_path / "data.yaml").write_text("of a label tool")
    places = {"frames": "mine/{video}/frames/*.png", "masks": "mine/{video}/masks/*.png"}
    assert len(load_videos(tmp_path, **places)[0].annotated_frames) == 2
    assert len(videos_from_entry({"root": tmp_path, **places}, "train_data[0]")) == 1


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"knd": "davis"}, r"train_data\[0\] names no `kind` or `root`.*'knd'"),
        ("davis", r"train_data\[0\] must be a folder or .*not 'davis'; did you mean \{kind: davis\}"),
        (["davis"], r"train_data\[0\] must be a folder or the arguments"),
        ({"kind": ["davis"]}, "unknown kind"),
        ({"kind": "synthetic", "num_videos": "2", "num_frames": 2}, "`num_videos` must be an integer, not '2'"),
        ({"kind": "synthetic", "num_videos": True, "num_frames": 2}, "num_videos"),
        ({"kind": "synthetic", "num_videos": 2, "num_frames": math.nan}, "num_frames"),
        ({"kind": "synthetic", "num_videos": 2, "num_frames": 2, "image_size": [64, 0]}, "image_size"),
        ({"kind": "frames", "root": ".", "binary": "no"}, "`binary` must be bool or None, not 'no'"),
        ({"kind": "davis", "root": ".", "year": "2016"}, "`year` must be 2016 or 2017 or None, not '2016'"),
        ({"kind": "davis", "root": 5}, "root"),
        ({"kind": "ocid", "root": ".", "ignore_ids": "12"}, "`ignore_ids` must be a list of an integer"),
        ({"kind": "sa_v", "root": ".", "annotations": "../x"}, "`annotations` must be 'manual' or 'auto'"),
        ({"kind": "davis", "root": ".", "video_ids": "cat"}, "video_ids"),
    ],
)
def test_wrong_datasets_of_a_run_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        videos_from_entry(entry, "train_data[0]")


def test_what_is_no_yaml_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    for content in (
        b"\xff\xfe\xfa", "ä: ü".encode("latin-1"), b"[" * 5000, b"a: 2001-99-99", b"{[1]: 2}", b"a: " + b"9" * 5000,
        b"!!python/object/apply:os.system ['touch executed']", b"- 1", b"", b"a: *b", b"\0",
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.yaml"):
            read_yaml(path)
    assert not Path("executed").exists()


def test_a_window_is_refused_where_frames_are_no_images(tmp_path):
    made = layouts.make_sa_v(tmp_path)
    with pytest.raises(SampleError, match="`window` goes with image files, which its frames are not"):
        load_videos(**made, window=(0, 9))[0]
