"""`samoe track`: what it writes, what it leaves alone and what it refuses before it loads a model, here "nowhere"."""

import re
from functools import partial

import numpy as np
import pytest
from PIL import Image

from helpers.edgetam import slow_over_bases
from samoe_hf.commands.track import parse_arguments, read_prompts
from samoe_hf.data import SyntheticVideos, load_videos, read_label_png, read_video, write_palette_png, write_video
from samoe_hf.tracks import read_tracks
from samoe_hf.where_to_look import where_to_look


@pytest.fixture(scope="module")
def video():
    return SyntheticVideos(1, 5, (96, 128), seed=3)[0]


@pytest.fixture
def file(video, tmp_path):
    write_video(tmp_path / "in.mp4", video.frames, fps=10)
    return tmp_path / "in.mp4"


@pytest.fixture
def track(samoe):
    return partial(samoe, "track")


@slow_over_bases
def test_a_video_file(track, model_folder, file, video, tmp_path):
    mask = tmp_path / "mask.png"
    write_palette_png(mask, video.masks(0)[0].astype(np.uint8))
    said = track(
        model_folder, file, "--point", "40,30", "--point", "100,80:0", "--box", "2=10,10,60,60@1",
        "--mask", f"3={mask}", "--end", "3=2", "--output", tmp_path / "out.mp4",
    )  # fmt: skip
    assert "propagate in video" in said and "Tracked 3 prompts through 5 frames" in said
    overlay = read_video(tmp_path / "out.mp4")
    assert len(overlay) == 5 and overlay.size == (96, 128)
    assert overlay.fps == pytest.approx(10), "the overlay plays as fast as the video"
    files = sorted((tmp_path / "out_masks").glob("*.png"))
    assert [file.name for file in files] == [f"{t:05d}.png" for t in range(5)]
    assert Image.open(files[0]).mode == "P"
    maps = [read_label_png(file) for file in files]
    assert [3 in id_map for id_map in maps] == [True, True, False, False, False]
    assert set(np.unique(np.stack(maps))) <= {0, 1, 2, 3}
    rows = read_tracks(tmp_path / "out_tracks.csv")
    assert [(row.frame, row.time, row.object) for row in rows] == [(t, t / 10, i) for t in range(5) for i in (1, 2, 3)]
    assert all(row.area == (maps[row.frame] == row.object).sum() for row in rows)
    assert {(row.object, row.frame) for row in rows if row.prompted} == {(1, 0), (2, 1), (3, 0), (3, 2)}
    looks = where_to_look(rows, 5)
    lines = [f"  frame {look.frame} ({look.time:.2f} s): {look.reason}" for look in looks]
    assert looks and "\n".join(["Worth a look, the most important first:", *lines]) in said
    mask.unlink()
    (labelled,) = load_videos(tmp_path)  # not the overlay, in which masks are drawn
    np.testing.assert_array_equal(labelled.frames[0], read_video(file)[0])
    np.testing.assert_array_equal(labelled.id_map(0), maps[0])


