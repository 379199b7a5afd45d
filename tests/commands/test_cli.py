"""The table of commands, their help texts, and what becomes of an error."""

import errno
import io
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from huggingface_hub import HfApi
from torch.utils.data import DataLoader

from helpers.reference import ROOT
from samoe_hf import cli
from samoe_hf.cli import COMMANDS, main, run_command
from samoe_hf.data.frames import SampleError
from samoe_hf.data.registry import read_yaml
from samoe_hf.errors import InputError, input_errors
from samoe_hf.training.arguments import run_parser

SYNTHETIC = ["--dataset", "synthetic", "--option", "num_videos=1", "--option", "num_frames=2"]


def printed_help(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["help"]])
def test_help_lists_every_command(capsys, arguments):
    printed = printed_help(capsys, *arguments)
    assert all(f"\n  {name} " in printed and text in printed for name, text in COMMANDS.items())


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_its_options_in_groups(command, capsys):
    printed = printed_help(capsys, command, "--help")
    assert f"usage: samoe {command} " in printed and printed == printed_help(capsys, "help", command)
    ungrouped = "".join(re.findall(r"^(?:positional arguments|options):\n((?:  .*\n)+)", printed, flags=re.MULTILINE))
    options = re.findall(r"^  (-\S+)", ungrouped, flags=re.MULTILINE)
    assert set(options) <= {"-h,", "--traceback", "--help-all"} and "--traceback" in options


