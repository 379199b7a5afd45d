"""Frames, label images, the schema and its form as a `datasets.Dataset`."""

import argparse
import pickle

import av
import datasets
import numpy as np
import pytest
from PIL import Image

from samoe_hf.data import (
    FEATURES,
    SampleError,
    SyntheticVideos,
    Video,
    read_label_png,
    read_video,
    to_datasets,
    video_from_row,
    videos_from_dataset,
    voc_palette,
    write_palette_png,
    write_video,
)
from samoe_hf.data.annotations import LabelImages, MaskArrays, ObjectImages, RleMasks
from samoe_hf.data.registry import add_dataset_arguments, videos_from_arguments
from samoe_hf.data.video_io import ArrayFrames


@pytest.fixture
def gradient():
    """30 frames (48, 64, 3) of even gray, each brighter than the last, with a lighter upper left corner."""
    frames = np.zeros((30, 48, 64, 3), np.uint8) + np.arange(0, 210, 7, dtype=np.uint8)[:, None, None, None]
    frames[:, :16, :16] += 40
    return frames


# --- frames


def test_a_folder_of_frames_is_read_in_natural_order_and_lazily(tmp_path, gradient):
    for i in (0, 2, 10, 9):
        Image.fromarray(gradient[i]).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    frames = read_video(tmp_path)
    assert len(frames) == 4 and frames.names == ["frame0", "frame2", "frame9", "frame10"] and frames.size == (48, 64)
    assert np.array_equal(frames[-1], gradient[10]) and np.array_equal(list(frames)[2], gradient[9])
    assert len(frames[1:3]) == 2
    with pytest.raises(IndexError):
        frames[4]
    (tmp_path / "frame10.png").unlink()  # nothing was decoded before it was asked for
    with pytest.raises(FileNotFoundError, match=r"frame10\.png"):
        frames[3]


def test_a_container_gives_every_frame_in_any_order(tmp_path, gradient):
    path = tmp_path / "clip.mp4"
    write_video(path, gradient, fps=12.5)
    frames = read_video(path)
    assert len(frames) == 30 and frames.size == (48, 64) and frames.fps == 12.5
    assert frames.names[:2] == ["00000", "00001"]
    for i in (0, 1, 2, 29, 3, 17, 17, 4, 28):
        assert np.abs(frames[i].astype(int) - gradient[i]).mean() < 3, f"frame {i}"
    assert np.array_equal(pickle.loads(pickle.dumps(frames))[17], frames[17])


def test_seeking_by_key_frames_finds_the_same_frames(tmp_path, gradient):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"g": "5", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in gradient:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    in_order = list(read_video(path))
    frames = read_video(path)
    for i in (22, 3, 4, 29, 11, 7, 6):
        assert np.array_equal(frames[i], in_order[i]), f"frame {i}"


def test_a_rotated_recording_is_turned_upright(tmp_path, gradient):
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a rotation")
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(gradient[5], format="rgb24")))
        container.mux(stream.encode())
    frame = read_video(path)[0]
    assert frame.shape == (64, 48, 3) and read_video(path).size == (64, 48)
    assert frame[-16:, :16].mean() > frame.mean() + 20, "a quarter turn to the left brings the upper left corner down"


def test_odd_sizes_are_extended_by_repeating_the_border(tmp_path, gradient):
    write_video(tmp_path / "odd.mp4", (frame[:47, :33] for frame in gradient[:3]))
    frames = read_video(tmp_path / "odd.mp4")
    assert frames.size == (48, 34)
    assert np.abs(frames[1][:47, :33].astype(int) - gradient[1, :47, :33]).mean() < 3


def test_writing_refuses_what_is_no_video(tmp_path, gradient):
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "x.mp4", [])
    with pytest.raises(ValueError, match=r"frame 1 is uint8 \(20, 20, 3\)"):
        write_video(tmp_path / "x.mp4", [gradient[0], gradient[0, :20, :20]])


def test_missing_empty_and_corrupt_videos_are_named(tmp_path, gradient):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_video(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SampleError, match=r"empty: no \.jpg"):
        read_video(tmp_path / "empty")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(SampleError, match=r"noise\.mp4: not a readable video"):
        read_video(tmp_path / "noise.mp4")
    write_video(tmp_path / "whole.mp4", gradient)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    with pytest.raises(SampleError, match=r"cut\.mp4"):
        list(read_video(tmp_path / "cut.mp4"))


