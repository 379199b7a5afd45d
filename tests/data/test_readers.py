"""Readers of dataset layouts, on small copies of each layout and, where it is there, on real data."""

import json
import math
from itertools import chain

import nibabel as nib
import numpy as np
import pytest

from helpers.layouts import (
    SIZE,
    label_map,
    make_coco,
    make_nifti,
    make_sa_v,
    make_sa_v_val,
    save_frames,
    save_image,
    save_labels,
)
from helpers.reference import ROOT
from samoe_hf.data import SampleError, load_videos


@pytest.fixture
def vos(tmp_path):
    """Two videos of 6 frames, every second one annotated, a second object from frame 2 on."""
    for name in ("a", "b"):
        save_frames(tmp_path / "train" / "JPEGImages" / name, 6)
        labels = {0: label_map((1, 2)), 2: label_map((1, 4), (9, 20)), 4: label_map((9, 22))}
        save_labels(tmp_path / "train" / "Annotations" / name, labels)
    return tmp_path


@pytest.mark.parametrize("kind", ["youtube_vos"])
def test_vos_layouts_give_unannotated_frames_and_late_objects(vos, kind):
    videos = load_videos(kind, vos, split="train")
    assert videos.video_ids == ["a", "b"] and videos[0].domain == kind
    video = videos[1]
    assert (len(video), video.annotated_frames, video.object_ids) == (6, [0, 2, 4], [1, 9])
    assert [video.visible(t) for t in video.annotated_frames] == [[1], [1, 9], [9]]
    assert np.array_equal(video.masks(2)[1], label_map((1, 20)) > 0)
    assert load_videos(kind, vos / "train", domain="mine")[0].domain == "mine"


def test_a_split_may_be_a_list_and_videos_may_be_chosen(vos):
    (vos / "train" / "ImageSets").mkdir()
    (vos / "train" / "ImageSets" / "few.txt").write_bytes(b"\xef\xbb\xbfb\r\n\r\n")  # as Notepad does
    assert load_videos("frames", vos / "train", split="few").video_ids == ["b"]
    assert load_videos("frames", vos / "train", video_ids=["b"]).video_ids == ["b"]
    with pytest.raises(ValueError, match=r"no videos \['c'\]; there are \['a', 'b'\]"):
        load_videos("frames", vos / "train", video_ids=["c"])
    with pytest.raises(FileNotFoundError, match=r"val\.txt: no list for this split; there are: few"):
        load_videos("frames", vos / "train", split="val")


def save_davis(root, year_lists):
    for name in ("bear.2", "cat"):
        save_frames(root / "JPEGImages" / "480p" / name, 2)
        for i in range(2):
            save_image(root / "Annotations" / "480p" / name / f"{i:05d}.png", label_map((255, 3 + i)))
    for path, text in year_lists.items():
        (root / "ImageSets" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / path).write_text(text)


@pytest.mark.parametrize(
    "line", ["cat\n", "/JPEGImages/480p/cat/00000.jpg /Annotations/480p/cat/00000.png\n" * 2], ids=["names", "files"]
)
def test_davis_2016_has_one_object_stored_as_255(tmp_path, line):
    save_davis(tmp_path, {"480p/val.txt": line})
    videos = load_videos("davis", tmp_path, split="val")
    assert videos.video_ids == ["cat"] and videos[0].object_ids == [1]
    assert np.array_equal(videos[0].masks(1)[0], label_map((1, 4)) > 0)
    assert load_videos("davis", tmp_path).video_ids == ["bear.2", "cat"]


def test_davis_2017_has_the_palettes_ids(tmp_path):
    save_davis(tmp_path, {"2017/val.txt": "cat", "2016/val.txt": "bear.2"})
    save_labels(tmp_path / "Annotations" / "480p" / "cat", {i: label_map((1, 2), (2, 10)) for i in range(2)})
    assert load_videos("davis", tmp_path, split="val")[0].object_ids == [1, 2]
    assert load_videos("davis", tmp_path, split="val", year=2016).video_ids == ["bear.2"]


SHARED = ROOT.parent / "shared" / "data"


