"""The small base that comes with the package, and how it is made."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import make_base as maker
from helpers.domains import new_model
from helpers.reference import ROOT
from helpers.results import mean_j
from samoe_hf import SamoeModel, small_base
from samoe_hf.data import SyntheticVideos
from samoe_hf.evaluation.evaluate import evaluate_videos
from samoe_hf.inference import load_processor

RUNS = [ROOT / "scripts" / "small_base" / f"{name}.yaml" for name in ("frames", "clips", "parts", "long", "sharp")]


def stored_types(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_it_is_small_and_tracks():
    folder = Path(small_base())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000 and stored_types(folder) == {"BF16"}
    model = SamoeModel.from_pretrained(folder)
    assert model.dtype == torch.float32
    videos = list(SyntheticVideos(3, 5, (128, 128), domain="shapes", seed=4))
    assert mean_j(evaluate_videos(model, load_processor(str(folder), model), videos, False)) > 0.5


def test_it_is_made_of_a_model_that_was_trained(model_folder, tmp_path, monkeypatch, capsys):
    for name, value in (("NUM_VIDEOS", 1), ("NUM_FRAMES", 2), ("SYNTHETIC_DOMAINS", ("shapes", "paper"))):
        monkeypatch.setattr(maker, name, value)
    output = tmp_path / "base"
    maker.main([*map(str, RUNS), "--models", str(model_folder), "--output", str(output)])
    assert capsys.readouterr().out.count("J&F") == 4
    assert stored_types(output) == {"BF16"}
    before, after = SamoeModel.from_pretrained(model_folder), SamoeModel.from_pretrained(output)
    assert after.dtype == torch.float32
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(b, a.bfloat16().float()), name
    card = (output / "README.md").read_text()
    assert "| frames: max_steps | 4500 |" in card and "synthetic videos: cutouts" in card
    with pytest.raises(FileExistsError):
        maker.main([*map(str, RUNS), "--models", str(model_folder), "--output", str(output)])


def test_of_several_models_the_mean_is_taken(tmp_path):
    models, folders = [new_model() for _ in range(3)], [str(tmp_path / str(i)) for i in range(3)]
    for number, (model, folder) in enumerate(zip(models, folders, strict=True)):
        for parameter in model.parameters():
            parameter.data.add_(number**2 * torch.rand_like(parameter))
        model.save_pretrained(folder)
    size = models[0].config.image_size
    models[1].config.resize(2 * size)
    models[1].config.save_pretrained(folders[1])  # it was trained on larger frames
    made = maker.mean_model(folders)
    assert made.config.image_size == size and maker.mean_model(folders[1:]).config.image_size == 2 * size
    mean = made.state_dict()
    for (name, found), *tensors in zip(mean.items(), *(model.state_dict().values() for model in models), strict=True):
        assert torch.allclose(found, torch.stack(tensors).mean(0), rtol=1e-5), name
