"""Videos of one's own: every layout is recognized, and what is none is answered with the remedy."""

import json
import unicodedata
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import yaml

from helpers import layouts
from helpers.own_videos import (
    LAYOUTS,
    NUM_FRAMES,
    SIZE,
    save,
    save_ids,
    save_videos,
    truth,
    write,
    write_objects,
    write_videos,
)
from samoe_hf.data import SampleError, load_videos, write_palette_png, write_video
from samoe_hf.data.formats import convert
from samoe_hf.data.layouts import WRITTEN


def check_videos(videos) -> None:
    """The videos are those of `truth`, in order, with its masks, and frames that are at most compressed."""
    expected = list(truth().values())
    assert len(videos) == len(expected)
    for video, true in zip(videos, expected, strict=True):
        assert len(video) == NUM_FRAMES and video.annotated_frames == list(range(NUM_FRAMES))
        assert video.object_ids == true.object_ids
        for t in range(NUM_FRAMES):
            difference = np.abs(video.frames[t].astype(int) - true.frames[t])
            others = [np.abs(video.frames[t].astype(int) - true.frames[s]).mean() for s in range(NUM_FRAMES) if s != t]
            assert difference.mean() < min(others), "another frame"
            assert np.array_equal(video.id_map(t), true.id_map(t))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_videos_are_read_without_naming_a_kind(layout, tmp_path, caplog):
    """What the log says of their layout can be given as it is."""
    root = LAYOUTS[layout](tmp_path / "my_videos")
    for path in list(root.rglob("*.mp4"))[:1]:  # suffixes may differ
        path.rename(path.with_suffix(".mov"))
    videos = load_videos(str(root))
    check_videos(videos)
    assert videos[0].domain == "my_videos" and "my_videos: 2 videos, frames in" in caplog.text
    if layout in ("csv", "json", "jsonl"):
        assert load_videos(next(root.glob("pairs.*"))).video_ids == list(truth())
    else:
        frames, masks = caplog.messages[-1].partition("frames in ")[2].split(", masks in ")
        named = load_videos("files", root, frames=frames, masks=masks)
        assert [len(video.annotated_frames) for video in named] == [NUM_FRAMES] * 2
        assert named[1].object_ids == videos[1].object_ids


@pytest.mark.parametrize(
    "layout", ["frames_and_masks", "unknown_names", "one_folder_by_suffix", "videos_beside_their_masks"]
)
def test_a_damaged_video_hides_no_layout(layout, tmp_path):
    root = LAYOUTS[layout](tmp_path / "my_videos")
    paths = [*(root / "cat").rglob("*0.*")]
    for path in paths:
        path.write_bytes(b"damaged")
    assert load_videos(root).video_ids == list(truth())
    for path in paths:
        path.unlink()
        path.symlink_to("nowhere")
    assert load_videos(root).video_ids == list(truth())


@pytest.mark.parametrize(
    "frames, masks, ids",
    [
        ("frames/{t:05d}.jpg", "masks/{t:05d}.png", ["my_videos"]),
        ("data/images/{v}/{t}.jpg", "data/labels/{v}/{t}.png", ["data/cat"]),
        ("camera/{v}/{t}.jpg", "masks/{v}/{t}.png", ["cat"]),
        ("frames_{v}/{t}.jpg", "masks_{v}/{t}.png", ["cat"]),
        ("{v}/rgb_left/{t}.jpg", "{v}/binary_masks/{t}.png", ["cat"]),
        ("{v}/{t}.jpg", "{v}_masks/{t}.png", ["cat"]),
    ],
)
def test_folders_tell_the_video_beside_their_role(frames, masks, ids, tmp_path):
    videos = load_videos(write(tmp_path / "my_videos", frames, masks, only=1))
    assert videos.video_ids == ids and videos[0].annotated_frames == list(range(NUM_FRAMES))


def test_masks_in_two_folders_are_not_frames_and_masks(tmp_path):
    """Cell Tracking Challenge."""
    for folder in ("SEG", "TRA"):
        write(tmp_path, "{v}/t{t}.png", "{v}_GT/" + folder + "/man{t}.png")
    videos = load_videos(tmp_path)
    assert videos.video_ids == list(truth()) and videos[0].frames.names[0] == "t0"
    with pytest.raises(SampleError, match=r"cat_GT/\w+/man0\.png: read as the mask of one object.*give a pattern of"):
        videos[0].masks(0)
    check_videos(load_videos(tmp_path, frames="{video}/*", masks="{video}_GT/TRA/*"))


