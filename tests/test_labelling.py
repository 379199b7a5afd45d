"""A dataset is labelled: from masks, boxes and files of prompts, once for each video, whole or not at all."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import time
import unicodedata
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from PIL import Image

from helpers.edgetam import slow_over_bases
from helpers.own_videos import save, save_videos
from helpers.processes import ENVIRONMENT, LAUNCH
from helpers.reference import ROOT
from samoe_hf.cli import main
from samoe_hf.data import VideoList, load_videos, write_video
from samoe_hf.data.annotations import Shapes
from samoe_hf.data.images import read_label_png
from samoe_hf.data.synthetic import SyntheticVideos
from samoe_hf.errors import InputError
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.inference import evaluation_mode, load_processor, tracking_steps
from samoe_hf.labelling import from_first_frames, from_prompt_file, read_prompts, video_paths
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.tracks import TrackRow, read_tracks
from samoe_hf.where_to_look import where_to_look

NUM_VIDEOS, NUM_FRAMES = 3, 4
PLACES = ("frames/{v}/{t:03d}.png", "masks/{v}/{t:03d}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos as folders of frames, each with the mask of its first frame alone."""
    videos = SyntheticVideos(NUM_VIDEOS, NUM_FRAMES, (64, 80), max_objects=2, seed=3)
    return save_videos(tmp_path_factory.mktemp("data") / "clips", videos, *PLACES, num_masks=1)


def label(model, *words, device="cpu"):
    main(["label", str(model), *map(str, words), "--device", device])


def read_masks(folder):
    return {path.relative_to(folder).as_posix(): read_label_png(path) for path in sorted(folder.rglob("*.png"))}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@slow_over_bases
@pytest.mark.parametrize("prompt", ["mask", "box"])
def test_videos_are_labelled_from_their_first_masks(model_folder, data, tmp_path, capsys, prompt):
    label(model_folder, "--dataset", data, "--prompt", prompt, "--output", tmp_path / "out")
    model = SamoeModel.from_pretrained(model_folder)
    processor = load_processor(model_folder, model)
    videos = load_videos(data)
    masks = tmp_path / "out" / "masks" / videos[0].domain / "Annotations"
    found = read_masks(masks)
    assert len(found) == NUM_VIDEOS * NUM_FRAMES
    for video in videos:
        with evaluation_mode(model):
            expected, _ = segment_video(model, processor, video, prompt)
        for t in range(len(video)):
            ids = found[f"{video.video_id}/{t:03d}.png"]
            assert set(np.unique(ids)) <= {0, *video.object_ids}
            assert np.array_equal(ids > 0, expected[t].any(axis=0))
    summary = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert summary["num_frames"] == NUM_VIDEOS * NUM_FRAMES and summary["labelled_now"] == NUM_VIDEOS
    assert len(summary["videos"]) == NUM_VIDEOS and summary["videos_per_hour"] > 0
    printed = capsys.readouterr().out
    assert "videos an hour with 1 process on cpu" in printed and "Written: masks in" in printed
    assert f"; {summary['worth_a_look']} frames are worth a look" in printed


@slow_over_bases
def test_videos_are_labelled_at_once_as_one_by_one(model_folder, data, tmp_path, capsys):
    for count in ("1", "2", "auto"):
        label(model_folder, "--dataset", data, "--output", tmp_path / count, "--videos-at-once", count)
        masks, alone = read_masks(tmp_path / count), read_masks(tmp_path / "1")
        # Batches are rounded otherwise: some pixel at the edge of a mask may fall to the other side.
        assert masks.keys() == alone.keys() and all((masks[name] != alone[name]).mean() < 1e-3 for name in alone)
    summaries = [json.loads((tmp_path / count / "labels.json").read_text()) for count in ("1", "2", "auto")]
    assert [summary["videos_at_once"] for summary in summaries] == [1, 2, 8]
    for wrong in ("0", "-1", "many"):
        with pytest.raises(SystemExit):
            label(model_folder, "--dataset", data, "--output", tmp_path / "no", f"--videos-at-once={wrong}")
        assert f"--videos-at-once: must be an integer from 1 on, or auto, got '{wrong}'" in capsys.readouterr().err


