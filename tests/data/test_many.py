"""What takes long with many files, objects or prompts grows with their number, and no faster."""

import json
import re
import time
from contextlib import contextmanager

import numpy as np

from samoe_hf.data import load_videos, read_video, write_video
from samoe_hf.data.images import encode_png
from samoe_hf.inference import check_prompts
from samoe_hf.labelling import read_prompts


@contextmanager
def within(seconds):
    """What follows takes less than this time, of which it needs a tenth or less."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


def write_files(root, names):
    content = encode_png(np.zeros((4, 4, 3), np.uint8))
    for path in (root / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_many_videos_beside_each_other_are_told_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(re, "_MAXCACHE", 512)  # as Python has it
    re.purge()
    names = [f"video{v:04d}_{t}.png" for v in range(600) for t in range(2)]
    write_files(tmp_path, [f"{kind}/{name}" for name in names for kind in ("images", "masks")])
    with within(20):
        videos = load_videos("files", tmp_path)
    assert len(videos) == 600 and {len(video.annotated_frames) for video in videos[::100]} == {2}


def test_pictures_of_many_masks_are_left_out(tmp_path):
    write_files(tmp_path, [f"v/{kind}/{t:05d}.png" for t in range(6000) for kind in ("frames", "masks")])
    write_files(tmp_path, ["v/masks/preview.png"])
    with within(10):
        (video,) = load_videos("files", tmp_path)
    assert len(video.annotated_frames) == 6000


def test_many_prompts_are_read_and_checked(tmp_path):
    entries = [{"video": "v", "object": o, "frame": t, "box": [1, 1, 9, 9]} for o in range(1, 6) for t in range(3000)]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    with within(25):
        prompts = [prompt.read(tmp_path) for prompt in read_prompts(tmp_path / "prompts.json")["v"]]
        check_prompts(prompts, 3000, (10, 10))
    assert len(prompts) == 15_000


def test_a_video_file_is_read_backward_about_as_fast_as_forward(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    write_video(tmp_path / "v.mp4", (np.roll(image, t, 1) for t in range(240)))  # of one key frame
    frames = read_video(tmp_path / "v.mp4")
    expected, start = list(frames), time.process_time()
    forward = [frames[t] for t in range(240)]
    with within(1 + 5 * (time.process_time() - start)):
        backward = [frames[t] for t in range(239, -1, -1)]
    assert np.array_equal(forward, expected) and np.array_equal(backward[::-1], expected)
