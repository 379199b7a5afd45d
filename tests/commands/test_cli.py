"""The table of commands, and what all commands have in common."""

import re
import runpy
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from helpers.reference import ROOT
from samoe_hf import cli
from samoe_hf.cli import COMMANDS, main
from samoe_hf.data import SyntheticVideos, write_video


def test_help_lists_every_command_and_each_explains_itself(capsys):
    for arguments in (["--help"], *([command, "--help"] for command in COMMANDS if command != "train")):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        if len(arguments) == 1:
            assert all(f"\n  {name} " in printed and text in printed for name, text in COMMANDS.items())
        else:
            assert f"usage: samoe {arguments[0]} " in printed


def test_help_of_training_has_all_keys_in_groups(capsys):
    main(["train", "--help"])
    printed = capsys.readouterr().out
    groups = [printed.index(f"\n{name}:\n") for name in ("model", "data", "prompts", "loss", "training")]
    assert groups == sorted(groups)
    for option in ("--model_name_or_path", "--train_data", "--box_probability", "--focal_weight", "--trainable"):
        assert f"  {option}" in printed


def test_the_package_itself_is_a_command(monkeypatch, capsys):
    """`python -m samoe_hf track`, as `torchrun` and `accelerate launch` run it."""
    monkeypatch.setattr(sys, "argv", ["samoe_hf", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("samoe_hf", run_name="__main__")
    assert capsys.readouterr().out.startswith("samoe_hf ")


@pytest.mark.parametrize("arguments", [[], ["fly"], ["--fly"]])
def test_other_commands_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError])
def test_errors_of_users_end_in_one_line(monkeypatch, error):
    def fail(arguments):
        raise error("first\n   second")

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=fail))
    with pytest.raises(SystemExit, match=r"^error: first second$"):
        main(["track"])


def test_a_hub_that_is_not_reached_ends_in_one_line(monkeypatch):
    def fail(arguments):
        HfApi(endpoint="http://127.0.0.1:9", token=False).create_repo("me/x")  # where nobody listens

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=fail))
    with pytest.raises(SystemExit, match=r"^error: The Hugging Face Hub was not reached: .*refused"):
        main(["track"])


def test_other_errors_keep_their_trace(monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=lambda arguments: [][0]))
    with pytest.raises(IndexError):
        main(["track"])