def test_what_tracking_says_lies_beside_the_masks(model_folder, data, tmp_path):
    label(model_folder, "--dataset", data, "--output", tmp_path / "out", "--layout", "sa_v")
    summary, looks = json.loads((tmp_path / "out" / "labels.json").read_text()), []
    for video in load_videos(data):
        key = f"{video.domain}/{video.video_id}"
        rows = read_tracks(tmp_path / "out" / "tracks" / f"{key}.csv")
        assert [(r.frame, r.object) for r in rows] == [(t, i) for t in range(NUM_FRAMES) for i in video.object_ids]
        for row in rows:
            mask = tmp_path / "out" / "masks" / key / f"{row.object - 1:03d}" / f"{row.frame:03d}.png"
            assert row.area == read_label_png(mask).sum() and row.prompted == (row.frame == 0) and row.time is None
        for object_id, about in summary["videos"][key]["tracks"].items():
            seen = [row for row in rows if row.object == int(object_id) and row.seen]
            assert about["frames"] == len(seen) and about["iou"] == pytest.approx(
                np.mean([r.iou for r in seen]), abs=1e-4
            )
        looks += [(look.settles, key, look) for look in where_to_look(rows)]
    with (tmp_path / "out" / "where_to_look.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(looks) == summary["worth_a_look"] > 0
    assert [float(one["settles"]) for one in found] == sorted((settles for settles, *_ in looks), reverse=True)
    assert {(one["video"], int(one["frame"]), one["reason"]) for one in found} == {
        (key, look.frame, look.reason) for _, key, look in looks
    }


def write_prompts(path, entries):
    lines = "\n".join(json.dumps(entry) for entry in entries)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(entries))
    return path


@pytest.fixture
def clips(tmp_path):
    """A folder with the video file `day/one` and the folders of two frames `b` and `b/a`, and a link to itself."""
    folder = tmp_path / "clips"
    frames = list(SyntheticVideos(1, 2, (64, 80), seed=3)[0].frames)
    for name in ("b", "b/a", "day"):
        (folder / name).mkdir(parents=True)
    write_video(folder / "day" / "one.mp4", frames)
    for name in ("b", "b/a"):
        for t, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / name / f"{t}.png")
    (folder / "b" / "loop").symlink_to(folder)
    assert video_paths(folder).keys() == {"b", "b/a", "day/one"}
    return folder


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_prompts_come_from_a_file(model_folder, clips, tmp_path, suffix):
    """A video may lie within another's folder; objects may overlap in the layout of SA-V."""
    mask = np.zeros((64, 80), np.uint8)
    mask[20:40, 20:40] = 200
    Image.fromarray(mask).save(tmp_path / "first.png")
    entries = [
        {"video": "day/one", "points": [[40, 30], [10, 10]], "labels": [1, 0]},
        {"video": "b", "object": 3, "box": [10, 10, 60, 50]},
        {"video": "b", "object": 3, "frame": 1, "end": True},
        {"video": "b", "object": 5, "frame": 1, "mask": "first.png"},
        {"video": "b/a", "object": 2, "box": [5, 5, 60.5, 60]},
    ]
    prompts = write_prompts(tmp_path / f"prompts{suffix}", entries)
    words = ["--dataset", clips, "--prompts", prompts, "--output"]
    label(model_folder, *words, tmp_path / "out", "--layout", "davis")
    masks = tmp_path / "out" / "masks" / "clips"
    ids = {name: set(np.unique(found)) for name, found in read_masks(masks).items()}
    assert ids.keys() == {f"{name}.png" for name in ("b/0", "b/1", "b/a/0", "b/a/1", "day/one/00000", "day/one/00001")}
    own = {"b/a": {2}, "b": {3, 5}, "day/one": {1}}
    assert all(found <= {0, *own[name.rpartition("/")[0]]} for name, found in ids.items())
    assert 5 in ids["b/1.png"] and 3 in ids["b/0.png"] - ids["b/1.png"]
    label(model_folder, *words, tmp_path / "sa_v", "--layout", "sa_v")
    assert {"002", "004"} <= {path.name for path in (tmp_path / "sa_v/masks/clips/b").iterdir()}


