"""A Space: its files, its upload to a Hub, and its start in a fresh environment."""

import os
import runpy
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import httpx
import pytest
import yaml

from helpers.app_server import Visitor
from helpers.wheel import build_wheel
from samoe_hf import SamoeModel
from samoe_hf.app.space import push_space, write_space
from samoe_hf.cli import main

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="needs the `app` extra")


@pytest.fixture
def fake_wheel(tmp_path) -> Path:
    path = tmp_path / "samoe_hf-0.1.0-py3-none-any.whl"
    path.write_bytes(b"wheel")
    return path


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


def test_the_files_of_a_space(tmp_path, fake_wheel):
    main(["app", "me/my-model", "--space", str(tmp_path / "space"), "--wheel", str(fake_wheel)])
    assert sorted(path.name for path in (tmp_path / "space").iterdir()) == [
        "README.md", "app.py", "requirements.txt", fake_wheel.name
    ]  # fmt: skip
    assert (tmp_path / "space" / "requirements.txt").read_text() == f"./{fake_wheel.name}[app]\n"
    about = front_matter(tmp_path / "space")
    assert (about["sdk"], about["app_file"], about["sdk_version"]) == ("gradio", "app.py", version("gradio"))
    assert about["models"] == ["me/my-model"] and about["title"] == "samoe my-model"
    assert 'MODEL = "me/my-model"' in (tmp_path / "space" / "app.py").read_text()


def test_without_a_model_the_small_one_is_served_from_the_package_index(tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr("samoe_hf.app.server.serving", lambda loaded, limits, **where: (loaded, where))
    monkeypatch.setattr("samoe_hf.app.server.until_stopped", served.append)
    write_space(tmp_path / "space")
    assert (tmp_path / "space" / "requirements.txt").read_text().startswith("samoe_hf[app]==")
    runpy.run_path(str(tmp_path / "space" / "app.py"), run_name="__main__")
    (((loaded,), where),) = served
    assert loaded.name == "small model" and where == {"host": "0.0.0.0", "port": 7860}


def test_a_folder_with_a_model_goes_along(tmp_path, model_folder):
    write_space(tmp_path / "space", str(model_folder))
    assert (tmp_path / "space" / "model" / "config.json").is_file() and "models" not in front_matter(tmp_path / "space")
    assert runpy.run_path(str(tmp_path / "space" / "app.py"))["MODEL"] == "model"


def test_a_name_cannot_leave_its_quotes(tmp_path):
    write_space(tmp_path / "space", 'x"; import os #')
    assert runpy.run_path(str(tmp_path / "space" / "app.py"))["MODEL"] == 'x"; import os #'


def test_what_is_there_stays_and_what_cannot_run_there_is_refused(tmp_path, fake_wheel, model_folder):
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        write_space(tmp_path / "space")
    with pytest.raises(ValueError, match="must be a wheel of samoe_hf"):
        write_space(tmp_path / "other", wheel=tmp_path / "space" / "file")
    with pytest.raises(ValueError, match="`samoe convert` makes a folder"):
        write_space(tmp_path / "other", str(fake_wheel))
    SamoeModel.from_pretrained(model_folder).save_pretrained(tmp_path / "trained", experts_only=True)
    with pytest.raises(ValueError, match=r"`samoe convert .*trained --output DIR` writes a whole model"):
        write_space(tmp_path / "other", str(tmp_path / "trained"))
    assert not (tmp_path / "other").exists() and (tmp_path / "space" / "file").read_text() == "mine"


def test_a_space_is_uploaded(tmp_path, monkeypatch):
    api = MagicMock()
    monkeypatch.setattr("samoe_hf.app.space.HfApi", api)
    api.return_value.create_repo.return_value = "https://hub/me/space"
    write_space(tmp_path / "space")
    assert push_space(tmp_path / "space", "me/space") == "https://hub/me/space"
    made, uploaded = api.return_value.create_repo.call_args, api.return_value.upload_folder.call_args.kwargs
    assert made.args == ("me/space",) and (made.kwargs["repo_type"], made.kwargs["space_sdk"]) == ("space", "gradio")
    assert (uploaded["repo_id"], uploaded["repo_type"], uploaded["folder_path"].name) == ("me/space", "space", "space")


@pytest.mark.slow
def test_a_space_starts_in_a_fresh_environment(tmp_path):
    """As a Space does: Gradio of the version that README names, then the requirements, then `python app.py`."""
    write_space(tmp_path / "space", wheel=build_wheel(tmp_path))
    uv, python = Path(sys.executable).parent / "uv", tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    needed = [f"gradio=={front_matter(tmp_path / 'space')['sdk_version']}", "-r", "requirements.txt"]
    subprocess.run([uv, "pip", "install", "--python", python, *needed], cwd=tmp_path / "space", check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([python, "app.py"], cwd=tmp_path / "space", env=environment, stdout=log, stderr=log)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 600
        while not answers(url):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.5)
        visitor = Visitor(url)
        assert visitor.load().success
        assert visitor.act("take-example", "click", "Shapes").success
        event = {"index": [168, 200], "value": None}
        answer = visitor.act("frame", "select", 0, None, "+ is the object", event_data=event)
        assert answer.success and "jpeg" in answer.text
    finally:
        process.terminate()
        assert process.wait(30) == 0


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