@pytest.mark.parametrize(
    "command",
    [
        ["track", "m", "v", "--output", "o"],
        ["evaluate", "m", "--dataset", "davis", "--output", "o"],
        ["experts", "m", "--dataset", "davis"],
        ["assemble", "m", "l", "--dataset", "d", "--output", "o"],
    ],
)
@pytest.mark.parametrize("device", ["nope", "cuda:99", "meta", "cpu:x"])
def test_devices_that_cannot_be_used_are_refused_at_once(command, device, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--device", device])
    assert caught.value.code == 2
    assert f"argument --device: {device!r} is no device that can be used here" in capsys.readouterr().err


def test_training_needs_a_run():
    with pytest.raises(SystemExit, match=r"error: A run is missing: a YAML file, or one of .*smoke"):
        main(["train"])


def options_without_a_group(help_text: str) -> list[str]:
    """What argparse lists under its own headings, beside `--help`."""
    ungrouped = re.findall(r"^(?:positional arguments|options):\n((?:  .*\n)+)", help_text, flags=re.MULTILINE)
    return [line for text in ungrouped for line in re.findall(r"^  (\S+)", text, flags=re.MULTILINE) if line != "-h,"]


@pytest.mark.parametrize("command", COMMANDS)
def test_all_options_are_in_groups(command, capsys):
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
    printed = capsys.readouterr().out
    assert "--help" in printed and options_without_a_group(printed) == []


def test_options_without_a_group_are_found():
    text = "usage\n\noptions:\n  -h, --help  show\n  --one X     one\n\nmodel:\n  --two Y     two\n"
    assert options_without_a_group(text) == ["--one"]


def test_help_is_a_command_too(capsys):
    for arguments, found in ((["help"], "\ncommands:\n"), (["help", "track"], "usage: samoe track ")):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0 and found in capsys.readouterr().out
    main(["train", "smoke", "--help"])
    assert "usage: samoe train RUN.yaml|NAME" in capsys.readouterr().out


def test_help_of_adapting_names_the_options_of_a_run(capsys):
    with pytest.raises(SystemExit):
        main(["adapt", "--help"])
    listed = capsys.readouterr().out.partition("options of the run")[2]
    for option in ("--num_experts", "--config", "--train_data", "--box_probability", "--trainable", "--learning_rate"):
        assert option in listed
    assert "--output_dir" not in listed and "--model_config" not in listed


@pytest.mark.parametrize(
    "command",
    [
        ["train", "smok"],
        ["train", "smoke", "--model_config", "model_nan"],
        ["adapt", "m", "--domain", "d", "--dataset", "smok", "--output", "o"],
        ["evaluate", "m", "--dataset", "smok.yaml", "--output", "o"],
    ],
)
def test_wrong_names_of_configurations_are_answered_with_the_nearest(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"is no file, .* did you mean '(smoke|model_nano)'"):
        main(command)
    assert list(tmp_path.iterdir()) == []


NANO = ROOT / "tests" / "fixtures" / "nano"


def test_messages_name_the_options_of_the_command_line(tmp_path, monkeypatch, model_folder):
    write_video(tmp_path / "in.mp4", SyntheticVideos(1, 2, (96, 128), seed=3)[0].frames, fps=5)
    monkeypatch.chdir(tmp_path)
    tail = ["in.mp4", "--box", "10,10,60,60", "--output", "out.mp4"]
    with pytest.raises(SystemExit, match="give the model's YAML as `--config`"):
        main(["track", str(NANO / "sam2.1_hiera_nano.pt"), *tail])
    with pytest.raises(SystemExit, match="`--experts` and `--config` go with an original checkpoint"):
        main(["track", str(model_folder), *tail, "--config", "x.yaml"])
    with pytest.raises(SystemExit, match="holds experts only; give it as `--experts`"):
        main(["track", str(NANO / "samoe_nano_adapters.pt"), *tail])
    with pytest.raises(SystemExit, match="`samoe train --ignore_mismatched_sizes` gives the model new experts"):
        run = ["--model_name_or_path", str(model_folder), "--num_experts", "3", "--output_dir", "out"]
        main(["train", "smoke", *run])
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


@pytest.mark.parametrize("command", ["track", "evaluate", "experts", "convert"])
def test_original_checkpoints_are_read_with_their_experts(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "in.mp4", SyntheticVideos(1, 2, (96, 128), seed=3)[0].frames, fps=5)
    data = ["--dataset", "synthetic", "--option", "num_videos=1", "--option", "num_frames=3"]
    rest = {"track": ["in.mp4", "--box", "10,10,60,60", "--output", "out.mp4"], "convert": ["--output", "out"]}
    original = [str(NANO / "sam2.1_hiera_nano.pt"), "--config", str(NANO / "sam2.1_hiera_nano_moe.yaml")]
    original += ["--experts", str(NANO / "samoe_nano_adapters.pt")]
    main([command, *original, *rest.get(command, [*data, "--output", "out"])])
    printed = capsys.readouterr()
    assert re.search(r"Written: .*out.*\n$", printed.out) and "are new" not in printed.err
    bars = re.findall(r"(?:^|[\r\n])[^\r\n]*\|[^\r\n]*\d+/(\d+) \[", printed.err)
    assert "0" not in bars and not re.search(r"(?<![\d.])0it", printed.err) and (command == "convert" or bars)


def test_an_evaluation_with_nothing_left_to_do_shows_no_bar(tmp_path, monkeypatch, capsys, model_folder):
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "synthetic", "--option", "num_videos=1", "--option", "num_frames=2", "--output", "out"]
    for bars in (True, False):
        main(["evaluate", str(model_folder), *data])
        assert ("frame/s" in capsys.readouterr().err) == bars
