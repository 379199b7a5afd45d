"""What is written for a label tool is read back: ids, frames, sizes, frames without annotation, and every pixel."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from helpers.formats import SIZE, odd_videos, save
from samoe_hf.data import SyntheticVideos, Video, load_videos, write_video
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.data.formats.convert import compare, write_videos
from samoe_hf.data.frames import ArrayFrames
from samoe_hf.data.images import ImageFrames
from samoe_hf.data.layouts import WRITTEN, recognize
from samoe_hf.data.shapes import draw, joined, polygons_of
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
    for path in [path for path in (tmp_path / "out").rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"of macOS")
        if path.suffix in (".json", ".txt", ".xml", ".yaml"):  # as editors on Windows save them
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
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
def test_masks_stay_with_their_frames_where_names_are_in_another_order(kind, tmp_path):
    videos = named_videos(tmp_path / "frames", ["a"], ("2", "0", "1"))
    (tmp_path / "out").mkdir()
    kept = write_videos(kind, videos, tmp_path / "out")
    assert (kept.pixels, kept.lost) == (videos[0].masks(0).sum() * 3, 0)
    (back,) = load_videos(tmp_path / "out")
    assert back.frames.names == (["2", "0", "1"] if kind in ("coco", "ytvis") else ["0", "1", "2"])
    for name in "012":
        one, two = (own.frames.names.index(name) for own in (videos[0], back))
        assert np.array_equal(videos[0].masks(one), back.masks(two))


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


def test_images_that_tools_show_otherwise_become_png(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    picture = np.random.default_rng(0).integers(0, 255, SIZE, dtype=np.uint8)
    files = {"turned.jpg": picture.T, "plain.jpg": picture, "deep.png": picture * np.uint16(256), "plain.png": picture}
    masks = MaskArrays(np.ones((1, 1, *SIZE), bool), [1])
    videos = []
    for name, pixels in files.items():
        path = save(tmp_path / "frames" / name, pixels, **({"exif": exif} if name == "turned.jpg" else {}))
        videos.append(Video(name, ImageFrames([path]), masks))
    (tmp_path / "out").mkdir()
    write_videos("ytvis", videos, tmp_path / "out")
    written = {path.parent.name: path for path in (tmp_path / "out" / "JPEGImages").rglob("*.*") if path.is_file()}
    assert [written[name].suffix for name in files] == [".png", ".jpg", ".png", ".png"]
    for name, video in zip(files, videos, strict=True):
        with Image.open(written[name]) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), video.frames[0])
        is_copy = written[name].read_bytes() == (tmp_path / "frames" / name).read_bytes()
        assert is_copy == name.startswith("plain")


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_lead_out_of_the_folder_or_are_there_twice_are_refused(kind, tmp_path):
    (tmp_path / "in" / "out").mkdir(parents=True)
    (video,) = named_videos(tmp_path / "frames", ["a"])
    frames = [ImageFrames(video.frames.sources, names=[name, "1", "2"]) for name in ("../0", "2")]
    odd = [replace(video, video_id="../../a"), *(replace(video, frames=own) for own in frames)]
    if kind == "davis":
        del odd[0]  # its names have no slash
    for one in odd:
        with pytest.raises(InputError, match=r"no path within a folder|frames of a: '2' is there twice"):
            write_videos(kind, [one], tmp_path / "in" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames", "in"]


@pytest.mark.parametrize("polygons", [False, True])
def test_tracks_of_cvat_end_without_what_is_added_to_its_meta(polygons, tmp_path):
    (video,) = named_videos(tmp_path / "frames", ["a"])
    masks = np.concatenate([video.masks(t)[None] for t in range(3)])
    masks[1] = False
    write_videos("cvat", [replace(video, annotations=MaskArrays(masks, [1]))], tmp_path, polygons=polygons)
    path = tmp_path / "a" / "annotations.xml"
    path.write_text(re.sub("<labelled_frames>.*</labelled_frames>", "", path.read_text()))
    (back,) = load_videos("cvat", tmp_path)
    assert back.annotated_frames == [0, 1, 2] and back.visible(1) == [] and back.visible(2) == [1]


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
    assert recognize(tmp_path)[0].kind == "ytvis"
    (tmp_path / "a.json").write_bytes(b"")
    assert recognize(tmp_path)[0].kind == "files"


@pytest.mark.parametrize("kind", ["coco", "ytvis", "cvat", "labelme"])
def test_polygons_keep_every_pixel_too(kind, tmp_path):
    kept = write_videos(kind, odd_videos(tmp_path / "frames"), tmp_path, polygons=True)
    assert (kept.differences, kept.lost) == ([], 0)


@pytest.mark.parametrize("kind, options", [("yolo", {}), ("cvat", {"polygons": True})])
def test_a_mask_whose_polygon_would_not_be_read_is_named(kind, options, tmp_path):
    squares = np.indices(SIZE).sum(0) % 2 == 0
    video = Video.from_arrays("v", np.zeros((2, *SIZE, 3), np.uint8), np.stack([squares * 0, squares])[:, None] > 0)
    with pytest.raises(InputError, match=r"^v, frame 1, object 1: .* outline is longer .* many parts; `coco` keeps"):
        write_videos(kind, [video], tmp_path, **options)


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
    assert compare(one[:1], one).differences == ["set/b: was not there"]
    small = MaskArrays(np.ones((6, 1, 8, 8), bool), [1])
    other = Video("turned", ArrayFrames(np.zeros((6, 8, 8, 3), np.uint8)), small)
    assert any("size were (30, 44), are (8, 8)" in text for text in compare(one[:1], [other]).differences)


def test_cvats_video_files_are_opened_when_their_video_is(tmp_path, monkeypatch):
    (video,) = SyntheticVideos(1, 3, (32, 48))
    write_videos("cvat", [video], tmp_path)
    shutil.rmtree(tmp_path / video.video_id / "images")
    write_video(tmp_path / video.video_id / "video.mp4", video.frames, fps=10)
    with monkeypatch.context() as patch:
        patch.setattr("samoe_hf.data.formats.cvat.read_video", None)
        videos = load_videos(tmp_path)
    assert len(videos[0]) == 3 and videos[0].object_ids == video.object_ids