@pytest.mark.parametrize(
    "where",
    ["{s}/{v}/frames/{t}.jpg", "frames/{s}/{v}/{t}.jpg", "{s}/frames/{v}/{t}.jpg", "data/{s}/{v}/frames/{t}.jpg"],
)
def test_splits_are_recognized(where, tmp_path, caplog):
    """Also in a folder that holds all, and beside a folder that is none."""
    for split in ("train", "val", "others"):
        frame = where.replace("{s}", split)
        write(tmp_path, frame, frame.replace("frames", "masks").replace(".jpg", ".png"), only=1 + (split == "val"))
    assert len(load_videos(tmp_path)) == 1
    assert "the split train is taken; others are ['others', 'val']" in caplog.text
    videos = load_videos(tmp_path, split="val")
    assert [name.removeprefix("data/") for name in videos.video_ids] == list(truth()) and videos[
        1
    ].annotated_frames == list(range(NUM_FRAMES))
    with pytest.raises(ValueError, match=r"no split 'dev'; there are: train, val"):
        load_videos(tmp_path, split="dev")


@pytest.mark.parametrize("kind", ["davis", "sa_v", "sa_v_val", "ocid", "npz", "nifti", "dataset"])
def test_layouts_of_public_datasets_are_recognized(kind, tmp_path, caplog):
    named = load_videos(**getattr(layouts, f"make_{kind}")(tmp_path / "data"))
    videos = load_videos(tmp_path / "data")
    assert f"read as {kind}" in caplog.text
    assert [video.video_id for video in videos] == [video.video_id for video in named]
    assert videos[0].domain == named[0].domain and videos[0].object_ids == named[0].object_ids
    frame = named[0].annotated_frames[0]
    assert np.array_equal(videos[0].masks(frame), named[0].masks(frame))


@pytest.mark.parametrize("folder", ["train", "."])
def test_coco_exports_are_recognized(folder, tmp_path):
    made = layouts.make_coco(tmp_path / "data")
    (tmp_path / "export" / folder).mkdir(parents=True)
    (tmp_path / "data" / "images" / "one.png").rename(tmp_path / "export" / folder / "one.png")
    (tmp_path / "data" / made["annotations"]).rename(tmp_path / "export" / folder / "_annotations.coco.json")
    (video,) = load_videos(tmp_path / "export")
    assert video.domain == "coco" and video.object_ids == [1, 2]


@pytest.mark.parametrize("name, kind", [("YouTubeVOS", "youtube_vos"), ("MOSE", "mose"), ("LVOS_V2", "lvos")])
def test_vos_datasets_are_recognized_by_name_with_their_splits(name, kind, tmp_path, caplog):
    for split in ("train", "valid"):
        write(tmp_path / name / split, "JPEGImages/{v}/{t:05d}.jpg", "Annotations/{v}/{t:05d}.png", only=1)
    videos = load_videos(tmp_path / name)
    assert videos[0].domain == kind and "read as " + kind in caplog.text
    assert "train" in str(videos[0].frames.paths[0])
    assert "valid" in str(load_videos(tmp_path / name, split="valid")[0].frames.paths[0])
    assert load_videos(tmp_path / name / "valid")[0].domain == kind
    with pytest.raises(ValueError, match=r"no split 'dev'; there are: train, valid"):
        load_videos(tmp_path / name, split="dev")


