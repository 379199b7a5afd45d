"""Video files of every kind give the frames that decoding them from beginning to end gives."""

import gc
import multiprocessing
import os
import pickle
import resource
import struct
from fractions import Fraction
from itertools import zip_longest

import av
import numpy as np
import pytest
from torch.utils.data import DataLoader

from helpers.random_videos import draw_scene, plain_decoding, shown, stored, trim
from samoe_hf.data import SampleError, container_index, read_video


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A folder of its own to remember indexes in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def encode(
    path, frames, codec="libx264", options=None, container=None, pixels="yuv420p", rate=25, turn=None, times=(), **muxer
):
    """Writes frames, each with a time of its own, in units of the rate."""
    with av.open(str(path), "w", format=container, options=muxer) as target:
        stream = target.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if turn is not None:
            stream.set_display_rotation(turn[0], hflip=turn[1])
        for frame, time in zip_longest(frames, times):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if time is not None:
                image.pts, image.time_base = time, Fraction(1, rate)
            target.mux(stream.encode(image))
        target.mux(stream.encode())


@pytest.fixture(scope="module")
def scene():
    return draw_scene(np.random.default_rng(3), 40, (48, 64))


def assert_as_decoded(path, length=None):
    """Compares frames that are read in several orders, each by a new reader, with those of plain decoding."""
    expected, is_whole = plain_decoding(path)
    assert is_whole and length in (None, len(expected))
    middle = len(expected) // 2
    for order in (range(len(expected)), [len(expected) - 1, 3, middle, 0], [middle], [middle - 1, middle, 1]):
        frames = read_video(path)
        assert len(frames) == len(expected)
        for i in order:
            assert np.array_equal(frames[i], expected[i]), f"frame {i} of {list(order)[:4]}"


