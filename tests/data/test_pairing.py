"""Masks belong to the frames and objects that their names say; what can be read in two ways is refused."""

import numpy as np
import pytest

from helpers.layouts import SIZE, label_map, save_image
from samoe_hf.data import SampleError, load_videos, write_video
from samoe_hf.data.check import check_video

COLUMNS = {1: 2, 2: 10, 3: 18, 4: 26}  # where each object is


def write_frames(root, name="{t:05d}.jpg", count=10):
    for t in range(count):
        save_image(root / "v/frames" / name.format(t=t), np.full((*SIZE, 3), 20 * t, np.uint8))


def write_masks(root, name, frames=range(10), objects=(1, 2)):
    """Label images, or images of one object where the name has `{o}`; each shows which frame and object it is of."""
    for t in frames:
        ids = label_map(*((o, COLUMNS[o]) for o in objects))
        ids[21:, : t + 1] = objects[0]
        for o in objects if "{o" in name else (0,):
            save_image(root / "v/masks" / name.format(t=t, o=o), (ids == o) * np.uint8(255) if o else ids)


def read(root, **options):
    """Frame index -> object id -> number of columns that the mask has below, which tells the frame it was drawn for."""
    video = load_videos("files", root, **options)[0]
    return {t: {i: int(video.masks(t, [i])[0][22].sum()) for i in video.visible(t)} for t in video.annotated_frames}


def expected(frames=range(10), objects=(1, 2)):
    return {t: {o: t + 1 if o == objects[0] else 0 for o in objects} for t in frames}