def test_videos_may_be_added_and_prompts_mended(model_folder, clips, tmp_path):
    a, outside, b = ({"video": name, "box": [5, 5, x, 60]} for name, x in (("b/a", 60), ("b", 50), ("b", 40)))
    outside["box"] = [500, 5, 600, 60]
    words = ["--dataset", clips, "--prompts", tmp_path / "p.json", "--output", tmp_path / "out"]
    write_prompts(tmp_path / "p.json", [a, outside])
    with pytest.raises(SystemExit, match=r"b: The box .* lies outside"):
        label(model_folder, *words)
    finished = tmp_path / "out" / "finished" / "clips" / "b" / "a.json"
    before = finished.stat().st_mtime_ns
    write_prompts(tmp_path / "p.json", [a, b])
    label(model_folder, *words)
    assert finished.stat().st_mtime_ns == before and len(read_masks(tmp_path / "out")) == 4
    write_prompts(tmp_path / "p.json", [{**a, "box": [5, 5, 50, 60]}, b])
    with pytest.raises(SystemExit, match="has clips/b/a from other prompts"):
        label(model_folder, *words)
    write_prompts(tmp_path / "p.json", [a, outside])
    with pytest.raises(SystemExit, match=r"b: The box .* lies outside"):
        label(model_folder, *words, "--overwrite")
    assert finished.stat().st_mtime_ns == before and len(read_masks(tmp_path / "out")) == 4, "nothing is lost"


def test_a_stopped_run_goes_on_and_another_is_refused(model_folder, data, tmp_path, capsys, monkeypatch):
    from samoe_hf import labelling

    words = ["--dataset", data, "--output", tmp_path / "out"]
    tracked = []

    def stop_at_the_second(model, processor, frames, prompts):
        if len(tracked) == 1:
            raise KeyboardInterrupt
        tracked.append(frames)
        return tracking_steps(model, processor, frames, prompts)

    monkeypatch.setattr(labelling, "tracking_steps", stop_at_the_second)
    words += ["--videos-at-once", 1]
    with pytest.raises(KeyboardInterrupt):
        label(model_folder, *words)
    monkeypatch.undo()
    (first,) = (tmp_path / "out" / "finished").rglob("*.json")
    assert len(read_masks(tmp_path / "out")) == NUM_FRAMES, "nothing half-written"
    leftover = tmp_path / "out" / ".unfinished" / "killed" / "000.png"  # of a process that could not tidy up
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    before = first.stat().st_mtime_ns
    label(model_folder, *words)
    assert first.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "out" / "labels.json").read_text())["labelled_now"] == NUM_VIDEOS - 1
    label(model_folder, *words, "--output", tmp_path / "undisturbed")
    assert same(read_masks(tmp_path / "out"), read_masks(tmp_path / "undisturbed"))
    label(model_folder, *words)
    assert "all were labelled already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="from other prompts"):
        label(model_folder, *words, "--prompt", "box")
    with pytest.raises(SystemExit, match="holds the results of another run: `layout` is"):
        label(model_folder, *words, "--layout", "davis")
    label(model_folder, *words, "--prompt", "box", "--overwrite")
    assert not same(read_masks(tmp_path / "out"), read_masks(tmp_path / "undisturbed"))


@pytest.fixture
def one_video(tmp_path):
    """A folder with a video of 6 frames, whose first one has a mask, and that mask."""
    video = replace(SyntheticVideos(1, 6, (64, 80), seed=3)[0], video_id="v")
    return save_videos(tmp_path / "data", [video], num_masks=1), tmp_path / "data" / "v" / "masks" / "0.png"


def moved(ids):
    return np.roll(ids, 9, axis=0)


def test_labels_of_other_masks_or_frames_are_not_taken_for_the_new_ones(model_folder, one_video, tmp_path):
    data, mask = one_video
    prompts = write_prompts(tmp_path / "p.json", [{"video": "v/frames", "mask": "mask.png"}])
    Image.fromarray((read_label_png(mask) == 1).astype(np.uint8)).save(tmp_path / "mask.png")
    first = ["--dataset", data, "--output", tmp_path / "first"]
    second = ["--dataset", data, "--prompts", prompts, "--output", tmp_path / "second"]
    frame = data / "v" / "frames" / "4.png"
    for words, changed in [(first, mask), (second, tmp_path / "mask.png"), (first, frame), (second, frame)]:
        label(model_folder, *words, "--overwrite")
        before = changed.read_bytes()
        Image.fromarray(moved(np.asarray(Image.open(changed)))).save(changed)
        with pytest.raises(SystemExit, match="from other prompts or frames"):
            label(model_folder, *words)
        changed.write_bytes(before)
        label(model_folder, *words)


