"""Readers for volumes, whose slices serve as frames."""

from __future__ import annotations

import re
import zipfile
import zlib
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from .annotations import IdVolume
from .schema import Video, VideoList
from .video_io import ArrayFrames, SampleError, natural_key

Window = tuple[float, float]


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
    folder = Path(root) / split if split else Path(root)
    return VideoList(_files(folder, "*.npz"), partial(_open_npz, domain, window))


def _open_npz(domain: str, window: Window | None, video_id: str, path: Path) -> Video:
    try:
        with np.load(path) as file:
            images, ids = file["imgs"], file["gts"]
            spacing = tuple(float(s) for s in file["spacing"]) if "spacing" in file else None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SampleError(f"{path}: not a volume with imgs and gts ({error})") from error
    return _volume(path, video_id, images, ids, spacing, domain, window)


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
    labels = _files(Path(root) / f"labels{split}", "*.nii*")
    return VideoList(labels, partial(_open_nifti, domain, window, Path(root) / f"images{split}"))


def _open_nifti(domain: str, window: Window | None, images: Path, video_id: str, label_path: Path) -> Video:
    suffix = label_path.name.removeprefix(video_id)
    candidates = [images / f"{video_id}{suffix}", images / f"{video_id}_0000{suffix}"]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{candidates[0]}: no such image for {label_path}")
    volume, spacing = _axial_slices(path)
    ids, _ = _axial_slices(label_path)
    if not np.array_equal(ids, np.rint(ids)):
        raise SampleError(f"{label_path}: labels must be whole numbers")
    return _volume(path, video_id, volume, ids.astype(np.int64), spacing, domain, window)


def _axial_slices(path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A NIfTI file's values as (slices, rows, columns), and the size of a voxel along x, y and z in mm."""
    try:
        image = nib.as_closest_canonical(nib.load(path))  # axes to the right, to the front, up
        values = np.asarray(image.dataobj)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise SampleError(f"{path}: not a readable NIfTI file ({error})") from error
    if values.ndim != 3:
        raise SampleError(f"{path}: a volume must have three axes, not {values.shape}")
    x, y, z = (float(zoom) for zoom in image.header.get_zooms()[:3])
    return values[::-1, ::-1].transpose(2, 1, 0), (x, y, z)


def _volume(
    path: Path,
    video_id: str,
    volume: np.ndarray,
    ids: np.ndarray,
    spacing: tuple[float, float, float] | None,
    domain: str,
    window: Window | None,
) -> Video:
    if volume.shape[:3] != ids.shape:
        raise SampleError(f"{path}: images {volume.shape} and labels {ids.shape} differ in size")
    try:
        return Video(video_id, ArrayFrames(to_uint8(volume, window)), IdVolume(ids), domain, spacing)
    except SampleError as error:
        raise SampleError(f"{path}: {error}") from error


def to_uint8(volume: np.ndarray, window: Window | None = None) -> np.ndarray:
    """Intensities as gray values 0…255.

    Args:
        volume: any shape and real dtype; uint8 without a window is returned as it is.
        window: intensities that become 0 and 255; by default the 0.5 and 99.5 percentiles.
    """
    if volume.dtype == np.uint8 and window is None:
        return volume
    low, high = np.percentile(volume, (0.5, 99.5)) if window is None else window
    scaled = (volume.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def _files(folder: Path, pattern: str) -> dict[str, Path]:
    """Name without suffixes -> file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = sorted(folder.glob(pattern), key=lambda path: natural_key(path.name))
    if not paths:
        raise FileNotFoundError(f"{folder}: no files {pattern}")
    return {re.sub(r"\.(npz|nii|nii\.gz)$", "", path.name): path for path in paths}
