"""What is written for a label tool is read back: ids, frames, sizes, frames without annotation, and every pixel."""

import numpy as np
import pytest

from helpers.formats import odd_videos
from samoe_hf.data import load_videos
from samoe_hf.data.formats.convert import compare, write_videos
from samoe_hf.data.formats.shapes import draw, joined, polygons_of
from samoe_hf.data.layouts import WRITTEN
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
