"""A dataset is labelled: from masks, boxes and files of prompts, once for each video, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image

from helpers.reference import ROOT
from samoe_hf.cli import main
from samoe_hf.data import load_videos, write_video
from samoe_hf.data.synthetic import SyntheticVideos
from samoe_hf.data.video_io import read_label_png, write_palette_png
from samoe_hf.evaluation.evaluate import segment_video
from samoe_hf.inference import evaluation_mode, track_video
from samoe_hf.labelling import read_prompts, video_paths
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import load_processor

NUM_VIDEOS, NUM_FRAMES = 3, 4


def save_videos(folder, num_videos=NUM_VIDEOS, num_frames=NUM_FRAMES, size=(64, 80)):
    """Videos as folders of frames, each with the mask of its first frame alone."""
    videos = SyntheticVideos(num_videos, num_frames, size, max_objects=2, seed=3)
    for video in videos:
        for t in range(len(video)):
            path = folder / "frames" / video.video_id / f"{t:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(video.frames[t]).save(path)
        path = folder / "masks" / video.video_id / "000.png"
        path.parent.mkdir(parents=True)
        write_palette_png(path, video.id_map(0))
    return videos


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    save_videos(folder)
    return folder


def label(model, *words, device="cpu"):
    main(["label", str(model), *map(str, words), "--device", device])


def read_masks(folder):
    return {path.relative_to(folder).as_posix(): read_label_png(path) for path in sorted(folder.rglob("*.png"))}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


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
    # What was written is a dataset of the same kind.
    (tmp_path / "again").mkdir()
    os.symlink(masks, tmp_path / "again" / "masks")
    os.symlink(data / "frames", tmp_path / "again" / "frames")
    assert len(load_videos(tmp_path / "again")[0].annotated_frames) == NUM_FRAMES


def write_prompts(path, entries):
    lines = "\n".join(json.dumps(entry) for entry in entries)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(entries))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_prompts_come_from_a_file(model_folder, tmp_path, suffix):
    clips = tmp_path / "clips"
    video = SyntheticVideos(1, 5, (64, 80), max_objects=2, seed=3)[0]
    (clips / "day").mkdir(parents=True)
    write_video(clips / "day" / "one.mp4", list(video.frames))
    for t in range(len(video)):
        (clips / "two").mkdir(exist_ok=True)
        Image.fromarray(video.frames[t]).save(clips / "two" / f"{t}.jpg")
    write_palette_png(tmp_path / "first.png", (video.masks(2)[0]).astype(np.uint8))
    prompts = write_prompts(
        tmp_path / f"prompts{suffix}",
        [
            {"video": "day/one", "points": [[40, 30], [10, 10]], "labels": [1, 0]},
            {"video": "two", "object": 3, "box": [10, 10, 60, 50]},
            {"video": "two", "object": 5, "frame": 2, "mask": "first.png"},
        ],
    )
    label(model_folder, "--dataset", clips, "--prompts", prompts, "--output", tmp_path / "out")
    found = read_masks(tmp_path / "out" / "masks" / "clips" / "Annotations")
    assert len(found) == 10 and all(set(np.unique(ids)) <= {0, 1} for n, ids in found.items() if n.startswith("day"))
    two = [ids for name, ids in found.items() if name.startswith("two")]
    assert len(two) == 5 and set(np.unique(two[2])) <= {0, 3, 5} and 5 in two[2]
    # Objects may overlap in the layout of SA-V.
    words = ["--dataset", clips, "--prompts", prompts, "--layout", "sa_v", "--output", tmp_path / "sa_v"]
    label(model_folder, *words)
    assert {path.name for path in (tmp_path / "sa_v/masks/clips/two").iterdir()} == {"002", "004"}


def test_videos_may_be_added_and_prompts_mended(model_folder, tmp_path):
    frames = SyntheticVideos(1, 2, (64, 80), seed=3)[0].frames
    for folder in "ab":
        for t in range(2):
            (tmp_path / "clips" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(frames[t]).save(tmp_path / "clips" / folder / f"{t}.png")
    (tmp_path / "clips" / "a" / "loop").symlink_to(tmp_path / "clips")
    assert video_paths(tmp_path / "clips").keys() == {"a", "b"}
    a, outside, b = ({"video": name, "box": [5, 5, x, 60]} for name, x in (("a", 60), ("b", 50), ("b", 40)))
    outside["box"] = [500, 5, 600, 60]
    words = ["--dataset", tmp_path / "clips", "--prompts", tmp_path / "p.json", "--output", tmp_path / "out"]
    write_prompts(tmp_path / "p.json", [a, outside])
    with pytest.raises(SystemExit, match=r"b: The box .* lies outside"):
        label(model_folder, *words)
    finished = tmp_path / "out" / "finished" / "clips" / "a.json"
    before = finished.stat().st_mtime_ns
    write_prompts(tmp_path / "p.json", [a, b])
    label(model_folder, *words)
    assert finished.stat().st_mtime_ns == before and len(read_masks(tmp_path / "out")) == 4
    write_prompts(tmp_path / "p.json", [{**a, "box": [5, 5, 50, 60]}, b])
    with pytest.raises(SystemExit, match="has clips/a from other prompts"):
        label(model_folder, *words)


def test_a_video_may_lie_within_anothers_folder(model_folder, tmp_path):
    frames = SyntheticVideos(1, 2, (64, 80), seed=3)[0].frames
    for folder in ("b/a", "b"):
        for t in range(2):
            (tmp_path / "clips" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(frames[t]).save(tmp_path / "clips" / folder / f"{t}.png")
    prompts = [{"video": name, "object": i, "box": [5, 5, 60, 60]} for i, name in ((1, "b/a"), (2, "b"))]
    write_prompts(tmp_path / "p.json", prompts)
    words = ["--dataset", tmp_path / "clips", "--prompts", tmp_path / "p.json", "--output", tmp_path / "out"]
    label(model_folder, *words, "--layout", "davis")
    masks = read_masks(tmp_path / "out" / "masks" / "clips")
    assert masks.keys() == {"b/0.png", "b/1.png", "b/a/0.png", "b/a/1.png"}
    assert {name: int(ids.max()) for name, ids in masks.items() if ids.any()}.items() <= {
        "b/0.png": 2, "b/1.png": 2, "b/a/0.png": 1, "b/a/1.png": 1,
    }.items()  # fmt: skip


def test_a_stopped_run_goes_on_and_another_is_refused(model_folder, data, tmp_path, capsys, monkeypatch):
    from samoe_hf import labelling

    words = ["--dataset", data, "--output", tmp_path / "out"]
    tracked = []

    def stop_at_the_second(model, processor, frames, prompts):
        if len(tracked) == 1:
            raise KeyboardInterrupt
        tracked.append(frames)
        return track_video(model, processor, frames, prompts)

    monkeypatch.setattr(labelling, "track_video", stop_at_the_second)
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
    label(model_folder, "--dataset", data, "--output", tmp_path / "undisturbed")
    assert same(read_masks(tmp_path / "out"), read_masks(tmp_path / "undisturbed"))
    label(model_folder, *words)
    assert "all were labelled already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="from other prompts"):
        label(model_folder, *words, "--prompt", "box")
    with pytest.raises(SystemExit, match="holds the results of another run: `layout` is"):
        label(model_folder, *words, "--layout", "davis")
    label(model_folder, *words, "--prompt", "box", "--overwrite")
    assert not same(read_masks(tmp_path / "out"), read_masks(tmp_path / "undisturbed"))


def test_labels_are_pushed_as_a_dataset(model_folder, data, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.Dataset, "push_to_hub", lambda self, name: self.save_to_disk(str(tmp_path / name)))
    label(model_folder, "--dataset", data, "--output", tmp_path / "out", "--push-to-hub", "labels")
    rows = load_from_disk(str(tmp_path / "labels"))
    assert len(rows) == NUM_VIDEOS and rows[0]["annotated_frames"] == [*range(NUM_FRAMES)]
    masks = read_masks(tmp_path / "out" / "masks")
    for video in load_videos("dataset", str(tmp_path / "labels")):
        for t in range(NUM_FRAMES):
            assert np.array_equal(video.id_map(t), masks[f"clips/Annotations/{video.video_id}/{t:03d}.png"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "at least one"),
        ('{"video": "a"}', "must hold a list"),
        ('[{"object": 1}]', "prompt 1: expected an object with `video`"),
        ('[{"video": "a", "boxes": [1]}]', "prompt 1: unknown key 'boxes'"),
        ('[{"video": "a", "points": [[1]]}]', "prompt 1: `points` must hold 2 numbers"),
        ('[{"video": "a", "box": [1, 2, 3, "4"]}]', "prompt 1: `box` must hold 4 numbers"),
        (
            '[{"video": "a", "points": [[1, 2]]}, {"video": "a", "object": "1"}]',
            "prompt 2: `object` must be an integer",
        ),
        ('[{"video": "a", "object": 0}]', "prompt 1: `object` must be an integer of at least 1"),
        ('[{"video": "a", "points": [[1, 2]], "labels": [[1]]}]', "prompt 1: `labels` must be 0 or 1"),
        ('[{"video": "a", "box": [1, 2, 3, 1%s]}]' % ("0" * 400), "prompt 1: int too large"),
        (
            '[{"video": "a", "box": [1, 2, 3, 4]}, {"video": "a", "points": [[1, 2]]}]',
            "prompt 2: object 1 of 'a' has two",
        ),
        ('[{"video": "a", "mask": "../secret.png"}]', "prompt 1: .*no path within a folder"),
        ('[{"video": "a", "mask": "/etc/passwd"}]', "prompt 1: .*no path within a folder"),
    ],
)
def test_files_of_prompts_that_are_wrong_are_refused(tmp_path, content, message):
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "prompts.json")


def test_wrong_prompts_are_told_before_anything_is_written(model_folder, data, tmp_path):
    prompts = write_prompts(tmp_path / "p.json", [{"video": "frames/nobody", "points": [[1, 1]]}])
    words = ["--dataset", data, "--prompts", prompts, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match="`video` 'frames/nobody' is not in"):
        label(model_folder, *words)
    assert not (tmp_path / "out").exists()
    name = next(iter(video_paths(data)))
    write_prompts(prompts, [{"video": name, "points": [[1000, 1]]}])
    with pytest.raises(SystemExit, match=rf"{name}: The point \(1000.0, 1.0\) of object 1 on frame 0 lies outside"):
        label(model_folder, *words)
    assert not list((tmp_path / "out").rglob("*.png"))
    with pytest.raises(SystemExit):
        label(model_folder, "--dataset", "davis", "--root", data, "--prompts", prompts, "--output", tmp_path / "b")
    with pytest.raises(SystemExit, match="neither video files nor folders of images"):
        (tmp_path / "empty").mkdir()
        label(model_folder, "--dataset", tmp_path / "empty", "--prompts", prompts, "--output", tmp_path / "b")


def start(model_folder, data, output):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(ROOT / "scripts" / "track.py"), str(model_folder)),
        *("--dataset", str(data), "--output", str(output), "--device", "cpu"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_that_are_killed_three_times_label_as_one(model_folder, tmp_path):
    data, num_videos = tmp_path / "clips", 200
    save_videos(data, num_videos, 6)
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
    label(model_folder, "--dataset", data, "--output", tmp_path / "one")
    assert same(read_masks(tmp_path / "one" / "masks"), read_masks(tmp_path / "two" / "masks"))
    summary = json.loads((tmp_path / "two" / "labels.json").read_text())
    assert summary["num_processes"] == 2 and 0 < summary["labelled_now"] < num_videos