def test_a_video_is_finished_when_its_masks_are_there(model_folder, one_video, tmp_path, capsys, monkeypatch):
    def refuse_unfinished(source, target, *, move, **options):
        if ".unfinished" in str(source):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        move(source, target, **options)

    for name in ("rename", "replace"):  # masks may lie on another disk
        monkeypatch.setattr(os, name, partial(refuse_unfinished, move=getattr(os, name)))
    words = ["--dataset", one_video[0], "--output", tmp_path / "out"]
    label(model_folder, *words)
    before = read_masks(tmp_path / "out")
    lost, stale = ((tmp_path / "out" / "masks").rglob("3.png"), (tmp_path / "out" / "masks").rglob("5.png"))
    next(lost).unlink()
    path = next(stale)
    path.rename(path.with_name("from_another_attempt.png"))
    label(model_folder, *words)
    assert "v is labelled anew: 5 of 6 masks are there" in capsys.readouterr().out
    assert same(before, read_masks(tmp_path / "out"))
    (tracks,) = (tmp_path / "out" / "tracks").rglob("*.csv")
    tracks.unlink()
    label(model_folder, *words)
    assert "v.csv is missing" in capsys.readouterr().out and tracks.is_file()
    (finished,) = (tmp_path / "out" / "finished").rglob("*.json")
    finished.write_text("")
    label(model_folder, *words)
    assert "v.json is damaged" in capsys.readouterr().out
    assert same(before, read_masks(tmp_path / "out"))


def test_videos_that_cannot_be_opened_are_left_out(model_folder, tmp_path):
    """Those that were labelled before, too."""
    videos = [replace(video, video_id=name) for video, name in zip(SyntheticVideos(3, 2, (64, 80)), "abc", strict=True)]
    data = save_videos(tmp_path / "data", videos)
    words, paths = ["--dataset", data, "--output", tmp_path / "out"], [data / "a/frames/0.png", data / "b/masks/0.png"]
    whole = [path.read_bytes() for path in paths]
    for is_damaged in (True, False, True):
        for path, content in zip(paths, whole, strict=True):
            path.write_bytes(b"damaged" if is_damaged else content)
        if is_damaged:
            with pytest.raises(SystemExit, match=r"2 of 3 videos are not labelled.*a/frames/0\.png.*b/masks/0\.png"):
                label(model_folder, *words)
        else:
            label(model_folder, *words)
        summary = json.loads((tmp_path / "out" / "labels.json").read_text())
        assert [*summary["videos"]] == [f"data/{name}" for name in ("c" if is_damaged else "abc")]
        assert [*summary["failed"]] == (["a", "data/b"] if is_damaged else [])


def test_videos_without_objects_are_left_out_which_is_said(capsys):
    video, other = SyntheticVideos(2, 2, (64, 80))
    bare = [replace(video, annotations=Shapes({0: {}}, ids)) for ids in ([], [1])]
    assert [one.video_id for one in from_first_frames([*bare, other])] == [other.video_id]
    assert capsys.readouterr().out == f"2 videos show no object and are left out, such as {video.video_id}.\n"


def test_videos_are_not_kept_open():
    opened = []

    def open_video(_, seed):
        opened.append(weakref.ref(video := SyntheticVideos(1, 2, (64, 80), seed=seed)[0]))
        return video

    assert len(from_first_frames(VideoList({"a": 1, "b": 2}, open_video))) == 2 == len(opened)
    assert [video() for video in opened] == [None, None]


def test_videos_of_one_name_are_refused_before_anything_is_removed(model_folder, one_video, tmp_path):
    label(model_folder, "--dataset", one_video[0], "--output", tmp_path / "out")
    (tmp_path / "two.yaml").write_text(json.dumps({"eval_data": [str(one_video[0])] * 2}))
    with pytest.raises(SystemExit, match="Two videos are called data/v"):
        label(model_folder, "--dataset", tmp_path / "two.yaml", "--output", tmp_path / "out", "--overwrite")
    assert len(read_masks(tmp_path / "out")) == 6


