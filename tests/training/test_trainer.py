"""SamoeTrainer and its arguments: what it logs and saves, resumption, processes, plain Trainer."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from helpers.reference import ROOT
from samoe_hf import SamoeModel
from samoe_hf.data import ClipCollator, ClipDataset, SyntheticVideos
from samoe_hf.training.arguments import SamoeTrainingArguments, parse_run
from samoe_hf.training.trainer import SamoeTrainer, build_trainer


@pytest.fixture
def run_config(model_folder, tmp_path):
    """A run of six steps over two domains, with a checkpoint after each two."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
model_name_or_path: {model_folder}
train_data:
  - {{kind: synthetic, num_videos: 6, num_frames: 3, image_size: [64, 64]}}
  - {{kind: synthetic, domain: blobs, num_videos: 6, num_frames: 3, image_size: [64, 64], weight: 3}}
eval_data:
  - {{kind: synthetic, num_videos: 1, num_frames: 3, image_size: [64, 64], seed: 5}}
  - {{kind: synthetic, domain: blobs, num_videos: 1, num_frames: 3, image_size: [64, 64], seed: 5}}
num_frames: 3
num_correction_clicks: 2
max_steps: 6
per_device_train_batch_size: 1
learning_rate: 1.0e-3
logging_steps: 1
save_steps: 2
report_to: none
disable_tqdm: true
output_dir: {tmp_path / "out"}
"""
    )
    return path


def make_trainer(config: Path, *overrides: str) -> SamoeTrainer:
    return build_trainer([str(config), *overrides])


def test_logs_tell_losses_rates_and_routing_by_domain(run_config):
    trainer = make_trainer(run_config, "--trainable", "experts", "decoder=1e-5", "--router_aux_loss_coef", "0.01")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 6
    first = logs[0]
    parts = [first[f"loss_{name}"] for name in ("focal", "dice", "iou", "object_score", "router")]
    total = sum(weight * part for weight, part in zip((20, 1, 1, 1, 0.01), parts, strict=True))
    assert first["loss"] == pytest.approx(total, rel=1e-3)
    assert first["learning_rate/experts"] == pytest.approx(100 * first["learning_rate/decoder"])
    domains = {key.split("/")[1] for entry in logs for key in entry if key.startswith("router_entropy/")}
    assert domains == {"shapes", "blobs"}
    for entry in logs:
        for domain in domains:
            usage = [entry[key] for key in entry if key.startswith(f"expert_usage/{domain}/")]
            assert usage == [] or sum(usage) == pytest.approx(1, abs=1e-4)
            assert 0 <= entry.get(f"router_entropy/{domain}", 0) <= 1


def test_only_the_named_sets_learn_each_at_its_rate(run_config):
    trainer = make_trainer(
        run_config, "--trainable", "experts=1e-3", r"mask_decoder\.conv_s0\..*=0.0", "--max_steps", "1"
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora_" in name or ".router." in name for name in changed)
    rates = {group["set"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"experts": 1e-3, r"mask_decoder\.conv_s0\..*": 0.0}


def test_evaluation_tracks_videos_and_reports_by_domain(run_config):
    trainer = make_trainer(run_config)
    metrics = trainer.evaluate()
    for domain in ("", "shapes_", "blobs_"):
        j, f, jf = (metrics[f"eval_{domain}{name}"] for name in ("J", "F", "J&F"))
        assert 0 <= j <= 1 and jf == pytest.approx((j + f) / 2)
    assert trainer.model.training
    assert metrics["eval_J"] == pytest.approx((metrics["eval_shapes_J"] + metrics["eval_blobs_J"]) / 2, abs=0.26)


def test_equal_ids_in_two_domains_are_two_videos(run_config):
    """Each domain's figures are those of the domain alone, and the overall one is over all objects."""
    trainer = make_trainer(run_config)
    videos = [dataclasses.replace(video, video_id="same") for video in trainer.eval_dataset]
    assert [video.domain for video in videos] == ["shapes", "blobs"]
    expected = [trainer.evaluate([video])["eval_J"] for video in videos]
    metrics = trainer.evaluate(videos)
    assert [metrics["eval_shapes_J"], metrics["eval_blobs_J"]] == expected
    counts = [len(video.object_ids) for video in videos]
    assert metrics["eval_J"] == pytest.approx(sum(c * j for c, j in zip(counts, expected, strict=True)) / sum(counts))
    with pytest.raises(ValueError, match="Two videos are called shapes/same"):
        trainer.evaluate([videos[0], videos[0]])


