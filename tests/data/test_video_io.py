"""Frames, containers and label images."""

import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from helpers.layouts import SIZE, make_frames, make_sa_v, save_frames
from samoe_hf.data import (
    SampleError,
    load_videos,
    read_label_png,
    read_video,
    voc_palette,
    write_palette_png,
    write_video,
)


def test_a_folder_of_frames_is_read_in_natural_order_and_lazily(tmp_path, gradient):
    for i in (0, 2, 10, 9):
        Image.fromarray(gradient[i]).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    frames = read_video(tmp_path)
    assert len(frames) == 4 and frames.names == ["frame0", "frame2", "frame9", "frame10"] and frames.size == (48, 64)
    assert np.array_equal(frames[-1], gradient[10]) and np.array_equal(list(frames)[2], gradient[9])
    assert len(frames[1:3]) == 2
    with pytest.raises(IndexError):
        frames[4]
    (tmp_path / "frame10.png").unlink()  # nothing was decoded before it was asked for
    with pytest.raises(FileNotFoundError, match=r"frame10\.png"):
        frames[3]
    (tmp_path / "frame10.png").symlink_to("nowhere.png")
    assert len(read_video(tmp_path)) == 4, "no frame is left out for a link that leads nowhere"


def test_odd_sizes_are_extended_by_repeating_the_border_and_other_frames_refused(tmp_path, gradient):
    write_video(tmp_path / "odd.mp4", (frame[:47, :33] for frame in gradient[:3]))
    frames = read_video(tmp_path / "odd.mp4")
    assert frames.size == (48, 34)
    assert np.abs(frames[1][:47, :33].astype(int) - gradient[1, :47, :33]).mean() < 3
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "x.mp4", [])
    with pytest.raises(ValueError, match=r"frame 1 is uint8 \(20, 20, 3\)"):
        write_video(tmp_path / "x.mp4", [gradient[0], gradient[0, :20, :20]])


def test_missing_empty_and_corrupt_videos_are_named(tmp_path, gradient):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_video(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SampleError, match=r"empty: no images in this folder \(\.apng"):
        read_video(tmp_path / "empty")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(SampleError, match=r"noise\.mp4: not a readable video"):
        read_video(tmp_path / "noise.mp4")
    write_video(tmp_path / "whole.mp4", gradient)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    with pytest.raises(SampleError, match=r"cut\.mp4"):
        list(read_video(tmp_path / "cut.mp4"))


def test_corrupt_and_misfitting_frames_are_named(tmp_path, gradient):
    for i in range(4):
        Image.fromarray(gradient[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    Image.fromarray(gradient[2, :40]).save(tmp_path / "2.png")
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(tmp_path / "3.png")
    frames = read_video(tmp_path)
    for i, message in ((1, "not a readable image"), (2, r"size \(40, 64\).*\(48, 64\)"), (3, "uint16.* 8 bits")):
        with pytest.raises(SampleError, match=rf"{i}\.png: .*{message}"):
            frames[i]


def test_palette_images_keep_ids_and_have_the_colours_of_davis(tmp_path):
    path, ids = tmp_path / "ids.png", np.arange(256).reshape(16, 16)
    write_palette_png(path, ids)
    assert np.array_equal(read_label_png(path), ids)
    with Image.open(path) as image:
        assert image.mode == "P" and image.convert("RGB").getpixel((1, 0)) == (128, 0, 0)
    assert voc_palette()[[0, 2, 3, 255]].tolist() == [[0, 0, 0], [0, 128, 0], [128, 128, 0], [224, 224, 192]]
    with pytest.raises(ValueError, match=r"ids\.png: ids 0 to 256.*renumber"):
        write_palette_png(path, np.array([[0, 256]]))
    with pytest.raises(ValueError, match="integers"):
        write_palette_png(path, np.zeros((2, 2)))


@pytest.mark.parametrize(
    "pixels, ids",
    [
        (np.array([[0, 700]], np.uint16), [[0, 700]]),
        (np.array([[0, 255]], np.uint8), [[0, 255]]),
        (np.full((2, 2, 3), 7, np.uint8), [[7, 7], [7, 7]]),
        (voc_palette()[[[0, 200], [255, 1]]], [[0, 200], [255, 1]]),
    ],
)
def test_labels_are_read_as_stored(pixels, ids, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "ids.png")
    assert read_label_png(tmp_path / "ids.png").tolist() == ids
    Image.new("RGB", (2, 2), (7, 8, 9)).save(tmp_path / "colours.png")
    with pytest.raises(SampleError, match=r"colours\.png: an RGB image of 1 colours, such as #070809"):
        read_label_png(tmp_path / "colours.png")


def png(width, height):
    """The header of a gray PNG of any size, and no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_images_of_absurd_sizes_are_named(tmp_path):
    options = make_frames(tmp_path)
    for folder, side in (("JPEGImages", 100_000), ("Annotations", 100_000), ("JPEGImages", 12_000)):
        path = tmp_path / folder / "a" / "00000.png"
        path.with_suffix(".jpg").unlink(missing_ok=True)
        path.write_bytes(png(side, side))
        with pytest.raises(SampleError, match=r"00000\.png.*pixels"):
            load_videos(**options)[0].visible(0)


def test_frames_may_have_any_name(tmp_path):
    save_frames(tmp_path, 2)
    (tmp_path / "00001.jpg").rename(tmp_path / "²1.jpg")
    assert read_video(tmp_path).names == ["00000", "²1"]
    (tmp_path / "folder.png").mkdir()
    assert len(read_video(tmp_path)) == 2, "a folder is no frame"


@pytest.mark.parametrize(
    "text",
    ["hello\n" * 500, "ffconcat version 1.0\nfile real.mp4\n", "#EXTM3U\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n"],
)
def test_text_is_no_video(tmp_path, text):
    write_video(tmp_path / "real.mp4", np.zeros((3, 16, 16, 3), np.uint8))
    for name in ("a.mp4", "a.txt", "a.ans", "a.m3u8"):
        (tmp_path / name).write_text(text)
        with pytest.raises(SampleError, match=rf"{name}: not a readable video"):
            read_video(tmp_path / name)


def test_a_container_is_demuxed_once_while_it_does_not_change(tmp_path, monkeypatch):
    options = make_sa_v(tmp_path)
    opened, av_open = [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: opened.append(args) or av_open(*args, **kwargs))
    videos = load_videos(**options)
    first = videos[0].frames
    before = len(opened)
    for _ in range(5):
        assert (videos[0].frames.size, len(videos[0].frames)) == (first.size, 10)
    assert len(opened) == before
    write_video(tmp_path / "sav_000" / "sav_1.mp4", np.zeros((12, *SIZE, 3), np.uint8))
    assert len(videos[0].frames) == 12


def test_frames_of_a_container_have_one_size(tmp_path):
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuvj420p"
        for i, side in enumerate((16, 16, 32)):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = side, side, "yuvj420p", Fraction(1, 5)
            frame = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")
            for packet in encoder.encode(frame.reformat(format="yuvj420p")):
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 5)
                container.mux(packet)
    frames = read_video(tmp_path / "v.mkv")
    assert frames.size == (16, 16)
    with pytest.raises(SampleError, match=r"v\.mkv: frame 2 .*\(32, 32\)"):
        list(frames)