@pytest.mark.parametrize(
    "frames, masks, kind",
    [
        ("frames/{v}/{t}.jpg", "masks/{v}/{t}.png", None),
        ("{v}_frames/{t}.jpg", "{v}_masks/{t}.png", None),
        ("{v}/frames/{v}_{t}.jpg", "{v}/masks/{v}_{t}_mask.png", None),
        ("JPEGImages/{v}/{v}{t}.jpg", "Annotations/{v}/{v}{t}.png", "frames"),
        *[("frames/{v}/{v}{t}.jpg", "masks/{v}/{v}{t}.png", kind) for kind in ("csv", *WRITTEN)],
    ],
)
def test_names_of_the_unicode_form_of_macos_are_the_same(frames, masks, kind, tmp_path):
    videos = [replace(video, video_id="bébé") for video in list(truth().values())[:1]]
    root = save_videos(tmp_path / "made", videos, frames, masks)
    if kind == "csv":
        rows = [f"{frames},{masks}".format(v="bébé", t=t) for t in range(NUM_FRAMES)]
        (root / "pairs.csv").write_text("\n".join(["frame,mask", *rows]))
    elif kind in WRITTEN:
        written, root = load_videos(root), tmp_path / "written"
        root.mkdir()
        convert.write_videos(kind, written, root)
    images = list(root.rglob("*.jpg"))
    for path in (*images, *{image.parent for image in images}):
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
    (video,) = load_videos(root) if kind != "frames" else load_videos("frames", root)
    expected = truth()["cat"]
    assert len(video.annotated_frames) == NUM_FRAMES
    assert all(np.array_equal(video.id_map(t), expected.id_map(t)) for t in range(NUM_FRAMES))


def test_masks_of_some_frames_leave_the_others_without_annotation(tmp_path, caplog):
    write(tmp_path, "{v}/frames/{t:05d}.jpg", "{v}/masks/m{t}.png")
    (tmp_path / "cat" / "masks" / "m1.png").unlink()
    save(tmp_path / "bird" / "frames" / "0.jpg", np.zeros((*SIZE, 3), np.uint8))
    videos = load_videos(tmp_path)
    assert videos[0].annotated_frames == [0, 2, 3] and len(videos[0]) == NUM_FRAMES
    assert videos.video_ids == list(truth()) and "left out for want of masks: bird" in caplog.text


def test_objects_of_one_frame_each_are_objects(tmp_path):
    """Objects that never share a frame are told by a word of their files' names."""
    video = truth()["cat"]
    for t in range(2):
        save(tmp_path / "a" / "frames" / f"{t}.jpg", video.frames[t])
        save(tmp_path / "a" / "masks" / f"{t}_obj{3 + t}.png", np.where(video.masks(t)[0], 255, 0).astype(np.uint8))
    (read,) = load_videos(tmp_path)
    assert read.object_ids == [3, 4] and read.visible(0) == [3] and read.visible(1) == [4]
    for name in ("wing", "beak"):  # names become ids in their order
        save(tmp_path / "b" / "masks" / name / "0.png", np.where(video.masks(0)[0], 255, 0).astype(np.uint8))
    save(tmp_path / "b" / "frames" / "0.jpg", video.frames[0])
    (read,) = load_videos(tmp_path / "b")
    assert read.object_ids == [1, 2] and "beak" in read.annotations.source(0)


