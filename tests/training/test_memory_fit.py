"""How much memory a training step needs is counted as it is on a real one, and settings are chosen by it."""

import pytest
import torch
import yaml

from helpers.reference import ROOT
from measure import peak_bytes
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.model.prompts import PromptRecipe
from samoe_hf.training.arguments import parse_run
from samoe_hf.training.memory_fit import (
    CONTEXT_BYTES,
    FRAGMENTS,
    RunMemory,
    Settings,
    Workload,
    choose_settings,
    parse_memory,
)
from samoe_hf.training.trainer import build_trainer

CPU = torch.device("cpu")
RECIPE = PromptRecipe(point_probability=1, max_initial_frames=1, max_corrected_frames=1, num_correction_clicks=1)
ASKED = Settings(2, 2, False, None)


@pytest.fixture(scope="module")
def model():
    """Without dropout, of which a CPU keeps more than a GPU."""
    torch.manual_seed(0)
    settings = yaml.safe_load((ROOT / "configs" / "model_nano.yaml").read_text())
    return SamoeModel(SamoeConfig(**settings)).train()


@pytest.fixture(scope="module")
def counted(model):
    return RunMemory(model, Workload(2, 2, RECIPE))


def of_real_step(model: SamoeModel, clips: int) -> int:
    size = model.config.image_size
    pixels = torch.randn(clips, 2, 3, size, size)
    labels = torch.zeros(clips, 2, 2, size, size, dtype=torch.bool)
    labels[..., 32:64, 32:64] = True

    def step() -> None:
        model(pixels, labels, prompts=RECIPE).loss.backward()

    for parameter in model.parameters():
        parameter.grad = None
    return peak_bytes(step, CPU) + pixels.nbytes + labels.nbytes


@pytest.mark.parametrize("sets, checkpointing", [(("experts",), False), (("experts",), True), (("all",), False)])
def test_the_count_is_that_of_a_real_step(model, sets, checkpointing):
    model.set_trainable(*sets)
    model._set_gradient_checkpointing(checkpointing)
    counted = RunMemory(model, Workload(2, 2, RECIPE))
    moments = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    real = of_real_step(model, clips=2)
    model._set_gradient_checkpointing(False)
    found = counted.step(2, checkpointing) - counted.weights - moments
    model.set_trainable("experts")
    model.zero_grad()
    assert found == pytest.approx(real, rel=0.1)  # what convolutions need for themselves is not counted