def test_checkpoints_are_small_and_load_as_models(run_config, model_folder, tmp_path):
    trainer = make_trainer(run_config, "--save_total_limit", "2", "--trainable", "experts", "decoder")
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    folder = tmp_path / "out" / "checkpoint-6"
    names = set(load_file(folder / "model.safetensors"))
    assert names == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    config = json.loads((folder / "config.json").read_text())
    assert config["base_model"]["name_or_path"] == str(model_folder)
    for load in (SamoeModel.from_pretrained, AutoModel.from_pretrained):
        loaded, info = load(folder, output_loading_info=True)
        assert type(loaded) is SamoeModel and not any(info.values())
        for name, tensor in trainer.model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert loaded.base_model_source == trainer.model.base_model_source


def test_the_best_checkpoint_is_loaded_at_the_end(run_config):
    trainer = make_trainer(
        run_config,
        "--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end", "True",
        "--metric_for_best_model", "J&F", "--greater_is_better", "True",
    )  # fmt: skip
    trainer.train()
    history = [entry["eval_J&F"] for entry in trainer.state.log_history if "eval_J&F" in entry]
    assert len(history) == 3 and trainer.state.best_metric == max(history)
    assert trainer.evaluate()["eval_J&F"] == pytest.approx(max(history), abs=1e-6)


