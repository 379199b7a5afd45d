"""The table of commands, and what all commands have in common."""

import runpy
from types import SimpleNamespace

import pytest

from helpers.reference import ROOT
from samoe_hf import cli
from samoe_hf.cli import COMMANDS, main


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


def test_every_script_is_a_command(monkeypatch, capsys):
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} == COMMANDS.keys()
    for command in COMMANDS:
        monkeypatch.setattr(cli, "run_command", lambda name: print(f"ran {name}"))
        runpy.run_path(str(ROOT / "scripts" / f"{command}.py"), run_name="__main__")
        assert capsys.readouterr().out == f"ran {command}\n"


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
        ["benchmark", "parts"],
    ],
)
@pytest.mark.parametrize("device", ["nope", "cuda:99", "meta", "cpu:x"])
def test_devices_that_cannot_be_used_are_refused_at_once(command, device, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--device", device])
    assert caught.value.code == 2
    assert f"argument --device: {device!r} is no device that can be used here" in capsys.readouterr().err


def test_training_needs_a_run():
    with pytest.raises(SystemExit, match="error: The YAML of a run is missing"):
        main(["train"])