def test_the_model_is_left_as_it_is(model, counted):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counted.step(1, True)
    assert not model.gradient_checkpointing and model.feature_cache is None
    assert all(type(p) is torch.nn.Parameter and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    size = model.config.image_size
    loss = model(torch.randn(1, 2, 3, size, size), torch.ones(1, 1, 2, size, size, dtype=torch.bool)).loss
    assert loss.item() > 0  # tensors without data have none


def test_what_costs_less(model, counted):
    assert counted.step(1, False) < counted.step(2, False)
    assert counted.encoding(4, 1) < counted.encoding(4, 4)
    longer = RunMemory(model, Workload(4, 1, RECIPE, torch.bfloat16))
    assert longer.step(1, True) < longer.step(1, False)


class Formula(RunMemory):
    """Memory by a formula, in the place of what is counted: a clip of 4 frames takes 4 GB, or 1 GB."""

    def step(self, clips: int, checkpointing: bool) -> int:
        return self.weights + self.of_training + clips * (10**9 if checkpointing else 4 * 10**9)

    def encoding(self, frames: int, at_once: int) -> int:
        return self.weights + min(frames, at_once) * 3 * 10**8


def test_settings_are_chosen_from_fast_to_small(model):
    formula = Formula(model, Workload(4, 3, RECIPE))

    def limit(batch: int, checkpointing: bool, at_once: int | None = None) -> int:
        return formula.total(Settings(batch, 1, checkpointing, at_once))

    def choose(memory: int, *kept: str) -> Settings:
        return choose_settings(memory, formula, ASKED, kept)

    assert choose(limit(2, False)) == ASKED
    assert choose(limit(2, False) - 1) == Settings(1, 4, False, None)
    assert choose(limit(1, False) - 1) == Settings(2, 2, True, None)
    assert choose(limit(2, True, 1)) == Settings(2, 2, True, 4)
    assert choose(limit(2, True, 1) - 1) == Settings(1, 4, True, None)
    assert choose(limit(2, False), "gradient_checkpointing", "per_device_train_batch_size") == ASKED
    with pytest.raises(ValueError, match=r"with `gradient_checkpointing` False, which need .* smallest that would fit"):
        choose(limit(1, False) - 1, "gradient_checkpointing")
    with pytest.raises(ValueError, match="with `per_device_train_batch_size` 2, which need"):
        choose(limit(2, True, 1) - 1, "per_device_train_batch_size")
    with pytest.raises(ValueError, match=r"even one at a time with `gradient_checkpointing`.* are weights"):
        choose(CONTEXT_BYTES)


def test_the_margin(counted):
    tensors = max(counted.step(2, False), counted.encoding(4, 4))
    assert counted.total(ASKED) == int(tensors * (1 + FRAGMENTS)) + CONTEXT_BYTES


@pytest.mark.parametrize(
    "text, expected",
    [("16GB", 16e9), ("24 GiB", 24 * 2**30), ("16", 16e9), (16, 16e9), ("7.5gb", 7.5e9), ("800MB", 8e8)],
)
def test_sizes(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "16 bananas", "GB", "nan", "True"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="`fit` must be a size of memory such as 16GB"):
        parse_memory(text)


@pytest.fixture
def run(tmp_path):
    def write(*lines: str) -> str:
        data = "train_data: [{kind: synthetic, num_videos: 2, num_frames: 2, image_size: [64, 64]}]"
        model = f"model_config: {ROOT / 'configs' / 'model_nano.yaml'}"
        common = [data, model, f"output_dir: {tmp_path / 'out'}", "num_frames: 2", "max_objects: 1", "report_to: none"]
        path = tmp_path / "run.yaml"
        path.write_text("\n".join([*common, "num_correction_clicks: 1", "use_cpu: true", *lines]))
        return str(path)

    return write


def test_a_run_says_what_was_chosen(run, tmp_path, capsys):
    trainer = build_trainer([run("per_device_train_batch_size: 2"), "--fit", "2GB"])
    said = capsys.readouterr().out
    assert "fit 2.0 GB: per_device_train_batch_size 2, gradient_accumulation_steps 1" in said
    assert "Expected: 1." in said
    assert trainer.args.feature_cache == str(tmp_path / "out" / "features") and trainer.model.feature_cache is not None
    trainer.args.max_steps = 1
    trainer.train()


@pytest.mark.parametrize("line", ["augmentation: {}", "trainable: [all]"])
def test_no_cache_where_features_change(run, line):
    assert build_trainer([run(line, "per_device_train_batch_size: 1"), "--fit", "4GB"]).args.feature_cache is None


def test_a_batch_of_the_yaml_may_be_divided_and_options_are_kept(run):
    path = run("per_device_train_batch_size: 4", "gradient_checkpointing: true")
    *_, arguments = parse_run([path, "--fit=8GB", "--encoder-batch-size", "1"])
    kept = {"fit", "encoder_batch_size", "gradient_checkpointing"}
    assert kept <= arguments.given and "per_device_train_batch_size" not in arguments.given
    *_, arguments = parse_run([path, "--per_device_train_batch_size", "2"])
    assert "per_device_train_batch_size" in arguments.given


def test_bad_sizes_of_a_run(run):
    with pytest.raises(ValueError, match=r"`fit` must be a size of memory such as 16GB.*got 'lots'"):
        parse_run([run(), "--fit", "lots"])
    with pytest.raises(ValueError, match="is too little for clips of 2 frames and 1 objects"):
        build_trainer([run("fit: 1GB", "per_device_train_batch_size: 1")])
