"""`samoe data check`: what a dataset holds, and what is likely a mistake."""

import io
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from helpers.own_videos import SIZE, save, save_ids, truth, write, write_objects
from samoe_hf import load_videos
from samoe_hf.cli import main
from samoe_hf.data import to_datasets
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.errors import InputError


def check(folder, *options):
    main(["data", "check", str(folder), "--output", str(folder.parent / "out"), *options])


def test_it_lists_videos_and_draws_them(tmp_path, capsys):
    root = write(tmp_path / "mine", "{v}/frames/{t}.jpg", "{v}/masks/{t}.png")
    check(root)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["cat", "64", "x", "48", "4", "4", "2", "1,", "2"]
    sheet = tmp_path / "out" / "contact_sheet.png"
    assert lines[-2:] == ["2 videos, 4 objects; 0 videos with warnings", f"Written: {sheet}"]
    assert np.asarray(Image.open(sheet)).std() > 10
    check(root, "--video", "cat")
    assert "dog" not in capsys.readouterr().out


def test_a_terminal_without_some_letters_shows_question_marks(tmp_path, monkeypatch):
    root = write(tmp_path / "mine", "{v}/frames/{t}.jpg", "{v}/masks/{t}.png")
    (root / "cat").rename(root / "kätzchen-猫")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "iso-8859-1", write_through=True))
    check(root)
    assert "\nkätzchen-? " in sys.stdout.buffer.getvalue().decode("iso-8859-1")


def test_names_that_are_no_utf8_are_refused(tmp_path):
    """As those of archives that another system has packed."""
    root = write(tmp_path / "mine", "{v}/frames/{t}.jpg", "{v}/masks/{t}.png")
    os.rename(root / "cat", os.fsencode(root / "k") + b"\xe4tzchen")
    with pytest.raises(SystemExit):
        check(root)
    with pytest.raises(InputError, match=r"k\\udce4tzchen.*UTF-8"):
        load_videos(root)[1]


def test_likely_mistakes_are_told(tmp_path, capsys):
    root = write(tmp_path / "mine", "{v}/frames/{t}.jpg", "{v}/masks/{t}.png")
    for t in range(4):
        save(root / f"white/frames/{t}.jpg", np.zeros((*SIZE, 3), np.uint8))
        save(root / f"full/frames/{t}.jpg", np.zeros((*SIZE, 3), np.uint8))
    mask = np.zeros(SIZE, np.uint8)
    save(root / "full/masks/0.png", np.ones(SIZE, np.uint8))
    save(root / "white/masks/1.png", mask)
    mask[4:20, 4:20] = 255
    save(root / "white/masks/0.png", mask)
    check(root)
    text = capsys.readouterr().out
    for warning in (
        "2 of 4 frames have no mask", "an object covers 100 % of a frame", "one frame alone has masks",
        "objects that one frame alone shows: 1",
    ):  # fmt: skip
        assert f"warning: {warning}" in text
    assert "2 videos with warnings" in text


def test_a_video_without_masks_is_listed(tmp_path, capsys):
    bare = replace(truth()["cat"], annotations=MaskArrays(np.zeros((0, 1, *SIZE), bool), [1], []))
    to_datasets([bare, truth()["dog 2"]]).save_to_disk(tmp_path / "mine")
    check(tmp_path / "mine")
    assert "warning: no frame shows an object" in capsys.readouterr().out and (tmp_path / "out").is_dir()


def test_soft_edges_and_damaged_files_are_errors_of_their_videos(tmp_path, capsys):
    root = write(tmp_path / "mine", "{v}/frames/{t}.jpg", "{v}/masks/{t}.png")
    soft = np.zeros(SIZE, np.uint8)
    soft[4:20, 4:20] = 255
    soft[3, 4:20] = soft[20, 4:20] = np.arange(40, 200, 10)
    save(root / "cat/masks/0.png", soft)
    (root / "dog 2/masks/1.png").write_bytes(b"damaged")
    save(root / "fine/frames/0.jpg", np.zeros((*SIZE, 3), np.uint8))
    save_ids(root / "fine/masks/0.png", truth()["cat"], 0)
    with pytest.raises(SystemExit, match=r"2 of 3 videos cannot be used"):
        check(root)
    text = capsys.readouterr().out
    assert "0.png: a mask with soft edges" in text and "1.png: not a readable image" in text
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_wrong_options_are_named(tmp_path):
    root = write(tmp_path / "mine", "{v}/frames/{t}.jpg", "{v}/masks/{t}.png")
    with pytest.raises(SystemExit, match=r"`--video` names \['bird'\]"):
        check(root, "--video", "bird")
    with pytest.raises(SystemExit, match="no split 'dev'"):
        check(root, "--split", "dev")
    with pytest.raises(SystemExit, match="no folder"):
        check(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["empty", "cut off", "another size"])
def test_every_frame_is_read(damage, tmp_path, capsys):
    root = write(tmp_path / "mine", "{v}/frames/{t}.jpg", "{v}/masks/{t}.png")
    path = root / "cat/frames/2.jpg"
    if damage == "another size":
        save(path, np.zeros((9, 9, 3), np.uint8))
    else:
        path.write_bytes(path.read_bytes()[: 400 * (damage == "cut off")])
    with pytest.raises(SystemExit, match="1 of 2 videos cannot be used"):
        check(root)
    assert "cat/frames/2.jpg" in capsys.readouterr().out


def test_what_was_guessed_is_printed(tmp_path, capsys):
    root = write_objects(tmp_path / "mine", "{v}/frames/{t}.jpg", "{v}/masks/{t:05d}_obj{o}.png")
    check(root)
    assert "cat/masks/00000_obj1.png: object 1 of frame 0 (0)" in capsys.readouterr().out


def test_options_of_the_reader_overrule_guesses(tmp_path, capsys):
    root = write(tmp_path / "mine", "{v}/frames/{t}.jpg", "{v}/masks/{t}.png")
    patterns = ("--option", "frames={video}/frames/*", "--option", "masks={video}/masks/{frame}.png")
    check(root, "--option", "binary=true", *patterns)
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["1", "1"]
    check(root, "--option", "ignore_ids=[1]")
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["1", "2"]
    with pytest.raises(SystemExit, match="`--option split=val`: it is `--split`"):
        check(root, "--option", "split=val")
