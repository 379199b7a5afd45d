"""Videos as rows of a `datasets.Dataset`."""

import math
import struct
import tracemalloc

import datasets
import numpy as np
import pytest
from PIL import Image

from helpers.layouts import make_dataset
from samoe_hf.data import (
    FEATURES,
    SampleError,
    SyntheticVideos,
    Video,
    load_videos,
    read_video,
    to_datasets,
    video_from_row,
    videos_from_dataset,
)
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.data.frames import ArrayFrames
from samoe_hf.data.schema import video_to_row


def assert_same(a, b):
    for name in ("video_id", "domain", "object_ids", "annotated_frames", "spacing", "size", "classes"):
        assert getattr(a, name) == getattr(b, name)
    assert a.frames.names == b.frames.names
    assert all(np.array_equal(x, y) for x, y in zip(a.frames, b.frames, strict=True))
    assert all(np.array_equal(a.masks(t), b.masks(t)) for t in a.annotated_frames)


@pytest.fixture
def odd_video():
    """Overlapping objects, an id beyond 255, unannotated frames, spacing: all that a palette image cannot hold."""
    rng = np.random.default_rng(0)
    frames, masks = rng.integers(0, 256, (5, 8, 10, 3), dtype=np.uint8), rng.random((2, 2, 8, 10)) > 0.5
    annotations = MaskArrays(masks, [3, 70000], [0, 4])
    return Video("odd", ArrayFrames(frames), annotations, "ct", (0.5, 0.5, 5.0), {70000: "cat"})


def test_a_dataset_is_lossless_and_lazy_through_disk_and_stream(tmp_path, odd_video):
    videos = [odd_video, *SyntheticVideos(3, 2, (16, 24))]
    dataset = to_datasets(videos, cache_dir=str(tmp_path / "cache"))
    assert dataset.features == FEATURES and len(dataset) == 4
    dataset.save_to_disk(tmp_path / "saved")
    loaded = videos_from_dataset(datasets.load_from_disk(tmp_path / "saved"))
    files = [str(tmp_path / f"{i}.parquet") for i in range(2)]
    for i, file in enumerate(files):
        dataset.shard(2, i).to_parquet(file)
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    streamed = {video.video_id: video for video in videos_from_dataset(stream)}
    for original, video in zip(videos, loaded, strict=True):
        for one in (video, streamed[original.video_id]):
            assert isinstance(one.frames.sources[0], bytes), "frames stay encoded until they are asked for"
            assert_same(one, original)
    assert_same(video_from_row(dataset[0]), odd_video)  # images that `datasets` has decoded
    (older,) = videos_from_dataset(dataset.select([0]).remove_columns("classes"))
    assert older.classes == {} and older.object_ids == odd_video.object_ids


def test_files_keep_their_bytes(tmp_path, gradient):
    Image.fromarray(gradient[3]).save(tmp_path / "7.jpg")
    row = video_to_row(Video("v", read_video(tmp_path), MaskArrays(np.ones((1, 1, 48, 64), bool), [1])))
    assert row["frames"][0]["bytes"] == (tmp_path / "7.jpg").read_bytes() and row["frame_names"] == ["7"]


@pytest.mark.parametrize(
    "change",
    [
        {"size": [10**6, 10**6]}, {"size": None}, {"object_ids": [0]}, {"object_ids": [1, 1]}, {"object_ids": None},
        {"annotated_frames": [0, 5]}, {"annotated_frames": [0, 0]}, {"annotated_frames": [-1, 0]},
        {"annotated_frames": [0]}, {"masks": [[], []]}, {"masks": None}, {"masks": [["x"], ["y"]]}, {"frames": []},
        {"frames": [None, None]}, {"frames": [{"bytes": None, "path": None}] * 2}, {"frame_names": ["a"]},
        {"frame_names": [None, None]}, {"spacing": [0.0, 1.0, 1.0]}, {"spacing": [1.0]}, {"spacing": [math.nan] * 3},
    ],
    ids=str,
)  # fmt: skip
def test_rows_whose_parts_do_not_fit_are_named(change):
    row = video_to_row(Video.from_arrays("odd", np.zeros((2, 4, 4), np.uint8), np.ones((2, 1, 4, 4), bool))) | change
    with pytest.raises(SampleError, match="odd"):
        video = video_from_row(row)
        assert video.frames[0].shape == (4, 4, 3)
        video.masks(0)


def test_damaged_rows_on_disk_are_named(tmp_path):
    options = make_dataset(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    content = path.read_bytes()
    offsets = struct.pack("<3i", 0, 14, 28)  # of the two videos' ids
    assert offsets in content
    path.write_bytes(content.replace(offsets, struct.pack("<3i", 0, -5, 2**30)))
    with pytest.raises(SampleError, match=r"saved.*\.arrow, row 0: damaged"):
        load_videos(**options)[0]


def test_a_map_of_ids_shows_the_higher_id_where_objects_overlap():
    masks = np.array([[[[1, 1, 0]], [[0, 1, 1]]]], bool)
    video = Video.from_arrays("v", np.zeros((1, 1, 3), np.uint8), masks, object_ids=[3, 300])
    assert video.id_map(0).tolist() == [[3, 300, 300]]
    assert not Video.from_arrays("v", np.zeros((1, 1, 3), np.uint8), masks[:, :0]).id_map(0).any()


def test_a_map_of_many_objects_takes_little_more_memory_than_their_masks():
    masks = (np.arange(256 * 256) % 80 == np.arange(80)[:, None]).reshape(1, 80, 256, 256)
    video = Video.from_arrays("v", np.zeros((1, 256, 256), np.uint8), masks, range(1001, 1081))
    tracemalloc.start()
    ids = video.id_map(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * masks.nbytes and (ids.ravel() == np.arange(256 * 256) % 80 + 1001).all()