def test_corrupt_and_misfitting_frames_are_named(tmp_path, gradient):
    for i in range(4):
        Image.fromarray(gradient[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    Image.fromarray(gradient[2, :40]).save(tmp_path / "2.png")
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(tmp_path / "3.png")
    frames = read_video(tmp_path)
    for i, message in ((1, "not a readable image"), (2, r"size \(40, 64\).*\(48, 64\)"), (3, "8 bits")):
        with pytest.raises(SampleError, match=rf"{i}\.png: .*{message}"):
            frames[i]


# --- label images


def test_palette_images_keep_ids_and_have_the_colours_of_davis(tmp_path):
    ids = np.arange(256).reshape(16, 16)
    write_palette_png(tmp_path / "ids.png", ids)
    assert np.array_equal(read_label_png(tmp_path / "ids.png"), ids)
    with Image.open(tmp_path / "ids.png") as image:
        assert image.mode == "P"
        assert image.convert("RGB").getpixel((1, 0)) == (128, 0, 0)
    assert voc_palette()[[0, 2, 3, 255]].tolist() == [[0, 0, 0], [0, 128, 0], [128, 128, 0], [224, 224, 192]]


def test_ids_beyond_a_palette_are_refused_when_written_and_read_from_16_bits(tmp_path):
    with pytest.raises(ValueError, match=r"ids\.png: ids 0 to 256.*renumber"):
        write_palette_png(tmp_path / "ids.png", np.array([[0, 256]]))
    with pytest.raises(ValueError, match="integers"):
        write_palette_png(tmp_path / "ids.png", np.zeros((2, 2)))
    Image.fromarray(np.array([[0, 700]], np.uint16)).save(tmp_path / "wide.png")
    assert read_label_png(tmp_path / "wide.png").tolist() == [[0, 700]]


def test_binary_labels_stay_as_stored_and_colours_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "binary.png")
    assert read_label_png(tmp_path / "binary.png").tolist() == [[0, 255]]
    Image.new("RGB", (2, 2)).save(tmp_path / "colours.png")
    with pytest.raises(SampleError, match=r"colours\.png: RGB"):
        read_label_png(tmp_path / "colours.png")


# --- annotations and videos


def make_masks(num_frames=3, num_objects=2, size=(8, 10)):
    masks = np.zeros((num_frames, num_objects, *size), bool)
    masks[0, :, 2:5, 2:5] = True
    masks[1, 0, 3:6, 3:6] = True
    return masks


def test_a_video_tells_visible_objects_and_masks_of_chosen_ones():
    masks = make_masks()
    video = Video.from_arrays("v", np.zeros((3, 8, 10), np.uint8), masks, [7, 300])
    assert (len(video), video.size, video.object_ids) == (3, (8, 10), [7, 300])
    assert [video.visible(t) for t in range(3)] == [[7, 300], [7], []]
    assert np.array_equal(video.masks(0), masks[0])
    assert np.array_equal(video.masks(1, [300, 7]), masks[1, ::-1])
    assert video.masks(0, []).shape == (0, 8, 10)


def test_unannotated_frames_are_not_absent_objects():
    annotations = MaskArrays(make_masks(2), [1, 2], frames=[0, 4])
    video = Video("v", ArrayFrames(np.zeros((5, 8, 10), np.uint8)), annotations)
    assert video.annotated_frames == [0, 4] and not video.is_annotated(2)
    with pytest.raises(SampleError, match="v: frame 2 is not annotated"):
        video.masks(2)
    with pytest.raises(SampleError, match="annotations up to frame 4, but 3 frames"):
        Video("v", ArrayFrames(np.zeros((3, 8, 10), np.uint8)), annotations)


def test_masks_of_another_size_than_the_frames_are_refused(tmp_path):
    write_palette_png(tmp_path / "00000.png", np.ones((4, 6), int))
    video = Video("v", ArrayFrames(np.zeros((1, 8, 10), np.uint8)), LabelImages({0: tmp_path / "00000.png"}))
    with pytest.raises(SampleError, match=r"v: masks of size \(4, 6\) for frames of \(8, 10\).*00000\.png"):
        video.masks(0)


def test_objects_with_images_of_their_own_may_overlap_and_be_missing(tmp_path):
    for name, size in (("a", (8, 10)), ("b", (8, 10)), ("small", (4, 5))):
        Image.fromarray(np.full(size, 255, np.uint8)).save(tmp_path / f"{name}.png")
    annotations = ObjectImages({1: {0: tmp_path / "a.png", 4: tmp_path / "a.png"}, 2: {0: tmp_path / "b.png"}})
    assert annotations.frames == [0, 4] and annotations.visible(4) == [1]
    assert annotations.masks(0, [1, 2]).all()
    assert annotations.masks(4, [2, 1]).any(axis=(1, 2)).tolist() == [False, True]
    assert annotations.masks(4, [2]).shape == (1, 8, 10)
    with pytest.raises(SampleError, match=r"object 2 is \(4, 5\)"):
        ObjectImages({1: {0: tmp_path / "a.png"}, 2: {0: tmp_path / "small.png"}}).masks(0, [1, 2])


def test_broken_run_lengths_are_named():
    annotations = RleMasks({0: {1: {"size": [8, 10]}}}, [1], (8, 10), "file.json")
    with pytest.raises(SampleError, match=r"file\.json, frame 0: object 1"):
        annotations.masks(0, [1])


def test_videos_without_frames_are_refused():
    with pytest.raises(SampleError, match="without frames"):
        ArrayFrames(np.zeros((0, 8, 10), np.uint8))
    with pytest.raises(SampleError, match="must be uint8"):
        ArrayFrames(np.zeros((1, 8, 10), np.float32))


# --- datasets


def assert_same(a, b):
    assert (a.video_id, a.domain, a.object_ids, a.annotated_frames) == (
        b.video_id,
        b.domain,
        b.object_ids,
        b.annotated_frames,
    )
    assert a.frames.names == b.frames.names and a.spacing == b.spacing and a.size == b.size
    assert all(np.array_equal(x, y) for x, y in zip(a.frames, b.frames, strict=True))
    assert all(np.array_equal(a.masks(t), b.masks(t)) for t in a.annotated_frames)


@pytest.fixture
def odd_video():
    """Overlapping objects, an id beyond 255, unannotated frames, spacing: all that a palette image cannot hold."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 8, 10, 3), dtype=np.uint8)
    return Video("odd", ArrayFrames(frames), MaskArrays(make_masks(2), [3, 70000], [0, 4]), "ct", (0.5, 0.5, 5.0))


def test_a_dataset_is_lossless_and_lazy_through_disk_and_stream(tmp_path, odd_video):
    videos = [odd_video, *SyntheticVideos(3, 2, (16, 24))]
    dataset = to_datasets(videos, cache_dir=str(tmp_path / "cache"))
    assert dataset.features == FEATURES and len(dataset) == 4
    dataset.save_to_disk(tmp_path / "saved")
    loaded = videos_from_dataset(datasets.load_from_disk(tmp_path / "saved"))
    assert len(loaded) == 4
    for i in range(2):
        dataset.shard(2, i).to_parquet(tmp_path / f"{i}.parquet")
    files = [str(tmp_path / f"{i}.parquet") for i in range(2)]
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    streamed = {video.video_id: video for video in videos_from_dataset(stream)}
    on_the_fly = videos_from_dataset(to_datasets(videos, streaming=True))
    for original, a, b in zip(videos, loaded, on_the_fly, strict=True):
        for video in (a, b, streamed[original.video_id]):
            assert isinstance(video.frames.images[0]["bytes"], bytes), "frames stay encoded until they are asked for"
            assert_same(video, original)
    assert_same(video_from_row(dataset[0]), odd_video)  # images that `datasets` has decoded


def test_files_keep_their_bytes(tmp_path, gradient):
    Image.fromarray(gradient[3]).save(tmp_path / "7.jpg")
    video = Video("v", read_video(tmp_path), MaskArrays(np.ones((1, 1, 48, 64), bool), [1]))
    row = next(iter(to_datasets([video], streaming=True).cast_column("frames", FEATURES["frames"])))
    stored = videos_from_dataset(to_datasets([video], streaming=True))
    assert next(iter(stored)).frames.images[0]["bytes"] == (tmp_path / "7.jpg").read_bytes()
    assert row["frame_names"] == ["7"]


def test_a_damaged_frame_of_a_dataset_is_named(odd_video):
    row = next(iter(to_datasets([odd_video], streaming=True).cast_column("frames", FEATURES["frames"])))
    row["frames"] = list(row["frames"])
    row["frames"][3] = {"bytes": b"no image", "path": None}
    with pytest.raises(SampleError, match="odd, frame 00003: not a readable image"):
        video_from_row(row).frames[3]


def test_a_dataset_with_other_columns_is_refused():
    with pytest.raises(ValueError, match="lacks the columns"):
        videos_from_dataset(datasets.Dataset.from_dict({"video_id": ["a"]}))


def dataset_arguments(*given):
    parser = argparse.ArgumentParser()
    add_dataset_arguments(parser)
    return parser.parse_args(given)


def test_the_command_line_names_videos_by_kind_or_by_a_run(tmp_path):
    options = ["--option", "num_videos=3", "--option", "image_size=[32, 48]", "--option", "num_frames=4"]
    videos = videos_from_arguments(dataset_arguments("--dataset", "synthetic", "--domain", "blobs", *options))
    assert len(videos) == 3 and videos[0].domain == "blobs" and videos[0].size == (32, 48)
    chosen = videos[1].video_id
    (one,) = videos_from_arguments(
        dataset_arguments("--dataset", "synthetic", "--domain", "blobs", *options, "--video", chosen)
    )
    assert one.video_id == chosen

    run = tmp_path / "run.yaml"
    run.write_text("eval_data:\n  - {kind: synthetic, domain: blobs, num_videos: 2, num_frames: 4}\n")
    assert len(videos_from_arguments(dataset_arguments("--dataset", str(run)))) == 2
    with pytest.raises(ValueError, match="--split"):
        videos_from_arguments(dataset_arguments("--dataset", str(run), "--split", "val"))
    with pytest.raises(ValueError, match="nobody"):
        videos_from_arguments(dataset_arguments("--dataset", str(run), "--video", "nobody"))
    with pytest.raises(ValueError, match="NAME=VALUE"):
        videos_from_arguments(dataset_arguments("--dataset", "synthetic", "--option", "num_videos"))
    run.write_text("train_data: []\n")
    with pytest.raises(ValueError, match="no videos"):
        videos_from_arguments(dataset_arguments("--dataset", str(run)))
