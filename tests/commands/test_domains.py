"""`samoe domains`, and what `evaluate` and `label` say of the domains that videos got."""

import errno
import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.domains import new_model
from samoe_hf import SamoeModel
from samoe_hf.data import SyntheticVideos, write_video
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.one_writer import OneWriter
from samoe_hf.surgery.domains import add_domain

DATA = ["--dataset", "synthetic", "--domain", "blobs", "--option", "num_videos=2", "--option", "num_frames=3"]


@pytest.fixture(scope="module")
def folder(gated, tmp_path_factory):
    """A base, and what was trained on it: domains a (blobs) and b (stripes)."""
    base = tmp_path_factory.mktemp("base")
    new_model().save_pretrained(base, processor=build_processor(gated.config))
    model = SamoeModel.from_pretrained(base)
    for domain in gated.config.domains:
        add_domain(model, **domain)
    model.load_state_dict(gated.state_dict())
    model.save_pretrained(base.parent / "trained", experts_only=True)
    return base.parent / "trained"


@pytest.fixture
def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "blob.mp4"
    write_video(path, SyntheticVideos(1, 6, (128, 128), domain="blobs", seed=77)[0].frames, fps=5)
    return path


def tensors(path):
    return SamoeModel.from_pretrained(path).state_dict()


def assert_kept(before, after, *names):
    """What has the same name is the same to the bit, but rows of the gate; and there are experts of these domains."""
    assert before.keys() & after.keys()
    for name in before.keys() & after.keys():
        assert name.startswith("domain_gate.") or torch.equal(before[name], after[name]), name
    for name in names:
        assert any(f".domain_{name}." in key for key in after)


def row(state, number):
    return {name: tensor[number] for name, tensor in state.items() if name.startswith("domain_gate.")}