OPEN_GOP = {"x265-params": "log-level=none:pools=1:keyint=12:bframes=3:open-gop=1"}
KINDS = {
    "b.avi": ("libx264", "avi", {"bf": "2"}),
    "xvid.avi": ("mpeg4", "avi", {"bf": "2", "vtag": "XVID"}),
    "open.mp4": ("libx265", "mp4", OPEN_GOP),
    "open.mkv": ("libx264", "matroska", {"x264-params": "keyint=12:open-gop=1:bframes=3"}),
    "refresh.mp4": ("libx264", "mp4", {"x264-params": "intra-refresh=1:keyint=10:bframes=0"}),
    "a.ts": ("libx264", "mpegts", {}),
    "open.ts": ("libx265", "mpegts", OPEN_GOP),
    "00001.MTS": ("libx264", "mpegts", {"g": "12"}),
    "a.mpg": ("mpeg2video", "mpeg", {"bf": "2"}),
    "a.wmv": ("wmv2", "asf", {}),
    "b.wmv": ("libx264", "asf", {}),
    "a.flv": ("libx264", "flv", {}),
    "a.h264": ("libx264", "h264", {}),
    "a.hevc": ("libx265", "hevc", OPEN_GOP),
    "a.webm": ("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "12"}),
    "a.mxf": ("mpeg2video", "mxf", {"bf": "2"}),
    "a.mov": ("qtrle", "mov", {}),
    "fields.mp4": ("libx264", "mp4", {"x264-params": "tff=1:keyint=12"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_of_every_container_are_those_of_decoding(tmp_path, scene, name):
    codec, container, options = KINDS[name]
    encode(tmp_path / name, scene, codec, options, container, "rgb24" if codec == "qtrle" else "yuv420p")
    assert_as_decoded(tmp_path / name, 40)
    assert read_video(tmp_path / name).fps in (pytest.approx(25), None)


def test_equal_time_stamps_and_a_late_start_do_not_matter(tmp_path, scene):
    encode(tmp_path / "a.mkv", scene, rate=3000)  # Matroska's times are whole milliseconds
    encode(tmp_path / "b.webm", scene, "libvpx-vp9", rate=5000)
    for name in ("a.mkv", "b.webm"):
        assert_as_decoded(tmp_path / name, 40)


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.h264"])
def test_times_are_those_of_the_file_and_not_of_its_rate(tmp_path, scene, name):
    encode(tmp_path / name, scene)
    frames = read_video(tmp_path / name)
    assert [frames.time(t) for t in (0, 10)] == pytest.approx([0, 0.4] if frames.fps else [None, None])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_of_uneven_times_the_rate_is_their_mean(tmp_path, scene, name):
    encode(tmp_path / name, scene, times=[t + 20 * (t > 10) for t in range(40)])  # of a phone, in the dark
    frames = read_video(tmp_path / name)
    assert [frames.time(t) for t in (0, 10, 11, 39)] == pytest.approx([0, 0.4, 1.24, 2.36])
    assert frames.fps == pytest.approx(39 / 2.36, rel=0.02)


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mov", "libx265"), ("a.mkv", "libx264")])
def test_a_trimmed_recording_starts_where_its_edit_list_says(tmp_path, scene, name, codec):
    encode(tmp_path / name, scene, codec, OPEN_GOP if codec == "libx265" else {"g": "12"})
    trim(tmp_path / name, 0.3)
    assert_as_decoded(tmp_path / name)


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.avi", "a.flv", "fast.mp4"])
def test_of_a_file_that_is_cut_off_the_frames_before_are_read(tmp_path, scene, name, caplog):
    path = tmp_path / name
    codec, pixels = ("mjpeg", "yuvj420p") if name == "a.avi" else ("libx264", "yuv420p")
    encode(path, scene, codec, pixels=pixels, **({"movflags": "faststart"} if name == "fast.mp4" else {}))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 5])
    expected, is_whole = plain_decoding(path)
    frames = read_video(path)
    assert 5 < len(frames) == len(expected) < 40
    assert all(np.array_equal(frames[i], expected[i]) for i in reversed(range(len(expected))))
    if not is_whole:
        assert f"{name}: decoding ends after {len(frames)} frames" in caplog.text
    if name == "fast.mp4":
        assert f"{len(frames)}" in caplog.text


def atom(kind, data):
    return struct.pack(">I4s", len(data) + 8, kind) + data


def test_a_cover_is_not_the_video(tmp_path, scene):
    encode(tmp_path / "v.mp4", scene)
    encode(tmp_path / "c.mjpeg", scene[:1], "mjpeg", pixels="yuvj420p", container="mjpeg")
    cover = atom(b"covr", atom(b"data", struct.pack(">II", 13, 0) + (tmp_path / "c.mjpeg").read_bytes()))
    header = atom(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    user_data = atom(b"udta", atom(b"meta", bytes(4) + header + atom(b"ilst", cover)))
    data, atoms = (tmp_path / "v.mp4").read_bytes(), []
    while data:
        size = struct.unpack(">I", data[:4])[0]
        part, data = data[:size], data[size:]
        if part[4:8] == b"moov":  # the last one, so no offset changes
            end = 8 + struct.unpack(">I", part[8:12])[0]
            part = atom(b"moov", part[8:end] + user_data + part[end:])
        atoms.append(part)
    (tmp_path / "clip.mp4").write_bytes(b"".join(atoms))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].disposition & av.stream.Disposition.attached_pic
    assert len(read_video(tmp_path / "clip.mp4")) == 40


@pytest.mark.parametrize("name, default", [("a.mkv", None), ("a.mkv", 1), ("a.mkv", 0), ("a.mp4", 1)])
def test_of_several_streams_the_default_or_the_largest_is_shown(tmp_path, scene, name, default):
    with av.open(str(tmp_path / name), "w") as target:
        streams = [target.add_stream("libx264", rate=25) for _ in range(2)]
        for number, (stream, side) in enumerate(zip(streams, (16, 48), strict=True)):
            stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
            if number == default:
                stream.disposition = av.stream.Disposition.default
        for frame in scene[:9]:
            for stream, side in zip(streams, (16, 48), strict=True):
                pixels = np.ascontiguousarray(frame[:side, :side])
                target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            target.mux(stream.encode())
    assert read_video(tmp_path / name).size == ((16, 16) if default == 0 else (48, 48))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_recordings_are_turned_and_mirrored_as_players_do(tmp_path, scene, degrees, is_mirrored):
    encode(tmp_path / "a.mp4", scene[:5], turn=(degrees, is_mirrored))
    with av.open(str(tmp_path / "a.mp4")) as source:
        pixels = [stored(frame) for frame in source.decode(video=0)][2]
    frames, expected = read_video(tmp_path / "a.mp4"), np.rot90(pixels, degrees // 90)
    expected = expected[:, ::-1] if is_mirrored else expected
    assert frames.size == expected.shape[:2] and np.array_equal(frames[2], expected)
    assert all(stride > 0 for stride in frames[2].strides), "torch takes no negative ones"


def test_a_recording_turned_by_less_than_a_quarter_is_refused(tmp_path, scene):
    encode(tmp_path / "a.mp4", scene[:5], turn=(30, False))
    with pytest.raises(SampleError, match=r"a\.mp4: its frames are turned by 30"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le", "yuv444p", "yuv422p10le"])
@pytest.mark.parametrize("space", ["", ":colormatrix=bt709", ":colormatrix=bt2020nc", ":range=pc", ":tff=1"])
def test_colours_are_those_of_the_accurate_conversion(tmp_path, scene, pixels, space):
    encode(tmp_path / "a.mp4", scene[:3], options={"x264-params": "qp=8" + space}, pixels=pixels)
    with av.open(str(tmp_path / "a.mp4")) as container:
        expected = [shown(frame) for frame in container.decode(video=0)]
    assert np.array_equal(list(read_video(tmp_path / "a.mp4")), expected)


def test_colours_of_the_fields_of_a_frame_are_not_mixed(tmp_path):
    """Red rows of one field, blue ones of the other: chroma belongs to the rows of its own field."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[0::2], pixels[1::2] = (200, 30, 30), (30, 30, 200)
    fields = [
        av.VideoFrame.from_ndarray(pixels[i::2].copy(), format="rgb24").reformat(format="yuv420p") for i in (0, 1)
    ]
    frame = av.VideoFrame(64, 48, "yuv420p")
    for plane, *of_fields in zip(frame.planes, *(field.planes for field in fields), strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        for i, field in enumerate(of_fields):
            part = np.frombuffer(field, np.uint8).reshape(field.height, -1)
            rows[i::2, : plane.width] = part[:, : plane.width]
        plane.update(rows.tobytes())
    with av.open(str(tmp_path / "a.mkv"), "w") as target:
        stream = target.add_stream("libx264", rate=25, options={"x264-params": "tff=1:qp=1"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        target.mux(stream.encode(frame))
        target.mux(stream.encode())
    assert np.abs(read_video(tmp_path / "a.mkv")[0].astype(int) - pixels).max() < 6


def test_another_size_in_mid_file_is_refused(tmp_path, scene):
    for name in ("a.ts", "a.h264"):
        parts = []
        for side in (48, 32):
            encode(tmp_path / f"{side}{name}", np.ascontiguousarray(scene[:5, :side, :side]))
            parts.append((tmp_path / f"{side}{name}").read_bytes())
        (tmp_path / name).write_bytes(b"".join(parts))
        with pytest.raises(SampleError, match=rf"{name}: frame \d of size \(32, 32\), not \(48, 48\)"):
            read_video(tmp_path / name)


def test_packets_before_the_first_frame_may_be_unusable(tmp_path, scene):
    encode(tmp_path / "a.ts", scene, options={"g": "12", "bf": "0"})
    data = (tmp_path / "a.ts").read_bytes()
    (tmp_path / "b.ts").write_bytes(data[len(data) // 188 // 3 * 188 :])
    frames = read_video(tmp_path / "b.ts")
    assert 8 < len(frames) < 35 and len(list(frames)) == len(frames)


def test_packets_without_a_frame_are_found_when_they_are_read(tmp_path, scene):
    """Packets of HEVC that hold no picture count as frames first; then decoding counts, for later readers too."""
    encode(tmp_path / "whole.mp4", scene, "libx265", {"x265-params": "log-level=none:pools=1:bframes=0:keyint=10"})
    with av.open(str(tmp_path / "whole.mp4")) as source, av.open(str(tmp_path / "a.mp4"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for number, packet in enumerate(source.demux(stream)):
            if packet.size:
                empty = av.Packet(b"\0\0\0\3\x46\1\x50")
                empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
                chosen = empty if number == 35 else packet
                chosen.stream = copy
                target.mux(chosen)
    expected, is_whole = plain_decoding(tmp_path / "a.mp4")
    assert is_whole and len(expected) < 40
    frames = read_video(tmp_path / "a.mp4")
    assert np.array_equal(frames[20], expected[20])
    with pytest.raises(SampleError, match=rf"a\.mp4: frame 35: decoding gives {len(expected)} frames, where"):
        frames[35]
    assert_as_decoded(tmp_path / "a.mp4")


def open_files(suffix):
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).endswith(suffix) for link in links if os.path.islink(link))


def test_decoders_are_closed_with_their_readers_and_few_are_idle(tmp_path, scene):
    for i in range(6):
        encode(tmp_path / f"{i}.mp4", scene[:9])
    readers = [read_video(tmp_path / f"{i}.mp4") for i in range(6)]
    gc.collect()  # of other tests
    assert open_files(".mp4") == 0
    expected = [list(reader) for reader in readers]
    assert open_files(".mp4") == 4
    for t in (5, 2, 8):
        assert all(np.array_equal(reader[t], frames[t]) for reader, frames in zip(readers, expected, strict=True))
    again = pickle.loads(pickle.dumps(readers[0]))
    assert np.array_equal(again[3], expected[0][3])
    del again
    readers.clear()
    assert open_files(".mp4") == 0


class Threads:
    """A dataset whose items are a frame's sum and the number of threads of the process that read it."""

    def __init__(self, frames):
        self.frames = frames

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        pixels = int(self.frames[index].astype(np.int64).sum())
        return pixels, len(os.listdir("/proc/self/task"))


def test_a_worker_of_a_data_loader_decodes_with_one_thread(tmp_path, scene):
    encode(tmp_path / "a.mp4", scene, options={"g": "5"})
    frames = read_video(tmp_path / "a.mp4")
    expected = [int(frame.astype(np.int64).sum()) for frame in frames]  # its decoder is open when workers are forked
    loader = DataLoader(Threads(frames), batch_size=None, num_workers=2)
    sums, threads = zip(*loader, strict=True)
    assert list(sums) == expected
    assert max(threads) <= 2, "the worker's own, and one that sends what it read"
    assert [int(frame.astype(np.int64).sum()) for frame in frames] == expected


def test_a_forked_process_leaves_its_parents_decoders_alone(tmp_path, scene):
    """PyAV's objects lie in cycles: whoever collects a decoder waits for its threads, which a forked process lacks."""
    encode(tmp_path / "a.mp4", scene)
    gc.disable()
    try:
        list(av.open(str(tmp_path / "a.mp4")).decode(video=0))
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
    finally:
        gc.enable()
    child.join(10)
    assert child.exitcode == 0


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, scene):
    encode(tmp_path / "a.mp4", scene)
    frames = read_video(tmp_path / "a.mp4")
    encode(tmp_path / "a.mp4", scene[::-1].copy())
    os.utime(tmp_path / "a.mp4", (1, 1))
    with pytest.raises(SampleError, match=r"a\.mp4 has changed since it was opened"):
        frames[0]


def tiny_packets(path, count):
    header = struct.pack("<HHIHHIIII", 0, 32, int.from_bytes(b"VP80", "little"), 64, 48, 30, 1, count, 0)
    path.write_bytes(b"DKIF" + header + b"".join(struct.pack("<IQ", 1, i) + b"\0" for i in range(count)))


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("tiny.avi", None)])
def test_more_frames_than_allowed_are_refused_before_they_cost_memory(tmp_path, scene, name, codec):
    path = tmp_path / name
    if codec is None:
        tiny_packets(path, 200_000)
    else:
        encode(path, scene, codec)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SampleError, match=rf"{name}.*(more than 39 frames; 39 are the most|not a readable video)"):
        read_video(path, max_frames=39)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024


