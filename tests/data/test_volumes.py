"""Volumes, whose slices serve as frames."""

import copy
import math
import pickle
import struct
import tracemalloc
import zipfile

import nibabel as nib
import numpy as np
import pytest

from helpers.layouts import SIZE, make_nifti, make_npz, save_nifti
from samoe_hf.data import SampleError, load_videos


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


GRID, SPOT = (6, 8, 3), np.zeros((6, 8, 3), np.uint8)
SPOT[4, 6, 2] = 4


def flipped(*axes: int) -> np.ndarray:
    """The affine of a volume of `GRID` that is stored in the other direction along some axes."""
    affine = np.eye(4)
    for axis in axes:
        affine[axis, axis], affine[axis, 3] = -1, GRID[axis] - 1
    return affine


def shifted(*offset: float, spacing: float = 1) -> np.ndarray:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = offset
    return affine


@pytest.mark.parametrize(
    "ids, affine",
    [
        (SPOT, np.eye(4)),
        (SPOT, shifted(0.01, 0, 0)),
        (SPOT[::-1], flipped(0)),
        (SPOT[::-1, :, ::-1], flipped(0, 2)),
        (SPOT.transpose(1, 0, 2), np.eye(4)[[1, 0, 2, 3]]),
        (SPOT[..., None], np.eye(4)),
    ],
    ids=["same", "rounded", "flipped", "flipped twice", "axes in another order", "fourth axis of one"],
)
def test_a_label_is_turned_to_its_image(tmp_path, ids, affine, caplog):
    save_nifti(tmp_path / "imagesTr" / "case.nii", SPOT.astype(np.float32), np.eye(4))
    save_nifti(tmp_path / "labelsTr" / "case.nii", ids, affine)
    video = load_videos("nifti", tmp_path)[0]
    shown = [frame[..., 0] > 0 for frame in video.frames]
    assert np.array_equal(shown, [video.masks(t)[0] for t in range(3)])
    assert ("are turned to those of its image" in caplog.text) == (ids.shape[:3] != GRID or affine[0, 0] < 0)


@pytest.mark.parametrize(
    "shape, affine",
    [
        (GRID, shifted(100, 50, 0)),
        (GRID, shifted(0.5, 0, 0)),
        (GRID, np.diag([-1.0, -1, 1, 1])),
        (GRID, shifted(0, 0, 0, spacing=2)),
        ((6, 8, 4), np.eye(4)),
        ((6, 6, 6), np.eye(4)[[1, 0, 2, 3]]),
    ],
    ids=["elsewhere", "half a voxel", "other origin", "other spacing", "other shape", "axes swapped"],
)
def test_a_label_that_lies_elsewhere_than_its_image_is_refused(tmp_path, shape, affine):
    grid = (6, 6, 6) if shape == (6, 6, 6) else GRID
    save_nifti(tmp_path / "imagesTr" / "case.nii", np.ones(grid, np.float32), np.eye(4))
    save_nifti(tmp_path / "labelsTr" / "case.nii", np.ones(shape, np.uint8), affine)
    with pytest.raises(SampleError, match=r"labelsTr/case\.nii: .*label.*by_voxels"):
        load_videos("nifti", tmp_path)[0]
    if shape == grid:
        assert load_videos("nifti", tmp_path, by_voxels=True)[0].masks(1).all()


def test_labels_that_do_not_say_where_they_lie_are_taken_by_voxels(tmp_path, caplog):
    save_nifti(tmp_path / "imagesTr" / "case.nii", SPOT.astype(np.float32), flipped(0))
    label = nib.Nifti1Image(SPOT, None)
    (tmp_path / "labelsTr").mkdir()
    nib.save(label, tmp_path / "labelsTr" / "case.nii")
    video = load_videos("nifti", tmp_path)[0]
    assert np.array_equal(video.frames[2][..., 0] > 0, video.masks(2)[0]) and "voxel by voxel" in caplog.text