def real_data(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs ../shared/data/{name}, which is not part of the repository")
    return SHARED / name


def test_real_davis():
    videos = load_videos("davis", real_data("davis"), split="val")
    assert videos.video_ids == ["blackswan", "dog", "libby"]
    dog = videos[1]
    assert (len(dog), dog.size, dog.visible(0)) == (50, (480, 854), [1])
    assert dog.frames[49].shape == (480, 854, 3) and 0.05 < dog.masks(49).mean() < 0.3


def test_real_ct_volumes():
    videos = load_videos("npz", real_data("ct_lesions"), domain="ct")
    video = videos[0]
    assert len(videos) == 4 and video.object_ids == [1] and video.size == (512, 512)
    assert video.spacing == pytest.approx((0.31445, 0.31445, 5.0), abs=1e-4)
    assert [t for t in range(len(video)) if video.visible(t)] == list(range(5, 12))


def test_sa_v_validation_has_a_folder_per_object(tmp_path):
    make_sa_v_val(tmp_path / "sav_val")
    for path in (tmp_path, tmp_path / "sav_val"):
        video = load_videos("sa_v_val", path)[0]
        assert (video.video_id, video.object_ids, video.annotated_frames) == ("sav_1", [1, 2], [0, 4])
        assert [video.visible(t) for t in (0, 4)] == [[1], [1, 2]]
        assert video.masks(4).all(axis=0).any(), "objects may overlap"


@pytest.fixture
def ocid(tmp_path):
    for folder in ("ARID20/table/bottom", "YCB10/floor"):
        for n in (*range(1, 7), 13):
            sequence = tmp_path / folder / f"seq{n:02d}"
            save_frames(sequence / "rgb", 3, ".png")
            ids = [(1, 0), (2, 6), (300, 12)]
            for i in range(3):  # one object more per frame; object 9 is taken away again
                shown = [*ids[: i + 1], (9, 20)] if i < 2 else ids
                save_image(sequence / "label" / f"{i:05d}.png", label_map(*shown, dtype=np.uint16))
    return tmp_path


def test_ocid_has_the_originals_splits_and_the_objects_of_the_last_label(ocid):
    splits = {name: load_videos("ocid", ocid, split=name).video_ids for name in ("train", "val", "test")}
    assert splits["test"] == ["ARID20/table/bottom/seq13", "YCB10/floor/seq13"]
    assert (len(splits["train"]), len(splits["val"])) == (9, 3)
    assert sorted(chain.from_iterable(splits.values())) == sorted(load_videos("ocid", ocid).video_ids)
    assert load_videos("ocid", ocid, split="train").video_ids == splits["train"], "the split is fixed"
    video = load_videos("ocid", ocid, split="test")[0]
    assert video.object_ids == [1, 2, 300], "ids of 16 bits; an object that was taken away is none"
    assert [video.visible(t) for t in range(3)] == [[1], [1, 2], [1, 2, 300]]
    assert load_videos("ocid", ocid, split="test", ignore_ids=[1])[0].object_ids == [2, 300]


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
    with pytest.raises(SampleError, match=r"sav_1/0+: .*named by a number of its own"):
        load_videos(**make_sa_v_val(tmp_path / "sav"))[0]
    (labels / "case.nii").unlink()
    (labels / "case.nii.json").write_text("{}")
    (labels / "._case.nii.gz").write_text("")
    assert load_videos(**nifti).video_ids == ["case"], "files beside the volumes are none"


def test_sa_v_training_decodes_video_and_masklets(tmp_path):
    make_sa_v(tmp_path)
    video = load_videos("sa_v", tmp_path)[0]
    assert (video.video_id, len(video), video.object_ids) == ("sav_1", 10, [1, 2])
    assert video.annotated_frames == [0, 8], "an object without an entry leaves its frame unannotated"
    assert np.array_equal(video.masks(0), [label_map((1, 2)) > 0, label_map((1, 2), (1, 9)) > 0])
    assert video.visible(8) == [1] and abs(int(video.frames[8].mean()) - 160) < 4
    with pytest.raises(FileNotFoundError, match=r"no files \*_auto\.json"):
        load_videos("sa_v", tmp_path, annotations="auto")
    (tmp_path / "sav_000" / "sav_1.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"sav_1\.mp4"):
        load_videos("sa_v", tmp_path)[0]


def test_coco_images_are_videos_of_one_frame_with_a_warning(tmp_path, caplog):
    videos = load_videos(**make_coco(tmp_path))
    assert "get no gradient" in caplog.text and "expert_modules" in caplog.text
    assert videos.video_ids == ["one.png"], "images without annotations are left out"
    video = videos[0]
    assert (len(video), video.object_ids) == (1, [1, 2]), "crowds are left out"
    assert video.masks(0).sum(axis=(1, 2)).tolist() == [64, 64]


SEGMENTATIONS = [
    *([[x, 0, -x, 0, 0, x]] for x in (1e9, math.nan, 1e400)), [[0, 0, 31, 23] * 200], [[0, 0, 1, 1, 2]],
    [["a"] * 6], [], None, {"size": [10**6, 10**6], "counts": [10**12]},
    {"size": list(SIZE), "counts": "oooooooooo"}, {"size": list(SIZE), "counts": [5, 10**9]},
]  # fmt: skip


@pytest.mark.parametrize(
    "change, match",
    [
        *(({"annotations": {"segmentation": x}}, r"one\.png") for x in SEGMENTATIONS),
        ({"images": {"height": 10**6, "width": 10**6}}, r"one\.png.*\(24, 32\)"),
        *(({"images": {"file_name": x}}, r"labels\.json") for x in ("../labels.json", "/etc/passwd", 5)),
        ({"annotations": None}, r"labels\.json: not COCO"),
    ],
    ids=str,
)
def test_polygons_masks_and_names_of_coco_fit_their_image(tmp_path, change, match):
    options = make_coco(tmp_path)
    data = json.loads((tmp_path / "labels.json").read_text())
    for key, values in change.items():
        data[key] = None if values is None else [data[key][0] | values, *data[key][1:]]
    (tmp_path / "labels.json").write_text(json.dumps(data))
    with pytest.raises(SampleError, match=match):
        load_videos(**options)[0].masks(0)