def full_atom(kind, data):
    return atom(kind, bytes(4) + data)


@pytest.mark.parametrize("kind", ["vide", "soun"])
def test_a_table_without_end_is_refused_before_it_is_built(tmp_path, kind):
    count = 10_000_000
    entry = atom(b"avc1", bytes(7) + b"\1" + bytes(16) + struct.pack(">HH", 64, 48) + bytes(50))
    tables = full_atom(b"stsd", struct.pack(">I", 1) + entry) + full_atom(b"stts", struct.pack(">III", 1, count, 2))
    tables += full_atom(b"stsc", struct.pack(">IIII", 1, 1, count, 1))
    tables += full_atom(b"stsz", struct.pack(">II", 1, count)) + full_atom(b"stco", struct.pack(">II", 1, 8))
    media = full_atom(b"mdhd", struct.pack(">IIIIHH", 0, 0, 1000, count, 0, 0))
    media += full_atom(b"hdlr", bytes(4) + kind.encode() + bytes(13)) + atom(b"minf", atom(b"stbl", tables))
    track = full_atom(b"tkhd", struct.pack(">IIII", 0, 0, 1, 0) + bytes(64)) + atom(b"mdia", media)
    (tmp_path / "a.mp4").write_bytes(atom(b"ftyp", b"isom\0\0\2\0isom") + atom(b"moov", atom(b"trak", track)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SampleError, match=r"a\.mp4 has tables for more than 30000 frames; 30000 are the most"):
        read_video(tmp_path / "a.mp4", max_frames=30_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024


def test_raw_sound_does_not_count(tmp_path, scene):
    with av.open(str(tmp_path / "a.mov"), "w") as target:
        video, sound = target.add_stream("libx264", rate=25), target.add_stream("pcm_s16le", rate=48000)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        for frame in scene:
            target.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 48000), np.int16), format="s16", layout="stereo")
        samples.sample_rate = 48000
        for stream, data in ((video, None), (sound, samples), (sound, None)):
            target.mux(stream.encode(data))
    assert len(read_video(tmp_path / "a.mov", max_frames=100)) == 40


