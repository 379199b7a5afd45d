"""Readers for volumes, whose slices serve as frames."""

from __future__ import annotations

import math
import re
import tokenize
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, product
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakSet

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import OrientationError, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from psutil import virtual_memory
from torch.utils.data import get_worker_info

from .annotations import IdVolume, LabelMaps
from .frames import DAMAGE, ArrayFrames, SampleError, check_folder, named_errors, natural_key, say_once
from .image_files import file_version
from .images import Window, to_uint8
from .schema import Video, VideoList

# Volumes that stay in RAM: so many that a model may track at once, and more in this share of it. In a worker of a data
# loader the last one.
MIN_KEPT, SHARE_OF_RAM = 9, 0.25
_in_ram: WeakSet[_Volume] = WeakSet()
_lock, _clock = Lock(), count()
MAX_VALUES = 2**29  # of an array in a file: 512 x 512 x 2048
ROUNDING = 0.1  # of a voxel, by which headers of one grid may differ
# RuntimeError: encrypted, or compressed in another way.
NPZ_DAMAGE = (*DAMAGE, RuntimeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile)
NIFTI_DAMAGE = (*DAMAGE, ImageFileError, OrientationError, HeaderDataError, WrapStructError)


class _Volume(ArrayFrames):
    """Slices of a volume, which is read again where they are asked for and it is no longer in RAM.

    So a dataset may hold more than fits there. `read` gives it as a video in RAM.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], Video]):
        self.versions, self.read = {path: file_version(path) for path in paths}, read
        self._opened: Any = None
        self.names, self.size = self.opened().frames.names, self.opened().size

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": None}  # where it arrives, it is read when it is needed

    def opened(self) -> Any:
        """The video in RAM; `SampleError` where its files have changed."""
        with _lock:  # frames may be read ahead in a thread
            self._used = next(_clock)
            if (video := self._opened) is None:
                for path, version in self.versions.items():
                    if file_version(path) != version:
                        raise SampleError(f"{path} has changed since it was opened")
                video = self._opened = self.read()
                _in_ram.add(self)
                least, room = (MIN_KEPT, SHARE_OF_RAM * virtual_memory().total) if get_worker_info() is None else (1, 0)
                for place, volume in enumerate(sorted(_in_ram, key=lambda volume: -volume._used)):
                    room -= 2 * volume._opened.frames.array.nbytes  # with the labels
                    if place >= least and room < 0:
                        volume._opened = None
                        _in_ram.discard(volume)
            return video

    @property
    def array(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride] (it is only read)
        return self.opened().frames.array


class _Labels(LabelMaps):
    """Labels of a volume."""

    def __init__(self, volume: _Volume):
        self.volume, labels = volume, volume.opened().annotations
        self.frames, self.size = labels.frames, labels.size

    def ids(self, frame: int) -> np.ndarray:
        return self.volume.opened().annotations.ids(frame)


def _lasting(paths: Sequence[Path], read: Callable[[], Video]) -> Video:
    """What `read` gives of some files, without values in RAM."""
    volume = _Volume(paths, read)
    return replace(volume.opened(), frames=volume, annotations=_Labels(volume))


def read_npz(root: str | Path, split: str | None = None, window: Window | None = None) -> VideoList:
    """Volumes `*.npz` with `imgs` (D, H, W), `gts` (D, H, W) object ids, 0 for background, and optionally `spacing`.

    `split` is a folder of root; for `window` see [`~samoe_hf.data.registry.load_videos`].
    """
    return VideoList(_files(Path(root, split or ""), ".npz"), partial(_open_npz, window))


def _open_npz(window: Window | None, video_id: str, path: Path) -> Video:
    return _lasting([path], partial(_read_npz, window, video_id, path))


def _read_npz(window: Window | None, video_id: str, path: Path) -> Video:
    with named_errors(path, "not a volume with imgs and gts", NPZ_DAMAGE):
        with zipfile.ZipFile(path) as archive:
            _check_headers(archive)
        with np.load(path) as file:
            images, ids = file["imgs"], file["gts"]
            x, y, z = (float(length) for length in file["spacing"]) if "spacing" in file else (0.0, 0.0, 0.0)
            spacing = (x, y, z) if "spacing" in file else None
        return Video(video_id, ArrayFrames(to_uint8(images, window)), IdVolume(ids), spacing=spacing)


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
    if shapes["imgs"][:3] != shapes["gts"]:
        raise SampleError(f"images {shapes['imgs']} and labels {shapes['gts']} differ in size")
    if shapes["spacing"] != (3,):
        raise SampleError(f"spacing must be three numbers, not {shapes['spacing']}")


def _check_shape(shape: Sequence[int], dtype: np.dtype, name: str) -> None:
    if dtype.kind not in "iuf":
        raise SampleError(f"{name} must hold real numbers, not {dtype}")
    if min(shape, default=1) < 1 or math.prod(shape) > MAX_VALUES:
        raise SampleError(f"{name} has the shape {tuple(shape)}; 1 to {MAX_VALUES} values are read")


def read_nifti(root: str | Path, split: str = "Tr", window: Window | None = None, by_voxels: bool = False) -> VideoList:
    """NIfTI volumes as the Medical Segmentation Decathlon and nnU-Net lay them out.

    Slices are axial, from the feet up, shown as radiologists see them: the front up, the patient's right on the left.
    Labels lie where their headers say. One whose axes run otherwise than its image's is turned, which is said once. One
    whose voxels are not those of its image is refused.

    Args:
        root: holds `images<split>/*.nii[.gz]` (or `…_0000.nii[.gz]`) and, under the same names, `labels<split>`.
        by_voxels: labels are taken voxel by voxel as they are stored, wherever their headers say that they lie.
    """
    labels = _files(Path(root) / f"labels{split}", ".nii", ".nii.gz")
    return VideoList(labels, partial(_open_nifti, window, by_voxels, Path(root) / f"images{split}"))


def _open_nifti(window: Window | None, by_voxels: bool, images: Path, video_id: str, label_path: Path) -> Video:
    path = images / label_path.name
    if not path.is_file():
        path = images / f"{video_id}_0000{label_path.name.removeprefix(video_id)}"
    if not path.is_file():
        raise FileNotFoundError(f"{images / label_path.name}: no such image for {label_path}")
    return _lasting([path, label_path], partial(_read_pair, window, by_voxels, video_id, path, label_path))


def _read_pair(window: Window | None, by_voxels: bool, video_id: str, path: Path, label_path: Path) -> Video:
    scan, labels = _load_nifti(path), _load_nifti(label_path)
    if by_voxels or not (_is_placed(scan) and _is_placed(labels)):
        if scan.shape != labels.shape:
            raise SampleError(f"{path}: images {scan.shape} and labels {labels.shape} differ in size ({label_path})")
        if not by_voxels:
            say_once(f"{label_path.parent}: labels or images do not say where they lie, and are taken voxel by voxel")
        with named_errors(label_path, "not a readable NIfTI file", NIFTI_DAMAGE):
            labels = nib.Nifti1Image(labels.dataobj, scan.affine)
    else:
        with named_errors(path, "its orientation cannot be read", NIFTI_DAMAGE):
            labels = _turn_to(scan, labels, path, label_path)
    volume, spacing = _axial_slices(scan, path)
    ids, _ = _axial_slices(labels, label_path)
    if ids.dtype.kind == "f":
        if not ((np.rint(ids) == ids) & (np.abs(ids) < 2**31)).all():
            raise SampleError(f"{label_path}: labels must be whole numbers")
        ids = ids.astype(np.int32)
    with named_errors(path, "not a volume"):
        return Video(video_id, ArrayFrames(to_uint8(volume, window)), IdVolume(ids), spacing=spacing)


def _load_nifti(path: Path) -> Any:
    """Reads a NIfTI file's header alone, and checks it before memory is allocated for the values."""
    with named_errors(path, "not a readable NIfTI file", NIFTI_DAMAGE):
        image: Any = nib.load(path)
        if len(image.shape) < 3 or set(image.shape[3:]) - {1}:
            raise SampleError(f"a volume must have three axes, not {image.shape}; save one of several as a file")
        _check_shape(image.shape, image.get_data_dtype(), "the volume")
        return image.slicer[(..., *[0] * (len(image.shape) - 3))] if len(image.shape) > 3 else image


