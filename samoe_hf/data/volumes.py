"""Readers for volumes, whose slices serve as frames."""

from __future__ import annotations

import math
import re
import tokenize
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import OrientationError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from .annotations import IdVolume
from .frames import DAMAGE, ArrayFrames, SampleError, named_errors, natural_key
from .schema import Video, VideoList
from .windows import Window, check_window, to_uint8

MAX_VALUES = 2**29  # of an array in a file: 512 x 512 x 2048
# RuntimeError: encrypted, or compressed in another way.
NPZ_DAMAGE = (*DAMAGE, RuntimeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile)
NIFTI_DAMAGE = (*DAMAGE, ImageFileError, OrientationError, HeaderDataError, WrapStructError)


def read_npz(
    root: str | Path, split: str | None = None, domain: str = "npz", window: Window | None = None
) -> VideoList:
    """Volumes `*.npz` with `imgs` (D, H, W), `gts` (D, H, W) object ids, 0 for background, and optionally `spacing`.

    Args:
        root: the folder of the files.
        split: a folder of root.
        domain: name for routing and metrics.
        window: intensities that become black and white, for `imgs` that are not uint8; by default their 0.5 and 99.5
            percentiles.
    """
    check_window(window)
    return VideoList(_files(Path(root, split or ""), ".npz"), partial(_open_npz, domain, window))


def _open_npz(domain: str, window: Window | None, video_id: str, path: Path) -> Video:
    with named_errors(path, "not a volume with imgs and gts", NPZ_DAMAGE):
        with zipfile.ZipFile(path) as archive:
            _check_headers(archive)
        with np.load(path) as file:
            images, ids = file["imgs"], file["gts"]
            x, y, z = (float(length) for length in file["spacing"]) if "spacing" in file else (0.0, 0.0, 0.0)
            spacing = (x, y, z) if "spacing" in file else None
        return Video(video_id, ArrayFrames(to_uint8(images, window)), IdVolume(ids), domain, spacing)


def _check_headers(archive: zipfile.ZipFile) -> None:
    """Checks the shapes and types that the arrays of a file declare, before memory is allocated for them."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shapes: dict[str, tuple[int, ...]] = {"spacing": (3,)}
    for name in ("imgs.npy", "gts.npy", *{"spacing.npy"} & set(archive.namelist())):
        with archive.open(name) as file:
            shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
        _check_shape(shape, dtype, name)
        if archive.getinfo(name).file_size < math.prod(shape) * dtype.itemsize:
            raise SampleError(f"{name} is cut off: less data than for its shape {shape}")
        shapes[name.removesuffix(".npy")] = shape
    _check_same_size(shapes["imgs"], shapes["gts"])
    if shapes["spacing"] != (3,):
        raise SampleError(f"spacing must be three numbers, not {shapes['spacing']}")


def _check_shape(shape: Sequence[int], dtype: np.dtype, name: str) -> None:
    if dtype.kind not in "iuf":
        raise SampleError(f"{name} must hold real numbers, not {dtype}")
    if min(shape, default=1) < 1 or math.prod(shape) > MAX_VALUES:
        raise SampleError(f"{name} has the shape {tuple(shape)}; 1 to {MAX_VALUES} values are read")


def _check_same_size(images: Sequence[int], labels: Sequence[int]) -> None:
    if tuple(images[:3]) != tuple(labels):
        raise SampleError(f"images {tuple(images)} and labels {tuple(labels)} differ in size")


def read_nifti(root: str | Path, split: str = "Tr", domain: str = "nifti", window: Window | None = None) -> VideoList:
    """NIfTI volumes as the Medical Segmentation Decathlon and nnU-Net lay them out.

    Slices are axial, from the feet up, shown as radiologists see them: the front up, the patient's right on the left.

    Args:
        root: holds `images<split>/*.nii[.gz]` (or `…_0000.nii[.gz]`) and, under the same names, `labels<split>`.
        split: "Tr", "Ts"…
        domain: name for routing and metrics.
        window: intensities that become black and white, e.g. (-160, 240) Hounsfield units for soft tissue in CT; by
            default the volume's 0.5 and 99.5 percentiles.
    """
    check_window(window)
    labels = _files(Path(root) / f"labels{split}", ".nii", ".nii.gz")
    return VideoList(labels, partial(_open_nifti, domain, window, Path(root) / f"images{split}"))


def _open_nifti(domain: str, window: Window | None, images: Path, video_id: str, label_path: Path) -> Video:
    path = images / label_path.name
    if not path.is_file():
        path = images / f"{video_id}_0000{label_path.name.removeprefix(video_id)}"
    if not path.is_file():
        raise FileNotFoundError(f"{images / label_path.name}: no such image for {label_path}")
    scan, labels = _load_nifti(path), _load_nifti(label_path)
    if sorted(scan.shape) != sorted(labels.shape):  # their axes may be in another order
        raise SampleError(f"{path}: images {scan.shape} and labels {labels.shape} differ in size ({label_path})")
    volume, spacing = _axial_slices(scan, path)
    ids, _ = _axial_slices(labels, label_path)
    if ids.dtype.kind == "f":
        if not ((np.rint(ids) == ids) & (np.abs(ids) < 2**31)).all():
            raise SampleError(f"{label_path}: labels must be whole numbers")
        ids = ids.astype(np.int32)
    with named_errors(path, "not a volume"):
        _check_same_size(volume.shape, ids.shape)
        return Video(video_id, ArrayFrames(to_uint8(volume, window)), IdVolume(ids), domain, spacing)


def _load_nifti(path: Path) -> nib.Nifti1Image:
    """Reads a NIfTI file's header alone, and checks it before memory is allocated for the values."""
    with named_errors(path, "not a readable NIfTI file", NIFTI_DAMAGE):
        image: Any = nib.load(path)
        if len(image.shape) != 3:
            raise SampleError(f"a volume must have three axes, not {image.shape}")
        _check_shape(image.shape, image.get_data_dtype(), "the volume")
        return image


def _axial_slices(image: nib.Nifti1Image, path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A NIfTI file's values as (slices, rows, columns), and the size of a voxel along x, y and z in mm."""
    with named_errors(path, "not a readable NIfTI file", NIFTI_DAMAGE):
        image = nib.as_closest_canonical(image)  # axes to the right, to the front, up
        values = np.asarray(image.dataobj)
        x, y, z = (float(zoom) for zoom in image.header.get_zooms())
    return values[::-1, ::-1].transpose(2, 1, 0), (x, y, z)


def _files(folder: Path, *suffixes: str) -> dict[str, Path]:
    """Name without suffixes -> file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = [p for p in folder.iterdir() if p.name.endswith(suffixes) and not p.name.startswith(".")]
    if not paths:
        raise FileNotFoundError(f"{folder}: no files *{' or *'.join(suffixes)}")
    files: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: natural_key(path.name)):
        name = re.sub(r"\.(npz|nii|nii\.gz)$", "", path.name)
        if files.setdefault(name, path) != path:
            raise SampleError(f"{path}: {files[name].name} has the same name")
    return files