def same_row(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_domains_are_listed_and_drawn(samoe, folder, copy_of, tmp_path):
    printed = samoe("domains", "list", folder)
    assert "a             3     2" in printed and "videos that the gate knows" in printed and "12" in printed
    samoe("domains", "show", folder, "--output", tmp_path / "plain")
    size = sum(x.nbytes for name, x in tensors(folder).items() if ".domain_a." in name) / 1e6
    shown = next(line.split()[3] for line in printed.splitlines() if line.startswith("a "))
    assert float(shown) == pytest.approx(size, rel=0.5)
    (copy_of / "examples").mkdir()
    Image.fromarray(np.full((40, 60, 3), (255, 0, 255), np.uint8)).save(copy_of / "examples" / "b.png")
    samoe("domains", "show", copy_of, "--output", tmp_path / "pictures")
    plain, drawn = (np.asarray(Image.open(tmp_path / name / "domains.png"))[..., :3] for name in ("plain", "pictures"))
    is_magenta = (np.abs(drawn.astype(int) - (255, 0, 255)) < 8).all(-1)
    assert is_magenta.sum() > 500 and not (np.abs(plain.astype(int) - (255, 0, 255)) < 8).all(-1).any()


def pictures(model):
    return {path.name: path.read_bytes() for path in (model / "examples").glob("*")}


def test_a_domain_is_renamed_removed_and_added_again_and_nothing_else_changes(samoe, folder, copy_of, tmp_path):
    (copy_of / "examples").mkdir()
    for name in ("a.jpg", "b.png"):
        (copy_of / "examples" / name).write_bytes(name.encode())
    before, source = tensors(folder), shutil.copytree(copy_of, tmp_path / "source")
    assert "b is now lines." in samoe("domains", "rename", copy_of, "b", "lines", "--in-place")
    renamed = tensors(copy_of)
    assert_kept(before, renamed, "a", "lines")
    assert pictures(copy_of) == {"a.jpg": b"a.jpg", "lines.png": b"b.png"}
    samoe("domains", "remove", copy_of, "lines", "--output", tmp_path / "one")
    one = tensors(tmp_path / "one")
    assert_kept(before, one, "a")
    assert not any("lines" in name for name in one) and same_row(row(one, 0), row(before, 0))
    assert torch.equal(tensors(copy_of)["domain_gate.means"], renamed["domain_gate.means"])
    assert pictures(tmp_path / "one") == {"a.jpg": b"a.jpg"} and "lines.png" in pictures(copy_of)
    printed = samoe(
        "domains", "add", tmp_path / "one", source, "--domain", "b", "--as", "new", "--output", tmp_path / "two"
    )
    assert f"Added new, of {source}." in printed and pictures(tmp_path / "two").keys() == {"a.jpg", "new.png"}
    two = tensors(tmp_path / "two")
    assert_kept(before, two, "a", "new")
    assert same_row(row(two, 0), row(before, 0))
    again, was = row(two, 1), row(before, 1)
    assert all(torch.equal(again[name], was[name]) for name in again if name != "domain_gate.names")
    for name in before:
        assert torch.equal(before[name], two[name.replace("domain_b.", "domain_new.")]) or "domain_gate.names" in name
    files = {file.name for file in (tmp_path / "two").iterdir()}
    assert (tmp_path / "two" / "model.safetensors").stat().st_size < 2e6 and "processor_config.json" in files
    names = sorted(file.name for file in (tmp_path / "two" / "domains").iterdir())
    assert names == ["a.safetensors", "new.safetensors"]
    samoe("domains", "remove", copy_of, "a", "--in-place")
    assert pictures(copy_of) == {"lines.png": b"b.png"}


def test_domains_are_added_to_a_base_without_any(samoe, folder, tmp_path):
    base = json.loads((folder / "config.json").read_text())["base_model"]["name_or_path"]
    samoe("domains", "add", base, folder, "--output", tmp_path / "out")
    assert_kept(tensors(folder), tensors(tmp_path / "out"), "a", "b")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 2e6  # whole, as the base is


def test_a_confirmed_video_changes_one_row_of_the_gate_alone(samoe, folder, copy_of, video):
    before = tensors(folder)
    printed = samoe("domains", "confirm", copy_of, video, "--domain", "a", "--in-place")
    assert f"{video}: the gate took it for" in printed and "13" in printed
    after = tensors(copy_of)
    assert_kept(before, after, "a", "b")
    assert same_row(row(after, 1), row(before, 1)) and not same_row(row(after, 0), row(before, 0))
    assert after["domain_gate.counts"].tolist() == [13, 12]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["remove", "FOLDER", "z", "--output", "OUT"], "The model has no domain 'z'; there are 'a', 'b'"),
        (
            ["add", "FOLDER", "FOLDER", "--as", "x", "--output", "OUT"],
            "(`--as`) is for one domain, but 2 are taken: a, b",
        ),
        (
            ["add", "FOLDER", "FOLDER", "--domain", "z", "--output", "OUT"],
            "The other model has no domain 'z'; it has 'a', 'b'",
        ),
        (["confirm", "FOLDER", "nothing.mp4", "--domain", "z", "--output", "OUT"], "The model has no domain 'z'"),
        (["confirm", "FOLDER", "nothing.mp4", "--domain", "a", "--output", "OUT"], "nothing.mp4"),
        (["remove", "FOLDER", "a", "--output", "FOLDER"], "exists; give a new folder, or `--in-place`"),
        (["remove", "some/repo", "a", "--in-place"], "`--in-place` goes with a folder"),
        (["list", "FOLDER", "--hub"], "which only this machine has"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(samoe, folder, tmp_path, words, message):
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    names = {"FOLDER": folder, "OUT": tmp_path / "out"}
    assert message in samoe("domains", *(names.get(word, word) for word in words), fails=True)
    assert not (tmp_path / "out").exists()
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"\xff" * path.stat().st_size)])
def test_a_domain_whose_file_is_lost_or_damaged_can_be_removed(samoe, folder, copy_of, change):
    change(copy_of / "domains" / "a.safetensors")
    assert "a.safetensors" in samoe("domains", "remove", copy_of, "b", "--in-place", fails=True)
    assert "Removed a." in samoe("domains", "remove", copy_of, "a", "--in-place")
    before, after = tensors(folder), tensors(copy_of)
    assert_kept(before, after, "b")
    assert not any(".domain_a." in name for name in after) and same_row(row(after, 0), row(before, 1))


