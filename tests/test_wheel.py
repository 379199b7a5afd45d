"""The package as it is installed: from a wheel, without the repository."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers.reference import CHECKPOINT, CONFIG, EXPERTS, ROOT
from helpers.wheel import build_wheel
from samoe_hf import small_base
from samoe_hf.data import SyntheticVideos, write_video


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("source"))


def test_the_source_distribution_has_no_tests_either_which_would_lack_their_helpers(wheel):
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"samoe_hf/cli.py", "samoe_hf/configs/smoke.yaml", "samoe_hf/base/config.json"} <= names
    assert not any(name.startswith("tests") for name in names)


def test_everything_but_tests_and_docs_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "samoe_hf").rglob("*.py")}
    configs = {f"samoe_hf/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    base = {f"samoe_hf/base/{path.name}" for path in Path(small_base()).iterdir()}
    base |= {"samoe_hf/app/space_files/app.py.txt", "samoe_hf/app/space_files/README.md"}
    data = {"samoe_hf/py.typed", "samoe_hf/hub/model_card.md", "samoe_hf/evaluation/report_template.md"}
    data |= {"samoe_hf/original/architecture.yaml", "samoe_hf/surgery/video_spread.safetensors"}
    assert code | configs | base | data <= names
    assert not any(name.startswith(("tests/", "docs/", "scripts/")) for name in names)
    (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert "samoe = samoe_hf.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


@pytest.mark.slow
def test_the_installed_commands_work(wheel, tmp_path):
    """In a fresh environment, which borrows all but this package from the one that runs the tests."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    # After the environment's own packages; code of its .pth files, such as an editable install's, is not run.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    uv = Path(sys.executable).parent / "uv"
    installer = [uv, "pip", "install", "--offline", "--no-deps", "--python", binaries / "python", wheel]
    subprocess.run(installer, check=True, capture_output=True, cwd=tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: object) -> str:
        command = [binaries / command[0], *command[1:]]
        result = subprocess.run(
            [str(part) for part in command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    where = run("python", "-c", "import samoe_hf; samoe_hf.SamoeTrainer; print(samoe_hf.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    assert "track objects through a video" in run("samoe", "--help")
    printed = run("samoe", "train", "smoke", "--max_steps", "1")
    assert printed.endswith("Written: the model and its processor in outputs/smoke\n")
    run("samoe", "convert", CHECKPOINT, "--experts", EXPERTS, "--config", CONFIG, "--output", "model")
    write_video(tmp_path / "in.mp4", SyntheticVideos(1, 3, (96, 128), seed=3)[0].frames, fps=5)
    run("samoe", "track", "model", "in.mp4", "--box", "10,10,60,60", "--output", "out.mp4")
    assert (tmp_path / "out.mp4").is_file() and len(list((tmp_path / "out_masks").iterdir())) == 3
