"""Uploads: what is taken, and what is refused before it costs anything."""

import struct
import tracemalloc
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import PureWindowsPath

import numpy as np
import pytest
from PIL import Image

from samoe_hf.app.uploads import EXAMPLES, Limits, hide_paths, open_archive, open_upload, safe_name
from samoe_hf.data.frames import SampleError
from samoe_hf.data.synthetic import SYNTHETIC_DOMAINS

LIMITS = Limits()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "session"
    path.mkdir()
    return path


def png(size=(20, 30), value=7):
    stream = BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def files_of(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def zipped(folder, files):
    path = folder / "clip of frames.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_video_file_is_kept_in_the_folder(small_video, folder):
    video = open_upload([small_video], folder, LIMITS)
    assert (video.name, len(video.frames), video.frames.size, video.fps) == ("some_video", 8, (64, 96), 6)
    assert [path.name for path in folder.iterdir()] == ["00000.mp4"]


def test_frames_come_in_the_natural_order_of_their_names(tmp_path, folder):
    """Whatever folders they lie in: Gradio names one for each file by its content."""
    files = [
        files_of(tmp_path / where, {f"f{t}.png": png(value=t)})[0] for where, t in zip("abc", (10, 9, 2), strict=True)
    ]
    video = open_upload(files, folder, LIMITS)
    assert [int(frame[0, 0, 0]) for frame in video.frames] == [2, 9, 10] and video.fps == 12


def test_a_zip_of_frames(tmp_path, folder):
    path = zipped(tmp_path, {"a/10.png": png(value=2), "a/9.png": png(value=1), "a/.x.png": b"", "__MACOSX/a.png": b""})
    video = open_upload([path], folder, LIMITS)
    assert [int(frame[0, 0, 0]) for frame in video.frames] == [1, 2] and video.name == "clip_of_frames"


@pytest.mark.parametrize(
    "files,message",
    [
        ({"../a.png": png()}, "is no path within"),
        ({"/a.png": png()}, "is no path within"),
        ({"a\\..\\b.png": png()}, "is no path within"),
        ({"a/1.png": png(), "b/1.png": png()}, "in several folders"),
        ({"readme.txt": b"x"}, "holds no images"),
        ({"1.png": b"not an image"}, "not a readable image"),
        ({"1.png": png(), "2.png": png((21, 30))}, "Frame 1 has 30 x 21 pixels, but the first has 30 x 20"),
        ({f"{i}.png": png() for i in range(5)}, "has 5 frames; 4 are the most"),
        ({"1.png": bytes(2 * 10**6)}, "1000000 are the most"),
    ],
)
def test_zips_that_are_refused(tmp_path, folder, files, message):
    limits = replace(LIMITS, frames=4, upload_bytes=10**6)
    with pytest.raises(SampleError, match=message):
        open_upload([zipped(tmp_path, files)], folder, limits)
    assert not list(tmp_path.parent.glob("a.png"))


def test_a_zip_whose_directory_lies_about_a_size_is_refused(tmp_path, folder):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(5 * 10**6))
    content = path.read_bytes()
    path.write_bytes(content.replace((5 * 10**6).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    with pytest.raises(SampleError, match=r"larger than|cannot be read|no zip"):
        open_upload([path], folder, replace(LIMITS, upload_bytes=10**6))
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 10**6


def test_a_file_that_is_asked_for_again_and_again_counts_each_time(tmp_path):
    with open_archive(zipped(tmp_path, {"a.bmp": bytes(900)}), replace(LIMITS, upload_bytes=1000)) as archive:
        archive.unpack("a.bmp", tmp_path / "1")
        with pytest.raises(SampleError, match="larger than it may be"):
            archive.unpack("a.bmp", tmp_path / "2")


def test_a_zip_of_a_million_files_is_refused_before_its_directory_is_read(tmp_path):
    number = 10**6
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, number & 0xFFFF, number & 0xFFFF, number * 46, 0, 0)
    entry = b"PK\1\2" + bytes(42)
    (tmp_path / "many.zip").write_bytes(entry * number + end)
    tracemalloc.start()
    with (
        pytest.raises(SampleError, match="the directory of the zip has more than"),
        open_archive(tmp_path / "many.zip", LIMITS),
    ):
        pass
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["x.mp4", "x.zip", "x.png", "x.gif", "x.avi"])
def test_broken_files_are_refused_without_the_servers_paths(tmp_path, folder, name):
    for content in (b"", b"junk" * 100, b"PK\x03\x04" + b"x" * 50):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SampleError) as error:
            open_upload([tmp_path / name], folder, LIMITS)
        assert str(tmp_path) not in hide_paths(str(error.value), tmp_path)
        for file in folder.iterdir():
            file.unlink()


def test_a_cut_video_is_refused_or_its_frames_say_so(small_video, tmp_path, folder):
    content = small_video.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(SampleError):
        list(open_upload([tmp_path / "cut.mp4"], folder, LIMITS).frames)


@pytest.mark.parametrize(
    "limits,message",
    [
        (Limits(frames=7), "more than 7 frames; 7 are the most"),
        (Limits(pixels=6000), "96 x 64 pixels; 6000 pixels are the most"),
        (Limits(upload_bytes=100), "more than 100 bytes"),
    ],
)
def test_limits_of_videos(small_video, folder, limits, message):
    with pytest.raises(SampleError, match=message):
        open_upload([small_video], folder, limits)


@pytest.mark.parametrize("names", [["a.txt"], ["a.mp4", "b.png"], ["a.zip", "b.zip"], []])
def test_other_uploads_are_refused(tmp_path, folder, names):
    with pytest.raises(SampleError, match=r"one video, one zip|No file"):
        open_upload(files_of(tmp_path / "in", dict.fromkeys(names, b"x")), folder, LIMITS)


def test_files_of_one_upload_count_together(tmp_path, folder):
    files = files_of(tmp_path / "in", {f"{i}.png": png() for i in range(10)})
    with pytest.raises(SampleError, match="more than 500 bytes"):
        open_upload(files, folder, replace(LIMITS, upload_bytes=500))
    assert files[0].stat().st_size < 100 and not list(folder.iterdir())


NAMES = {"../../etc/passwd": "passwd", "C:\\a\\b c.mp4": "b_c", "...": "video", "ä ö": "video", "a" * 99: "a" * 60}


def test_paths_of_windows_are_hidden_too():
    errors = FileNotFoundError(2, "no", "C:\\data dir\\people\\a\\0.png"), OSError("C:\\data dir\\people\\0.png: no")
    shown = [hide_paths(str(error), PureWindowsPath("C:\\data dir\\people")) for error in errors]
    assert shown == ["[Errno 2] no: '0.png'", "0.png: no"]


def test_names_are_made_safe():
    assert {name: safe_name(name) for name in NAMES} == NAMES


def test_examples_are_looks_of_synthetic_videos():
    assert {name.lower() for name in EXAMPLES} <= set(SYNTHETIC_DOMAINS)
