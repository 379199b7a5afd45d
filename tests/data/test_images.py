"""Pictures are what a viewer shows, label images are what is stored."""

import importlib
import re
import struct
import sys
import types
import zlib
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image

from samoe_hf.data import image_files, load_videos, read_label_png, video_from_item
from samoe_hf.data.annotations import Shapes
from samoe_hf.data.frames import SampleError
from samoe_hf.data.hub_datasets import videos_from_dataset
from samoe_hf.data.image_files import Page
from samoe_hf.data.images import ImageFrames, voc_palette
from samoe_hf.data.schema import Video, to_datasets, video_from_row, video_to_row
from samoe_hf.data.video_io import read_video

SIZE = (20, 32)
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}  # orientation -> what is stored for a picture


@pytest.fixture
def picture():
    frame = np.full((*SIZE, 3), 60, np.uint8)
    frame[3:9, 4:16] = 220
    return frame


@pytest.fixture
def ids():
    labels = np.zeros(SIZE, np.uint8)
    labels[3:9, 4:16], labels[10:15, 8:20], labels[16:19, 2:5] = 1, 2, 3
    return labels


def png(values: np.ndarray, bits: int, color_type: int = 0) -> bytes:
    """A PNG of any depth, (H, W) or (H, W, C) with 16 bits."""
    rows = values.reshape(len(values), -1)
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        digits = np.unpackbits(rows[..., None].astype(np.uint8), axis=-1)[..., 8 - bits :]
        lines = [row.tobytes() for row in np.packbits(digits.reshape(len(rows), -1), axis=1)]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, color_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + line for line in lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    buffer = BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def oriented(array: np.ndarray, orientation: int, format: str, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(TURNS[orientation](array), format, exif=exif, **options)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_an_orientation_turns_frames_and_the_size_of_their_header(tmp_path, picture, format, orientation):
    path = tmp_path / f"0.{format.lower()}"
    path.write_bytes(oriented(picture, orientation, format, quality=95))
    frames = ImageFrames([path])
    assert frames.size == SIZE and np.abs(frames[0].astype(int) - picture).mean() < 4


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_an_orientation_turns_labels(ids, format, orientation):
    assert np.array_equal(read_label_png(oriented(ids, orientation, format)), ids)


def test_an_orientation_turns_rows_and_items(tmp_path, picture, ids):
    (tmp_path / "0.jpg").write_bytes(oriented(picture, 6, "JPEG", quality=95))
    (tmp_path / "0.png").write_bytes(encode(ids, "PNG"))
    columns = {"image": datasets.Image(), "mask": datasets.Image(), "video_id": datasets.Value("string")}
    row = {"image": [str(tmp_path / "0.jpg")], "mask": [str(tmp_path / "0.png")], "video_id": ["a"]}
    dataset = datasets.Dataset.from_dict(row, features=datasets.Features(columns))
    shown = np.asarray(dataset[0]["image"].convert("RGB"))
    with Image.open(tmp_path / "0.jpg") as image:
        item = video_from_item({"frames": [image], "masks": [Image.fromarray(ids)]})
    for video in (videos_from_dataset(dataset)[0], item):
        assert np.array_equal(video.frames[0], shown) and video.masks(0).shape == (3, *SIZE)
    again = videos_from_dataset(to_datasets([videos_from_dataset(dataset)[0]], cache_dir=str(tmp_path)))[0]
    assert np.array_equal(again.frames[0], shown)


def test_rows_of_deep_frames_take_a_window(tmp_path, picture, ids):
    columns = {"image": datasets.Image(), "mask": datasets.Image(), "video_id": datasets.Value("string")}
    frame, mask = png(picture.astype(np.uint16) * 16, 16, 2), encode(ids, "PNG")
    row = {"image": [{"bytes": frame, "path": None}], "mask": [{"bytes": mask, "path": None}], "video_id": ["a"]}
    dataset = datasets.Dataset.from_dict(row, features=datasets.Features(columns))
    with pytest.raises(SampleError, match="a, frame 00000: colours of 16 bits"):
        videos_from_dataset(dataset)[0].frames[0]
    video = videos_from_dataset(dataset, window=(0, 4080))[0]
    assert np.array_equal(video.frames[0], picture)
    again = videos_from_dataset(to_datasets([video], cache_dir=str(tmp_path)))[0]
    assert np.array_equal(again.frames[0], picture), "as it was shown"


def test_masks_of_unturned_frames_are_refused_with_a_hint(tmp_path, picture, ids):
    for folder in ("frames", "masks"):
        (tmp_path / "v" / folder).mkdir(parents=True)
    (tmp_path / "v/frames/0.jpg").write_bytes(oriented(picture, 6, "JPEG"))
    (tmp_path / "v/masks/0.png").write_bytes(encode(np.rot90(ids), "PNG"))
    with pytest.raises(SampleError, match=r"size \(32, 20\) for frames of \(20, 32\).*EXIF orientation"):
        load_videos(tmp_path)[0].masks(0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_labels_of_any_depth_are_the_stored_numbers(ids, bits):
    labels = ids.astype(int) & (2**bits - 1)
    assert np.array_equal(read_label_png(png(labels, bits)), labels)
    shown = labels if bits == 16 else labels * 255 // (2**bits - 1)
    if bits < 16:
        assert np.array_equal(ImageFrames([png(labels, bits)])[0][..., 0], shown), "frames as a viewer shows them"


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_whose_white_is_zero_is_shown_inverted_and_its_labels_are_as_stored(ids, compression):
    stored = encode(255 - ids, "TIFF", tiffinfo={262: 0}, compression=compression)  # Pillow inverts what it writes
    assert np.array_equal(read_label_png(stored), ids)
    assert np.array_equal(ImageFrames([stored])[0][..., 0], 255 - ids)
    black_white = encode(Image.fromarray(ids > 0), "TIFF", tiffinfo={262: 0}, compression=compression)
    assert np.array_equal(read_label_png(black_white), ids > 0), "of black and white, white is the object"


def test_deep_gray_whose_white_is_zero_is_shown_inverted(ids):
    deep = ids.astype(np.uint16) * 1000
    shown = ImageFrames([encode(deep, "TIFF", tiffinfo={262: 0})], (62535, 65535))[0][..., 0]
    assert np.array_equal(shown, 255 - ids * 85) and np.array_equal(read_label_png(encode(deep, "TIFF")), deep)


def test_transparent_pixels_of_frames_are_white_and_of_labels_background(picture, ids):
    alpha = np.where(ids == 1, 255, 0).astype(np.uint8)
    shown = ImageFrames([encode(np.dstack([picture, alpha]), "PNG")])[0]
    assert (shown[ids != 1] == 255).all() and np.array_equal(shown[ids == 1], picture[ids == 1])
    white = np.full(SIZE, 255, np.uint8)
    for bands in ([white] * 3 + [alpha], [white, alpha]):
        image = Image.merge("RGBA" if len(bands) == 4 else "LA", [Image.fromarray(band) for band in bands])
        assert np.array_equal(read_label_png(encode(image, "PNG")) > 0, ids == 1)
    palette = Image.fromarray(ids)
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    data = encode(palette, "PNG", transparency=2)
    assert np.array_equal(read_label_png(data), ids), "indices of a palette are ids, whatever their colours"
    assert (ImageFrames([data])[0][ids == 2] == 255).all()
    hidden = np.dstack([ids, ids, ids, np.zeros_like(ids)])
    assert np.array_equal(read_label_png(encode(hidden, "PNG")), ids), "stored without regard to transparency"


def test_cmyk_and_black_and_white_frames_are_shown(picture, ids):
    shown = ImageFrames([encode(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=95)])[0]
    assert np.abs(shown.astype(int) - picture).mean() < 4
    assert np.array_equal(ImageFrames([encode(Image.fromarray(ids > 0), "PNG")])[0][..., 0], (ids > 0) * 255)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_deep_gray_frames_get_one_window_for_the_video_which_is_said(tmp_path, dtype, caplog):
    ramp = np.linspace(0, 4000, 640).reshape(SIZE)
    values = np.stack([ramp, ramp / 2]).astype(dtype)
    if dtype == np.float32:
        values[0, 0, 0] = np.nan
    for i, frame in enumerate(values):
        Image.fromarray(frame).save(tmp_path / f"{i}.tif")
    frames = read_video(tmp_path)
    first = frames[0]
    assert re.search("more than 8 bits.* become black and white in the whole video; `window`", caplog.text)
    assert first.dtype == np.uint8 and first.max() == 255 and abs(int(frames[1].max()) - 130) < 5
    assert first[0, 0, 0] == 0, "NaN is black"
    chosen = ImageFrames([tmp_path / "0.tif"], (0, 8000))[0]
    assert abs(int(chosen.max()) - 128) <= 1


def test_colours_of_16_bits_need_a_window(tmp_path, picture):
    deep = picture.astype(np.uint16) * 16
    data = png(deep, 16, 2)
    (tmp_path / "0.png").write_bytes(data)
    for source in (data, tmp_path / "0.png"):
        with pytest.raises(SampleError, match=r"16 bits per channel; `window`"):
            ImageFrames([source])[0]
        assert np.array_equal(ImageFrames([source], (0, 4080))[0], picture)
    with pytest.raises(SampleError, match="colours of 16 bits"):
        read_label_png(data)
    with pytest.raises(SampleError, match="without transparency"):
        ImageFrames([png(np.dstack([deep, deep[..., 0]]), 16, 6)], (0, 4080))[0]


def stack(frames, format, **options) -> bytes:
    first, *others = (Image.fromarray(frame) for frame in frames)
    return encode(first, format, save_all=True, append_images=others, **options)


PLAYED = {
    "TIFF": {"compression": "tiff_lzw"},
    "GIF": {"duration": 50},
    "PNG": {"duration": 50},
    "WEBP": {"duration": 50, "lossless": True},
    "AVIF": {"duration": 50, "quality": 100},
}


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_pages_have_times_of_their_own(tmp_path, picture, format):
    pages = [np.ascontiguousarray(np.roll(picture, i, axis=1)) for i in range(3)]
    path = tmp_path / f"a.{format.lower()}"
    path.write_bytes(stack(pages, format, **{**PLAYED[format], "duration": [1000, 200, 5000]}))
    frames = read_video(path)
    assert [frames.time(t) for t in range(3)] == [0, 1, 1.2] and frames.fps == pytest.approx(2 / 1.2)


@pytest.mark.parametrize("format", PLAYED)
def test_pages_of_one_file_are_frames(tmp_path, picture, format):
    pages = [np.ascontiguousarray(np.roll(picture, i, axis=1)) for i in range(5)]
    path = tmp_path / f"a.{format.lower()}"
    path.write_bytes(stack(pages, format, **PLAYED[format]))
    frames = read_video(path)
    assert len(frames) == 5 and frames.size == SIZE and frames.fps == (None if format == "TIFF" else 20)
    for i in (3, 0, 4, 4, 1, 2):
        assert np.abs(frames[i].astype(int) - pages[i]).mean() < 4, i
    other = path.with_stem("b")
    other.write_bytes(path.read_bytes())
    with pytest.raises(SampleError, match="5 pages"):
        ImageFrames([path, other])[0]
    row = video_to_row(Video("a", frames, Shapes({}, [1])))
    assert all(np.array_equal(a, b) for a, b in zip(video_from_row(row).frames, frames, strict=True))


@pytest.mark.parametrize("format", ["TIFF", "GIF", "PNG", "WEBP"])
def test_pages_of_gray_labels_keep_their_ids(tmp_path, ids, format):
    path = tmp_path / "a.img"
    path.write_bytes(stack([np.roll(ids, i, axis=1) for i in range(4)], format, lossless=True))
    for i in (2, 0, 3, 1, 1):
        assert np.array_equal(read_label_png(Page(path, i)), np.roll(ids, i, axis=1)), i
    with pytest.raises(SampleError, match="4 pages"):
        read_label_png(path)


def test_a_gif_tells_ids_by_its_colours_since_its_writer_may_number_them_anew(ids):
    ids = np.array([0, 2, 5, 200], np.uint8)[ids]
    davis, other = Image.fromarray(ids), Image.fromarray(ids)
    davis.putpalette(voc_palette().tobytes())
    for image in (Image.fromarray(ids), davis):
        buffer = BytesIO()
        image.save(buffer, "GIF")
        assert np.array_equal(read_label_png(buffer.getvalue()), ids)
    other.putpalette(np.random.default_rng(0).bytes(768))
    other.save(buffer := BytesIO(), "GIF")
    with pytest.raises(SampleError, match=r"a GIF of 4 colours, such as .*PNG"):
        read_label_png(buffer.getvalue())


def test_indices_that_a_tool_has_numbered_anew_are_told_by_daviss_colours(ids):
    """As ImageMagick does, and what makes files smaller."""
    ids, colors = np.array([0, 2, 5, 200], np.uint8)[ids], voc_palette()
    few = Image.fromarray(colors[ids]).quantize(4)  # its first colour is any one
    dropped = Image.fromarray(np.searchsorted([0, 2, 5, 200], ids).astype(np.uint8))
    dropped.putpalette(colors[[0, 2, 5, 200]].tobytes())
    grays, own = Image.fromarray(ids), Image.fromarray(ids)
    grays.putpalette(np.arange(256, dtype=np.uint8).repeat(3).tobytes())
    own.putpalette((colors[:, ::-1] // 2 + 3).tobytes())
    for image in (few, dropped, grays, own):
        assert image.mode == "P" and np.array_equal(read_label_png(encode(image, "PNG")), ids)


def test_black_on_transparent_pixels_is_no_label_image(ids):
    for mode in ("LA", "RGBA"):
        image = Image.new(mode, SIZE[::-1])
        image.putalpha(Image.fromarray((ids > 0) * np.uint8(255)))
        with pytest.raises(SampleError, match="black on transparent pixels"):
            read_label_png(encode(image, "PNG"))


def test_lossy_labels_are_refused(ids):
    for format in ("JPEG", "WEBP"):
        with pytest.raises(SampleError, match=f"{format} image; labels must be .*without losses"):
            read_label_png(encode(ids * 50, format))


def test_previews_beside_a_picture_are_no_pages(tmp_path, picture):
    preview = Image.fromarray(picture[::2, ::2].copy())
    path = tmp_path / "a.tif"
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(picture).save(path, save_all=True, append_images=[preview])
    assert len(ImageFrames([path])) == 1 and np.array_equal(ImageFrames([path])[0], picture)
    path.write_bytes(stack([picture] * 3, "PNG", default_image=True))
    assert len(ImageFrames([path])) == 2, "a default picture is not part of the animation"


@pytest.mark.parametrize(
    "description, message",
    [
        ("ImageJ=1.53\nimages=6\nchannels=2\nframes=3\n", "several axes"),
        ('<OME><Pixels SizeC="2" SizeT="3" SizeZ="1"/></OME>', "several axes"),
        ('{"shape": [3, 2, 20, 32]}', "several axes"),
        ("ImageJ=1.53\nimages=9\nframes=9\n", "6 pages.*says 9"),
        ("ImageJ=1.53\nimages=6\nframes=6\n", None),
        ('<OME><Pixels SizeC="1" SizeT="6" SizeZ="1"/></OME>', None),
        ('{"shape": [6, 20, 32]}', None),
    ],
)
def test_pages_of_several_axes_or_too_few_are_refused(tmp_path, picture, description, message):
    path = tmp_path / "a.tif"
    path.write_bytes(stack([picture] * 6, "TIFF", tiffinfo={270: description}))
    if message is None:
        assert len(ImageFrames([path])) == 6
        return
    with pytest.raises(SampleError, match=message):
        ImageFrames([path])


def test_pages_of_several_sizes_or_too_many_are_refused(tmp_path, picture, monkeypatch):
    path = tmp_path / "a.tif"
    path.write_bytes(stack([picture, picture[:10].copy()], "TIFF"))
    with pytest.raises(SampleError, match="several sizes"):
        ImageFrames([path])
    monkeypatch.setattr("samoe_hf.data.image_files.MAX_PAGES", 4)
    for format in ("TIFF", "PNG", "GIF", "WEBP"):
        path = tmp_path / f"b.{format}"
        path.write_bytes(stack([np.roll(picture, i, axis=1) for i in range(6)], format))
        with pytest.raises(SampleError, match="more than 4 pages"):
            ImageFrames([path])


def test_jpeg_2000_is_read(tmp_path, picture):
    path = tmp_path / "0.jp2"
    path.write_bytes(encode(picture, "JPEG2000"))
    assert np.array_equal(read_video(tmp_path)[0], picture)


def test_pictures_that_are_not_read_are_named(tmp_path, picture, caplog):
    (tmp_path / "0.dng").touch()
    with pytest.raises(SampleError, match=r"no images.*not read: 1 \.dng"):
        read_video(tmp_path)
    Image.fromarray(picture).save(tmp_path / "1.png")
    assert len(read_video(tmp_path)) == 1 and "not read: 1 .dng" in caplog.text


def test_heic_is_read_where_its_plugin_is_there(monkeypatch):
    registered = []
    plugin = types.ModuleType("pillow_heif")
    plugin.__spec__ = importlib.machinery.ModuleSpec("pillow_heif", None)
    plugin.register_heif_opener = lambda: registered.append(True)
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    again = importlib.util.module_from_spec(image_files.__spec__)
    image_files.__spec__.loader.exec_module(again)
    assert registered and ".heic" in again.IMAGE_SUFFIXES
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    without = importlib.util.module_from_spec(image_files.__spec__)
    image_files.__spec__.loader.exec_module(without)
    assert ".heic" in without.UNREAD_SUFFIXES