def test_a_folder_of_frames_from_a_frame_in_the_middle(track, model_folder, video, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    for t, frame in enumerate(video.frames):
        Image.fromarray(frame[..., 0].astype(np.uint16)).save(frames / f"frame_{t}.png")
    ids = (video.masks(3) * np.array(video.object_ids)[:, None, None]).max(axis=0)
    write_palette_png(tmp_path / "ids.png", ids)
    said = track(model_folder, frames, "--mask", tmp_path / "ids.png", "--frame", 3, "--output", tmp_path / "o.mp4",
                 "--masks", tmp_path / "masks", "--window", "0,255")  # fmt: skip
    assert "percentiles" not in said
    written = {file.stem: read_label_png(file) for file in (tmp_path / "masks").iterdir()}
    assert sorted(written) == [f"frame_{t}" for t in range(5)]
    assert (written["frame_3"] == ids).mean() > 0.97
    assert read_video(tmp_path / "o.mp4").fps == pytest.approx(24)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--point", "40"], "`--point` must be 2 numbers"),
        (["--point", "4,5:7"], "label of `--point` must be 0 or 1, got '7'"),
        (["--point", "nan,5"], "`--point` must be 2 numbers"),
        (["--box", "1,2,30,40", "--box", "1,2,50,60"], "Object 1 has two boxes on frame 0"),
        (["--point", "4,5@-1"], "`--point` must be 2 numbers"),
        (["--point", "256=4,5"], "ids of objects must be from 1 to 255, got 256"),
        (["--mask", "nowhere.png"], "nowhere.png"),
        (["--point", "4,5", "--end", "1=5@3"], "`--end` must be [ID=]FRAME, got '1=5@3'"),
        (["--mask", "mask.png", "--mask", "mask.png"], "Object 1 has two masks on frame 0"),
        (["--mask", "3=large.png"], "one object, 3, but holds the values 2, 300; give a map of ids without an id"),
        ([], "at least one object, by `--point`, `--box` or `--mask`"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_loaded(track, file, tmp_path, arguments, message):
    ids = np.zeros((96, 128), np.uint16)
    ids[:40], ids[40:60] = 300, 2
    Image.fromarray(ids).save(tmp_path / "large.png")
    write_palette_png(tmp_path / "mask.png", np.ones((96, 128), np.uint8))
    arguments = [re.sub(r"\w+\.png", rf"{tmp_path}/\g<0>", word) for word in arguments]
    assert message in track("nowhere", file, *arguments, "--output", tmp_path / "o.mp4", fails=True)
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--point", "2=4,5@2", "--end", "2=2"], "prompt is given of object 2 on frame 2, where it is said to be gone"),
        (
            ["--point", "4,5@2", "--end", "1"],
            "end of object 1 must be after all that is given of it (on the frames [2])",
        ),
        (["--point", "128,5"], "point (128.0, 5.0) of object 1 on frame 0 lies outside of the video of 128 x 96"),
        (["--point", "4,5", "--window", "0,255"], "`--window` goes with images"),
        (["--point", "4,5", "--domain", "fog"], "`--domain` must be auto, none or one of the model's (it has none)"),
    ],
)
def test_prompts_that_do_not_fit_leave_nothing_behind(track, model_folder, file, tmp_path, arguments, message):
    assert message in track(model_folder, file, *arguments, "--output", tmp_path / "o.mp4", fails=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_a_mask_is_read_as_those_of_data_sets_are(tmp_path):
    """White around ids is a border, and shades of gray are the edge of one object."""
    ids = np.zeros((24, 32), np.uint8)
    ids[4:12, 4:12], ids[4:20, 18:30] = 3, 9
    border, soft = ids.copy(), np.zeros_like(ids)
    border[:2] = 255
    soft[5:20, 5:25] = 255
    soft = np.array(Image.fromarray(soft).resize((16, 12)).resize((32, 24), Image.Resampling.BILINEAR))

    def masks(values, word="{}"):
        Image.fromarray(values).save(tmp_path / "m.png")
        words = ["nowhere", "v.mp4", "--output", "o.mp4", "--mask", word.format(tmp_path / "m.png")]
        return {prompt.object_id: prompt.mask.tolist() for prompt in read_prompts(parse_arguments(words))}

    assert masks(border) == {3: (ids == 3).tolist(), 9: (ids == 9).tolist()}
    assert masks(soft) == {1: (soft > 0).tolist()} and masks(soft, "4={}") == {4: (soft > 0).tolist()}
    assert masks((ids == 9) * np.uint8(255)) == masks((ids == 9) * np.uint8(7)) == {1: (ids == 9).tolist()}


def test_outputs_are_checked_before_anything_is_loaded(track, file, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    Image.new("RGB", (128, 96)).save(frames / "0.png")
    (tmp_path / "old.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    before = file.read_bytes(), (frames / "0.png").read_bytes()
    for video, arguments, message in (
        (file, ["--output", tmp_path / "o.mp4", "--masks", tmp_path], "must be a new folder"),
        (file, ["--output", tmp_path / "old.mp4"], "old.mp4 exists; give another `--output` or `--overwrite`"),
        (file, ["--overwrite", "--output", file], "`--output` must not be the video itself"),
        (file, ["--overwrite", "--output", tmp_path / "o.mp4", "--masks", tmp_path / "notes"], "one of masks alone"),
        *(
            (file, ["--output", tmp_path / "new/o.mp4", "--masks", tmp_path / "new" / masks], "`--masks` must be a new")
            for masks in ("o.mp4", "o_tracks.csv", "o.mp4/masks", "")
        ),
        (file, ["--overwrite", "--output", tmp_path / "folder.mp4"], "folder.mp4 is a folder"),
        (file, ["--output", tmp_path / "o.gif"], "`--output` must end in .mp4, .m4v, .mov or .mkv, got"),
        (frames, ["--output", tmp_path / "o.mp4", "--masks", frames], "`--masks` must not be the video itself"),
    ):
        assert message in track("nowhere", video, "--point", "40,30", *arguments, fails=True)
    assert before == (file.read_bytes(), (frames / "0.png").read_bytes())
    assert not (tmp_path / "o_masks").exists() and not (tmp_path / "new").exists()


def test_a_frame_that_cannot_be_read_leaves_nothing_behind(track, model_folder, video, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    for t, frame in enumerate(video.frames):
        Image.fromarray(frame).save(frames / f"{t}.png")
    (frames / "3.png").write_bytes(b"no picture")
    assert "3.png" in track(model_folder, frames, "--point", "40,30", "--output", tmp_path / "o.mp4", fails=True)
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]


def test_an_earlier_run_is_replaced_whole_if_asked_to(track, monkeypatch, model_folder, file, tmp_path):
    output, masks = tmp_path / "o.mp4", tmp_path / "o_masks"
    masks.mkdir()
    for name in ("00000.png", "00099.png"):
        write_palette_png(masks / name, np.zeros((9, 9), np.uint8))
    output.write_bytes(b"old")
    arguments = [model_folder, file, "--point", "40,30", "--output", output]
    assert "o.mp4 exists" in track(*arguments, fails=True)
    # Of a process that was killed just before the end; its masks were others.
    for name in (f".n.{'0' * 32}.mp4", f".o_tracks.{'0' * 32}.csv"):
        (tmp_path / name).touch()
    assert "must be a new folder" in track(*arguments[:-1], tmp_path / "n.mp4", "--masks", masks, fails=True)
    track(*arguments, "--overwrite")
    assert len(read_video(output)) == 5
    assert sorted(path.name for path in masks.iterdir()) == [f"{t:05d}.png" for t in range(5)]
    before = {path: path.read_bytes() for path in (output, *masks.iterdir())}
    monkeypatch.setattr("samoe_hf.data.video_io.write_video", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        track(*arguments, "--overwrite")
    assert {path: path.read_bytes() for path in (output, *masks.iterdir())} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "o.mp4", "o_masks", "o_tracks.csv"]
