"""A fingerprint changes with what is read, and with nothing else."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from samoe_hf.data import SyntheticVideos, Video, read_video, write_video
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.data.fingerprints import fingerprint, frames_fingerprint, video_fingerprint
from samoe_hf.data.frames import ArrayFrames
from samoe_hf.data.schema import video_from_row, video_to_row


def write_frames(kind, path, frames):
    if kind == "video":
        write_video(path.with_suffix(".mp4"), frames)
        return path.with_suffix(".mp4")
    images = [Image.fromarray(frame) for frame in frames]
    if kind == "stack":
        images[0].save(path.with_suffix(".tif"), save_all=True, append_images=images[1:])
        return path.with_suffix(".tif")
    path.mkdir(exist_ok=True)
    for t, image in enumerate(images):
        image.save(path / f"{t}.png")
    return path


@pytest.fixture(scope="module")
def video():
    return SyntheticVideos(1, 4, (48, 64), seed=3)[0]


@pytest.mark.parametrize("kind", ["folder", "video", "stack"])
def test_frames_in_files(video, tmp_path, kind):
    frames = np.stack(list(video.frames))
    path = write_frames(kind, tmp_path / "a", frames)
    first = frames_fingerprint(read_video(path))
    for file in [path] if path.is_file() else path.iterdir():
        os.utime(file, (1, 1))
    assert frames_fingerprint(read_video(path)) == first
    moved = tmp_path / f"b{path.suffix}"  # a video that is written once more has another time in it
    (shutil.copy if path.is_file() else shutil.copytree)(path, moved)
    assert frames_fingerprint(read_video(moved)) == first, "wherever they lie"
    frames[2] = 255 - frames[2]
    assert frames_fingerprint(read_video(write_frames(kind, tmp_path / "a", frames))) != first


def changed(video, frame=None, mask=None):
    frames, masks = np.stack(list(video.frames)), np.stack([video.masks(t) for t in range(len(video))])
    if frame is not None:
        frames[frame, 5, 5] += 1
    if mask is not None:
        masks[mask, 0, 5, 5] ^= True
    return Video("another name", ArrayFrames(frames), MaskArrays(masks, video.object_ids))


@pytest.mark.parametrize("as_read", [lambda video: video, lambda video: video_from_row(video_to_row(video))])
def test_frames_and_masks_of_a_video(video, as_read):
    first = video_fingerprint(as_read(changed(video)))
    assert video_fingerprint(as_read(changed(video))) == first
    assert len({first, *(video_fingerprint(as_read(changed(video, frame=t))) for t in range(4))}) == 5
    assert len({first, *(video_fingerprint(as_read(changed(video, mask=t))) for t in range(4))}) == 5


def test_values_are_told_apart(tmp_path):
    (tmp_path / "a").write_bytes(bytes(300_000))
    (tmp_path / "b").write_bytes(bytes(300_000) + b"1")
    values = [1, "1", b"1", None, [1], [[1]], [1, 2], {1: 2}, tmp_path / "a", tmp_path / "b"]
    values += [np.arange(2), np.arange(2.0), np.zeros((1, 2))]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint({1: 2, 3: 4}) == fingerprint({3: 4, 1: 2})
