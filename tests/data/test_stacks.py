"""Files of several pages as frames and as masks of videos of one's own."""

import numpy as np
import pytest
from PIL import Image

from samoe_hf.data import load_videos
from samoe_hf.data.frames import SampleError
from samoe_hf.data.video_io import write_video
from samoe_hf.labelling import video_paths

LENGTH = 6
FRAMES, IDS = np.full((LENGTH, 24, 32, 3), 90, np.uint8), np.zeros((LENGTH, 24, 32), np.uint8)
for t in range(LENGTH):
    FRAMES[t, :4] = 40 * t
    IDS[t, 6:12, 4 + t : 12 + t], IDS[t, 14:20, 20 - t : 28 - t] = 1, 2


def stack(path, pages, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = map(Image.fromarray, pages)
    first.save(path, save_all=True, append_images=others, **options)


def images(folder, pages, name="{:05d}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, page in enumerate(pages):
        Image.fromarray(page).save(folder / name.format(i))


def check(video, ids=IDS):
    assert len(video) == LENGTH and video.annotated_frames == list(range(LENGTH))
    assert [round(float(frame[1].mean()) / 40) for frame in video.frames] == list(range(LENGTH))
    assert video.object_ids == [1, 2] and all(np.array_equal(video.id_map(t), ids[t]) for t in range(LENGTH))


FORMS = {
    "stacks beside stacks": (["images/a.tif", "images/b.tif"], ["masks/a.tif", "masks/b.tif"]),
    "stacks in folders of videos": (["a/frames/x.tif", "b/frames/x.tif"], ["a/masks/y.tif", "b/masks/y.tif"]),
    "a mask for each page": (["a/frames/s.tif", "b/frames/s.tif"], ["a/masks/s_*", "b/masks/s_*"]),
    "folders of masks": (["images/a.tif", "images/b.tif"], ["masks/a/*", "masks/b/*"]),
    "folders of frames": (["images/a/*", "images/b/*"], ["masks/a.tif", "masks/b.tif"]),
    "a stack in a folder of a video": (["a/frames/*", "b/frames/*"], ["a/masks.tif", "b/masks.tif"]),
    "names with a suffix": (["a.tif", "b.tif"], ["a_mask.tif", "b_mask.tif"]),
    "one video": (["movie.tif"], ["masks/*"]),
    "video files": (["videos/a.mp4", "videos/b.mp4"], ["masks/a.tif", "masks/b.tif"]),
    "animations": (["images/a.webp", "images/b.png"], ["masks/a.png", "masks/b.gif"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_is_a_video_of_its_pages(tmp_path, form):
    for places, pages in zip(FORMS[form], (FRAMES, IDS), strict=True):
        for place in places:
            if place.endswith("*"):
                images(tmp_path / place.rpartition("/")[0], pages, place.rpartition("/")[2][:-1] + "{:05d}.png")
            elif place.endswith(".mp4"):
                (tmp_path / place).parent.mkdir(exist_ok=True)
                write_video(tmp_path / place, pages)
            else:
                stack(tmp_path / place, pages, **({"lossless": True} if place.endswith("webp") else {}))
    videos = load_videos(tmp_path)
    assert len(videos) == len(FORMS[form][0])
    for video in videos:
        check(video)


def test_patterns_name_stacks_as_files_or_as_folders(tmp_path):
    stack(tmp_path / "pictures/a.tif", FRAMES)
    stack(tmp_path / "outlines/a.tif", IDS)
    for form in ("{}/{{video}}.tif", "{}/{{video}}/*"):
        (video,) = load_videos("files", tmp_path, frames=form.format("pictures"), masks=form.format("outlines"))
        assert video.video_id == "a"
        check(video)


def test_stacks_of_objects_and_of_frames(tmp_path, caplog):
    images(tmp_path / "o/v/frames", FRAMES)
    for i in (1, 2):
        stack(tmp_path / f"o/v/masks/obj{i}.tif", (i == IDS).astype(np.uint8) * 255)
    check(load_videos(tmp_path / "o")[0])
    for name, scale in (("binary", 255), ("values", 1)):
        images(tmp_path / name / "v/frames", FRAMES)
        for t in range(LENGTH):
            pages = [(IDS[t] == i).astype(np.uint8) * (scale if scale > 1 else i) for i in (1, 2)]
            stack(tmp_path / name / f"v/masks/{t:05d}.tif", pages)
        check(load_videos(tmp_path / name)[0])
    assert "a file has the masks of a frame" in caplog.text and "each file has the masks of an object" in caplog.text


def test_a_frame_whose_pages_are_empty_has_no_object(tmp_path):
    images(tmp_path / "v/frames", FRAMES)
    for t in range(LENGTH):
        pages = [(IDS[t] == i) * np.uint8(i) * (t > 0) for i in (2, 1)]
        stack(tmp_path / f"v/masks/{t:05d}.tif", pages)
    check(load_videos(tmp_path)[0], IDS * (np.arange(LENGTH) > 0)[:, None, None])


@pytest.mark.parametrize(
    "masks, message",
    [
        ({"m.tif": IDS[:4]}, "m.tif: 4 pages for 6 frames"),
        ({"m.tif": IDS[[0, 1, 2, 3, 4, 5, 5]]}, "m.tif: 7 pages for 6 frames"),
        ({f"{t:05d}.tif": [IDS[t], IDS[t]] for t in range(6)}, r"holds the values \[1, 2\]"),
        ({f"{t:05d}.tif": [IDS[t] > 0] * (2 + t % 2) for t in range(6)}, "which page is which object"),
        (
            {f"{t:05d}.tif": [(IDS[t] == 1) * np.uint8(i) for i in (1, 2, 2)] for t in range(6)},
            "another mask of object",
        ),
    ],
    ids=["too few", "too many", "several objects on a page", "different counts", "an object twice"],
)
def test_pages_of_masks_that_tell_no_frame_or_object_are_refused(tmp_path, masks, message):
    images(tmp_path / "v/frames", FRAMES)
    for name, pages in masks.items():
        stack(tmp_path / "v/masks" / name, pages)
    with pytest.raises(SampleError, match=message):
        load_videos(tmp_path)[0]


def test_deep_frames_take_the_window_of_the_options(tmp_path):
    deep = FRAMES[..., 0].astype(np.uint16) * 16
    stack(tmp_path / "v/frames/s.tif", deep)
    images(tmp_path / "v/masks", IDS)
    (video,) = load_videos(tmp_path, window=[0, 4080])
    assert all(np.array_equal(shown, frame) for shown, frame in zip(video.frames, FRAMES, strict=True))
    images(tmp_path / "vos/JPEGImages/v", deep)
    images(tmp_path / "vos/Annotations/v", IDS)
    (video,) = load_videos("frames", tmp_path / "vos", window=[0, 4080])
    assert np.array_equal(video.frames[3], FRAMES[3])
    with pytest.raises(ValueError, match="`window` must be"):
        load_videos(tmp_path, window=[5, 0])


def test_masks_of_pages_count_as_those_of_a_video_file(tmp_path):
    stack(tmp_path / "v/frames/s.tif", FRAMES)
    images(tmp_path / "v/masks", IDS, "m_{:05d}.png")
    (tmp_path / "v/masks/m_00000.png").rename(tmp_path / "v/masks/m_00006.png")
    for t in (5, 4, 3, 2, 1):
        assert (tmp_path / f"v/masks/m_{t:05d}.png").exists()
    assert load_videos(tmp_path)[0].annotated_frames == list(range(LENGTH)), "from 1, as ffmpeg counts"


def test_videos_to_label_may_be_stacks(tmp_path):
    stack(tmp_path / "a.tif", FRAMES)
    images(tmp_path / "b", FRAMES)
    assert video_paths(tmp_path) == {"a": tmp_path / "a.tif", "b": tmp_path / "b"}


def test_pictures_in_a_folder_that_are_not_read_are_named(tmp_path, caplog):
    images(tmp_path / "v/frames", FRAMES)
    images(tmp_path / "v/masks", IDS)
    (tmp_path / "v/frames/00006.heic").touch()
    check(load_videos(tmp_path)[0])
    assert "frames holds files that are not read: 1 .heic (needs `pip install pillow-heif`)" in caplog.text
