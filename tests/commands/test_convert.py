"""`samoe convert`: there and back, and what it refuses; uploads are in tests/hub."""

import resource
from functools import partial

import pytest
from transformers import AutoProcessor, Sam2VideoProcessor

from helpers.reference import CHECKPOINT, CONFIG, EXPERTS
from samoe_hf import SamoeModel


@pytest.fixture
def convert(samoe):
    return partial(samoe, "convert")


def test_there_and_back(convert, nano, tmp_path):
    folder, original, again = (tmp_path / name for name in ("folder", "original", "again"))
    convert(CHECKPOINT, "--experts", EXPERTS, "--config", CONFIG, "--output", folder)
    assert isinstance(AutoProcessor.from_pretrained(folder), Sam2VideoProcessor)
    tensors = SamoeModel.from_pretrained(folder).state_dict()
    assert all((tensor == tensors[name]).all() for name, tensor in nano.model.state_dict().items())
    convert(folder, "--to", "original", "--output", original)
    stem = f"{original}/sam2.1_hiera_custom_moe"
    said = convert(f"{stem}.pt", "--config", f"{stem}.yaml", "--output", again)
    for name in ("model.safetensors", "config.json", "processor_config.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert f"Written: config.json, model.safetensors, processor_config.json in {again}" in said


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_left(convert, tmp_path):
    (tmp_path / "truncated.pt").write_bytes(CHECKPOINT.read_bytes()[:100_000])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    output, full = tmp_path / "output", tmp_path / "full"
    cases = [
        ([tmp_path / "truncated.pt", "--output", output], "truncated"),
        ([tmp_path / "missing.pt", "--output", output], "no such file"),
        ([CHECKPOINT, "--config", CHECKPOINT, "--output", output], "expected the original's YAML"),
        ([CHECKPOINT, "--config", CONFIG, "--output", full, "--push-to-hub", "me/x"], "something else than this model"),
    ]
    for arguments, message in cases:
        assert message in convert(*arguments, fails=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "truncated.pt"]


@pytest.mark.parametrize("target", ["samoe", "original"])
def test_a_full_disk_is_an_error_of_one_line(convert, model_folder, tmp_path, target):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = convert(model_folder, "--to", target, "--output", tmp_path / "output", fails=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "output" in message and "too large" in message
    assert list(tmp_path.iterdir()) == []
