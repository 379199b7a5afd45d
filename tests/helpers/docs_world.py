"""A folder with everything that README and guides name, small: models, data sets, videos, runs, and a Hub."""

import copy
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import Sam2VideoConfig, Sam2VideoModel

import samoe_hf
from helpers import layouts
from helpers.own_videos import save, save_ids
from helpers.reference import CHECKPOINT, CONFIG, EXPERTS, ROOT
from samoe_hf import SamoeModel, load_videos
from samoe_hf.cli import main
from samoe_hf.data import SyntheticVideos, Video, read_video, write_video
from samoe_hf.inference import load_processor
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import rename_domain
from samoe_hf.surgery.loras import export_expert

NUM_FRAMES, SIZE = 8, (600, 800)
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
    shutil.copy(CHECKPOINT, folder / "sam2.1_hiera_base_plus.pt")
    shutil.copy(EXPERTS, folder / "checkpoint_best.pt")
    shutil.copy(CONFIG, folder / "sam2.1_hiera_b+_moe.yaml")


def _make_data(folder: Path) -> None:
    first, second, *_ = videos = list(SyntheticVideos(2, NUM_FRAMES, SIZE, max_objects=2, seed=3))
    for name in ("dog.mp4", "heart.mp4"):
        write_video(folder / name, first.frames, fps=8)
    for name in ("CT", "data/CT", "data/ct_lesions/train", "data/ct_lesions/val"):
        layouts.make_npz(folder / name)
    layouts.make_nifti(folder / "Task06_Lung")
    layouts.make_sa_v_val(folder / "SA-V")
    for root in (folder / "DAVIS", folder / "data/DAVIS"):
        for name, video in zip(("bear", "camel"), videos, strict=True):
            _save(video, root / "JPEGImages/480p" / name, root / "Annotations/480p" / name)
        for split in ("2016/train", "2016/val", "2017/train", "2017/val"):
            path = root / f"ImageSets/{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("bear\ncamel")
    _save(first, folder / "data/MOSE/train/JPEGImages/dog", folder / "data/MOSE/train/Annotations/dog")
    for number in range(1, 6):
        sequence = folder / f"data/OCID-dataset/ARID20/seq{number:02d}"
        _save(first, sequence / "rgb", sequence / "label", ".png")
    for split, video in zip(("train", "val"), videos, strict=True):
        _save(video, folder / f"my_videos/{split}/dog/frames", folder / f"my_videos/{split}/dog/masks")
    for name in ("bear", "camel"):
        _save(first, folder / "unused", folder / "MASKS" / name)
    for t in range(NUM_FRAMES):
        save(folder / f"my_videos/rig/camera/left/{t}.jpg", second.frames[t])
        for i, mask in enumerate(second.masks(t)):
            save(folder / f"my_videos/rig/outlines/{i}/{t}.png", np.where(mask, 255, 0).astype(np.uint8))
    _make_columns(folder / "someone/surgery", first)
    # Videos without masks, and the prompts that a guide shows.
    (folder / "clips/day").mkdir(parents=True)
    write_video(folder / "clips/day/0001.mp4", second.frames, fps=8)
    _save(second, folder / "clips/night/a", folder / "unused")
    save(folder / "drawn/a_5.png", np.where(second.masks(5)[0], 255, 0).astype(np.uint8))
    guide = (ROOT / "docs" / "labelling.md").read_text()
    (folder / "prompts.json").write_text(guide.split("```json\n")[1].split("```")[0])


def _save(video: Video, frames: Path, masks: Path, suffix: str = ".jpg") -> None:
    for t, frame in enumerate(video.frames):
        save(frames / f"{t:05d}{suffix}", frame)
        save_ids(masks / f"{t:05d}.png", video, t)


def _make_columns(folder: Path, video: Video) -> None:
    """A dataset of the Hub whose columns have names of their own."""
    images = datasets.List(datasets.Image())
    features = datasets.Features({"case": datasets.Value("string"), "rgb": images, "instance_ids": images})
    rgb = [Image.fromarray(video.frames[t]) for t in range(3)]
    labels = [Image.fromarray(video.id_map(t).astype(np.uint8)) for t in range(3)]
    row = {"case": ["one"], "rgb": [rgb], "instance_ids": [labels]}
    datasets.Dataset.from_dict(row, features=features).save_to_disk(folder)


def enter(folder: str, guide: str) -> dict[str, Any]:
    """Goes into a folder that [`make_world`] filled, and gives what the snippets of a guide name without defining it.

    It changes its process: the working folder, and where datasets are pushed. The test server has no datasets, so they
    are saved to a folder of the same name, and loaded from there.
    """
    os.chdir(folder)
    datasets.Dataset.push_to_hub = lambda dataset, repo_id: dataset.save_to_disk(repo_id)
    loaded = SamoeModel.from_pretrained("facebook/sam2.1-hiera-base-plus")
    loaded.wake_experts()
    model, other = copy.deepcopy(loaded), copy.deepcopy(loaded)
    if guide == "domains.md":
        rename_domain(other, None, "others")
    if guide in ("domains.md", "README.md"):
        night = copy.deepcopy(loaded)
        rename_domain(night, None, "night")
        night.save_pretrained("someone/night", experts_only=True)
    side = model.config.image_size
    labels = torch.zeros(1, 1, 2, side, side, dtype=torch.bool)
    labels[..., 20:60, 20:60] = True
    videos = load_videos("davis", "DAVIS")
    return {
        **{name: getattr(samoe_hf, name) for name in samoe_hf.__all__}, "np": np, "samoe": samoe,
        "reset": lambda: copy.deepcopy(loaded), "model": model, "other": other,
        "processor": load_processor("MODEL", model), "videos": videos, "video": videos[0],
        "frames": list(read_video("dog.mp4")), "pixel_values": torch.rand(1, 2, 3, side, side), "labels": labels,
        "object_mask": torch.ones(1, 1).bool(),
    }  # fmt: skip


def samoe(line: str) -> None:
    """Runs a command in this process."""
    try:
        main(shlex.split(line)[1:])
    except SystemExit as stopped:
        if stopped.code:
            raise RuntimeError(f"{line}: {stopped.code}") from None
