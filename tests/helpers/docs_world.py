"""A folder with everything that README and guides name, small: models, data sets, videos, runs, and a Hub."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import Sam2VideoConfig, Sam2VideoModel

from helpers import layouts
from helpers.own_videos import save, save_ids
from helpers.reference import ROOT, reference_folder
from samoe_hf import SamoeModel
from samoe_hf.data import SyntheticVideos, Video, write_palette_png, write_video
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.loras import export_expert

SIZE = (600, 800)
RUN = """
model_name_or_path: BASE
train_data:
  - {kind: synthetic, domain: blobs, num_videos: 4, num_frames: 4, seed: 1}
  - {kind: synthetic, domain: stripes, num_videos: 4, num_frames: 4, seed: 1}
eval_data: [{kind: synthetic, num_videos: 1, num_frames: 3, seed: 2}]
num_frames: 2
max_steps: 1
save_strategy: "no"
report_to: none
"""


def make_world(folder: Path, model: SamoeModel) -> None:
    """Fills a folder. The small model stands for all that are named."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    _make_models(folder, model)
    _make_data(folder)
    for name in ("RUN.yaml", "OTHER.yaml", "A.yaml", "B.yaml"):
        (folder / name).write_text(RUN)
    save(folder / "domains.png", np.zeros((8, 8, 3), np.uint8))


def _make_models(folder: Path, model: SamoeModel) -> None:
    processor = build_processor(model.config)
    for name in ("MODEL", "A", "B"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    # What the Hub has of SAM 2: no experts.
    known = Sam2VideoConfig().to_dict().keys() - {"model_type"}
    base = Sam2VideoModel(Sam2VideoConfig(**{k: v for k, v in model.config.to_dict().items() if k in known}))
    base.load_state_dict({k: v for k, v in model.state_dict().items() if not is_expert_parameter(k)})
    for name in ("sam2", "BASE"):
        base.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    model.wake_experts()
    for number, name in enumerate(("LORA_A", "LORA_B", "someones-lora")):
        export_expert(model, number, folder / name)
    nano = reference_folder("nano")
    shutil.copy(nano / "sam2.1_hiera_nano.pt", folder / "sam2.1_hiera_base_plus.pt")
    shutil.copy(nano / "samoe_nano_adapters.pt", folder / "checkpoint_best.pt")
    shutil.copy(nano / "sam2.1_hiera_nano_moe.yaml", folder / "sam2.1_hiera_b+_moe.yaml")


def _make_data(folder: Path) -> None:
    videos = list(SyntheticVideos(4, 8, SIZE, max_objects=2, seed=3))
    for name in ("dog.mp4", "heart.mp4"):
        write_video(folder / name, videos[0].frames, fps=8)
    for root in (folder / "DAVIS", folder / "data" / "DAVIS"):
        _make_davis(root, dict(zip(("bear", "camel"), videos, strict=False)))
    for root in (
        folder / "CT",
        folder / "data" / "CT",
        folder / "data/ct_lesions/train",
        folder / "data/ct_lesions/val",
    ):
        layouts.make_npz(root)
    layouts.make_nifti(folder / "Task06_Lung")
    layouts.make_sa_v_val(folder / "SA-V")
    for t in range(8):
        for number in range(1, 6):
            sequence = folder / f"data/OCID-dataset/ARID20/seq{number:02d}"
            save(sequence / f"rgb/{t}.png", videos[0].frames[t])
            save_ids(sequence / f"label/{t}.png", videos[0], 0)
        save(folder / f"data/MOSE/train/JPEGImages/dog/{t:05d}.jpg", videos[0].frames[t])
        save_ids(folder / f"data/MOSE/train/Annotations/dog/{t:05d}.png", videos[0], t)
    for split, video in zip(("train", "val"), videos, strict=False):
        for t in range(8):
            save(folder / f"my_videos/{split}/dog/frames/{t:05d}.jpg", video.frames[t])
            save_ids(folder / f"my_videos/{split}/dog/masks/{t:05d}.png", video, t)
            save(folder / f"my_videos/rig/camera/left/{t}.jpg", video.frames[t])
            for i, mask in enumerate(video.masks(t)):
                save(folder / f"my_videos/rig/outlines/{i}/{t}.png", np.where(mask, 255, 0).astype(np.uint8))
    _make_columns(folder / "someone" / "surgery", videos[0])
    _make_clips(folder, videos[1])
    for t in range(8):
        for name in ("bear", "camel"):
            (folder / "MASKS" / name).mkdir(parents=True, exist_ok=True)
            write_palette_png(folder / "MASKS" / name / f"{t:05d}.png", np.eye(*SIZE, dtype=np.uint8))


def _make_clips(folder: Path, video: Video) -> None:
    """Videos without masks, and the prompts that a guide shows."""
    (folder / "clips" / "day").mkdir(parents=True)
    write_video(folder / "clips/day/0001.mp4", video.frames, fps=8)
    for t in range(8):
        save(folder / f"clips/night/a/{t}.jpg", video.frames[t])
    save(folder / "drawn/a_5.png", np.where(video.masks(5)[0], 255, 0).astype(np.uint8))
    guide = (ROOT / "docs" / "labelling.md").read_text()
    (folder / "prompts.json").write_text(guide.split("```json\n")[1].split("```")[0])


def _make_columns(folder: Path, video: Video) -> None:
    """A dataset of the Hub whose columns have names of their own."""
    images = datasets.List(datasets.Image())
    features = datasets.Features({"case": datasets.Value("string"), "rgb": images, "instance_ids": images})
    rgb = [Image.fromarray(video.frames[t]) for t in range(3)]
    labels = [Image.fromarray(video.id_map(t).astype(np.uint8)) for t in range(3)]
    row = {"case": ["one"], "rgb": [rgb], "instance_ids": [labels]}
    datasets.Dataset.from_dict(row, features=features).save_to_disk(folder)


def _make_davis(root: Path, videos: dict) -> None:
    for name, video in videos.items():
        for t in range(len(video)):
            save(root / f"JPEGImages/480p/{name}/{t:05d}.jpg", video.frames[t])
            save_ids(root / f"Annotations/480p/{name}/{t:05d}.png", video, t)
    for year in ("2016", "2017"):
        for split in ("train", "val"):
            path = root / "ImageSets" / year / f"{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(videos))


def clip_inputs(model: SamoeModel) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass: one clip of two frames with one object."""
    side = model.config.image_size
    labels = torch.zeros(1, 1, 2, side, side, dtype=torch.bool)
    labels[..., 20:60, 20:60] = True
    return {"pixel_values": torch.rand(1, 2, 3, side, side), "labels": labels, "object_mask": torch.ones(1, 1).bool()}