def test_a_scale_in_the_header_counts(tmp_path):
    for name, values in (("imagesTr", SPOT.astype(np.int16)), ("labelsTr", SPOT)):
        image = nib.Nifti1Image(values, np.eye(4))
        image.header.set_slope_inter(2, 0)
        (tmp_path / name).mkdir()
        image.to_filename(tmp_path / name / "case.nii")
    video = load_videos("nifti", tmp_path, window=(0, 16))[0]
    stored = np.asarray(nib.load(tmp_path / "labelsTr" / "case.nii").dataobj)
    assert video.object_ids == [int(stored.max())]


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


@pytest.mark.parametrize("dim", [(30_000, 30_000, 30_000), (6, 8, 0), (6, 8, 4)], ids=str)
def test_nifti_files_of_absurd_or_differing_sizes_are_refused_before_they_are_read(tmp_path, dim):
    options = make_nifti(tmp_path, ".nii")
    path = tmp_path / "imagesTr" / "case.nii"
    data = bytearray(path.read_bytes())
    struct.pack_into("<3h", data, 42, *dim)
    path.write_bytes(data)
    with pytest.raises(SampleError, match=r"case\.nii"):
        load_videos(**options)[0]


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


IMAGES, IDS = np.zeros((2, 4, 4), np.uint8), np.full((2, 4, 4), 7, np.int64)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"imgs": IMAGES}, "not a volume.*gts"),
        ({"imgs": IMAGES, "gts": IDS[:, :3]}, "differ in size"),
        ({"imgs": IMAGES, "gts": IDS.astype(np.float32)}, r"labels must be \(T, H, W\) integers"),
        ({"imgs": IMAGES, "gts": -IDS}, "labels .* not -7"),
        *(({"imgs": IMAGES, "gts": IDS, "spacing": x}, "spacing") for x in [(0, 1, 1), (1, math.nan, 1), (1, 1)]),
        (b"PK\x03\x04 cut", "not a volume"),
    ],
)
def test_damaged_volumes_are_named(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    path.write_bytes(arrays) if isinstance(arrays, bytes) else np.savez(path, **arrays)
    with pytest.raises(SampleError, match=rf"bad\.npz: .*{message}"):
        load_videos("npz", tmp_path)[0]


@pytest.mark.parametrize(
    "name, shape, descr",
    [
        ("imgs", (10**4, 10**4, 10**4), "|u1"), ("imgs", (4, *SIZE), "|O"), ("imgs", (-4, *SIZE), "|u1"),
        ("gts", (10**4, 10**4, 10**4), "<i8"), ("gts", (4, *SIZE), "<c16"), ("spacing", (10**9,), "<f8"),
    ],
)  # fmt: skip
def test_arrays_of_absurd_sizes_and_types_are_refused_before_they_are_read(tmp_path, name, shape, descr):
    headers = {array: {"shape": (4, *SIZE), "descr": "|u1"} for array in ("imgs", "gts")}
    headers |= {"spacing": {"shape": (3,), "descr": "<f8"}, name: {"shape": shape, "descr": descr}}
    with zipfile.ZipFile(tmp_path / "case.npz", "w") as archive:
        for array, header in headers.items():
            with archive.open(f"{array}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, header | {"fortran_order": False})
                file.write(bytes(4 * math.prod(SIZE)))
    with pytest.raises(SampleError, match=rf"case\.npz.*{name}|case\.npz.*differ"):
        load_videos("npz", tmp_path)[0]


def test_a_dataset_of_volumes_may_be_larger_than_the_ram(tmp_path, monkeypatch):
    monkeypatch.setattr("samoe_hf.data.volumes.SHARE_OF_RAM", 0, raising=False)
    for i in range(40):
        np.savez(tmp_path / f"{i:02d}.npz", imgs=np.full((8, 256, 256), i, np.uint8), gts=np.full((8, 256, 256), i + 1))
    tracemalloc.start()
    videos = list(load_videos("npz", tmp_path))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 20 * 2**20 and len(pickle.dumps(videos)) < 2**20  # to another process they travel without values
    for i, video in enumerate(copy.deepcopy(videos)):
        assert (video.frames[3] == i).all() and video.masks(3, [i + 1]).all() and video.object_ids == [i + 1]
    np.savez(tmp_path / "05.npz", imgs=np.zeros((8, 256, 256), np.uint8), gts=np.ones((8, 256, 256), np.uint8))
    with pytest.raises(SampleError, match=r"05\.npz has changed"):
        videos[5].frames[0]
