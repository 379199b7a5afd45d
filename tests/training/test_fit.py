"""How much device memory a training step needs by the formula, and the settings that are chosen by it."""

import json
import re
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helpers.edgetam import needs_timm
from helpers.reference import ROOT
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.prompt_recipe import PromptRecipe
from samoe_hf.training.arguments import SamoeTrainingArguments
from samoe_hf.training.fit import CONTEXT_BYTES, FRAGMENTS, step_bytes
from samoe_hf.training.trainer import build_trainer

# size, whether in float32, sets, clips, frames, objects, GB without gradient checkpointing ("" if unknown) and with it
ROW = re.compile(
    r"^\| (\w+)(, float32)? \| ([\w, ]+) \| (\d) \| (\d) \| (\d) \| ([\d.]*)(?: GB)? ?\| ([\d.]+) GB \|$", re.MULTILINE
)


def test_the_formula_is_near_the_counted_steps_of_the_guide():
    """Never less than was counted, but for rounding, and at most a fifth more."""
    rows = ROW.findall((ROOT / "docs" / "small_gpus.md").read_text())
    assert len(rows) == 13
    for size, float32, sets, clips, frames, objects, *counted in rows:
        with torch.device("meta"):
            model = SamoeModel(SamoeConfig(**read_yaml(f"model_{size}")))
        model.set_trainable(*sets.split(", "))
        for checkpointing, gigabytes in zip((False, True), counted, strict=True):
            if gigabytes:
                found = step_bytes(
                    model, int(frames), int(objects), PromptRecipe(), int(clips), checkpointing, bool(float32)
                )
                assert 0.98 < found / 1e9 / float(gigabytes) < 1.2, (size, sets, clips, frames, objects, checkpointing)


# Of EdgeTAM's encoder the tensors are not known.
EDGETAM = ("model_edgetam_nano", ["experts", "memory", "mask_decoder.*"], False)


@pytest.mark.parametrize(
    "base, sets, checkpointing",
    [*(("model_nano", *x) for x in ((["experts"], False), (["experts"], True), (["all"], False))),
     pytest.param(*EDGETAM, marks=needs_timm)],
)  # fmt: skip
def test_a_real_step_holds_no_more_than_the_formula_says(base, sets, checkpointing, tmp_path):
    """Of a small model, for which the formula is generous."""
    recipe = PromptRecipe(point_probability=1, max_initial_frames=1, max_corrected_frames=1, num_correction_clicks=1)
    model = SamoeModel(SamoeConfig(**read_yaml(base))).train()
    model.set_trainable(*sets)
    if checkpointing:
        model.gradient_checkpointing_enable()
    pixels, labels = torch.randn(2, 2, 3, 128, 128), torch.zeros(2, 2, 2, 128, 128, dtype=torch.bool)
    labels[..., 32:64, 32:64] = True
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(pixels, labels, prompts=recipe).loss.backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = max(accumulate(change for _, change in changes))
    held += sum(p.nbytes * (1 + 2 * p.requires_grad) for p in model.parameters())  # with AdamW's moments
    formula = (step_bytes(model, 2, 2, recipe, 2, checkpointing, float32=True) - CONTEXT_BYTES) / FRAGMENTS
    assert held < formula < 2.5 * held


@pytest.mark.parametrize("text", ["", "-3GB", "0GB", "16 bananas", "nanGB"])
def test_sizes_that_are_none(text, tmp_path):
    with pytest.raises(ValueError, match="`fit` must be a size of device memory such as 16GB"):
        SamoeTrainingArguments(tmp_path, fit=text)


@pytest.fixture
def run(tmp_path):
    def write(*lines: str) -> str:
        common = f"""
train_data: [{{kind: synthetic, num_videos: 8, num_frames: 2, image_size: [64, 64]}}]
model_config: model_nano
output_dir: {tmp_path / "out"}
num_frames: 2
max_objects: 1
report_to: none
use_cpu: true
"""
        path = tmp_path / "run.yaml"
        path.write_text("\n".join([common, *lines]))
        return str(path)

    return write


def test_settings_are_chosen_from_fast_to_small(run, capsys):
    """As asked; then fewer clips at once; then gradient checkpointing, with as many clips as fit."""
    model = build_trainer([run()]).model

    def fit(size: int, *lines: str) -> tuple[int, int, bool]:
        lines = ("per_device_train_batch_size: 4", "gradient_accumulation_steps: 2", f"fit: {size / 1e6}MB", *lines)
        args = build_trainer([run(*lines)]).args
        chosen = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.gradient_checkpointing
        assert f"per_device_train_batch_size {chosen[0]}, gradient_acc" in capsys.readouterr().out
        return chosen

    def limit(clips: int, checkpointing: bool) -> int:
        return step_bytes(model, 2, 1, PromptRecipe(), clips, checkpointing, float32=True)

    assert fit(limit(4, False) + 1) == (4, 2, False)
    assert fit(limit(4, False) + 1, "gradient_checkpointing: true") == (4, 2, True)
    assert fit(limit(4, False) - 1) == (2, 4, False)
    assert fit(limit(1, False) - 1)[2]
    assert fit(limit(1, True) + 1) == (1, 8, True)
    with pytest.raises(ValueError, match="is too little for clips of 2 frames and 1 objects: even one at a time"):
        fit(limit(1, True) - 1)


def test_what_is_chosen_is_trained_with(run, tmp_path):
    trainer = build_trainer([run(), "--fit", "2GB", "--max_steps", "1", "--save_strategy", "no"])
    assert trainer.args.feature_cache == str(tmp_path / "out" / "features")
    trainer.train()
    assert list((tmp_path / "out" / "features").rglob("*.safetensors"))
