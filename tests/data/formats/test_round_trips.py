"""What is written for a label tool is read back: ids, frames, sizes, frames without annotation, and every pixel."""

from dataclasses import replace

import numpy as np
import pytest

from helpers.formats import SIZE, odd_videos, save
from samoe_hf.data import Video, load_videos
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.data.formats.convert import compare, write_videos
from samoe_hf.data.formats.shapes import draw, joined, polygons_of
from samoe_hf.data.images import ImageFrames
from samoe_hf.data.layouts import WRITTEN, recognize
from samoe_hf.errors import InputError

KINDS = ["coco", "ytvis", "yolo", "cvat", "labelme", "labelstudio", "davis"]


def test_each_format_is_tested():
    assert sorted(KINDS) == sorted(WRITTEN)


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_kept(kind, tmp_path):
    videos = odd_videos(tmp_path / "frames", overlapping=kind != "davis")
    (tmp_path / "out").mkdir()
    kept = write_videos(kind, videos, tmp_path / "out")
    assert kept.differences == (["set/b is called set_b"] if kind == "davis" else [])
    assert kept.pixels > 900 and kept.lost == 0
    back = {video.video_id: video for video in load_videos(tmp_path / "out")}
    for video in videos if kind != "davis" else ():
        assert np.array_equal(back[video.video_id].frames[0], video.frames[0])
        assert {i: back[video.video_id].classes[i] for i in video.object_ids} == video.classes


def named_videos(folder, names, frames=("0.25", "0.5", "10.0")):
    """A video of each name, whose object moves, with images of the names `frames`."""
    masks = np.zeros((len(frames), 1, *SIZE), bool)
    for t, mask in enumerate(masks):
        mask[0, t : t + 4] = True
    videos = []
    for number, name in enumerate(names):
        paths = [folder / str(number) / f"{frame}.png" for frame in frames]
        images = [save(path, np.full((*SIZE, 3), 9 * t, np.uint8)) for t, path in enumerate(paths)]
        videos.append(Video(name, ImageFrames(images), MaskArrays(masks, [1])))
    return videos


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_any_signs_and_decimals_of_frames_are_kept(kind, tmp_path):
    videos = named_videos(tmp_path / "frames", ["images", "a&b 50%", "x#1+y?", "Käse %41", "set_1"])
    (tmp_path / "out").mkdir()
    kept = write_videos(kind, videos, tmp_path / "out")
    assert (kept.videos, kept.differences, kept.lost) == (5, [], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_videos_without_any_object_are_written_or_refused(kind, tmp_path):
    (video,) = named_videos(tmp_path / "frames", ["a"])
    empty = replace(video, annotations=MaskArrays(np.zeros((3, 0, *SIZE), bool), []))
    (tmp_path / "out").mkdir()
    if kind == "ytvis":
        with pytest.raises(InputError, match="ytvis cannot be written without any object"):
            write_videos(kind, [empty], tmp_path / "out")
    else:
        assert write_videos(kind, [empty], tmp_path / "out").differences == []


def test_names_that_become_one_are_named(tmp_path):
    with pytest.raises(InputError, match="names of videos, as davis has them: 'a_b' is there twice"):
        write_videos("davis", named_videos(tmp_path, ["a/b", "a_b"]), tmp_path / "out")


def test_masks_of_frames_that_are_no_longer_annotated_count_as_lost(tmp_path):
    (video,) = named_videos(tmp_path, ["a"])
    masks = np.stack([video.masks(t) for t in (0, 1)])
    kept = compare([video], [replace(video, annotations=MaskArrays(masks, [1], [0, 1]))])
    assert kept.lost == video.masks(2).sum() and "annotated frames" in kept.differences[0]


def test_a_file_is_recognized_by_words_in_its_middle(tmp_path):
    long = "x" * (1 << 21)
    (tmp_path / "a.json").write_text(f'{{"videos": "{long}", "file_names": 1, "segmentations": "{long}"}}')
    (tmp_path / "empty.json").touch()
    assert recognize(tmp_path)[0].kind == "ytvis"


@pytest.mark.parametrize("kind", ["coco", "ytvis", "cvat", "labelme"])
def test_polygons_keep_every_pixel_too(kind, tmp_path):
    kept = write_videos(kind, odd_videos(tmp_path / "frames"), tmp_path, polygons=True)
    assert (kept.differences, kept.lost) == ([], 0)


@pytest.mark.parametrize("kind", ["labelstudio", "davis", "yolo"])
def test_formats_of_one_form_refuse_polygons(kind, tmp_path):
    with pytest.raises(InputError, match=f"polygons.*{kind}"):
        write_videos(kind, odd_videos(tmp_path / "frames"), tmp_path, polygons=True)


def test_overlaps_that_davis_does_not_hold_are_counted(tmp_path):
    (tmp_path / "out").mkdir()
    assert write_videos("davis", odd_videos(tmp_path / "frames"), tmp_path / "out").lost > 0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_outlines_of_random_pixels_draw_them_again(share):
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((17, 23)) < share
        polygons = polygons_of(mask)
        again = np.zeros_like(mask)
        for polygon in polygons:
            again |= draw(polygon, mask.shape)
        assert np.array_equal(again, mask)
        assert np.array_equal(draw(joined(polygons), mask.shape), mask)


def test_what_differs_is_named(tmp_path):
    one, two = odd_videos(tmp_path / "frames"), odd_videos(tmp_path / "others", overlapping=False)
    kept = compare(one, two[:-1])
    assert kept.lost > 0 and any("not there" in text for text in kept.differences)