def test_a_list_may_name_frames_of_a_video_file_and_objects(tmp_path):
    write_videos(tmp_path, "{v}.mp4", "m/{v}/{t}.png")
    rows = [{"video": "cat.mp4", "frame": str(t), "mask": f"m/cat/{t}.png" if t else ""} for t in range(NUM_FRAMES)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (video,) = load_videos(tmp_path / "list.json")
    assert len(video) == NUM_FRAMES and video.annotated_frames == [1, 2, 3]
    write_objects(tmp_path / "o", "{v}/{t}.jpg", "{v}/{t}-{o}.png")
    lines = ["Image,Label,object_id", *(f"cat/{t}.jpg,cat/{t}-{o}.png,{o}" for t in range(2) for o in (1, 2))]
    (tmp_path / "o" / "list.csv").write_text("\n".join(lines))
    (video,) = load_videos(tmp_path / "o" / "list.csv")
    assert video.video_id == "cat" and video.object_ids == [1, 2]


# --- Lists


def write_list(root, columns, rows):
    for t in range(12):
        save(root / "f" / f"{t:05d}.png", np.full((*SIZE, 3), 20 * t, np.uint8))
        save(root / "m" / f"{t:05d}.png", np.full(SIZE, t + 1, np.uint8))
    (root / "pairs.csv").write_text("\n".join([columns, *rows]))
    return root / "pairs.csv"


@pytest.mark.parametrize(
    "columns, row, expected",
    [
        ("frame,mask", "f/{t:05d}.png,m/{t:05d}.png", range(12)),
        ("image,mask,frame_number", "f/{t:05d}.png,m/{t:05d}.png,{back}", range(11, -1, -1)),
        ("frame_index,video,frame,mask", "{back}.0,v,f/{t:05d}.png,m/{t:05d}.png", range(11, -1, -1)),
    ],
)
def test_frames_of_a_list_are_in_the_order_of_their_numbers_or_names(columns, row, expected, tmp_path, caplog):
    order = np.random.default_rng(0).permutation(12).tolist()
    path = write_list(tmp_path, columns, [row.format(t=t, back=11 - t) for t in order])
    (video,) = load_videos(path)
    assert [int(name) for name in video.frames.names] == list(expected)
    assert [video.visible(t) for t in range(12)] == [[t + 1] for t in expected]
    assert ("rows are put in the order of names" in caplog.text) == (columns == "frame,mask")


def test_a_list_may_be_written_on_windows_and_one_of_other_files_is_told(tmp_path, caplog):
    for t in range(3):
        for name in "ab":
            save(tmp_path / "frames" / name / f"{t}.png", np.full((*SIZE, 3), t, np.uint8))
            save(tmp_path / "masks" / name / f"{t}.png", np.full(SIZE, t + 1, np.uint8))
    rows = "".join(f"frames\\{v}\\{t}.png;masks\\{v}\\{2 - t}.png;{t}\n" for v in "ab" for t in range(3))
    (tmp_path / "pairs.csv").write_text(f"\ufeffframe;mask;frame_number\n{rows}", encoding="utf-8")
    videos = load_videos(tmp_path)
    assert videos.video_ids == ["a", "b"] and [videos[1].visible(t) for t in range(3)] == [[3], [2], [1]]
    (tmp_path / "pairs.csv").write_text("frame,mask\nf/0.png,m/9.png\n")
    video = load_videos(tmp_path)[0]
    assert video.visible(0) == [1] and "f/0.png. The list is not used" in caplog.text


def test_a_list_goes_before_what_names_tell(tmp_path):
    """By their names the masks would be those of other frames. A list of classes tells no masks."""
    for t in range(4):
        save(tmp_path / "frames" / f"{t}.png", np.full((*SIZE, 3), 20 * t, np.uint8))
        save(tmp_path / "masks" / f"{t}.png", np.full(SIZE, t + 1, np.uint8))
    for row, expected in (("frames/{t}.png,masks/{other}.png", [4, 1, 2, 3]), ("frames/{t}.png,cat", [1, 2, 3, 4])):
        rows = [row.format(t=t, other=(t + 3) % 4) for t in range(4)]
        (tmp_path / "list.csv").write_text("\n".join(["image,label", *rows]))
        (video,) = load_videos(str(tmp_path))
        assert [video.visible(t) for t in range(4)] == [[value] for value in expected]
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text("image,label\nframes/0.png,masks/1.png")
    with pytest.raises(ValueError, match=r"several lists of pairs; give one in place of it: .*train\.csv, .*val\.csv"):
        load_videos(str(tmp_path))


@pytest.mark.parametrize("name", ["any.json", "any.coco.json"])
def test_annotations_of_coco_of_any_name_are_told(tmp_path, name):
    save(tmp_path / "images" / "0.png", np.zeros((*SIZE, 3), np.uint8))
    (tmp_path / name).write_text('{"images": [], "annotations": [{"segmentation": []}], "categories": []}')
    with pytest.raises(ValueError, match=f"{name} is COCO's JSON: name the kind `coco` with `annotations: {name}`"):
        load_videos(str(tmp_path))


def test_names_without_numbers_leave_a_list_as_it_is(tmp_path):
    for name in "cab":
        save(tmp_path / f"{name}.png", np.zeros((*SIZE, 3), np.uint8))
        save(tmp_path / f"m{name}.png", np.ones(SIZE, np.uint8))
    (tmp_path / "pairs.csv").write_text("frame,mask\nc.png,mc.png\na.png,ma.png\nb.png,mb.png")
    assert load_videos(tmp_path / "pairs.csv")[0].frames.names == ["c", "a", "b"]


@pytest.mark.parametrize(
    "rows, message",
    [
        (["f/00000.png,m/00000.png,x"], r"pairs\.csv, row 1: frame_number must be a number, not 'x'"),
        (["f/00000.png,m/00000.png,1", "f/00001.png,m/00001.png,1"], "video f has several frames of the number 1"),
        (
            ["f/00000.png,m/00000.png,1", "f/00000.png,m/00001.png,2"],
            r"row 2: .*00000\.png has the number 1 in another",
        ),
    ],
)
def test_numbers_of_a_list_that_tell_no_order_are_refused(rows, message, tmp_path):
    with pytest.raises(SampleError, match=message):
        load_videos(write_list(tmp_path, "frame,mask,frame_number", rows))


def test_video_files_of_one_name_in_two_folders_are_two_videos(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "clip.mp4", list(truth().values())["ab".index(name)].frames)
        save_ids(tmp_path / name / "0.png", list(truth().values())["ab".index(name)], 0)
    (tmp_path / "pairs.csv").write_text("video,frame,mask\na/clip.mp4,0,a/0.png\nb/clip.mp4,0,b/0.png")
    assert load_videos(tmp_path / "pairs.csv").video_ids == ["a/clip", "b/clip"]


# --- Nothing vanishes


def test_a_linked_folder_and_a_root_of_the_same_name_are_videos_too(tmp_path):
    write(tmp_path / "cat", "{v}/frames/{t}.jpg", "{v}/masks/{t}.png", only=1)
    (tmp_path / "cat" / "again").symlink_to(tmp_path / "cat" / "cat")
    write(tmp_path / "cat", "frames/{t}.jpg", "masks/{t}.png", only=1)
    videos = load_videos(tmp_path / "cat")
    assert sorted(videos.video_ids) == ["again", "cat", "cat_"]
    assert [len(video.annotated_frames) for video in videos] == [NUM_FRAMES] * 3


def test_two_cameras_in_one_folder_are_two_videos(tmp_path):
    for t, side in product(range(4), ("left", "right")):
        save(tmp_path / f"images/{t:04d}_{side}.jpg", np.full((*SIZE, 3), 20 * t + 90 * (side == "left"), np.uint8))
        save(tmp_path / f"masks/{t:04d}_{side}.png", np.full(SIZE, 1 + (side == "left"), np.uint8))
    videos = load_videos(tmp_path)
    assert videos.video_ids == ["left", "right"] and [video.object_ids for video in videos] == [[2], [1]]


def test_masks_that_name_none_of_several_videos_are_refused(tmp_path):
    write(tmp_path, "images/{v}_{t:03d}.jpg", "masks/{t:03d}.png")
    with pytest.raises(SampleError, match=r"000\.png: names none of the 2 videos whose frames.*\(cat, dog 2\)"):
        load_videos(tmp_path)


def test_files_that_are_neither_frames_nor_masks_are_named(tmp_path, caplog):
    write(tmp_path, "{v}/frames/{t}.jpg", "{v}/masks/{t}.png")
    save(tmp_path / "bird" / "7.png", np.zeros((*SIZE, 3), np.uint8))
    load_videos(tmp_path)
    assert "neither frames nor masks: bird/7.png" in caplog.text


# --- What is no layout


def broken(root, what):
    """A folder with one fault."""
    path = root / "cat/masks/00001.png"
    root.mkdir()
    if what not in ("empty", "volumes"):
        masks = "../{v}/{t}.png" if what == "no masks" else "{v}/masks/{t:05d}.png"
        write(root, "{v}/frames/{t:05d}.jpg", masks)
    colors = np.zeros((*SIZE, 3), np.uint8)
    if what == "a mask without a frame":
        save_ids(path.with_name("00009.png"), truth()["cat"], 0)
    elif what == "another size":
        write_palette_png(path, np.ones((5, 5), int))
    elif what == "volumes":
        (root / "cat_gt.nii.gz").touch()
    elif what == "JPEG masks":
        save(path.with_suffix(".jpg"), colors)
        path.unlink()
    elif what == "two masks of a frame":
        save_ids(path.with_name("1.png"), truth()["cat"], 0)
    elif what == "colours":
        colors[:9] = (12, 200, 7)
        save(path, colors)
    elif what == "cut off":
        path.write_bytes(path.read_bytes()[:60])
    elif what == "two folders of frames":
        write(root, "{v}/images/{t:05d}.jpg", "{v}/masks/{t:05d}.png")
    return root


@pytest.mark.parametrize(
    "what, message",
    [
        ("empty", r"mine: no layout.* Found: no files\. Expected: \{video\}/frames"),
        ("volumes", r"mine: no layout.* Volumes are read from imagesTr/NAME\.nii\.gz with labelsTr"),
        ("no masks", r"mine: no layout.* Found: 8 \.jpg \(such as cat/frames/00000\.jpg\).*kind: files, root: "),
        (
            "a mask without a frame",
            r"00009\.png: no frame named 00009 or numbered 9; the frames are 00000 to 00003.*`first`",
        ),
        ("another size", r"masks of size \(5, 5\).*masks/00001\.png"),
        ("JPEG masks", r"00001\.jpg: JPEG image; labels must be"),
        ("two masks of a frame", r"00001\.png: frame 00001 has another mask|1\.png: frame 00001 has another mask"),
        ("colours", r"00001\.png: an RGB image of 2 colours, such as #000000, #0cc807"),
        ("cut off", r"00001\.png: not a readable image"),
        ("two folders of frames", r"both .*cat/(frames|images) and .*of video cat.*Name them: \{kind: files"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(what, message, tmp_path):
    root = broken(tmp_path / "mine", what)
    with pytest.raises((ValueError, SampleError), match=message):
        video = load_videos(root)[0]
        for t in video.annotated_frames:
            video.masks(t)


def test_video_files_whose_masks_lie_in_one_folder_are_read_as_the_remedy_says(tmp_path):
    root = write_videos(tmp_path / "mine", "{v}.mp4", "masks/{v}_{t:05d}.png")
    with pytest.raises(ValueError, match=r"both cat\.mp4 and dog 2\.mp4 could be the frames") as caught:
        load_videos(root)
    remedy = yaml.safe_load(str(caught.value).partition("Name them: ")[2])
    check_videos(load_videos(**remedy))


PATTERN = "{video}/frames/*"


@pytest.mark.parametrize(
    "frames, masks, message",
    [
        (PATTERN, None, "`frames` goes with `masks`"),
        (PATTERN, "{video}/nothing/*", "`masks`: no image or video below .* is named by"),
        ("<video>/frames/*", PATTERN, r"`frames` must be a pattern .*got '<video"),
        ("../{video}/*", PATTERN, "`frames` must be a pattern below"),
        (PATTERN, "cat/{video}/*.png", "name no video in common"),
    ],
)
def test_wrong_patterns_are_refused(frames, masks, message, tmp_path):
    write(tmp_path, "{v}/frames/{t:05d}.jpg", "{v}/masks/{t:05d}.png", only=1)
    with pytest.raises(ValueError, match=message):
        load_videos("files", tmp_path, frames=frames, masks=masks)


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,mask\ncat/frames/9.jpg,x.png\n", r"pairs\.csv, row 1: no such file .*9\.jpg"),
        ("image,mask\n../x.jpg,x.png\n", r"pairs\.csv, row 1: '\.\./x\.jpg' is no path within"),
        ("image,maks\na,b\n", r"pairs\.csv: has image, maks; expected a CSV or JSON"),
        ("image,mask\ncat/frames/0.jpg,\n", r"pairs\.csv: no row has a mask"),
        (f"image,label\ncat/frames/0.jpg,{'shape' * 60}\n", "row 1: label must be a path, not shapeshape[a-z]{50}…"),
    ],
)
def test_wrong_lists_name_the_row(text, message, tmp_path):
    write(tmp_path, "{v}/frames/{t}.jpg", "{v}/masks/{t}.png", only=1)
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises((OSError, SampleError), match=message):
        load_videos(tmp_path / "pairs.csv")


def test_frames_beside_a_video_are_no_masks_because_other_folders_are_gray(tmp_path):
    frame = np.zeros((*SIZE, 3), np.uint8)
    write_video(tmp_path / "clip.mp4", [frame])
    save(tmp_path / "clip" / "0.png", frame)
    for name in "ab":
        save(tmp_path / name / "0.png", frame[..., 0])
    with pytest.raises(ValueError, match="no layout of videos and masks is recognized"):
        load_videos(tmp_path)


def test_links_are_followed_once(tmp_path):
    write(tmp_path / "real", "{v}/frames/{t}.jpg", "{v}/masks/{t}.png")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "videos").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "cat" / "loop").symlink_to(tmp_path / "real")
    check_videos(load_videos(tmp_path / "linked"))
    patterns = {"frames": "videos/{video}/frames/*", "masks": "videos/{video}/masks/*"}
    check_videos(load_videos("files", tmp_path / "linked", **patterns))
