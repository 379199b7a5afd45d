"""A run goes on from its own checkpoints alone, takes each step once, and ends as one that was never stopped."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.own_videos import save_videos
from samoe_hf import SamoeModel
from samoe_hf.data.synthetic import SyntheticVideos
from samoe_hf.errors import InputError
from samoe_hf.training.trainer import SamoeTrainer, build_trainer

RUN = """
num_frames: 2
num_correction_clicks: 1
max_objects: 1
max_steps: 7
per_device_train_batch_size: 1
learning_rate: 1.0e-3
logging_steps: 1
save_steps: 1
report_to: none
disable_tqdm: true
use_cpu: true
"""
# An epoch has 3 steps.
PERSISTENT = ["--per_device_train_batch_size", 2, "--dataloader_persistent_workers", "true"]


@pytest.fixture
def data(tmp_path):
    """Five videos of three frames, as files."""
    return save_videos(tmp_path / "data", SyntheticVideos(5, 3, (64, 64), seed=1))


@pytest.fixture
def train(model_folder, data, tmp_path):
    """Runs a training into a folder, and returns its tensors."""
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {model_folder}\ntrain_data: [{data}]\n{RUN}")

    def train(name, *options):
        words = [str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / name), *map(str, options)]
        trainer = build_trainer(words)
        trainer.train(trainer.args.resume_from_checkpoint)
        trainer.save_model()
        files = [tmp_path / name / "model.safetensors", *(tmp_path / name).glob("domains/*")]
        return {key: tensor for file in files for key, tensor in load_file(file).items()}, trainer.state

    return train


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("options", "num_steps", "tried"),
    [
        pytest.param([], 7, [7], marks=pytest.mark.slow),  # an epoch has 5 steps
        (["--gradient_accumulation_steps", 2, "--augmentation", "{}", "--max_steps", 5], 5, [4]),  # 3, the last of one
        ([*PERSISTENT, "--dataloader_num_workers", 1, "--max_steps", 4], 4, [2]),
        (["--domain", "new", "--max_steps", 3], 3, [2]),
        pytest.param(["--max_steps", -1, "--num_train_epochs", 1.5, "--gradient_accumulation_steps", 3], 3, [1, 2, 3],
                     marks=pytest.mark.slow),
        pytest.param(["--lora_dropout", 0.2], 7, range(1, 8), marks=pytest.mark.slow),
        pytest.param(["--gradient_accumulation_steps", 2], 7, range(1, 8), marks=pytest.mark.slow),
        pytest.param([*PERSISTENT, "--dataloader_num_workers", 2], 7, range(1, 8), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_model_of_a_resumed_run_is_that_of_one_that_was_not_stopped(train, tmp_path, options, num_steps, tried):
    whole, _ = train("whole", *options)
    for step in tried:
        checkpoint = f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / f"cut_{step}" / checkpoint)
        found, state = train(f"cut_{step}", *options, "--resume_from_checkpoint", "last")
        assert state.global_step == num_steps and same(found, whole), step


def test_a_run_that_goes_on_elsewhere_ends_with_its_own_best_model(train, data, tmp_path, monkeypatch):
    monkeypatch.setattr(SamoeTrainer, "evaluate", lambda self, *_, **__: {"eval_J&F": 1 / self.state.global_step})
    options = ["--eval_data", data, "--eval_strategy", "steps", "--eval_steps", 1, "--max_steps", 2]
    options += ["--load_best_model_at_end", "true", "--metric_for_best_model", "J&F"]
    best, _ = train("out", *options)
    shutil.copytree(tmp_path / "out", tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-1", dirs_exist_ok=True)
    assert same(train("elsewhere", *options, "--resume_from_checkpoint", "last")[0], best)


def test_a_run_goes_on_only_with_what_it_was_made_from(train, model_folder, data, tmp_path, capsys, monkeypatch):
    short = ["--max_steps", 1]
    train("out", *short)
    resume = [*short, "--resume_from_checkpoint", "last"]
    model = SamoeModel.from_pretrained(model_folder)
    with torch.no_grad():
        model.vision_encoder.neck.convs[0].weight += 1e-3
    model.save_pretrained(tmp_path / "other")
    for options, differs in [
        (["--model_name_or_path", tmp_path / "other"], f"the model was {model_folder}, which differs from .*other"),
        (["--learning_rate", "1e-4"], "`learning_rates.experts` is 0.001, not 0.0001"),
        (["--seed", 7], "`seed` is 42, not 7"),
        (["--train_sampling_strategy", "sequential"], "`train_sampling_strategy` is 'random', not 'sequential'"),
        (["--point_probability", 1], "`point_probability` is 0.5, not 1.0"),
        (["--stride", 2], r"`train_data\.\w+\.stride` is 1, not 2"),
        (["--recent_memory_pooling", 2], r"`config\.recent_memory_pooling` is 1, not 2"),
        (
            ["--train_data", f"{{root: {data}, domain: z}}"],
            r"`train_data\.\w+` is missing now; `train_data\.z` is new\.",
        ),
    ]:
        with pytest.raises(InputError, match=f"checkpoint-1 is of another run: .*{differs}"):
            train("out", *resume, *options)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="`bf16` is False, not True"):
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` does
        train("out", *resume)
    train("elsewhere", *short)
    with pytest.raises(InputError, match="elsewhere holds another run"):
        train("elsewhere", *short, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1")
    elsewhere = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1", "--overwrite_output_dir", "true"]
    train("elsewhere", *short, *elsewhere)
    assert not [*(tmp_path / "elsewhere").glob("checkpoint-*")], "the other run gave way"
    mask = next(data.rglob("masks/2.png"))
    before = mask.read_bytes()
    Image.fromarray(np.roll(np.asarray(Image.open(mask)), 5, axis=1)).save(mask)
    with pytest.raises(InputError, match=r"train_data\.\w+\.videos` is .*start anew in another folder"):
        train("out", *resume)
    mask.write_bytes(before)
    capsys.readouterr()
    train("out", *resume, "--max_steps", 2)
    assert "checkpoint-1: `max_steps` is 1, not 2 any more." in capsys.readouterr().out
    with pytest.raises(InputError, match=r"`max_steps` is 1, but .*checkpoint-2 was trained for 2 already"):
        train("out", *resume)


def test_what_a_killed_process_had_not_written_to_its_end_is_removed(train, tmp_path, capsys):
    half = tmp_path / "out" / "checkpoint-5"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    train("out", "--max_steps", 1)
    assert f"{half}: removed, since a stopped process had not written it" in capsys.readouterr().out
    half.mkdir()
    (tmp_path / "out" / "_unsaved_x").mkdir()
    train("out", "--max_steps", 2, "--resume_from_checkpoint", "last")
    found = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert found == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("full_at", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_full_disk_costs_nothing_that_was_there(train, tmp_path, monkeypatch, full_at):
    whole, _ = train("whole", "--max_steps", 3)
    save = torch.save

    def save_until_full(what, file, *more, **options):
        if f"checkpoint-{full_at}/optimizer.pt" in str(file):
            with open(file, "wb") as half:
                half.write(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 224832 vs 224720")
        save(what, file, *more, **options)

    monkeypatch.setattr(torch, "save", save_until_full)
    resume = ["--resume_from_checkpoint", "last"] if full_at > 1 else []
    ending = r"run the same again with `resume_from_checkpoint: last`\." if resume else r"run the same again\."
    with pytest.raises(
        InputError, match=rf"checkpoint-{full_at} could not be written, since the disk is full.*{ending}"
    ):
        train("out", "--max_steps", 3)
    monkeypatch.undo()
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == full_at - 1
    assert same(train("out", "--max_steps", 3, *resume)[0], whole)
