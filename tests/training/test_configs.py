"""Every configuration is complete: its keys are known, and what needs no download can be opened."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel

from cutouts import LAYOUT
from helpers.cutouts import write_pictures
from helpers.edgetam import needs_timm
from helpers.reference import ROOT
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.layouts import LAYOUTS
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.base import config_of_base
from samoe_hf.training.trainer import build_trainer

CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "scripts" / "small_base").glob("*.yaml")])
RUNS = [path for path in CONFIGS if not path.name.startswith("model_")]
SIZES = sorted((ROOT / "configs").glob("model_*.yaml"))


def write_frames(frames, labels, num_frames=10):
    """A square that moves, as numbered files of the folders `frames` and `labels`."""
    for folder in (frames, labels):
        folder.mkdir(parents=True)
    suffix = ".png" if frames.name == "rgb" else ".jpg"
    for t in range(num_frames):
        ids = np.zeros((48, 64), dtype=np.uint8)
        ids[10:30, 10 + t : 30 + t] = 3
        Image.fromarray(np.stack([ids * 80] * 3, axis=-1)).save(frames / f"{t:05d}{suffix}")
        Image.fromarray(ids).save(labels / f"{t:05d}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small videos in the layouts of DAVIS, MOSE, OCID and CT volumes, and of one's own."""
    root = tmp_path_factory.mktemp("data")
    write_frames(root / "my_videos" / "a" / "frames", root / "my_videos" / "a" / "masks")
    for split in ("train", "val"):
        davis = root / "DAVIS"
        write_frames(davis / "JPEGImages" / "480p" / split, davis / "Annotations" / "480p" / split)
        (davis / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
        (davis / "ImageSets" / "2017" / f"{split}.txt").write_text(f"{split}\n")
        mose = root / "MOSE" / split
        write_frames(mose / "JPEGImages" / "video", mose / "Annotations" / "video")
        (root / "ct_lesions" / split).mkdir(parents=True)
        ids = np.zeros((10, 48, 64), dtype=np.uint8)
        ids[:, 10:30, 10:30] = 1
        np.savez(root / "ct_lesions" / split / f"{split}.npz", imgs=ids * 90, gts=ids)
    for number in range(1, 6):
        sequence = root / "OCID-dataset" / "ARID20" / "table" / f"seq{number:02d}"
        write_frames(sequence / "rgb", sequence / "label")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "pictures.npz")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_runs_can_start(path, data, pictures, model_folder, tmp_path, monkeypatch):
    """With the data where the run says, and a small model in place of SAM 2's."""
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    assert "../" not in text, "a path outside the repository"
    run = tmp_path / path.name
    base = "model_name_or_path: facebook/sam2.1-hiera-base-plus"
    text = re.sub(r"model_name_or_path: outputs/\w+\n", f"{base}\n", text)  # what an earlier run has left
    text = text.replace("model_192.yaml", str(ROOT / "scripts" / "small_base" / "model_192.yaml"))
    monkeypatch.setitem(LAYOUTS, "cutouts", LAYOUT)
    text = text.replace("outputs/pictures.npz", str(pictures))
    run.write_text(text.replace("data/", f"{data}/").replace(base, f"model_name_or_path: {model_folder}"))
    options = ["--output_dir", tmp_path / "out", "--bf16", "False", "--report_to", "none", "--use_cpu", "True"]
    trainer = build_trainer([str(run), *map(str, options)])
    clip = trainer.train_dataset[0]
    assert clip["pixel_values"].shape[0] >= min(4, read_yaml(path)["num_frames"])
    assert clip["domain"] in trainer.train_dataset.datasets
    assert clip["labels"].any()
    has_evaluation = "\neval_data:" in text
    assert has_evaluation == bool(trainer.eval_dataset)


@pytest.mark.parametrize(
    "path", [pytest.param(x, marks=needs_timm if "edgetam" in x.stem else (), id=x.stem) for x in SIZES]
)
def test_sizes_are_those_of_the_originals_checkpoints(path):
    """Parameters of the base models, as `sam2` counts them."""
    with torch.device("meta"):
        model = SamoeModel(SamoeConfig(**read_yaml(path)))
    experts = model.num_parameters(only_trainable=True)
    counts = {"tiny": 38_962_498, "small": 46_060_354, "base_plus": 80_850_178, "large": 224_446_642}
    counts["edgetam"] = 13_895_794  # as Meta's own code
    size = path.stem.removeprefix("model_")
    if size == "sam3":
        published = Sam3TrackerVideoConfig()
        with torch.device("meta"):
            counts[size] = Sam3TrackerVideoModel(published).num_parameters()
        assert config_of_base(model.config).to_dict() == published.to_dict()
    assert size.endswith(("nano", "micro")) or model.num_parameters() - experts == counts[size]


def test_the_run_on_mose_is_metas():
    package = find_spec("sam2")
    if package is None or package.origin is None:
        pytest.skip("needs the `bench` extra")
    meta = read_yaml(Path(package.origin).parent / "configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml")
    run, scratch, trainer = read_yaml(ROOT / "configs" / "finetune_mose.yaml"), meta["scratch"], meta["trainer"]
    sampler = trainer["data"]["train"]["datasets"][0]["dataset"]["datasets"][0]["sampler"]
    assert run["reverse_probability"] == sampler.get("reverse_time_prob", 0)
    assert run["clips_per_video"] == meta["dataset"]["multiplier"]
    assert (run["num_frames"], run["max_objects"]) == (scratch["num_frames"], scratch["max_num_objects"])
    assert run["num_train_epochs"] == scratch["num_epochs"] and run["seed"] == trainer["seed_value"]
    rates, decays = (trainer["optim"]["options"][name][0]["scheduler"] for name in ("lr", "weight_decay"))
    assert rates["end_value"] == "${divide:${scratch.base_lr},10}" and run["lr_scheduler_kwargs"] == {
        "min_lr_rate": 0.1
    }
    assert run["weight_decay"] == decays["value"]
    assert run["max_grad_norm"] == trainer["optim"]["gradient_clip"]["max_norm"]
