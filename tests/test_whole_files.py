"""Files and folders are written whole or not at all, also where a process is killed."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from samoe_hf.model.weights_io import unchanged_model, updated_folder
from samoe_hf.whole_files import clear_unfinished, new_folder, whole_file, write_text


@pytest.fixture(autouse=True)
def shortcuts():
    """Saves wait for the disk here: that is a step at which they may be killed."""


class Killed(BaseException):
    """Ends a save as a kill does: nothing tidies up after it."""


def save_files(folder, text, names):
    with updated_folder(folder) as temporary:
        for name in names:
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text)


SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.mark.parametrize("step", range(1, 22))
def test_a_killed_save_leaves_the_old_files_or_the_new_ones(tmp_path, monkeypatch, step):
    old, new = ["config.json", "model.safetensors"], ["config.json", *SHARDS, "mine/adapter_model.safetensors"]
    save_files(tmp_path, "old", old)
    count = 0

    def killed_at_the_step(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count >= step:
                raise Killed
            return function(*arguments, **options)

        return call

    for owner, name in [(Path, "rename"), (Path, "unlink"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")]:
        monkeypatch.setattr(owner, name, killed_at_the_step(getattr(owner, name)))
    with suppress(Killed):
        save_files(tmp_path, "new", new)
    monkeypatch.undo()
    reached_end = count < step
    texts = {path.read_text() for path in map(tmp_path.joinpath, [*new, *old]) if path.exists()}
    assert len(texts) == 1 or not (tmp_path / "config.json").exists(), "no reader sees a mixture"
    with unchanged_model(tmp_path):  # where a reader comes first, it finds the new ones whole
        assert (tmp_path / "config.json").exists()
    cleared = clear_unfinished(tmp_path)
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found in (dict.fromkeys(old, "old"), dict.fromkeys(new, "new"))
    assert bool(cleared) == (found["config.json"] == "old") and not (reached_end and cleared)


LONG = "視" * 83  # 249 of 255 bytes


@pytest.mark.parametrize("name", ["a.txt", f"{LONG}.txt"])
def test_a_file_is_whole_or_not_there(tmp_path, name):
    path = tmp_path / "new" / name
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    write_text(path, "first")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["out", LONG])
@pytest.mark.parametrize("open_folder", [new_folder, updated_folder])
def test_a_folder_is_written_whole_or_not_at_all(tmp_path, open_folder, name):
    with pytest.raises(RuntimeError), open_folder(tmp_path / name) as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    killed = open_folder(tmp_path / name)
    (killed.__enter__() / "a").write_text("half")
    assert clear_unfinished(tmp_path / name)
    with open_folder(tmp_path / name) as temporary:
        (temporary / "a").write_text("whole")
    assert (tmp_path / name / "a").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_what_others_have_written_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(FileExistsError, match="out exists and is not an empty folder"), new_folder(tmp_path / "out"):
        write_text(tmp_path / "out" / "theirs", "theirs")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]