def _is_placed(image: Any) -> bool:
    """Whether the header says where the volume lies."""
    return bool(image.header["sform_code"] or image.header["qform_code"])


def _turn_to(scan: Any, labels: Any, path: Path, label_path: Path) -> Any:
    """Labels with their axes turned as those of the scan; `SampleError` unless they then lie on its voxels."""
    turn = ornt_transform(io_orientation(labels.affine), io_orientation(scan.affine))
    turned = labels.as_reoriented(turn)
    ends = np.array([*product(*((0, length - 1) for length in scan.shape))])
    apart = np.abs(apply_affine(scan.affine, ends) - apply_affine(turned.affine, ends)).max()
    axes, label_axes = ("".join(nib.aff2axcodes(image.affine)) for image in (scan, labels))
    is_swapped = turn[:, 0].tolist() != [0, 1, 2]
    if turned.shape != scan.shape or not apart < ROUNDING * min(scan.header.get_zooms()):
        problem = f"the label lies elsewhere than its image {path}: {_place(labels)}, not {_place(scan)}"
    elif is_swapped and labels.shape == scan.shape:  # nothing tells a header that is wrong
        problem = f"by its header the label's axes run {label_axes}, and those of its image {path} {axes}"
    else:
        if label_axes != axes:
            say_once(f"{label_path}: its axes run {label_axes}, and are turned to those of its image, {axes}")
        return turned
    raise SampleError(
        f"{label_path}: {problem}; resample it to its image's grid, or, if its voxels are those of the image and its "
        "header is wrong, say `by_voxels: true`"
    )


def _place(image: Any) -> str:
    numbers = [", ".join(f"{x:.4g}" for x in values) for values in (image.header.get_zooms(), image.affine[:3, 3])]
    axes = "".join(map(str, nib.aff2axcodes(image.affine)))
    return f"{image.shape} voxels of ({numbers[0]}) mm from ({numbers[1]}), axes {axes}"


def _axial_slices(image: Any, path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A NIfTI file's values as (slices, rows, columns), and the size of a voxel along x, y and z in mm."""
    with named_errors(path, "not a readable NIfTI file", NIFTI_DAMAGE):
        image = nib.as_closest_canonical(image)  # axes to the right, to the front, up
        values = np.asarray(image.dataobj)
        x, y, z = (float(zoom) for zoom in image.header.get_zooms())
    return values[::-1, ::-1].transpose(2, 1, 0), (x, y, z)


def _files(folder: Path, *suffixes: str) -> dict[str, Path]:
    """Name without suffixes -> file."""
    paths = [p for p in check_folder(folder).iterdir() if p.name.endswith(suffixes) and not p.name.startswith(".")]
    if not paths:
        raise FileNotFoundError(f"{folder}: no files *{' or *'.join(suffixes)}")
    files: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: natural_key(path.name)):
        name = re.sub(r"\.(npz|nii|nii\.gz)$", "", path.name)
        if files.setdefault(name, path) != path:
            raise SampleError(f"{path}: {files[name].name} has the same name")
    return files
