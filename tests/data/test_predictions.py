"""Predicted masks lie where the servers of benchmarks look for them, and are read as they were written."""

from pathlib import PureWindowsPath

import numpy as np
import pytest
from PIL import Image

from samoe_hf.data import SampleError, Video, load_videos, voc_palette
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.data.formats.davis import write_davis
from samoe_hf.data.frames import ArrayFrames, check_inside
from samoe_hf.data.layouts import layout_of
from samoe_hf.data.predictions import MaskFiles


def make_video(object_ids, masks=None, **options):
    masks = np.zeros((1, len(object_ids), 6, 8), dtype=bool) if masks is None else masks
    return Video.from_arrays("dog", np.zeros((len(masks), *masks.shape[2:], 3), np.uint8), masks, object_ids, **options)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("davis", ["dog/00000.png"]),
        ("mose", ["Annotations/dog/00000.png"]),
        ("youtube_vos", ["Annotations/dog/00000.png"]),
        ("sa_v_val", ["dog/001/00000.png", "dog/004/00000.png"]),
        ("npz", ["dog/00000.png"]),
    ],
)
def test_layouts_are_those_of_the_servers(kind, expected, tmp_path):
    video = make_video([2, 5])
    MaskFiles(tmp_path, layout_of(kind).masks).write(video, 0, video.masks(0))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")) == expected


def test_maps_of_ids_are_palette_images_in_davis_colours(tmp_path):
    masks = np.zeros((1, 2, 6, 8), dtype=bool)
    masks[0, 0, :2], masks[0, 1, 3:, 5:] = True, True
    video, files = make_video([2, 255], masks), MaskFiles(tmp_path)
    files.write(video, 0, masks[0])
    image = Image.open(tmp_path / "dog" / "00000.png")
    assert image.mode == "P" and image.getpalette() == voc_palette().flatten().tolist()
    np.testing.assert_array_equal(np.asarray(image), 2 * masks[0, 0] + 255 * masks[0, 1])
    np.testing.assert_array_equal(files.read(video, 0), masks[0])
    np.testing.assert_array_equal(files.read(video, 0, [255]), masks[0, 1:])


def test_larger_ids_are_kept_in_16_bits_and_overlaps_in_folders_of_objects(tmp_path):
    masks = np.zeros((1, 2, 6, 8), dtype=bool)
    masks[0, 0, :2], masks[0, 1, 3:] = True, True
    video, files = make_video([1, 257], masks), MaskFiles(tmp_path)
    files.write(video, 0, masks[0])
    np.testing.assert_array_equal(files.read(video, 0), masks[0])
    far = make_video([1, 70000], masks)
    with pytest.raises(ValueError, match="dog: object 70000; the layout 'davis' holds ids up to 65535"):
        MaskFiles(tmp_path / "far").write(far, 0, masks[0])
    assert not (tmp_path / "far").exists()
    files, masks[:] = MaskFiles(tmp_path / "objects", "sa_v"), True
    files.write(far, 0, masks[0])
    np.testing.assert_array_equal(files.read(far, 0), masks[0])


@pytest.mark.parametrize("object_ids", [[255], [2, 255], [255, 300], [65535]])
def test_white_is_an_id_where_it_was_written_as_one(tmp_path, object_ids):
    masks = np.zeros((2, len(object_ids), 6, 8), dtype=bool)
    for row in range(len(object_ids)):
        masks[:, row, 3 * row : 3 * row + 2] = True
    masks[1, 1:] = False
    video = make_video(object_ids, masks)
    write_davis([video], tmp_path)
    (read,) = load_videos("davis", tmp_path)
    assert read.object_ids == object_ids and [read.visible(t) for t in (0, 1)] == [object_ids, object_ids[:1]]


def test_255_is_object_1_where_there_is_no_other(tmp_path):
    mask = np.zeros((6, 8), dtype=np.uint8)
    mask[2:4] = 255
    (tmp_path / "dog").mkdir()
    Image.fromarray(mask).save(tmp_path / "dog" / "00000.png")
    assert MaskFiles(tmp_path).read(make_video([1]), 0).sum() == 16
    assert not MaskFiles(tmp_path).read(make_video([1, 2]), 0).any()
    mask[0] = 7
    Image.fromarray(mask).save(tmp_path / "dog" / "00000.png")
    assert not MaskFiles(tmp_path).read(make_video([1]), 0).any()


@pytest.mark.parametrize("video_id, frame", [("../up", "0"), ("/tmp/up", "0"), ("v", "../../0"), ("v", "a\0b")])
def test_predictions_stay_in_their_folder(tmp_path, video_id, frame):
    frames = ArrayFrames(np.zeros((1, 4, 4), np.uint8))
    frames.names = [frame]
    video = Video(video_id, frames, MaskArrays(np.ones((1, 1, 4, 4), bool), [1]))
    with pytest.raises(SampleError, match="no path within a folder"):
        MaskFiles(tmp_path / "masks").write(video, 0, video.masks(0))
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("name", ["/up", "\\up", "C:up", "C:\\up", "a/..\\..\\up", "a/12:30", "a./b", "b "])
def test_names_stay_in_their_folder_on_windows_and_are_those_of_files(monkeypatch, name):
    monkeypatch.setattr("samoe_hf.data.frames.Path", PureWindowsPath)
    check_inside("./a b/c.d", "here")
    with pytest.raises(SampleError, match="no path within a folder"):
        check_inside(name, "here")


@pytest.mark.parametrize("layout", ["davis", "youtube_vos", "sa_v"])
def test_predictions_take_the_place_of_a_videos_masks(layout, tmp_path):
    masks = np.zeros((2, 2, 4, 6), bool)
    masks[:, 0, :2], masks[1, 1, 3:] = True, True
    video = Video.from_arrays("a", np.zeros((2, 4, 6, 3), np.uint8), masks, [3, 300])
    files = MaskFiles(tmp_path, layout)
    for t in range(2):
        files.write(video, t, video.masks(t))
    back = files.annotations(video)
    assert (back.object_ids, back.frames) == ([3, 300], [0, 1])
    assert all(np.array_equal(back.masks(t, [3, 300]), masks[t]) for t in range(2))


def test_where_none_is_there_the_layout_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"1 of 1 .* in the layout youtube_vos \(`--layout` names another"):
        MaskFiles(tmp_path, "youtube_vos").check(make_video([2]), [0])


def test_of_a_folder_that_is_given_too_deep_the_right_one_is_named(tmp_path):
    video = make_video([2])
    MaskFiles(tmp_path, "youtube_vos").write(video, 0, video.masks(0))
    with pytest.raises(FileNotFoundError, match=rf"1 of 1 predictions are missing.*; did you mean {tmp_path}\?"):
        MaskFiles(tmp_path / "Annotations", "youtube_vos").check(video, [0])
