"""One process writes an output; the others are told which, and what killed ones left is cleared."""

import errno
import json
import multiprocessing
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest

from samoe_hf.errors import InputError
from samoe_hf.model.weights_io import updated_folder
from samoe_hf.one_writer import OneWriter
from samoe_hf.whole_files import clear_unfinished, write_text


def hold(target, place, writing):
    sys.argv = ["-c", str(target), place]
    with OneWriter(target, inside=place == "inside"):
        writing.set()
        time.sleep(60)


FORK = multiprocessing.get_context("fork")

WORKER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(1)
"""


@pytest.mark.parametrize("other", ["inside", "beside"])
@pytest.mark.parametrize("place", ["inside", "beside"])
def test_a_second_process_is_told_who_writes_until_that_one_is_gone(tmp_path, place, other):
    target, writing = tmp_path / "out", FORK.Event()
    process = FORK.Process(target=hold, args=(target, place, writing))
    process.start()
    assert writing.wait(30)
    writer = OneWriter(target, inside=other == "inside")
    told = rf"out is being written by another process: `-c .*out {place}` \(process {process.pid} on "
    with (
        pytest.raises(InputError, match=told + rf"{socket.gethostname()}, since 20.*choose another `--output`"),
        writer,
    ):
        pass
    process.kill()
    process.join()
    with writer:
        pass
    if place == other:
        assert list(tmp_path.iterdir()) == ([target] if place == "inside" else []) and not list(tmp_path.glob("out/*"))


def test_the_one_who_writes_may_enter_again(tmp_path):
    writer, other = OneWriter(tmp_path / "out"), OneWriter(tmp_path / "out")
    with writer:
        with writer:
            assert {path.name for path in writer.target.iterdir()} == {"_writer.lock", "_writer.json"}
        with pytest.raises(InputError, match=f"process {os.getpid()}"), other:
            pass
        with pytest.raises(InputError, match="choose another `--masks`"), OneWriter(tmp_path / "out", "`--masks`"):
            pass
    with other:
        pass
    assert list(tmp_path.iterdir()) == [], "nothing stays of a folder in which nothing was written"


@pytest.mark.parametrize("inside", [True, False])
def test_a_full_disk_leaves_nothing_and_says_what_could_not_be_written(tmp_path, monkeypatch, inside):
    writer = OneWriter(tmp_path / "out", inside=inside)
    monkeypatch.setattr("pathlib.Path.write_text", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(InputError, match=r"`--output` .*out cannot be written: .*No space left"), writer:
        pass
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), writer:  # and nothing hides an error
        shutil.rmtree(writer.target, ignore_errors=True)
        raise ZeroDivisionError


def test_of_several_processes_the_first_stands_for_all(tmp_path, monkeypatch):
    with OneWriter(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with OneWriter(tmp_path):
            pass
        assert list(tmp_path.glob("_writer.*"))


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--hub_token", "Secret9"], "--hub_token …"),
        (["--hub-token=Secret9", "--seed", "1"], "--hub-token=… --seed 1"),
        (["--hub_tok", "a Secret9", "--seed", "1"], "--hub_tok … --seed 1"),
        (["--train_data", "{kind: hub, token: Secret9, id: b}"], "--train_data '{kind: hub, token: …, id: b}'"),
        (["--output", "tokens/hf_Secret9/a"], "--output tokens/…/a"),
        (["--include_num_input_tokens_seen", "all"], "--include_num_input_tokens_seen all"),
    ],
)
def test_a_token_of_the_command_is_not_written(tmp_path, monkeypatch, words, kept):
    monkeypatch.setattr(sys, "argv", ["samoe", "train", "run.yaml", *words])
    with OneWriter(tmp_path):
        assert json.loads((tmp_path / "_writer.json").read_text())["command"] == f"samoe train run.yaml {kept}"


def test_a_lock_that_workers_of_a_killed_process_hold_is_waited_for(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path / "_writer.lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    about = {"pid": gone.pid, "host": socket.gethostname(), "since": time.time(), "command": shlex.join(["samoe"])}
    (tmp_path / "_writer.json").write_text(json.dumps(about))
    start = time.monotonic()
    with OneWriter(tmp_path):
        assert time.monotonic() - start > 0.3
    process.wait()


@pytest.mark.parametrize("problem", [errno.ENOSYS, errno.ENOLCK])
def test_where_files_cannot_be_locked_they_are_written_all_the_same(tmp_path, monkeypatch, problem):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(problem, "as some file systems of clusters say")))
    with OneWriter(tmp_path / "out"), updated_folder(tmp_path / "out") as folder:
        write_text(folder / "a.txt", "a")
    assert os.listdir(tmp_path / "out") == ["a.txt"]


def test_what_killed_processes_left_is_cleared_with_a_sentence(tmp_path, capsys):
    target, number = tmp_path / "out", "0" * 32
    (target / "scores").mkdir(parents=True)
    kept = [
        target / "model.safetensors", tmp_path / f".other.{number}", target / ".hidden", target / "scores" / "a.npz",
    ]  # fmt: skip
    left = [target / "scores" / f".a.{number}.npz", target / f".run.{number}.json", tmp_path / f".out.{number}"]
    for path in kept + left:
        path.write_text("")
    (target / "_unsaved_x1").mkdir()
    with OneWriter(target):
        pass
    assert f"{target}: cleared what a stopped process left there, 4 names." in capsys.readouterr().out
    assert all(path.exists() for path in kept) and not any(path.exists() for path in left)
    with OneWriter(target):
        pass
    assert capsys.readouterr().out == ""


def test_a_folder_that_was_put_aside_is_put_back(tmp_path):
    aside = tmp_path / f".out.{'1' * 32}.old"
    for exists in (False, True):
        aside.mkdir()
        write_text(aside / "model", "old")
        assert clear_unfinished(tmp_path / "out") == [aside.name]
        assert (tmp_path / "out" / "model").read_text() == "old" and not aside.exists(), exists
