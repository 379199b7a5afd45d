"""Files and options that were read wrongly, accepted in silence, or ended in errors that named nothing."""

import json
import math
import struct
import warnings
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from helpers.layouts import (
    SIZE,
    label_map,
    make_coco,
    make_dataset,
    make_davis,
    make_frames,
    make_nifti,
    make_npz,
    make_sa_v,
    make_sa_v_val,
    rle,
    save_frames,
    save_image,
)
from samoe_hf.data import (
    ClipDataset,
    ClipStream,
    MixedDataset,
    SampleError,
    SyntheticVideos,
    Video,
    load_videos,
    read_video,
    to_datasets,
    training_transforms,
    video_from_row,
    write_video,
)
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.data.predictions import MaskFiles
from samoe_hf.data.registry import read_yaml, videos_from_entry
from samoe_hf.data.transforms import transforms_from_options
from samoe_hf.data.video_io import ArrayFrames
from samoe_hf.model.processor import build_processor


def png(width, height):
    """The header of a gray PNG of any size, and no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# --- masks of one object among label images


def draw_mask(soft):
    scale = 4 if soft else 1
    image = Image.new("L", (SIZE[1] * scale, SIZE[0] * scale))
    ImageDraw.Draw(image).ellipse([c * scale for c in (5, 4, 25, 20)], fill=255)
    return np.asarray(image.resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR) if soft else image)


def test_a_mask_with_soft_edges_is_no_map_of_75_objects(tmp_path):
    options = make_frames(tmp_path)
    save_image(tmp_path / "Annotations" / "a" / "00000.png", draw_mask(soft=True))
    with pytest.raises(SampleError, match=r"a/00000\.png: a mask with soft edges.*`binary: true`"):
        load_videos(**options)[0].visible(0)
    assert load_videos(**options, binary=True)[0].visible(0) == [1]


def test_a_mask_of_0_and_255_is_object_255_with_a_warning(tmp_path):
    options = make_frames(tmp_path)
    save_image(tmp_path / "Annotations" / "a" / "00000.png", draw_mask(soft=False))
    with pytest.warns(UserWarning, match=r"Annotations hold 0 and 255 alone.*`binary: true` \(`year: 2016`"):
        assert load_videos(**options)[0].visible(0) == [255]


@pytest.mark.parametrize("case", ["border", "grid", "small", "palette"])
def test_maps_with_an_object_255_are_taken_as_they_are(tmp_path, case):
    options = make_frames(tmp_path)
    ids = label_map((1, 2), (2, 12))
    if case == "border":  # as PASCAL VOC draws around objects
        ids[3:21, 11] = ids[3:21, 16] = ids[3, 11:17] = ids[20, 11:17] = 255
    elif case == "grid":
        ids = np.random.default_rng(0).permutation(256)[:192].astype(np.uint8).reshape(12, 16)
        ids = np.append(ids.ravel()[:-1], 255).astype(np.uint8).reshape(12, 16).repeat(2, 0).repeat(2, 1)
    elif case == "small":
        ids[:] = np.where(label_map((1, 2)) > 0, 255, 0)
        ids[0, 30:] = 7
    else:
        ids[:4] = 255
    if case == "palette":
        Image.fromarray(ids).convert("P").save(tmp_path / "Annotations" / "a" / "00000.png")
    else:
        save_image(tmp_path / "Annotations" / "a" / "00000.png", ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_videos(**options)[0].visible(0) == [int(i) for i in np.unique(ids) if i]


def test_labels_that_were_compressed_with_loss_are_refused(tmp_path):
    options = make_frames(tmp_path)
    (tmp_path / "Annotations" / "a" / "00000.png").unlink()
    Image.fromarray(label_map((9, 3))).save(tmp_path / "Annotations" / "a" / "00000.jpg")
    with pytest.raises(SampleError, match=r"00000\.jpg: JPEG image; labels must be PNG"):
        load_videos(**options)[0].visible(0)


# --- sizes are compared before anything is decoded


def damaged_sa_v(tmp_path, change):
    options = make_sa_v(tmp_path)
    path = tmp_path / "sav_000" / "sav_1_manual.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(SampleError, match=r"sav_1_manual\.json"):
        video = load_videos(**options)[0]
        for frame in video.annotated_frames:
            assert video.visible(frame) is not None
            video.masks(frame)


@pytest.mark.parametrize(
    "change",
    [
        {"video_height": 10**6, "video_width": 10**6},
        {"video_height": 25},
        {"video_height": -24},
        {"video_height": float("nan")},
        {"video_height": float("inf")},
        {"video_height": None},
        {"masklet": None},
        {"masklet": 5},
        {"masklet": [5]},
        {"masklet": [[5]]},
        {"masklet": [[{"size": [10**6, 10**6], "counts": "PPYo1"}]]},
        {"masklet": [[{"size": [24, 32], "counts": "PPYo1"}]]},
    ],
    ids=str,
)
def test_sizes_and_forms_of_masklets(tmp_path, change):
    damaged_sa_v(tmp_path, lambda data: data.update(change))


@pytest.mark.parametrize(
    "counts",
    ["", "oooooooooo", "0", "~~~~", "P`0", "é", "1" * 5000, [768, 1], [-1, 769], [1.5], [], None, {}],
    ids=repr,
)
def test_damaged_counts(tmp_path, counts):
    damaged_sa_v(tmp_path, lambda data: data["masklet"][0][0].update(counts=counts))


def test_masks_of_any_form_keep_their_pixels():
    rng = np.random.default_rng(0)
    for _ in range(100):
        size = tuple(rng.integers(1, 40, 2))
        mask = rng.random(size) < rng.choice([0, 0.1, 0.5, 0.9, 1])
        encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        flat = np.concatenate([[False], mask.T.ravel(), [not mask[-1, -1]]])
        runs = np.diff(np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1])])).tolist()
        for counts in (encoded["counts"], encoded["counts"].decode(), runs):
            row = {"size": list(size), "object_ids": [1], "annotated_frames": [0], "masks": [[counts]], "spacing": []}
            frame = Image.fromarray(np.zeros(size, np.uint8))
            video = video_from_row(row | {"video_id": "v", "domain": "d", "frames": [frame], "frame_names": ["0"]})
            assert (video.masks(0)[0] == mask).all() and video.visible(0) == ([1] if mask.any() else [])


def damaged_coco(tmp_path, change, match):
    options = make_coco(tmp_path)
    data = json.loads((tmp_path / "labels.json").read_text())
    change(data)
    (tmp_path / "labels.json").write_text(json.dumps(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SampleError, match=match):
            video = load_videos(**options)[0]
            assert video.masks(0) is not None


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1e9, 0, -1e9, 0, 0, 1e9]],
        [[math.nan, 0, 1, 1, 2, 2]],
        [[1e400, 0, 1, 1, 2, 2]],
        [[0, 0, 31, 23] * 200],
        [[0, 0, 1]],
        [[0, 0, 1, 1, 2]],
        [["a"] * 6],
        [{}],
        [],
        5,
        None,
        {"size": [10**6, 10**6], "counts": [10**12]},
        {"size": list(SIZE), "counts": "oooooooooo"},
        {"size": list(SIZE), "counts": [5, 10**9]},
    ],
    ids=str,
)
def test_polygons_and_masks_of_coco_fit_their_image(tmp_path, segmentation):
    damaged_coco(tmp_path, lambda d: d["annotations"][0].update(segmentation=segmentation), r"one\.png")


def test_images_of_coco_have_the_size_and_the_names_that_the_file_says(tmp_path):
    damaged_coco(tmp_path / "a", lambda d: d["images"][0].update(height=10**6, width=10**6), r"one\.png.*\(24, 32\)")
    for i, name in enumerate(("../labels.json", "/etc/passwd", 5, "")):
        damaged_coco(tmp_path / f"b{i}", lambda d, name=name: d["images"][0].update(file_name=name), r"labels\.json")
    twice = {"id": 7, "file_name": "one.png", "height": SIZE[0], "width": SIZE[1]}
    annotation = {"id": 3, "image_id": 7, "iscrowd": 0, "segmentation": rle(label_map((1, 2)))}
    damaged_coco(
        tmp_path / "c", lambda d: (d["images"].append(twice), d["annotations"].append(annotation)), "two images"
    )


def test_images_of_absurd_sizes_are_named(tmp_path):
    options = make_frames(tmp_path)
    for folder, side in (("JPEGImages", 100_000), ("Annotations", 100_000), ("JPEGImages", 12_000)):
        path = tmp_path / folder / "a" / "00000.png"
        path.with_suffix(".jpg").unlink(missing_ok=True)
        path.write_bytes(png(side, side))
        with pytest.raises(SampleError, match=r"00000\.png.*pixels"):
            load_videos(**options)[0].visible(0)


def test_arrays_of_absurd_sizes_and_types_are_refused_before_they_are_read(tmp_path):
    options = make_npz(tmp_path)
    for name, shape, descr in (
        ("imgs", (10**4, 10**4, 10**4), "|u1"),
        ("imgs", (4, *SIZE), "|O"),
        ("imgs", (-4, *SIZE), "|u1"),
        ("gts", (10**4, 10**4, 10**4), "<i8"),
        ("gts", (4, *SIZE), "<c16"),
        ("spacing", (10**9,), "<f8"),
        ("spacing", (2,), "<f8"),
    ):
        with zipfile.ZipFile(tmp_path / "case.npz", "w") as archive:
            for array in ("imgs", "gts", "spacing"):
                with archive.open(f"{array}.npy", "w") as file:
                    right = (
                        {"shape": (3,), "descr": "<f8"} if array == "spacing" else {"shape": (4, *SIZE), "descr": "|u1"}
                    )
                    header = {"shape": shape, "descr": descr} if array == name else right
                    np.lib.format.write_array_header_1_0(file, header | {"fortran_order": False})
                    file.write(bytes(4 * math.prod(SIZE)))
        with pytest.raises(SampleError, match=rf"case\.npz.*{name}|case\.npz.*differ"):
            load_videos(**options)[0]


@pytest.mark.parametrize("dim", [(30_000, 30_000, 30_000), (6, 8, 0), (6, 8, 4)], ids=str)
def test_nifti_files_of_absurd_or_differing_sizes_are_refused_before_they_are_read(tmp_path, dim):
    options = make_nifti(tmp_path, ".nii")
    path = tmp_path / "imagesTr" / "case.nii"
    data = bytearray(path.read_bytes())
    struct.pack_into("<3h", data, 42, *dim)
    path.write_bytes(data)
    with pytest.raises(SampleError, match=r"case\.nii"):
        load_videos(**options)[0]


@pytest.mark.parametrize("spacing", [(0, 1, 1), (1, -1, 1), (math.nan, 1, 1), (1, 1, math.inf)], ids=str)
def test_spacing_is_three_lengths(tmp_path, spacing):
    options = make_npz(tmp_path)
    ids = np.ones((2, 4, 4), np.uint8)
    np.savez(tmp_path / "case.npz", imgs=ids, gts=ids, spacing=spacing)
    with pytest.raises(SampleError, match=r"case\.npz: .*spacing"):
        load_videos(**options)[0]


def test_ids_of_volumes_are_not_negative_and_take_a_byte(tmp_path):
    options, images = make_npz(tmp_path), np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "case.npz", imgs=images, gts=np.full((2, 4, 4), -1))
    with pytest.raises(SampleError, match=r"case\.npz: labels .* not -1"):
        load_videos(**options)[0]
    np.savez(tmp_path / "case.npz", imgs=images, gts=np.full((2, 4, 4), 7, np.int64))
    video = load_videos(**options)[0]
    assert video.visible(0) == [7] and video.annotations.ids(0).dtype == np.uint8


def test_voxels_that_are_no_number_are_black(tmp_path):
    options = make_npz(tmp_path)
    images = np.linspace(0, 100, 32, dtype=np.float32).reshape(2, 4, 4)
    images[0, 0, 0] = math.nan
    np.savez(tmp_path / "case.npz", imgs=images, gts=np.ones((2, 4, 4), np.uint8))
    frames = load_videos(**options)[0].frames
    assert not frames[0][0, 0].any() and frames[1][-1, -1, 0] == 255 and frames[1][0, 0, 0] > 100
    np.savez(tmp_path / "case.npz", imgs=np.full((2, 4, 4), math.nan), gts=np.ones((2, 4, 4), np.uint8))
    with pytest.raises(SampleError, match=r"case\.npz: no finite"):
        load_videos(**options)[0]
    for window in ((1, 0), (math.nan, 1), (5,), "ct"):
        with pytest.raises(ValueError, match="window"):
            load_videos(**options, window=window)


# --- names


def test_frames_may_have_any_name(tmp_path):
    save_frames(tmp_path, 2)
    (tmp_path / "00001.jpg").rename(tmp_path / "²1.jpg")
    assert read_video(tmp_path).names == ["00000", "²1"]
    (tmp_path / "folder.png").mkdir()
    assert len(read_video(tmp_path)) == 2, "a folder is no frame"


def test_two_files_of_one_name_are_named(tmp_path):
    sa_v = make_sa_v(tmp_path / "sa_v")
    other = tmp_path / "sa_v" / "sav_001"
    other.mkdir()
    (other / "sav_1_manual.json").write_bytes((tmp_path / "sa_v" / "sav_000" / "sav_1_manual.json").read_bytes())
    with pytest.raises(SampleError, match=r"sav_001/sav_1_manual\.json.*sav_000"):
        load_videos(**sa_v)
    nifti = make_nifti(tmp_path / "nifti")
    labels = tmp_path / "nifti" / "labelsTr"
    nib.save(nib.load(labels / "case.nii.gz"), labels / "case.nii")
    with pytest.raises(SampleError, match=r"case\.nii.*same name"):
        load_videos(**nifti)
    save_image(tmp_path / "sav" / "Annotations_6fps" / "sav_1" / "0" / "00000.png", label_map((1, 2)))
    with pytest.raises(SampleError, match=r"sav_1/0+: another folder has the same number"):
        load_videos(**make_sa_v_val(tmp_path / "sav"))[0]
    (labels / "case.nii").unlink()
    (labels / "case.nii.json").write_text("{}")
    (labels / "._case.nii.gz").write_text("")
    assert load_videos(**nifti).video_ids == ["case"], "files beside the volumes are none"


@pytest.mark.parametrize("video_id, frame", [("../up", "0"), ("/tmp/up", "0"), ("v", "../../0"), ("v", "a\0b")])
def test_predictions_stay_in_their_folder(tmp_path, video_id, frame):
    frames = ArrayFrames(np.zeros((1, 4, 4), np.uint8))
    frames.names = [frame]
    video = Video(video_id, frames, MaskArrays(np.ones((1, 1, 4, 4), bool), [1]))
    with pytest.raises(SampleError, match="no path within a folder"):
        MaskFiles(tmp_path / "masks").write(video, 0, video.masks(0))
    assert list(tmp_path.rglob("*")) == []


# --- videos


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


# --- options


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"knd": "davis"}, r"train_data\[0\] names no `kind`.*'knd'"),
        ("davis", r"train_data\[0\] must be the arguments"),
        ({"kind": 5}, "unknown kind of dataset 5"),
        ({"kind": ["davis"]}, "unknown kind"),
        ({"kind": "synthetic", "num_videos": "2", "num_frames": 2}, "`num_videos` must be an integer, not '2'"),
        ({"kind": "synthetic", "num_videos": 0, "num_frames": 2}, "num_videos"),
        ({"kind": "synthetic", "num_videos": True, "num_frames": 2}, "num_videos"),
        ({"kind": "synthetic", "num_videos": 2, "num_frames": math.nan}, "num_frames"),
        ({"kind": "synthetic", "num_videos": 2, "num_frames": 2, "image_size": 64}, "image_size"),
        ({"kind": "synthetic", "num_videos": 2, "num_frames": 2, "image_size": [64, 0]}, "image_size"),
        ({"kind": "synthetic", "num_videos": 2, "num_frames": 2, "seed": -1}, "seed"),
        ({"kind": "frames", "root": ".", "binary": "no"}, "`binary` must be bool, not 'no'"),
        ({"kind": "davis", "root": ".", "year": "2016"}, "`year` must be 2016 or 2017 or None, not '2016'"),
        ({"kind": "davis", "root": 5}, "root"),
        ({"kind": "davis", "root": ".", "domain": 5}, "domain"),
        ({"kind": "ocid", "root": ".", "ignore_ids": "12"}, "`ignore_ids` must be a list of an integer"),
        ({"kind": "sa_v", "root": ".", "annotations": "../x"}, "`annotations` must be 'manual' or 'auto'"),
        ({"kind": "davis", "root": ".", "video_ids": "cat"}, "video_ids"),
        ({"kind": "dataset", "root": ".", "streaming": "no"}, "streaming"),
    ],
)
def test_wrong_datasets_of_a_run_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        videos_from_entry(entry, "train_data[0]")


@pytest.mark.parametrize("step", [0, -4])
def test_steps_between_annotated_frames_are_positive(tmp_path, step):
    with pytest.raises(ValueError, match="frame_step"):
        load_videos(**make_sa_v(tmp_path), frame_step=step)


@pytest.mark.parametrize("weight", ["a", math.nan, math.inf, True, None, -1, 0, [1]])
def test_weights_are_positive_numbers(weight):
    clips = ClipDataset(SyntheticVideos(1, 2, (8, 8)), None, num_frames=2)
    with pytest.raises(ValueError, match="weights must be positive numbers, but that of 'b'"):
        MixedDataset({"a": clips, "b": clips}, {"a": 1, "b": weight})


@pytest.mark.parametrize(
    "name, wrong",
    [
        *(("num_frames", x) for x in (0, -1, 1.5, "2", math.nan, True, None)),
        *(("stride", x) for x in (0, 0.5, "1")),
        *(("max_objects", x) for x in (0, -3, "3")),
        *(("reverse_probability", x) for x in (math.nan, -0.1, 2, "0.5", None)),
        *(("clips_per_video", x) for x in (0, -1, 1.0, "1")),
        *(("seed", x) for x in (-1, 0.5, "0", None)),
    ],
)
def test_numbers_of_clips_are_checked_by_name(name, wrong):
    with pytest.raises(ValueError, match=name):
        ClipDataset(SyntheticVideos(1, 2, (8, 8)), None, **{name: wrong})


def test_mixtures_are_not_empty():
    clips = {"a": ClipDataset(SyntheticVideos(1, 2, (8, 8)), None, num_frames=2)}
    for options in ({"length": 0}, {"length": -1}, {"length": 1.5}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MixedDataset(clips, **options)


def test_one_number_stands_for_several_in_the_augmentation():
    def text(**options):
        off = {"flip": 0, "degrees": 0, "shear": 0, "jitter": 0, "grayscale": 0, "frame_jitter": 0}
        return str(training_transforms(**off | options))

    assert text() == text(jitter=(0,), frame_jitter=(0, 0)) == text(translate=0, scale=0)
    assert text(jitter=0.2) == text(jitter=(0.2, 0, 0, 0)) and text(jitter=0.2) != text()
    assert text(frame_jitter=0.2) == text(frame_jitter=[0.2])
    assert text(translate=0.1) == text(translate=(0.1, 0.1))
    assert text(scale=0.25) == text(scale=(0.75, 1.25))
    assert text(crop_size=8, crop_scale=0.5) == text(crop_size=8, crop_scale=(0.5, 1.0))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"flp": 0.5}, "no option 'flp'; did you mean 'flip'"),
        ([0.5], "`augmentation` must be"),
        *(({"flip": x}, "flip") for x in (2, -1, math.nan, "yes", None)),
        *(({"jitter": x}, "jitter") for x in (-1, "a", math.nan, [0.1, 0.1, 0.1, 0.9], [0] * 4 + [1])),
        ({"degrees": math.nan}, "degrees"),
        ({"translate": 2}, "translat"),
        ({"scale": 2}, "scale"),
        ({"scale": [1]}, "scale"),
        ({"crop_scale": [0.9, 0.5], "crop_size": 8}, "crop_scale"),
        ({"crop_size": 0}, "crop_size"),
        ({"crop_size": 0.5}, "crop_size"),
    ],
    ids=str,
)
def test_wrong_augmentation_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        transforms_from_options(options)


# --- YAML


def test_what_is_no_yaml_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    for content in (
        b"\xff\xfe\xfa", "ä: ü".encode("latin-1"), b"[" * 5000, b"a: 2001-99-99", b"{[1]: 2}", b"a: " + b"9" * 5000,
        b"!!python/object/apply:os.system ['touch executed']", b"- 1", b"", b"a: *b", b"\0",
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.yaml"):
            read_yaml(path)
    assert not Path("executed").exists()


# --- rows of a dataset


@pytest.mark.parametrize(
    "change",
    [
        {"size": [10**6, 10**6]}, {"size": []}, {"size": None}, {"size": [0, 0]}, {"object_ids": [0]},
        {"object_ids": [-1]}, {"object_ids": [1, 1]}, {"object_ids": None}, {"annotated_frames": [0, 5]},
        {"annotated_frames": [0, 0]}, {"annotated_frames": [-1, 0]}, {"annotated_frames": [0]}, {"masks": [[], []]},
        {"masks": None}, {"masks": [["x"], ["y"]]}, {"frames": []}, {"frames": None}, {"frames": [None, None]},
        {"frames": [{"bytes": None, "path": None}] * 2}, {"frame_names": ["a"]}, {"frame_names": [None, None]},
        {"spacing": [0.0, 1.0, 1.0]}, {"spacing": [1.0]}, {"spacing": [math.nan] * 3},
    ],
    ids=str,
)  # fmt: skip
def test_rows_whose_parts_do_not_fit_are_named(change):
    videos = [Video.from_arrays("odd", np.zeros((2, 4, 4), np.uint8), np.ones((2, 1, 4, 4), bool))]
    row = next(iter(to_datasets(videos, streaming=True))) | change
    with pytest.raises(SampleError, match="odd"):
        video = video_from_row(row)
        assert video.frames[0].shape == (4, 4, 3)
        video.masks(0)


def test_a_stream_goes_on_after_a_row_that_is_no_video():
    videos = [Video.from_arrays(name, np.zeros((2, 8, 8), np.uint8), np.ones((2, 1, 8, 8), bool)) for name in "abc"]
    rows = list(to_datasets(videos, streaming=True))
    rows[1]["spacing"] = [0.0, 1.0, 1.0]
    processor = build_processor(SimpleNamespace(image_size=16))
    stream = ClipStream(map(video_from_row, rows), processor, num_frames=2, on_error="skip")
    assert [clip["video_id"] for clip in stream] == ["a", "c"] and stream.num_skipped == 1
    with pytest.raises(SampleError, match="b: spacing"):
        list(ClipStream(map(video_from_row, rows), processor, num_frames=2))


def test_ids_in_memory_are_different_and_above_0():
    for ids in ([0], [-1], [1.5], [True]):
        with pytest.raises(SampleError, match="integers above 0"):
            Video.from_arrays("v", np.zeros((1, 4, 4), np.uint8), np.ones((1, 1, 4, 4), bool), ids)
    with pytest.raises(SampleError, match="different"):
        Video.from_arrays("v", np.zeros((1, 4, 4), np.uint8), np.ones((1, 2, 4, 4), bool), [2, 2])


def test_a_damaged_dataset_on_disk_is_named(tmp_path):
    options = make_dataset(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(SampleError, match="saved"):
        load_videos(**options)


def test_damaged_rows_on_disk_are_named(tmp_path):
    options = make_dataset(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    content = path.read_bytes()
    offsets = struct.pack("<3i", 0, 14, 28)  # of the two videos' ids
    assert offsets in content
    path.write_bytes(content.replace(offsets, struct.pack("<3i", 0, -5, 2**30)))
    with pytest.raises(SampleError, match=r"saved.*\.arrow, row 0: damaged"):
        load_videos(**options)[0]


def test_lists_that_are_no_text_are_named(tmp_path):
    options = make_davis(tmp_path)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_bytes(b"\xff\xfe\0c")
    with pytest.raises(SampleError, match=r"val\.txt"):
        load_videos(**options)
