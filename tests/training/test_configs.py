"""Every configuration is complete: its keys are known, and what needs no download can be opened."""

import pytest
import torch

from helpers.reference import ROOT, reference_folder, shared_data
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.options import check_options
from samoe_hf.data.registry import READERS, read_yaml
from samoe_hf.data.transforms import transforms_from_options
from samoe_hf.model.processor import build_processor
from samoe_hf.training.arguments import parse_run

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RUNS = [path for path in CONFIGS if not path.name.startswith("model_")]
SIZES = [path for path in CONFIGS if path.name.startswith("model_")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_runs_parse(path, tmp_path):
    overrides = ["--output_dir", str(tmp_path), "--bf16", "False", "--report_to", "none"]
    model, data, recipe, loss, arguments = parse_run([str(path), *overrides])
    assert arguments.learning_rates() and data.train_data
    assert (model.model_name_or_path is None) != (model.model_config is None)
    assert loss.focal_weight == 20 and 0 <= recipe.point_probability <= 1
    if data.augmentation is not None:
        transforms_from_options(data.augmentation)
    for entry in [*data.train_data, *data.eval_data]:
        options = {name: value for name, value in entry.items() if name not in ("kind", "weight", "video_ids")}
        check_options(READERS[entry["kind"]], options, f"datasets of kind {entry['kind']}")


@pytest.mark.parametrize("name", ["smoke", "finetune_davis", "finetune_ct", "multi_domain"])
def test_runs_on_data_beside_the_repository_start(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if name != "smoke":
        reference_folder("mini")
        shared_data("davis")
    model_arguments, data, _, _, arguments = parse_run(
        [f"configs/{name}.yaml", "--output_dir", str(tmp_path), "--num_frames", "2"]
    )
    model = model_arguments.load()
    model.set_trainable(*arguments.learning_rates())
    clips = data.train_dataset(build_processor(model.config), arguments.seed)
    clip = clips[0]
    assert clip["pixel_values"].shape[0] == 2 and clip["domain"] in clips.datasets
    assert len(data.eval_videos()) > 0


def test_the_moe_settings_of_a_run_reach_the_model(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(f"model_config: {ROOT / 'configs' / 'model_nano.yaml'}\noutput_dir: {tmp_path}\nnum_experts: 6\n")
    model_arguments, *_ = parse_run([str(run), "--lora_rank", "2"])
    config = model_arguments.load().config
    assert (config.num_experts, config.lora_rank) == (6, 2)


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_sizes_are_those_of_the_originals_checkpoints(path):
    """Parameters of the base models, as `sam2` counts them."""
    with torch.device("meta"):
        model = SamoeModel(SamoeConfig(**read_yaml(path)))
    experts = model.num_parameters(only_trainable=True)
    counts = {"tiny": 38_962_498, "small": 46_060_354, "base_plus": 80_850_178, "large": 224_446_642}
    size = path.stem.removeprefix("model_")
    assert size in ("nano", "micro") or model.num_parameters() - experts == counts[size]
