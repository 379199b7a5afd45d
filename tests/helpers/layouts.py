"""Small copies of the layouts in which datasets come."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from samoe_hf.data import SyntheticVideos, to_datasets, write_palette_png, write_video

SIZE = (24, 32)


def label_map(*objects, dtype=np.uint8):
    """Labels of SIZE with a bar per (id, column)."""
    ids = np.zeros(SIZE, dtype)
    for object_id, column in objects:
        ids[4:20, column : column + 4] = object_id
    return ids


def save_frames(folder, num_frames, suffix=".jpg", size=SIZE):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_frames):
        Image.fromarray(np.full((*size, 3), 20 * i, np.uint8)).save(folder / f"{i:05d}{suffix}")


def save_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_labels(folder, labels):
    """Palette images: frame index -> ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, ids in labels.items():
        write_palette_png(folder / f"{i:05d}.png", ids)


def save_nifti(path, values, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return encoded | {"counts": encoded["counts"].decode()}


def make_frames(root: Path) -> dict:
    save_frames(root / "JPEGImages" / "a", 3)
    save_labels(root / "Annotations" / "a", {0: label_map((1, 2)), 2: label_map((1, 4), (9, 20))})
    return {"kind": "frames", "root": root}


def make_davis(root: Path) -> dict:
    save_frames(root / "JPEGImages" / "480p" / "cat", 2)
    save_labels(root / "Annotations" / "480p" / "cat", {i: label_map((1, 2)) for i in range(2)})
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("cat\n")
    return {"kind": "davis", "root": root, "split": "val"}


def make_sa_v_val(root: Path) -> dict:
    save_frames(root / "JPEGImages_24fps" / "sav_1", 5)
    for i in (0, 4):
        save_image(root / "Annotations_6fps" / "sav_1" / "000" / f"{i:05d}.png", label_map((255, 2)))
    save_image(root / "Annotations_6fps" / "sav_1" / "001" / "00004.png", label_map((255, 3)))
    (root / "sav_val.txt").write_text("sav_1\n")
    return {"kind": "sa_v_val", "root": root}


def make_sa_v(root: Path) -> dict:
    folder = root / "sav_000"
    folder.mkdir(parents=True)
    write_video(folder / "sav_1.mp4", (np.full((*SIZE, 3), 20 * i, np.uint8) for i in range(10)))
    left, both, empty = label_map((1, 2)) > 0, label_map((1, 2), (1, 9)) > 0, np.zeros(SIZE, bool)
    masklet = [[rle(left), rle(both)], [rle(left), None], [rle(left), rle(empty)]]
    data = {"video_height": float(SIZE[0]), "video_width": float(SIZE[1]), "masklet": masklet}
    (folder / "sav_1_manual.json").write_text(json.dumps(data))
    return {"kind": "sa_v", "root": root}


def make_ocid(root: Path) -> dict:
    save_frames(root / "seq01" / "rgb", 2, ".png")
    for i in range(2):
        save_image(root / "seq01" / "label" / f"{i:05d}.png", label_map((1, 0), (300, 9), dtype=np.uint16))
    return {"kind": "ocid", "root": root}


def make_npz(root: Path) -> dict:
    root.mkdir(parents=True, exist_ok=True)
    ids = np.stack([label_map((2, 3))] * 4)
    images = np.random.default_rng(0).integers(-1000, 1000, ids.shape, dtype=np.int16)
    np.savez_compressed(root / "case.npz", imgs=images, gts=ids, spacing=[0.5, 0.5, 5.0])
    return {"kind": "npz", "root": root}


def make_nifti(root: Path, suffix: str = ".nii.gz") -> dict:
    values = np.random.default_rng(0).normal(size=(6, 8, 3)).astype(np.float32)
    ids = np.zeros((6, 8, 3), np.uint8)
    ids[2:4, 3:6] = 4
    save_nifti(root / "imagesTr" / f"case{suffix}", values, np.diag([-0.5, 0.7, 2.0, 1.0]))
    save_nifti(root / "labelsTr" / f"case{suffix}", ids, np.diag([-0.5, 0.7, 2.0, 1.0]))
    return {"kind": "nifti", "root": root}


def make_coco(root: Path) -> dict:
    save_image(root / "images" / "one.png", np.zeros((*SIZE, 3), np.uint8))
    square = [2.0, 2.0, 10.0, 2.0, 10.0, 10.0, 2.0, 10.0]
    annotations = [
        {"id": 0, "image_id": 5, "iscrowd": 0, "category_id": 1, "segmentation": [square]},
        {"id": 90, "image_id": 5, "iscrowd": 0, "category_id": 1, "segmentation": rle(label_map((1, 8)) > 0)},
        {"id": 91, "image_id": 5, "iscrowd": 1, "category_id": 1, "segmentation": rle(label_map((1, 20)) > 0)},
    ]
    images = [
        {"id": i, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for i, name in ((5, "one.png"), (6, "x"))
    ]
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "labels.json").write_text(json.dumps(data))
    return {"kind": "coco", "root": root, "images": "images", "annotations": "labels.json"}


def make_dataset(root: Path) -> dict:
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    dataset = to_datasets(SyntheticVideos(2, 2, SIZE), cache_dir=str(root.with_name(root.name + "_cache")))
    dataset.save_to_disk(root)
    return {"kind": "dataset", "root": root}
