"""How the small base learns: single frames by many prompts, and Muon."""

import copy

import pytest
import torch
from torch.nn import functional as F

import learn
from cutouts import LAYOUT
from helpers.cutouts import write_pictures
from muon import MuonAndAdamW
from samoe_hf.data.layouts import LAYOUTS
from samoe_hf.model.losses import SegmentationLoss


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    """A run's options, with a small model and pictures of noise; without the number of frames."""
    monkeypatch.setitem(LAYOUTS, LAYOUT.kind, LAYOUT)
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {model_folder}\n"
        f"train_data: [{{kind: cutouts, root: {write_pictures(tmp_path / 'p.npz')}, num_videos: 40, side: 64}}]\n"
        "trainable: ['(?!.*(lora_|router)).*']\nsave_only_trained: false\nper_device_train_batch_size: 4\n"
        f"learning_rate: 3.0e-3\nreport_to: none\nuse_cpu: true\nsave_strategy: 'no'\noutput_dir: {tmp_path / 'out'}\n"
    )
    return [str(tmp_path / "run.yaml"), "--logging_steps", "5", "--disable_tqdm", "True"]


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_clicks_and_boxes_are_learned_on_single_frames(run):
    trainer = learn.build([*run, "--num_frames", "1", "--max_steps", "12", "--logging_steps", "3"])
    assert type(trainer) is learn.FrameTrainer
    memory = {name: p.clone() for name, p in trainer.model.named_parameters() if "memory_attention" in name}
    found = losses(trainer)
    assert found[-1] < 0.8 * found[0], found
    now = dict(trainer.model.named_parameters())
    assert memory and all(torch.equal(now[name], p) for name, p in memory.items())


def test_clips_are_learned_with_muon(run):
    trainer = learn.build([*run, "--num_frames", "2", "--max_steps", "2", "--per_device_train_batch_size", "1"])
    assert type(trainer) is learn.MuonTrainer
    losses(trainer)
    assert isinstance(trainer.optimizer.optimizer, MuonAndAdamW)


def test_clicks_on_first_frames_are_learned_beside_clips(run):
    clips, clicked = (learn.build([*run, "--num_frames", "2", *more]) for more in ([], [learn.CLICKS]))
    batch = clicked.data_collator([clicked.train_dataset[i] for i in range(4)])
    batch["labels"] = torch.zeros_like(batch["labels"])
    batch["labels"][:, :, :, 8:40, 8:40] = 1

    def loss(trainer, **changed):
        torch.manual_seed(0)
        return trainer.compute_loss(trainer.model, batch | changed).item()

    assert loss(clicked) > loss(clips) + 0.1
    nothing = torch.zeros_like(batch["labels"])
    assert loss(clicked, labels=nothing) == pytest.approx(loss(clips, labels=nothing))


def test_the_loss_is_that_of_the_best_of_three_and_of_the_one():
    settings, truth = SegmentationLoss(), torch.zeros(1, 1, 4, 4)
    truth[..., :2] = 1
    right, wrong = 40 * (truth - 0.5), -40 * (truth - 0.5)

    def loss(*kinds):
        ious = torch.tensor([[float(kind is right) for kind in kinds]])
        return learn.candidates_loss(settings, torch.cat(kinds, dim=1), ious, truth)

    assert loss(right, wrong, right, wrong) < 1e-3
    one, three = loss(wrong, right, right, right), loss(right, wrong, wrong, wrong)
    torch.testing.assert_close(one, learn.SINGLE * three)


def linear_model() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    linear = torch.nn.Linear
    return torch.nn.Sequential(linear(16, 32), torch.nn.LayerNorm(32), linear(32, 4)), torch.randn(8, 16)


def steps(model, optimizer, x, count):
    for _ in range(count):
        optimizer.zero_grad()
        F.mse_loss(model(x), x[:, :4]).backward()
        optimizer.step()


def test_muon_steps_matrices_and_adamw_the_rest():
    model, x = linear_model()
    twin = copy.deepcopy(model)
    steps(model, MuonAndAdamW([{"params": list(model.parameters()), "lr": 1e-2, "weight_decay": 0.1}]), x, 3)
    matrix, *rest = twin.parameters()
    muon = torch.optim.Muon([matrix], 1e-2, 0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, 1e-2, weight_decay=0.1)
    for _ in range(3):
        twin.zero_grad()
        F.mse_loss(twin(x), x[:, :4]).backward()
        muon.step(), adamw.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_muon_goes_on_from_what_was_saved():
    model, x = linear_model()
    optimizer = MuonAndAdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer, x, 2)
    twin, saved = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, x, 2)
    resumed = MuonAndAdamW(twin.parameters(), lr=1e-2)
    resumed.load_state_dict(saved)
    steps(twin, resumed, x, 2)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_schedule_reaches_both():
    model, x = linear_model()
    optimizer = MuonAndAdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())
    steps(model, optimizer, x, 1)
    schedule.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_what_is_wrong_with_a_run_is_said():
    with pytest.raises(SystemExit, match=r"none\.yaml is no file"):
        learn.main(["none.yaml"])