def test_help_texts_import_neither_pytorch_nor_transformers():
    program = ROOT / "tests" / "programs" / "help_texts.py"
    result = subprocess.run([sys.executable, program, *COMMANDS], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert all(f"usage: samoe {command} " in result.stdout for command in COMMANDS)


def test_help_of_training_has_our_keys_in_groups_and_all_if_asked(capsys):
    printed, everything = (printed_help(capsys, "train", option) for option in ("--help", "--help-all"))
    groups = [printed.index(f"\n{name}:\n") for name in ("model", "data", "prompts", "loss", "training")]
    assert groups == sorted(groups) and "--max_grad_norm" not in printed
    for action in run_parser()._actions:
        assert action.option_strings[0] in everything
    for option in ("--model_name_or_path", "--train_data", "--box_probability", "--focal_weight", "--trainable"):
        assert f"  {option}" in printed and f"  {option}" in everything


@pytest.fixture
def command(monkeypatch):
    """Makes a function what every command does."""

    def command(function):
        module = SimpleNamespace(parse_arguments=lambda arguments: None, run=lambda parsed: function())
        monkeypatch.setattr(cli, "import_module", lambda name: module)

    return command


def fail(error: BaseException) -> None:
    raise error


def test_the_home_folder_is_found_where_no_shell_does(monkeypatch, tmp_path):
    given = []
    known = SimpleNamespace(parse_arguments=lambda words: given.append(words) or words, run=lambda _: None)
    monkeypatch.setattr(cli, "import_module", lambda _: known)
    monkeypatch.setenv("HOME", str(tmp_path))
    main(["track", "~/a b", "--output=~/c", "--mask", "2=~/m.png@1", "x~/y", "~", r"~\d"])
    assert given == [
        [f"{tmp_path}/a b", f"--output={tmp_path}/c", "--mask", f"2={tmp_path}/m.png@1", "x~/y", "~", rf"{tmp_path}\d"]
    ]
    (tmp_path / "run.yaml").write_text("{train_data: [~/a, {root: ~/b}], output_dir: ~/c, note: a ~/b}")
    (a, b) = (run := read_yaml(tmp_path / "run.yaml"))["train_data"]
    assert a == f"{tmp_path}/a" and b == {"root": f"{tmp_path}/b"}
    assert run["output_dir"] == f"{tmp_path}/c" and run["note"] == "a ~/b"


def test_an_error_of_ours_is_a_line_or_a_traceback_if_asked(command):
    missing = FileNotFoundError(2, "No such file or directory", "a.png")  # as a frame is that was removed meanwhile
    for error, message in ((InputError("first\n   second"), "first second"), (missing, f"{missing}")):
        command(lambda error=error: fail(error))
        with pytest.raises(SystemExit, match=rf"^error: {re.escape(message)}$"):
            main(["track"])
        with pytest.raises(type(error)):
            main(["track", "--traceback"])


def test_a_full_disk_comes_with_advice_wherever_it_is_noticed(command):
    def write() -> None:
        with input_errors("a.onnx"):
            raise OSError(errno.ENOSPC, "No space left on device")

    for function in (write, lambda: fail(OSError(errno.ENOSPC, "No space left on device"))):
        command(function)
        with pytest.raises(SystemExit, match=r"^error: the disk is full: .* Make room, and run the command again\.$"):
            main(["export"])
    known = InputError("a was not written, since the disk is full: resume")  # has advice of its own
    known.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    command(lambda: fail(known))
    with pytest.raises(SystemExit, match=f"^error: {known}$"):
        main(["train"])


@pytest.mark.parametrize("arguments", [[], ["--traceback"]])
def test_a_user_who_stops_a_command_is_told_no_more(command, capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # which Python calls at last
    command(lambda: fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt) as stopped:
        main(["label", *arguments])
    sys.excepthook(stopped.type, stopped.value, stopped.tb)
    said = capsys.readouterr().err
    assert "Traceback" in said if arguments else said == "stopped\n"


@pytest.mark.parametrize("error", [OSError(errno.ESPIPE, "Illegal seek"), ValueError("I/O operation on closed file")])
def test_output_may_go_where_python_did_not_expect_it(monkeypatch, error):
    class Stream(io.TextIOWrapper):
        reconfigure = Mock(side_effect=error)  # as where a pipe has taken the place of a file

    monkeypatch.setattr(sys, "stderr", Stream(io.BytesIO()))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert Stream.reconfigure.called


class Damaged:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise SampleError(f"{index}.png: damaged")


def test_an_error_in_a_data_loaders_worker_is_its_line_alone(command):
    command(lambda: list(DataLoader(Damaged(), num_workers=1)))
    with pytest.raises(SystemExit, match=r"^error: 0\.png: damaged$"):
        main(["train"])


@pytest.mark.parametrize(
    "error", [ValueError("a library's"), OSError("no place"), ImportError("a circle"), KeyError(1)]
)
def test_other_errors_keep_their_traceback(command, error):
    command(lambda: fail(error))
    with pytest.raises(type(error)):
        main(["track"])


@pytest.mark.parametrize("error", [None, InputError("no")])
def test_a_command_leaves_the_other_processes_at_its_end(monkeypatch, error):
    group = Mock(**{"is_initialized.return_value": True})
    monkeypatch.setitem(sys.modules, "torch.distributed", group)
    monkeypatch.setattr("samoe_hf.commands.data.parse_arguments", Mock())
    monkeypatch.setattr("samoe_hf.commands.data.run", Mock(side_effect=error))
    with nullcontext() if error is None else pytest.raises(SystemExit):
        run_command("data", [])
    group.destroy_process_group.assert_called_once_with()


def test_what_a_user_can_mend_becomes_an_error_of_ours_where_it_is_met():
    def create():
        HfApi(endpoint="http://127.0.0.1:9", token=False).create_repo("me/x")  # where nobody listens

    for act, message in (
        (lambda: Path("nowhere").read_text(), "No such file or directory: 'nowhere'"),
        (lambda: fail(ImportError("needs bitsandbytes")), "needs bitsandbytes"),
        (lambda: HfApi(token=False).model_info("no id"), "Repo id must"),
        (create, "The Hugging Face Hub was not reached: .*refused"),
    ):
        with pytest.raises(InputError, match=message), input_errors():
            act()
    with pytest.raises(ValueError, match="a library's") as caught, input_errors():
        raise ValueError("a library's")
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train"], "A run is missing: a YAML file, or one of .*smoke"),
        (["train", "smoke", "--model_config", "model_nan"], "is no file, .* did you mean 'model_nano'"),
        (["evaluate", "m", "--dataset", "smok.yaml", "--output", "o"], "is no file, .* did you mean 'smoke'"),
        (["experts", "nowhere", *SYNTHETIC], "nowhere: "),
        (["experts", "gone.pt", *SYNTHETIC], "gone.pt: no such file"),
        (["convert", "a/b/c", "--output", "o"], "'a/b/c' is neither a folder or file"),
    ],
)
def test_names_of_nothing_are_told_in_a_line_and_nothing_is_written(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(arguments)
    assert list(tmp_path.iterdir()) == []
