"""Readers of dataset layouts, on small copies of each layout and, where it is there, on real data."""

import json
from itertools import chain

import numpy as np
import pytest

from helpers.layouts import SIZE, label_map, make_coco, make_sa_v, save_frames, save_image, save_labels, save_nifti
from helpers.reference import ROOT
from samoe_hf.data import (
    SampleError,
    SyntheticVideos,
    load_videos,
    read_video,
    to_datasets,
    write_palette_png,
)

SHARED = ROOT.parent / "shared" / "data"


def real_data(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs ../shared/data/{name}, which is not part of the repository")
    return SHARED / name


@pytest.fixture
def vos(tmp_path):
    """Two videos of 6 frames, every second one annotated, a second object from frame 2 on."""
    for name in ("a", "b"):
        save_frames(tmp_path / "train" / "JPEGImages" / name, 6)
        labels = {0: label_map((1, 2)), 2: label_map((1, 4), (9, 20)), 4: label_map((9, 22))}
        save_labels(tmp_path / "train" / "Annotations" / name, labels)
    return tmp_path


# --- frames and label images


@pytest.mark.parametrize("kind", ["youtube_vos", "mose", "lvos"])
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
    (vos / "train" / "ImageSets" / "few.txt").write_text("b\n\n")
    assert load_videos("frames", vos / "train", split="few").video_ids == ["b"]
    assert load_videos("frames", vos / "train", video_ids=["b"]).video_ids == ["b"]
    with pytest.raises(ValueError, match=r"no videos \['c'\]; there are \['a', 'b'\]"):
        load_videos("frames", vos / "train", video_ids=["c"])
    with pytest.raises(FileNotFoundError, match=r"val\.txt: no list for this split; there are: few"):
        load_videos("frames", vos / "train", split="val")


def test_labels_must_fit_the_frames_by_name_and_size(vos):
    folder = vos / "train" / "Annotations" / "a"
    save_labels(folder, {7: label_map((1, 2))})
    with pytest.raises(SampleError, match=r"00007\.png: no frame of this name"):
        load_videos("mose", vos, split="train")[0]
    (folder / "00007.png").unlink()
    write_palette_png(folder / "00000.png", np.ones((10, 10), int))
    with pytest.raises(SampleError, match=r"masks of size \(10, 10\).*00000\.png"):
        load_videos("mose", vos, split="train")[0].masks(0)
    (folder / "00000.png").write_bytes(b"damaged")
    with pytest.raises(SampleError, match=r"00000\.png: not a readable image"):
        load_videos("mose", vos, split="train")[0].masks(0)


def test_empty_and_missing_folders_are_named(vos):
    for path in (vos / "train" / "JPEGImages" / "a").iterdir():
        path.unlink()
    videos = load_videos("mose", vos, split="train")
    with pytest.raises(SampleError, match=r"JPEGImages/a: no \.jpg"):
        videos[0]
    assert len(videos[1]) == 6, "other videos are not affected"
    with pytest.raises(FileNotFoundError, match="JPEGImages: no such folder"):
        load_videos("frames", vos)


def make_davis(root, year_lists):
    for name in ("bear", "cat"):
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
    make_davis(tmp_path, {"480p/val.txt": line})
    videos = load_videos("davis", tmp_path, split="val")
    assert videos.video_ids == ["cat"] and videos[0].object_ids == [1]
    assert np.array_equal(videos[0].masks(1)[0], label_map((1, 4)) > 0)
    assert load_videos("davis", tmp_path).video_ids == ["bear", "cat"]


def test_davis_2017_has_the_palettes_ids(tmp_path):
    make_davis(tmp_path, {"2017/val.txt": "cat", "2016/val.txt": "bear"})
    save_labels(tmp_path / "Annotations" / "480p" / "cat", {i: label_map((1, 2), (2, 10)) for i in range(2)})
    assert load_videos("davis", tmp_path, split="val")[0].object_ids == [1, 2]
    assert load_videos("davis", tmp_path, split="val", year=2016).video_ids == ["bear"]


def test_real_davis():
    videos = load_videos("davis", real_data("davis"), split="val")
    assert videos.video_ids == ["blackswan", "dog", "libby"]
    dog = videos[1]
    assert (len(dog), dog.size, dog.visible(0)) == (50, (480, 854), [1])
    assert dog.frames[49].shape == (480, 854, 3) and 0.05 < dog.masks(49).mean() < 0.3


# --- SA-V


def test_sa_v_validation_has_a_folder_per_object(tmp_path):
    root = tmp_path / "sav_val"
    save_frames(root / "JPEGImages_24fps" / "sav_1", 9)
    for i in (0, 4, 8):
        save_image(root / "Annotations_6fps" / "sav_1" / "000" / f"{i:05d}.png", label_map((255, 2)))
    save_image(root / "Annotations_6fps" / "sav_1" / "001" / "00004.png", label_map((255, 3)))
    (root / "sav_val.txt").write_text("sav_1\n")
    for path in (tmp_path, root):
        video = load_videos("sa_v_val", path)[0]
        assert (video.video_id, video.object_ids, video.annotated_frames) == ("sav_1", [1, 2], [0, 4, 8])
        assert [video.visible(t) for t in (0, 4, 8)] == [[1], [1, 2], [1]]
        assert video.masks(4).all(axis=0).any(), "objects may overlap"


@pytest.fixture
def sa_v(tmp_path):
    make_sa_v(tmp_path)
    return tmp_path


def test_sa_v_training_decodes_video_and_masklets(sa_v):
    video = load_videos("sa_v", sa_v)[0]
    assert (video.video_id, len(video), video.object_ids) == ("sav_1", 10, [1, 2])
    assert video.annotated_frames == [0, 8], "an object without an entry leaves its frame unannotated"
    assert np.array_equal(video.masks(0), [label_map((1, 2)) > 0, label_map((1, 2), (1, 9)) > 0])
    assert video.visible(8) == [1]
    assert abs(int(video.frames[8].mean()) - 160) < 4
    with pytest.raises(FileNotFoundError, match=r"no files \*_auto\.json"):
        load_videos("sa_v", sa_v, annotations="auto")


def test_damaged_sa_v_files_are_named(sa_v):
    path = sa_v / "sav_000" / "sav_1_manual.json"
    for text in ('{"masklet": [', '{"masklet": []}', "[]"):
        path.write_text(text)
        with pytest.raises(SampleError, match=r"sav_1_manual\.json: not SA-V"):
            load_videos("sa_v", sa_v)[0]
    path.with_name("sav_1.mp4").unlink()
    path.write_text('{"video_height": 1, "video_width": 1, "masklet": []}')
    with pytest.raises(FileNotFoundError, match=r"sav_1\.mp4"):
        load_videos("sa_v", sa_v)[0]


# --- OCID


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


def test_ocid_splits_as_the_original(ocid):
    splits = {name: load_videos("ocid", ocid, split=name).video_ids for name in ("train", "val", "test")}
    assert splits["test"] == ["ARID20/table/bottom/seq13", "YCB10/floor/seq13"]
    assert (len(splits["train"]), len(splits["val"])) == (9, 3)
    assert sorted(chain.from_iterable(splits.values())) == sorted(load_videos("ocid", ocid).video_ids)
    assert load_videos("ocid", ocid, split="train").video_ids == splits["train"], "the split is fixed"
    with pytest.raises(ValueError, match="`split` must be 'train' or 'val' or 'test' or None, not 'seq13'"):
        load_videos("ocid", ocid, split="seq13")


def test_ocid_objects_are_those_of_the_last_label(ocid):
    video = load_videos("ocid", ocid, split="test")[0]
    assert video.object_ids == [1, 2, 300], "ids of 16 bits; an object that was taken away is none"
    assert [video.visible(t) for t in range(3)] == [[1], [1, 2], [1, 2, 300]]
    assert load_videos("ocid", ocid, split="test", ignore_ids=[1])[0].object_ids == [2, 300]


# --- volumes


def test_npz_volumes_have_slices_for_frames(tmp_path):
    rng = np.random.default_rng(0)
    images, ids = rng.integers(0, 256, (5, 16, 20), dtype=np.uint8), np.zeros((5, 16, 20), np.uint8)
    ids[1:4, 3:6, 3:6] = 2
    np.savez_compressed(tmp_path / "case.1.npz", imgs=images, gts=ids, spacing=[0.5, 0.5, 5.0])
    video = load_videos("npz", tmp_path)[0]
    assert (video.video_id, len(video), video.object_ids, video.spacing) == ("case.1", 5, [2], (0.5, 0.5, 5.0))
    assert np.array_equal(video.frames[3], np.repeat(images[3][..., None], 3, axis=-1))
    assert [video.visible(t) for t in range(5)] == [[], [2], [2], [2], []]
    assert np.array_equal(video.masks(2)[0], ids[2] == 2)


def test_a_window_maps_intensities_to_gray(tmp_path):
    volume = np.linspace(-1000, 1000, 5)[:, None, None] + np.zeros((5, 4, 4))
    np.savez(tmp_path / "ct.npz", imgs=volume, gts=np.ones((5, 4, 4), int))
    windowed = load_videos("npz", tmp_path, window=(-500, 500))[0]
    assert [int(frame[0, 0, 0]) for frame in windowed.frames] == [0, 0, 128, 255, 255]
    by_percentiles = load_videos("npz", tmp_path)[0]
    assert [int(frame[0, 0, 0]) for frame in by_percentiles.frames] == [0, 64, 128, 191, 255]
    assert windowed.spacing is None


def test_damaged_volumes_are_named(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, imgs=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(SampleError, match=r"bad\.npz: not a volume.*gts"):
        load_videos("npz", tmp_path)[0]
    np.savez(path, imgs=np.zeros((2, 4, 4), np.uint8), gts=np.zeros((2, 4, 5), np.uint8))
    with pytest.raises(SampleError, match=r"bad\.npz: .*differ in size"):
        load_videos("npz", tmp_path)[0]
    np.savez(path, imgs=np.zeros((2, 4, 4), np.uint8), gts=np.zeros((2, 4, 4), np.float32))
    with pytest.raises(SampleError, match=r"bad\.npz: labels must be \(T, H, W\) integers"):
        load_videos("npz", tmp_path)[0]
    for content in (b"", b"PK\x03\x04 cut", path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(SampleError, match=r"bad\.npz: not a volume"):
            load_videos("npz", tmp_path)[0]


def test_real_ct_volumes():
    videos = load_videos("npz", real_data("ct_lesions"), domain="ct")
    video = videos[0]
    assert len(videos) == 4 and video.object_ids == [1] and video.size == (512, 512)
    assert video.spacing == pytest.approx((0.31445, 0.31445, 5.0), abs=1e-4)
    assert [t for t in range(len(video)) if video.visible(t)] == list(range(5, 12))


@pytest.mark.parametrize("image_name", ["case.nii.gz", "case_0000.nii.gz"])
def test_nifti_slices_are_axial_and_shown_as_radiologists_see_them(tmp_path, image_name):
    values, ids = np.zeros((6, 8, 3), np.float32), np.zeros((6, 8, 3), np.uint8)  # to the right, to the front, up
    values[5, 7, 2] = 100  # the patient's right, front, top
    ids[5, 7, 2] = 4
    flipped = np.diag([-0.5, 0.7, 2.0, 1.0])  # stored from right to left
    flipped[0, 3] = 2.5
    save_nifti(tmp_path / "imagesTr" / image_name, values[::-1], flipped)
    save_nifti(tmp_path / "labelsTr" / "case.nii.gz", ids, np.diag([0.5, 0.7, 2.0, 1.0]))
    video = load_videos("nifti", tmp_path, window=(0, 100))[0]
    assert (video.video_id, len(video), video.size, video.object_ids) == ("case", 3, (8, 6), [4])
    assert video.spacing == pytest.approx((0.5, 0.7, 2.0))
    assert np.argwhere(video.frames[2][..., 0]).tolist() == [[0, 0]] == np.argwhere(video.masks(2)[0]).tolist()
    assert not video.frames[1].any()


def test_damaged_nifti_files_are_named(tmp_path):
    save_nifti(tmp_path / "labelsTr" / "case.nii", np.zeros((2, 2, 2), np.uint8), np.eye(4))
    (tmp_path / "imagesTr").mkdir()
    with pytest.raises(FileNotFoundError, match=r"imagesTr/case\.nii"):
        load_videos("nifti", tmp_path)[0]
    (tmp_path / "imagesTr" / "case.nii").write_bytes(b"no volume")
    with pytest.raises(SampleError, match=r"case\.nii: not a readable NIfTI"):
        load_videos("nifti", tmp_path)[0]
    save_nifti(tmp_path / "imagesTr" / "case.nii", np.zeros((2, 2, 2, 2), np.float32), np.eye(4))
    with pytest.raises(SampleError, match="three axes"):
        load_videos("nifti", tmp_path)[0]


# --- COCO


@pytest.fixture
def coco(tmp_path):
    make_coco(tmp_path)
    return tmp_path


def test_coco_images_are_videos_of_one_frame_with_a_warning(coco, capsys):
    with pytest.warns(UserWarning, match="get no gradient.*expert_modules"):
        videos = load_videos("coco", coco, images="images", annotations="labels.json")
    assert capsys.readouterr().out == ""
    assert videos.video_ids == ["one.png"], "images without annotations are left out"
    video = videos[0]
    assert (len(video), video.object_ids) == (1, [1, 2]), "crowds are left out"
    assert video.masks(0).sum(axis=(1, 2)).tolist() == [64, 64]


@pytest.mark.filterwarnings("ignore:COCO images")
def test_damaged_coco_files_are_named(coco):
    options = {"images": "images", "annotations": "labels.json"}
    data = json.loads((coco / "labels.json").read_text())
    del data["annotations"][0]["segmentation"]
    (coco / "labels.json").write_text(json.dumps(data))
    with pytest.raises(SampleError, match=r"one\.png: its COCO annotations"):
        load_videos("coco", coco, **options)[0]
    (coco / "labels.json").write_text("{")
    with pytest.raises(SampleError, match=r"labels\.json: not COCO"):
        load_videos("coco", coco, **options)


# --- load_videos


def test_unknown_names_are_refused_with_the_nearest_known_one(tmp_path):
    with pytest.raises(ValueError, match="unknown kind of dataset 'youtubevos'; did you mean 'youtube_vos'"):
        load_videos("youtubevos", tmp_path)
    with pytest.raises(ValueError, match="no option 'ignore_id'; did you mean 'ignore_ids'"):
        load_videos("ocid", tmp_path, ignore_id=[1])
    with pytest.raises(ValueError, match="kind 'davis' need the option 'root'"):
        load_videos("davis")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_videos("ocid", tmp_path / "nowhere")


def test_synthetic_videos_and_saved_datasets_are_kinds_too(tmp_path):
    videos = load_videos("synthetic", num_videos=2, num_frames=3, image_size=SIZE, domain="blobs")
    assert isinstance(videos, SyntheticVideos) and videos[1].domain == "blobs"
    to_datasets(videos, cache_dir=str(tmp_path / "cache")).save_to_disk(tmp_path / "saved")
    saved = load_videos("dataset", tmp_path / "saved")
    assert np.array_equal(saved[1].frames[2], videos[1].frames[2]) and saved[1].domain == "blobs"
    streamed = list(load_videos("dataset", tmp_path / "saved", streaming=True))
    assert [video.video_id for video in streamed] == [video.video_id for video in videos]
    with pytest.raises(ValueError, match="video_ids cannot choose"):
        load_videos("dataset", tmp_path / "saved", video_ids=["x"])


def test_frames_of_a_reader_survive_a_dataset(vos, tmp_path):
    original = load_videos("mose", vos, split="train")
    stored = load_videos("dataset", _saved(original, tmp_path))
    assert stored[0].annotated_frames == [0, 2, 4] and len(stored[0]) == 6
    assert np.array_equal(stored[0].masks(2), original[0].masks(2))
    assert np.array_equal(stored[0].frames[5], read_video(vos / "train" / "JPEGImages" / "a")[5])


def _saved(videos, folder):
    to_datasets(videos, cache_dir=str(folder / "cache")).save_to_disk(folder / "saved")
    return folder / "saved"
