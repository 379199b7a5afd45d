"""Arguments of runs: what is refused, and what stands for what."""

import pytest

from samoe_hf.training.arguments import SamoeTrainingArguments, parse_run


@pytest.fixture
def parse(tmp_path):
    """Parses a run with further lines of YAML, and options of the command line."""

    def parse(*lines: str, options: tuple[str, ...] = ()):
        run = tmp_path / "run.yaml"
        run.write_text("\n".join(["train_data: [{kind: synthetic}]", f"output_dir: {tmp_path / 'out'}", *lines]))
        return parse_run([str(run), *options])

    return parse


@pytest.mark.parametrize(
    "line, message",
    [
        ("per_device_train_batch_size: 0", "`per_device_train_batch_size` must be at least 1, got 0"),
        ("per_device_eval_batch_size: -1", "`per_device_eval_batch_size` must be at least 1"),
        ("gradient_accumulation_steps: 0", "`gradient_accumulation_steps` must be at least 1"),
        ("learning_rate: -1.0e-4", "`learning_rate` must be at least 0"),
        ("learning_rate: .nan", "`learning_rate` must be a number, got nan"),
        ("weight_decay: .inf", "`weight_decay` must be a number, got inf"),
        ("max_grad_norm: -1", "`max_grad_norm` must be at least 0"),
        ("num_train_epochs: 0", "`num_train_epochs` must be above 0"),
        ("num_frames: 0", "`num_frames` must be at least 1"),
        ("num_frames: 2.5", "`num_frames` must be a whole number, got 2.5"),
        ("max_objects: true", "`max_objects` must be a number, got True"),
        ("clips_per_video: -3", "`clips_per_video` must be at least 1"),
        ("encoder_batch_size: 0", "`encoder_batch_size` must be at least 1"),
        ("dice_weight: .nan", "`dice_weight` must be a number, got nan"),
        ("dice_weight: -1", "`dice_weight` must be a number from 0 on"),
        ("point_probability: .nan", "`point_probability` must be a number"),
        ("save_only_trained: 3", "`save_only_trained` must be true or false, got 3"),
        ("trainable: [experts=-1.0]", "must be from 0 on, got 'experts=-1.0'"),
        ("trainable: [experts=nan]", "must be from 0 on, got 'experts=nan'"),
        ("eval_data: 5", "`eval_data` must be a folder or a list of datasets"),
        ("gradient_checkpointing_kwargs: {use_reentrant: true}", "neither `use_reentrant` nor `offload`"),
    ],
)
def test_bad_values_are_refused_by_name(parse, line, message):
    with pytest.raises(ValueError) as error:
        parse(line)
    assert message in str(error.value)


def test_bad_values_of_the_command_line_are_refused_too(parse):
    with pytest.raises(ValueError, match="`learning_rate` must be at least 0, got nan"):
        parse(options=("--learning_rate", "nan"))


def test_one_set_of_parameters_needs_no_list(parse):
    *_, arguments = parse("trainable: experts", "learning_rate: 1.0e-3")
    assert arguments.learning_rates() == {"experts": 1e-3}
    *_, arguments = parse("trainable: decoder=1.0e-5")
    assert arguments.learning_rates() == {"decoder": 1e-5}


def test_numbers_may_be_written_as_text(parse):
    """YAML takes 1e-4, without a point, for text."""
    *_, arguments = parse("learning_rate: 1e-4", "trainable: [experts]")
    assert arguments.learning_rate == 1e-4


def test_the_best_checkpoint_is_that_of_the_tracking_evaluation(tmp_path):
    arguments = SamoeTrainingArguments(
        output_dir=tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=500, save_steps=500
    )
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == ("J&F", True)


def test_datasets_and_augmentation_are_options_too():
    entry = "{kind: synthetic, domain: blobs, num_videos: 2, num_frames: 3}"
    options = ["--train_data", entry, "--augmentation", "{flip: 0.5}", "--output_dir", "out"]
    _, data, *_ = parse_run(["smoke", *options])
    assert data.train_data == [{"kind": "synthetic", "domain": "blobs", "num_videos": 2, "num_frames": 3}]
    assert data.augmentation == {"flip": 0.5} and len(data.eval_data) == 2


def test_a_bad_value_of_an_option_is_not_hidden_behind_a_long_usage(capsys):
    with pytest.raises(SystemExit):
        parse_run(["smoke", "--output_dir", "out", "--max_steps", "many"])
    printed = capsys.readouterr().err
    assert "argument --max_steps" in printed and "'many'" in printed and printed.count("\n") == 2