def test_what_cannot_be_written_is_not_said_to_be_done(samoe, copy_of, monkeypatch, capfd):
    monkeypatch.setattr(SamoeModel, "save_pretrained", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    samoe("domains", "rename", copy_of, "a", "c", "--in-place", fails=True)
    assert "is now" not in capfd.readouterr().out
    (copy_of / "_writer.lock").mkdir()
    assert samoe("domains", "rename", copy_of, "a", "c", "--in-place", fails=True).startswith("error: MODEL ")


def test_a_stopped_change_leaves_no_half_of_a_model_and_loses_no_picture(samoe, folder, copy_of, tmp_path, monkeypatch):
    save = SamoeModel.save_pretrained

    def save_and_stop(*arguments, **options):
        save(*arguments, **options)
        raise KeyboardInterrupt

    (copy_of / "examples").mkdir()
    Image.new("RGB", (8, 8)).save(copy_of / "examples" / "a.png")
    monkeypatch.setattr(SamoeModel, "save_pretrained", save_and_stop)
    for target in (["--output", tmp_path / "new"], ["--in-place"]):
        with pytest.raises(KeyboardInterrupt):
            samoe("domains", "rename", copy_of, "a", "c", *target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    assert "c  " in samoe("domains", "list", copy_of) and (copy_of / "examples" / "c.png").is_file()


def test_a_folder_that_cannot_be_made_is_named_in_a_line(samoe, folder, tmp_path, monkeypatch):
    make = Path.mkdir

    def refuse(path, *args, **options):
        if path.name == "refused":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr("os.makedirs", lambda path, **options: refuse(Path(path), parents=True, **options))
    adapt = ["adapt", folder, "--domain", "x", "--dataset", "smoke", "--trainable", "experts"]
    for words in (["domains", "show", folder], ["experts", folder, *DATA], ["data", "check", *DATA[1:]], adapt):
        assert f"`--output` {tmp_path / 'refused'} cannot be written: " in samoe(
            *words, "--output", tmp_path / "refused", fails=True
        )


def test_two_processes_do_not_change_a_model_at_once(samoe, copy_of, monkeypatch):
    """Each would save what it had read, and the later one undo what the other did."""
    before = (copy_of / "model.safetensors").read_bytes()
    monkeypatch.setattr("samoe_hf.inference.load_tracker", lambda *_: pytest.fail("the model was read"))
    with OneWriter(copy_of), pytest.raises(SystemExit, match="copy is being written by another process"):
        samoe("domains", "rename", copy_of, "a", "c", "--in-place")
    assert (copy_of / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("command", ["evaluate", "label"])
def test_evaluate_and_label_say_whose_experts_each_video_got(samoe, folder, tmp_path, command):
    printed = samoe(command, folder, *DATA, "--output", tmp_path / "out")
    if command == "evaluate":
        (model,) = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
        found = {f"{one['domain']}/{one['video']}": one for one in model["videos"]}
        assert "| experts of |" in (tmp_path / "out" / "report.md").read_text()
    else:
        found = json.loads((tmp_path / "out" / "labels.json").read_text())["videos"]
    chosen = {key: (one["experts_of"], one["confidence"]) for key, one in found.items()}
    assert len(chosen) == 2 and "a" in {name for name, _ in chosen.values()}
    for key, (name, sure) in chosen.items():
        assert f"{key}  {name}, {sure:.0%} sure" in printed


@pytest.mark.parametrize("command", ["evaluate", "label"])
def test_strangers_get_what_unknown_says_and_another_choice_does_not_go_on(samoe, folder, tmp_path, command):
    data = [*("--dataset", "synthetic", "--domain", "shapes"), "--option", "num_videos=1", "--option", "num_frames=2"]
    printed = samoe(command, folder, *data, "--unknown", "mix", "--output", tmp_path / "out")
    assert re.search(r"half of [ab] \(nearest: it is of no known domain\), \d+% sure", printed)
    if command == "evaluate":
        (model,) = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
        (video,) = model["videos"]
    else:
        (video,) = json.loads((tmp_path / "out" / "labels.json").read_text())["videos"].values()
    assert video["unknown"] == "mix" and video["experts_of"] in "ab" and video["confidence"] < 0.5
    for other in ([], ["--unknown", "nearest"]):
        with pytest.raises(SystemExit, match="unknown"):
            samoe(command, folder, *data, *other, "--output", tmp_path / "out")