NAMES = ["{o}/{t:05d}", "{t:05d}/{o}", "{t:05d}_{o}", "{t:05d}-{o}", "{o}_{t:05d}", "obj{o}/{t}", "m_{t}_obj_{o}"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frames", [(0,), (0, 5), (3,), range(10)], ids=str)
def test_objects_are_no_frames_however_few_frames_have_masks(name, frames, tmp_path):
    write_frames(tmp_path)
    write_masks(tmp_path, f"{name}.png", frames, (1, 2, 3))
    assert read(tmp_path) == expected(frames, (1, 2, 3))


@pytest.mark.parametrize(
    "frame, mask", [("{t}", "{o}/{t}"), ("{t}", "{t}_{o}"), ("f_{t}", "m_{o}_{t}"), ("{t}", "{t}/{o}")]
)
def test_names_that_may_be_read_in_two_ways_are_refused_and_patterns_tell(frame, mask, tmp_path):
    write_frames(tmp_path, f"{frame}.jpg")
    write_masks(tmp_path, f"{mask}.png", (1, 2, 3), (1, 2, 3))
    with pytest.raises(SampleError, match=r"both '\d' and '\d' may be its frame or.*\{video\}/\{frame\}_\{object\}"):
        read(tmp_path)
    pattern = "{video}/masks/" + mask.replace("{o}", "{object}").replace("{t}", "{frame}") + ".png"
    assert read(tmp_path, frames="{video}/frames/*", masks=pattern) == expected((1, 2, 3), (1, 2, 3))


@pytest.mark.parametrize(
    "frame, mask",
    [
        ("frame_{t:04d}", "frame_{t:04d}_person{o}"), ("frame_{t:04d}", "{t:04d}_person{o}"),
        ("v2_{t:03d}", "v2_{t:03d}_dog{o}"), ("cam2_frame_{t:04d}", "cam2_mask_{t}_id{o}"),
        ("{t:05d}", "car {o}/mask_{t:05d}"),
        ("1305031102.{t:06d}", "1305031102.{t:06d}_{o}"), ("{t:05d}", "person_{o}_frame_{t}"),
    ],
)  # fmt: skip
def test_the_number_of_an_object_is_no_frames(frame, mask, tmp_path):
    """Also where an object has none, as the first `person`."""
    write_frames(tmp_path, f"{frame}.jpg")
    write_masks(tmp_path, f"{mask}.png")
    for path in [*(tmp_path / "v/masks").rglob("*person1*"), *(tmp_path / "v/masks").rglob("*dog1*")]:
        path.rename(path.with_name(path.name.replace("person1", "person").replace("dog1", "dog")))
    assert read(tmp_path) == expected()


@pytest.mark.parametrize("picture", ["{}_vis", "{}_color", "overlay_{}", "{}_pred_overlay", "{}.colored", "vis/{}"])
@pytest.mark.parametrize("mask", ["{t:05d}", "{t:05d}_{o}", "{t:05d}_mask"])
def test_pictures_of_masks_are_no_objects(picture, mask, tmp_path, caplog):
    write_frames(tmp_path)
    write_masks(tmp_path, f"{mask}.png")
    for t in range(10):
        colors = np.full((*SIZE, 3), (t, 99, 7), np.uint8)
        save_image(tmp_path / "v/masks" / f"{picture.format(mask.format(t=t, o=1))}.png", colors)
    assert read(tmp_path) == expected()
    assert "vis/" in picture or any("are taken for pictures of masks and left out" in m for m in caplog.messages)


def test_instances_are_taken_instead_of_classes(tmp_path):
    write_frames(tmp_path)
    write_masks(tmp_path, "{t:05d}_gtFine_instanceIds.png")
    for kind in ("labelIds", "color"):
        write_masks(tmp_path, f"{{t:05d}}_gtFine_{kind}.png", objects=(3,))
    assert read(tmp_path) == expected()


def test_a_mask_that_names_more_than_others_is_refused(tmp_path):
    write_frames(tmp_path)
    write_masks(tmp_path, "{t:05d}.png")
    write_masks(tmp_path, "{t:05d}_soft.png")
    with pytest.raises(SampleError, match=r"00000_soft\.png: unlike 00000\.png, it names something beside its frame"):
        read(tmp_path)


# --- Numbers of a video file's masks


@pytest.mark.parametrize(
    "name, numbers, options, first",
    [
        ("{t:05d}", range(10), {}, 0), ("{t}", range(10), {}, 0), ("f_{t:04d}", range(1, 11), {}, 1),
        ("{t:05d}", range(1, 11), {}, 1), ("{t:05d}", range(1, 10), {}, 0), ("{t:05d}", range(1, 10), {"first": 1}, 1),
        ("{t}", (3, 6), {"first": 0}, 0), ("{t}", (3, 6), {"first": 1}, 1), ("f{t:05d}_x", (0, 6), {}, 0),
        ("{t}", (3, 6), {}, None), ("{t}", (0, 10), {}, None), ("{t}", (1, 5), {"first": 0}, 0),
        ("{t}", (11,), {}, None),
        ("{t}", (0,), {"first": 1}, None),
    ],
)  # fmt: skip
def test_masks_of_a_video_file_count_from_0_or_1(name, numbers, options, first, tmp_path):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/clip.mp4", (np.full((*SIZE, 3), 20 * t, np.uint8) for t in range(10)))
    write_masks(tmp_path, f"{name}.png", numbers)
    if first is None:
        with pytest.raises(SampleError, match=r"may count from 0 or.*`first: 0` or `first: 1`|no frame n(umber|am)ed "):
            read(tmp_path, **options)
    else:
        shown = {t: masks[1] - 1 for t, masks in read(tmp_path, **options).items()}
        assert shown == {number - first: number for number in numbers}


def test_the_first_number_of_images_masks_may_be_told(tmp_path):
    write_frames(tmp_path, "frame_{t:04d}.jpg")
    write_masks(tmp_path, "{t:04d}.png", range(1, 11))
    with pytest.raises(SampleError, match=r"0010\.png: no frame named 0010 or numbered 10"):
        read(tmp_path)
    assert read(tmp_path, first=1) == {t - 1: shown for t, shown in expected(range(1, 11)).items()}


# --- Names of cameras and tools


@pytest.mark.parametrize(
    "times",
    [
        [f"{1305031102.05 + t / 5:.6f}" for t in range(10)], ["12.0", "12.25", "12.5", "12.75", "13.0", "13.25"],
        [f"20230501_2359{58 + t // 5:02d}_{t % 5}" for t in range(10)],
        [f"2023-05-01 12-{t // 3:02d}-{t:02d}" for t in range(9)],
        [f"cam_1305031{t // 4}02_{175304 + t}" for t in range(8)],
        [f"IMG_202305{1 + t // 3:02d}_12000{t}" for t in range(6)],
        [f"vlcsnap-2023-05-01-12h30m{t // 4:02d}s{t % 4 * 250:03d}" for t in range(8)],
        [f"12-30-{58 + t // 4}-{t % 4 * 250:03d}" for t in range(8)], [f"31-05-2023 12-30-0{t}" for t in range(8)],
        *([f"{before}{8 + t // 4}-{t % 4 * 250:03d}" for t in range(12)] for before in ("t-", "")),
        [f"cam-12-{30 + t // 6}-{t % 6 * 10:02d}" for t in range(12)],
        [f"cam_12-{30 + t // 60}-{t % 60:02d}-{v}" for t in range(58, 62) for v in ("067", "567")],
        [f"event_{t}" for t in range(-5, 4)], ["-1.0", "-0.75", "-0.5", "0.0", "0.25", "0.5"],
    ],
    ids=lambda times: times[0],
)  # fmt: skip
def test_times_as_names_are_one_video_in_their_order(times, tmp_path):
    for t, name in enumerate(times):
        save_image(tmp_path / "frames" / f"{name}.jpg", np.full((*SIZE, 3), 20 * t, np.uint8))
        save_image(tmp_path / "masks" / f"{name}.png", label_map((1, t)))
    (tmp_path / "frames/times.txt").touch()
    (video,) = load_videos(tmp_path)
    assert video.frames.names == times and video.annotated_frames == list(range(len(times)))
    assert [int(video.masks(t)[0].any(axis=0).argmax()) for t in video.annotated_frames] == list(range(len(times)))


@pytest.mark.parametrize("lengths, name", [((4, 4), "{}-{:03d}"), ((60, 60), "take-01-{}-{:02d}")])
def test_numbers_that_are_no_times_at_even_distances_tell_videos(lengths, name, tmp_path):
    for clip, length in enumerate(lengths, 11):
        for t in range(length):
            save_image(tmp_path / "frames" / f"{name.format(clip, t)}.png", np.zeros((*SIZE, 3), np.uint8))
            save_image(tmp_path / "masks" / f"{name.format(clip, t)}.png", label_map((1, 3)))
    assert [len(video) for video in load_videos(tmp_path)] == [*lengths]


def test_roboflows_hashes_leave_the_videos_apart(tmp_path):
    rng = np.random.default_rng(0)
    for video in ("walk", "run"):
        for t in range(4):
            name, code = f"{video}_mp4-{t:04d}_jpg", rng.integers(10**9)
            save_image(tmp_path / "train" / f"{name}.rf.{code:x}.jpg", np.full((*SIZE, 3), 20 * t, np.uint8))
            save_image(tmp_path / "train" / f"{name}.rf.{code:x}_mask.png", label_map((1, t)))
    videos = load_videos(tmp_path)
    assert [len(video.annotated_frames) for video in videos] == [4, 4] and videos.video_ids == ["run_mp4", "walk_mp4"]
    assert [video.masks(t)[0].any(axis=0).argmax() for video in videos for t in range(4)] == [*range(4)] * 2


def test_label_studios_masks_are_refused_and_its_json_is_named(tmp_path):
    write_frames(tmp_path)
    write_masks(tmp_path, "task-{t}-annotation-3{t}-by-1-tag-dog {o}-0.png")
    with pytest.raises(SampleError, match="Label Studio's masks name tasks instead of frames; export its JSON"):
        read(tmp_path)


# --- What is said


def test_guesses_are_sentences_of_the_check(tmp_path):
    write_frames(tmp_path)
    write_masks(tmp_path, "{t:05d}/{o}.png")
    report, _ = check_video("v", lambda: load_videos(tmp_path)[0])
    assert report.notes == [
        "masks/00000/1.png: object 1 of frame 0 (00000)",
        "masks/00009/2.png: object 2 of frame 9 (00009)",
    ]