def test_what_took_long_is_remembered_until_the_file_changes(tmp_path, scene, home, monkeypatch):
    encode(tmp_path / "a.avi", scene, "mpeg4")
    monkeypatch.setattr(container_index, "SECONDS_TO_REMEMBER", 0)
    indexed = []
    by_decoding = container_index.index_by_decoding
    monkeypatch.setattr(container_index, "index_by_decoding", lambda *args: indexed.append(1) or by_decoding(*args))
    for count in (40, 40, 30, 30):
        if count == 30 and len(indexed) == 1:
            encode(tmp_path / "a.avi", scene[:30], "mpeg4")
        monkeypatch.setattr(container_index, "_known", type(container_index._known)())
        frames = read_video(tmp_path / "a.avi")
        assert len(frames) == count and np.array_equal(frames[20], plain_decoding(tmp_path / "a.avi")[0][20])
    assert len(indexed) == 2 and len(list(home.rglob("*.npz"))) == 2
    for path in home.rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:40])
    monkeypatch.setattr(container_index, "_known", type(container_index._known)())
    assert len(read_video(tmp_path / "a.avi")) == 30
    home.rename(tmp_path / "gone")
    home.write_text("no folder")
    monkeypatch.setattr(container_index, "_known", type(container_index._known)())
    assert len(read_video(tmp_path / "a.avi")) == 30
