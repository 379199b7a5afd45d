"""What takes long with many files, objects or prompts grows with their number, and no faster."""

import re
import time
from contextlib import contextmanager

from helpers.layouts import label_map, save_image
from samoe_hf.data import load_videos


@contextmanager
def within(seconds):
    """What follows takes a hundredth of this time, and what compares each with each far more."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


def test_many_videos_beside_each_other_are_told_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(re, "_MAXCACHE", 512)  # as Python has it
    re.purge()
    save_image(tmp_path / "one.png", label_map((1, 2)))
    content = (tmp_path / "one.png").read_bytes()
    (tmp_path / "one.png").unlink()
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for name in (f"video{v:04d}_{t}.png" for v in range(600) for t in range(2)):
            (tmp_path / kind / name).write_bytes(content)
    with within(20):
        videos = load_videos("files", tmp_path)
    assert len(videos) == 600 and {len(video.annotated_frames) for video in videos[::100]} == {2}
