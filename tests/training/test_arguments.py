"""Arguments of runs: what is refused, and what stands for what."""

import sys

import pytest

from helpers.clips import numbered_video
from samoe_hf.cli import run_command
from samoe_hf.training.arguments import choose_aside, parse_run


@pytest.fixture
def run(tmp_path):
    """Writes a run with further lines of YAML."""

    def write(*lines: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text("\n".join(["train_data: [{kind: synthetic}]", f"output_dir: {tmp_path / 'out'}", *lines]))
        return str(path)

    return write


@pytest.mark.parametrize(
    "line, message",
    [
        ("per_device_train_batch_size: 0", "`per_device_train_batch_size` must be at least 1, got 0"),
        ("learning_rate: .nan", "`learning_rate` must be a finite number, not nan"),
        ("num_frames: 2.5", "`num_frames` must be an integer, not 2.5"),
        ("dice_weight: -1", "`dice_weight` must be a number from 0 on"),
        ("save_only_trained: 3", "`save_only_trained` must be bool, not 3"),
        ("learning_rates: {experts: fast}", "must be numbers from 0 on, got {'experts': 'fast'}"),
        ("learning_rates: {decoder: 1.0}", "must map sets of `trainable` (experts) to rates, got {'decoder': 1.0}"),
        ("eval_data: 5", "`eval_data` of a run must be a folder or a list"),
        ("gradient_checkpointing_kwargs: {use_reentrant: true}", "neither `use_reentrant` nor `offload`"),
        ("use_cpu: true\nfp16: true", "`fp16` is not for training on a CPU; give `bf16: true` and `use_cpu: true`"),
        ("seed: 4294967296", r"`seed` must be below 2**32, got 4294967296"),
        ("fp16_full_eval: true", "`fp16_full_eval` must be False, got True"),
        ("batch_size: 4", "has an unknown key 'batch_size'; did you mean 'per_device_train_batch_size'?"),
        ("learning_rat: 1", "has an unknown key 'learning_rat'; did you mean 'learning_rate'?"),
    ],
)
def test_bad_values_are_refused_by_name(run, line, message):
    with pytest.raises(ValueError) as error:
        parse_run([run(line)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--learning_rate", "nan"], "`learning_rate` must be at least 0, got nan"),
        (["--top-k=2"], "There is no option --top-k; did you mean '--num_experts_per_tok'?"),
        (["--learning_rat", "1"], "There is no option --learning_rat; did you mean '--learning_rate'?"),
        (["--lora_rank", "x"], "error: argument --lora_rank/--lora-rank: expected an integer of at least 1, got 'x'"),
        (["--lr_scheduler_kwargs", "{min_lr: 1}"], "`lr_scheduler_kwargs` must be JSON, such as"),
        (["--lr_scheduler_kwargs", "5"], "`lr_scheduler_kwargs` must be JSON, such as"),
    ],
)
def test_bad_options_of_train_and_adapt(run, tmp_path, options, message):
    adapt = [str(tmp_path), "--domain", "a", "--dataset", run(), "--output", str(tmp_path / "new")]
    for command, arguments in (("train", [run(), *options]), ("adapt", [*adapt, *options])):
        with pytest.raises(SystemExit) as error:
            run_command(command, arguments)
        assert message in str(error.value.code)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--report_to", "wandb"], "WandbCallback requires wandb to be installed"),
        (["--eval_strategy", "steps"], "you didn't pass an `eval_dataset`"),
        (["--load_best_model_at_end", "true", "--eval_strategy", "epoch", "--save_strategy", "steps"], "to match"),
        (["--optim", "galore_adamw"], "install `galore_torch`"),
        (["--adam_beta1", "2"], "Invalid beta parameter"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr or min_lr_rate should be set"),
    ],
)
def test_settings_that_transformers_refuses_are_told_in_a_line(tmp_path, monkeypatch, options, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    data = "{kind: synthetic, num_videos: 1, num_frames: 2, image_size: [32, 32]}"
    run = ["smoke", "--train_data", data, "--eval_data", "none", "--num_frames", "2", "--max_steps", "1"]
    with pytest.raises(SystemExit) as error:
        run_command("train", [*run, "--output_dir", str(tmp_path / "out"), *options])
    assert message in str(error.value.code) and "Training settings cannot be used" in str(error.value.code)
    assert not (tmp_path / "out").exists()


def test_only_videos_that_can_be_scored_are_kept_aside():
    good, late, bare, still = (numbered_video(count, [seen]) for count, seen in ((4, [2]), (4, [3]), (4, []), (1, [0])))
    assert bare.object_ids == [1] and choose_aside([good, bare, still], 0.4) == [0]
    assert choose_aside([bare, still, late], 0.4) == []


def test_none_is_what_a_run_has_not(run):
    path = run("eval_data: [{kind: davis}]", "augmentation: {}", "num_frames: 3")
    for words in (
        [path, "--eval_data", "none", "--augmentation", "none"],
        [run("eval_data: none", "augmentation: none")],
    ):
        data = parse_run(words)[1]
        assert data.eval_data == [] and data.augmentation is None


def test_numbers_may_be_written_as_text(run):
    """YAML takes 1e-4, without a point, for text."""
    lines = ("learning_rate: 1e-4", "trainable: [experts, decoder]", "learning_rates: {decoder: 1e-5}")
    *_, arguments = parse_run([run(*lines)])
    assert (arguments.learning_rate, arguments.learning_rates) == (1e-4, {"decoder": 1e-5})
    *_, arguments = parse_run([run(*lines), "--learning_rates", "{experts: 1e-3}", "--learning-rate", "1e-2"])
    assert (arguments.learning_rate, arguments.learning_rates) == (1e-2, {"experts": 1e-3})


def test_options_that_are_there_pass(run):
    options = [
        "--learning-rate", "1e-3", "--seed=3", "--no_save_only_trained", "--dice_weight", "2.5", "--max_objects=1",
    ]  # fmt: skip
    lines = ("learning_rate: 1.0", "max_objects: 2", "trainable: experts")
    _, data, _, loss, arguments = parse_run([run(*lines), *options])
    assert (arguments.learning_rate, arguments.seed, arguments.save_only_trained) == (1e-3, 3, False)
    assert arguments.trainable == ["experts"]
    assert (loss.dice_weight, data.max_objects) == (2.5, 1)


def test_datasets_and_augmentation_are_options_too():
    entry = "{kind: synthetic, domain: blobs, num_videos: 2, num_frames: 3}"
    options = ["--train_data", entry, "--augmentation", "{flip: 0.5}", "--output_dir", "out"]
    _, data, *_ = parse_run(["smoke", *options])
    assert data.train_data == [{"kind": "synthetic", "domain": "blobs", "num_videos": 2, "num_frames": 3}]
    assert data.augmentation == {"flip": 0.5} and len(data.eval_data) == 2
