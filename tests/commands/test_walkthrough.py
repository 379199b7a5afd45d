"""The README's walk-through, run as it is written there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from helpers.reference import ROOT
from samoe_hf.cli import main

SECTION = "## Train"
PROMISES = ROOT / "docs" / "experts.md"


def commands() -> list[str]:
    """Lines of the first fenced block under the section's heading."""
    section = (ROOT / "README.md").read_text().partition(f"\n{SECTION}\n")[2].partition("\n## ")[0]
    block = re.search(r"^```\w*\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    return block.group(1).replace("\\\n", " ").splitlines()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with what the commands name, so that their outputs stay out of the repository."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def check_outputs(folder: Path) -> None:
    """Every output folder that a command names holds what the guide promises."""
    outputs = [Path(path) for path in re.findall(r"--output (\S+)", "\n".join(commands()))]
    assert len(outputs) == 2 and (folder / "outputs/smoke/model.safetensors").is_file()
    for output in outputs:
        assert any((folder / output).iterdir()), output
    experts = {path.name for path in (folder / "outputs/smoke-experts").iterdir()}
    assert {"routing_shapes_shapes_2_00000.mp4", "routing_blobs_blobs_2_00000.mp4"} <= experts
    promised = re.findall(r"`([\w*]+\.(?:csv|json|png|mp4))`", PROMISES.read_text())
    assert len(promised) > 5
    for pattern in promised:
        assert any(re.fullmatch(pattern.replace(".", r"\.").replace("*", ".*"), name) for name in experts), pattern


def test_the_section_shows_the_whole_way():
    assert [shlex.split(line)[:2] for line in commands()] == [
        ["samoe", name] for name in ("train", "evaluate", "experts")
    ]


@pytest.mark.slow
def test_commands_run_with_less_to_do(folder, monkeypatch):
    """With fewer steps and videos, and experts in half as many layers. A file comes before the package's."""
    monkeypatch.chdir(folder)
    run, model = (folder / "configs" / name for name in ("smoke.yaml", "model_nano.yaml"))
    text = run.read_text()
    assert text.count("num_videos: 2, num_frames: 6") == 2 and "model_config: model_nano\n" in text
    text = text.replace("model_config: model_nano\n", "model_config: configs/model_nano.yaml\n")
    Path("smoke").write_text(text.replace("num_videos: 2, num_frames: 6", "num_videos: 1, num_frames: 3"))
    with open(model, "a") as file:
        file.write("expert_modules: memory_attention.layers.1.*_proj\n")
    for line in commands():
        _, command, *arguments = shlex.split(line)
        main([command, *arguments, *(["--max_steps", "2"] if command == "train" else [])])
    check_outputs(folder)