def test_damaged_videos_of_several_datasets_are_told_apart(model_folder, damaged_rows, tmp_path):
    with pytest.raises(SystemExit, match=r"2 of 4 videos .* bad 0, frame .* bad 1, frame "):
        label(model_folder, "--dataset", damaged_rows, "--output", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert len(summary["videos"]) == 2 and [*summary["failed"]] == ["dataset 1, video 1", "dataset 2, video 1"]


def test_labels_that_are_being_replaced_are_not_finished(model_folder, one_video, tmp_path, monkeypatch):
    words = ["--dataset", one_video[0], "--output", tmp_path / "out"]
    label(model_folder, *words)
    before, remove = read_masks(tmp_path / "out"), shutil.rmtree
    for place in ("finished", "masks"):

        def removed_and_killed(path, *more, place=place, **options):
            remove(path, *more, **options)
            if Path(path).name == place:
                raise KeyboardInterrupt

        monkeypatch.setattr(shutil, "rmtree", removed_and_killed)
        with pytest.raises(KeyboardInterrupt):
            label(model_folder, *words, "--prompt", "box", "--overwrite")
        monkeypatch.undo()
        label(model_folder, *words)
        assert same(before, read_masks(tmp_path / "out"))


def test_a_second_process_disturbs_no_labels(model_folder, one_video, tmp_path, monkeypatch):
    words = ["--dataset", one_video[0], "--output", tmp_path / "out"]

    def start_another(*arguments):
        with pytest.raises(SystemExit, match=f"is being written by another process: `.* \\(process {os.getpid()} "):
            label(model_folder, *words, "--overwrite")
        return tracking_steps(*arguments)

    monkeypatch.setattr("samoe_hf.labelling.tracking_steps", start_another)
    label(model_folder, *words)
    assert len(read_masks(tmp_path / "out")) == 6


def test_labels_are_pushed_as_a_dataset(model_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(Dataset, "push_to_hub", lambda self, name: self.save_to_disk(str(tmp_path / name)))
    label(model_folder, "--dataset", data, "--output", tmp_path / "out", "--push-to-hub", "labels")
    videos, masks = load_videos("dataset", str(tmp_path / "labels")), read_masks(tmp_path / "out" / "masks")
    assert len(videos) == NUM_VIDEOS
    for video in videos:
        for t in range(NUM_FRAMES):
            assert np.array_equal(video.id_map(t), masks[f"clips/Annotations/{video.video_id}/{t:03d}.png"])
    for row in load_from_disk(str(tmp_path / "labels")):
        table = read_tracks(tmp_path / "out" / "tracks" / row["domain"] / f"{row['video_id']}.csv")
        assert [TrackRow(**track) for track in row["tracks"]] == table and len(table) >= NUM_FRAMES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "at least one"),
        ('{"video": "a"}', "must hold a list"),
        ('[{"object": 1}]', "number 1, need the option 'video'"),
        ('[{"video": "a", "boxes": [1]}]', "no option 'boxes'; did you mean 'box'"),
        ('[{"video": "a", "points": [[1]]}]', "`points` must be a list of"),
        ('[{"video": "a", "box": [1, 2, 3, "4"]}]', "`box` must be"),
        (
            '[{"video": "a", "points": [[1, 2]]}, {"video": "a", "object": "1"}]',
            "number 2,: `object` must be an integer",
        ),
        ('[{"video": "a", "object": 0}]', "an `object` from 1"),
        ('[{"video": "a", "end": 7}]', "`end` must be bool, not 7"),
        ('[{"video": "a", "points": [[1, 2]], "labels": [[1]]}]', "`labels` must be"),
        ('[{"video": "a", "box": [1, 2, 3, 1%s]}]' % ("0" * 400), "int too large"),
        ('[{"video": "a", "box": [1, 2, 3, 4]}, {"video": "a"}]', "number 2, must be one for an object of 'a'"),
        ('[{"video": "a", "mask": "../secret.png"}]', "no path within a folder"),
    ],
)
def test_files_of_prompts_that_are_wrong_are_refused(tmp_path, content, message):
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / "prompts.json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_of_prompts_may_have_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "p.json").write_text('[{"video": "é", "box": [1, 2, 3, 4]}]', encoding=encoding)
    assert [*read_prompts(tmp_path / "p.json")] == ["é"]