def test_a_model_without_a_base_is_saved_whole(run_config, tmp_path):
    config = ROOT / "configs" / "model_nano.yaml"
    text = run_config.read_text().splitlines()
    run_config.write_text("\n".join([f"model_config: {config}", *text[2:]]))
    trainer = make_trainer(run_config, "--trainable", "all", "--max_steps", "1")
    trainer.train()
    trainer.save_model()
    loaded = SamoeModel.from_pretrained(tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(loaded.state_dict())
    with pytest.raises(ValueError, match="needs a base model"):
        trainer.model.save_pretrained(tmp_path / "experts", experts_only=True)


@pytest.mark.parametrize("change", ["shape", "missing base"])
def test_a_base_that_does_not_fit_is_refused_with_both_names(nano, model_folder, tmp_path, change):
    model = SamoeModel.from_pretrained(model_folder)
    model.save_pretrained(tmp_path / "experts", experts_only=True)
    path = tmp_path / "experts" / "config.json"
    config = json.loads(path.read_text())
    if change == "shape":
        config["lora_rank"] = 2
    else:
        config["base_model"]["name_or_path"] = str(tmp_path / "nowhere.pt")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"experts builds on .*(nano|nowhere)"):
        SamoeModel.from_pretrained(tmp_path / "experts")


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_killed_and_resumed_a_run_ends_with_the_same_tensors(run_config, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "scripts/train.py", str(run_config), "--dataloader_num_workers", "1"]
    subprocess.run([*command, "--output_dir", tmp_path / "whole"], cwd=ROOT, env=environment, check=True)
    cut = subprocess.Popen(
        [*command, "--output_dir", tmp_path / "cut"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    for line in cut.stdout:
        # After step 3: the last checkpoint is that of step 2.
        if "'epoch'" in line and (tmp_path / "cut" / "checkpoint-2" / "trainer_state.json").exists():
            cut.send_signal(signal.SIGKILL)
            break
    assert cut.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    arguments = ["--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "last"]
    subprocess.run([*command, *arguments], cwd=ROOT, env=environment, check=True)
    whole, resumed = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    start = state_of(tmp_path / "whole" / "checkpoint-2")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


GRADIENTS = """
import os, sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from samoe_hf import SamoeModel
from samoe_hf.data import ClipCollator, ClipDataset, SyntheticVideos
from samoe_hf.evaluation.evaluate import segment_video
from transformers import AutoProcessor

mode, folder, output = sys.argv[1:]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# In float64, where rounding does not tip the routers' discontinuous choice of experts.
model = SamoeModel.from_pretrained(folder, dtype=torch.float64).train()
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
    if hasattr(module, "dropout_p"):
        module.dropout_p = 0.0
if world > 1:
    dist.init_process_group("gloo")
if mode == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model)
if mode == "fsdp":
    # As accelerate shards a model: its blocks, then the rest.
    mesh = init_device_mesh("cpu", (2,))
    for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
videos = SyntheticVideos(2, 3, (64, 64), seed=0)
processor = AutoProcessor.from_pretrained(folder)
clips = ClipDataset(videos, processor, num_frames=3)
assert {len(clips[i]["labels"]) for i in range(2)} == {1, 3}  # else the number of objects would not matter
chosen = [clips[rank]] if world > 1 else [clips[0], clips[1]]
batch = ClipCollator()(chosen)
model(**{**batch, "pixel_values": batch["pixel_values"].double()}).loss.backward()
gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
if mode == "fsdp":
    gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
masks = segment_video(getattr(model, "module", model).eval(), processor, videos[0])[0]
if rank == 0:
    torch.save({**gradients, "masks": torch.from_numpy(masks)}, output)
if world > 1:
    dist.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_one(model_folder, tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    results = {}
    for mode, launcher in {"one": [], "ddp": launch, "fsdp": launch}.items():
        path = tmp_path / f"{mode}.pt"
        command = [sys.executable, *launcher, script, mode, model_folder, path]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        results[mode] = torch.load(path, weights_only=True)
    one = results["one"]
    for mode in ("ddp", "fsdp"):
        assert results[mode].keys() == one.keys()
        assert torch.equal(results[mode].pop("masks"), one["masks"])
        for name, gradient in results[mode].items():
            assert (one[name] - gradient).norm() <= 1e-5 * one[name].norm() + 1e-9, name


def test_recomputing_frames_gives_the_same_gradients(model_folder):
    processor = AutoProcessor.from_pretrained(model_folder)
    clips = ClipDataset(SyntheticVideos(1, 4, (64, 64), seed=4), processor, num_frames=4)
    batch = ClipCollator()([clips[0]])
    gradients = []
    for recompute in (False, True):
        model = SamoeModel.from_pretrained(model_folder).train()
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(**batch, prompts="sam2").loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_plain_trainer_trains_and_evaluates(model_folder, tmp_path):
    model = SamoeModel.from_pretrained(model_folder)
    processor = AutoProcessor.from_pretrained(model_folder)
    clips = ClipDataset(SyntheticVideos(4, 3, (64, 64)), processor, num_frames=3)
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=clips, eval_dataset=clips, data_collator=ClipCollator())
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model()
    reloaded = SamoeModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), reloaded.state_dict().values(), strict=True)
    )


def test_arguments_of_the_command_line_take_the_place_of_the_files(run_config):
    _, data, recipe, loss, arguments = parse_run([str(run_config), "--dice_weight", "2.5", "--max_objects", "1"])
    assert (loss.dice_weight, data.max_objects, recipe.num_correction_clicks) == (2.5, 1, 2)
    assert isinstance(arguments, SamoeTrainingArguments) and arguments.learning_rates() == {"experts": 1e-3}


def test_one_processor_prepares_clips_and_evaluates(run_config, model_folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(model_folder, own)
    processor = AutoProcessor.from_pretrained(own)
    processor.video_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(own)
    for has_processor in (True, False):
        trainer = build_trainer([str(run_config), "--model_name_or_path", str(own)])
        assert (list(trainer.processing_class.video_processor.image_mean) == [0.1, 0.2, 0.3]) == has_processor
        for clips in trainer.train_dataset.datasets.values():
            assert clips.sampler.processor is trainer.processing_class
        (own / "processor_config.json").unlink(missing_ok=True)
