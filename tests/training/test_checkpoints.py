"""Resuming from the newest whole checkpoint, and where a run may write."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from samoe_hf.errors import InputError
from samoe_hf.training.arguments import SamoeTrainingArguments
from samoe_hf.training.checkpoints import check_output_dir, clear_checkpoints, resolve_checkpoint, rotate_checkpoints
from samoe_hf.training.trainer import build_trainer


def write_checkpoint(output_dir, step):
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(1000)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(1000)}, folder / name)
    domains = [{"name": "one", "num_experts": 1}, {"name": "none_yet", "num_experts": 0}]
    (folder / "config.json").write_text(json.dumps({"adapters": ["mine"], "domains": domains}))
    for name in ("mine/adapter_model.safetensors", "domains/one.safetensors"):
        (folder / name).parent.mkdir()
        save_file({"weight": torch.ones(1000)}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    return folder


@pytest.fixture
def args(tmp_path):
    return SamoeTrainingArguments(output_dir=tmp_path / "out", report_to="none", use_cpu=True)


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json")
FILES += ("mine/adapter_model.safetensors", "domains/one.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_last_is_the_newest_whole_checkpoint(args, tmp_path, name, caplog):
    """Checkpoint 10 is newer than 9, though not in the order of names."""
    whole, newest = write_checkpoint(tmp_path / "out", 9), write_checkpoint(tmp_path / "out", 10)
    assert resolve_checkpoint("last", args) == str(newest) == resolve_checkpoint(True, args)
    content = (newest / name).read_bytes()
    for damage in ("damaged", "missing"):
        (newest / name).write_bytes(content[: len(content) // 2])
        if damage == "missing":
            (newest / name).unlink()
        assert resolve_checkpoint("last", args) == str(whole)
        is_unfinished = (name, damage) == ("trainer_state.json", "missing")
        assert is_unfinished or f"{newest}: {name} is {damage}" in caplog.text
        with pytest.raises(ValueError, match=f"checkpoint-10: {name} is {damage}"):
            resolve_checkpoint(str(newest), args)
    shutil.rmtree(whole)
    reason = "Leave it out" if name == "trainer_state.json" else f"{name} is .*Give `overwrite_output_dir: true`"
    with pytest.raises(ValueError, match=f"no whole checkpoint .*{reason}"):
        resolve_checkpoint("last", args)


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, {1, 2, 9, 10}),
        (-1, None, {1, 2, 9, 10}),
        (1, None, {10}),
        (2, None, {9, 10}),
        (2, 1, {1, 10}),
        (1, 1, {1, 10}),
        (3, 10, {2, 9, 10}),
    ],
)
def test_the_oldest_checkpoints_make_room_and_copies_of_them_stay(tmp_path, limit, best, kept):
    for step in (10, 9, 1, 2):
        write_checkpoint(tmp_path, step)
    for name in ("3-good", "good-3", "good"):
        shutil.copytree(tmp_path / "checkpoint-9", tmp_path / f"checkpoint-{name}")
    (tmp_path / "checkpoint-notes-4").mkdir()
    clear_checkpoints(tmp_path)
    rotate_checkpoints(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
    names = {path.name.removeprefix("checkpoint-") for path in tmp_path.iterdir()}
    assert names == {"3-good", "good-3", "good", "notes-4", *map(str, kept)}


def test_last_without_any_checkpoint_is_refused(args):
    with pytest.raises(ValueError, match=r"finds no whole checkpoint .*out\. Leave it out"):
        resolve_checkpoint("last", args)
    with pytest.raises(ValueError, match="is no folder"):
        resolve_checkpoint("nowhere", args)


def test_a_folder_with_another_run_is_refused_unless_it_is_asked_for(args, tmp_path):
    check_output_dir(args, None)
    write_checkpoint(tmp_path / "out", 1)
    with pytest.raises(ValueError, match="holds another run"):
        check_output_dir(args, None)
    args.resume_from_checkpoint = "last"
    check_output_dir(args, None)
    args.resume_from_checkpoint, args.overwrite_output_dir = None, True
    check_output_dir(args, None)
    (tmp_path / "file").touch()
    args.output_dir = str(tmp_path / "file" / "out")
    with pytest.raises(InputError, match=r"`output_dir` .*file/out must be a folder, but .*file is a file"):
        check_output_dir(args, None)


def test_a_run_does_not_overwrite_its_base_model(tmp_path, model_folder):
    own, run = tmp_path / "own", tmp_path / "run.yaml"
    shutil.copytree(model_folder, own)
    run.write_text(f"train_data: [{{kind: synthetic}}]\nmodel_name_or_path: {own}\noverwrite_output_dir: true\n")
    (tmp_path / "link").symlink_to(own)
    for output in (own, tmp_path / "link", tmp_path):
        with pytest.raises(ValueError, match="holds the base model"):
            build_trainer([str(run), "--output_dir", str(output)])