def test_a_file_of_prompts_may_have_names_of_another_unicode_form(tmp_path):
    video, mask = (unicodedata.normalize("NFD", name) for name in ("bébé", "tête.png"))
    save(tmp_path / "videos" / video / "0.png", np.zeros((8, 8, 3), np.uint8))
    save(tmp_path / mask, np.eye(8, dtype=np.uint8))
    (tmp_path / "prompts.json").write_text('[{"video": "bébé", "mask": "tête.png"}]')
    (prompted,) = from_prompt_file(tmp_path / "prompts.json", tmp_path / "videos")
    assert prompted.fingerprint and prompted.prompts(prompted.open())[0].mask.sum() == 8


def test_frames_of_one_name_are_refused_since_masks_have_it(tmp_path):
    for suffix in ("png", "jpg"):
        save(tmp_path / "videos" / "a" / f"0.{suffix}", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "prompts.json").write_text('[{"video": "a", "box": [1, 2, 3, 4]}]')
    with pytest.raises(InputError, match="a: 2 frames are called 0"):
        from_prompt_file(tmp_path / "prompts.json", tmp_path / "videos")[0].open()


def test_wrong_prompts_are_told_before_anything_is_written(model_folder, clips, tmp_path):
    prompts = write_prompts(tmp_path / "p.json", [{"video": "nobody", "points": [[1, 1]]}])
    words = ["--prompts", prompts, "--output", tmp_path / "out", "--dataset"]
    with pytest.raises(SystemExit, match="`video` 'nobody' is not in"):
        label(model_folder, *words, clips)
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(tmp_path / "map.png")
    write_prompts(prompts, [{"video": "b", "object": 2, "mask": "map.png"}])
    with pytest.raises(InputError, match=r"map.png: read as the mask of one object, 2, but holds the values 1, 2"):
        from_prompt_file(prompts, clips)[0].prompts(None)
    for option in (["--video", "b"], ["--prompt", "box"], ["--option", "window=[0, 9]"]):
        with pytest.raises(SystemExit, match=f"`{option[0]}` does not go with `--prompts`"):
            label(model_folder, *words, clips, *option)
    with pytest.raises(SystemExit, match="neither video files nor folders of images"):
        (tmp_path / "empty").mkdir()
        label(model_folder, *words, tmp_path / "empty")
    assert not (tmp_path / "out").exists()


# Videos that are tracked at once are those that are left, and rounding depends on which are.
ALONE = ["--videos-at-once", "1"]


def start(model_folder, data, output):
    words = ["label", model_folder, "--dataset", data, "--output", output, "--device", "cpu", *ALONE]
    command = [*LAUNCH, "-m", "samoe_hf", *map(str, words)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_processes_that_are_killed_three_times_label_as_one(model_folder, tmp_path):
    data, num_videos = tmp_path / "clips", 200
    save_videos(data, SyntheticVideos(num_videos, 6, (64, 80), max_objects=2, seed=3), *PLACES, num_masks=1)
    finished = tmp_path / "two" / "finished"
    stamps = {}
    for kill in range(4):
        process = start(model_folder, data, tmp_path / "two")
        while process.poll() is None:
            time.sleep(0.2)
            count = len([*finished.rglob("*.json")]) if finished.exists() else 0
            if kill < 3 and count >= 45 * (kill + 1):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert kill < 3 or process.returncode == 0, process.stderr.read()
        for path in finished.rglob("*.json"):
            assert stamps.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, "labelled twice"
    assert len(stamps) == num_videos
    label(model_folder, "--dataset", data, "--output", tmp_path / "one", *ALONE)
    assert same(read_masks(tmp_path / "one" / "masks"), read_masks(tmp_path / "two" / "masks"))
    summary = json.loads((tmp_path / "two" / "labels.json").read_text())
    assert summary["num_processes"] == 2 and 0 < summary["labelled_now"] < num_videos
