"""A Hugging Face Space that runs the app: its files, and their upload. Knows no Gradio."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi

from samoe_hf import __version__
from samoe_hf.errors import InputError
from samoe_hf.model.weights_io import new_folder

APP = '''"""A Space of samoe_hf: the page of `samoe app`."""

import os
from pathlib import Path

from samoe_hf.app.click_base import click_base
from samoe_hf.app.limits import Limits
from samoe_hf.app.models import load_model
from samoe_hf.app.server import serve

MODEL = {model}
FOLDER = Path(__file__).parent
# What a Space shares among strangers is small, and nothing is learned there.
LIMITS = Limits(upload_bytes=100 * 2**20, frames=3000, sessions=16, idle_seconds=1800)

if __name__ == "__main__":
    import torch

    source = click_base() if MODEL is None else FOLDER / MODEL if (FOLDER / MODEL).is_dir() else MODEL
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = "small model" if MODEL is None else Path(str(source)).name
    host, port = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    serve([load_model(source, device, name)], LIMITS, None, None, host=host, port=port)
'''
README = """---
title: {title}
emoji: 🎯
colorFrom: yellow
colorTo: blue
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
pinned: false
license: apache-2.0
{models}---

Click on objects in a video, track and correct them, and see which experts work where. Made by `samoe app --space`.
"""
MODEL_FOLDER = "model"


def write_space(folder: Path, model: str | None = None, wheel: Path | None = None) -> None:
    """Writes the files of a Space into a new folder.

    Args:
        model: an id of the Hub, or a folder, which is copied into the Space; by default the small model that comes with
            the package.
        wheel: of this package, which is put into the Space; by default it is installed from the package index.

    Raises:
        FileExistsError: the folder is there, and not empty.
        ValueError: the wheel is no wheel of this package, or the model is a file.
    """
    if wheel is not None and not (wheel.is_file() and wheel.name.startswith("samoe_hf-") and wheel.suffix == ".whl"):
        example = f"samoe_hf-{__version__}-py3-none-any.whl"
        raise InputError(f"`wheel` must be a wheel of samoe_hf, such as {example}, got {wheel}.")
    if model is not None and Path(model).is_file():
        raise InputError(f"`model` must be a folder or an id of the Hub, got {model}; `samoe convert` makes a folder.")
    is_folder = model is not None and Path(model).is_dir()
    named = MODEL_FOLDER if is_folder else model
    with new_folder(folder) as target:
        (target / "app.py").write_text(APP.replace("{model}", "None" if named is None else json.dumps(named)))
        (target / "requirements.txt").write_text(_requirements(wheel))
        title = "samoe" if model is None else f"samoe {PurePosixPath(str(model)).name}"
        models = f"models:\n- {model}\n" if model is not None and not is_folder else ""
        readme = README.format(title=json.dumps(title), gradio=_gradio_version(), models=models)
        (target / "README.md").write_text(readme, encoding="utf-8")
        if wheel is not None:
            shutil.copy(wheel, target / wheel.name)
        if is_folder:
            shutil.copytree(model, target / MODEL_FOLDER, ignore=shutil.ignore_patterns("checkpoint-*", "*.bin"))


def push_space(folder: Path, name: str, token: str | None = None) -> str:
    """Makes a Space of the Hub of a folder, or updates it; gives its address.

    Args:
        name: OWNER/NAME.
        token: that may write; by default that of `hf auth login` or `HF_TOKEN`.
    """
    api = HfApi(token=token)
    url = api.create_repo(name, repo_type="space", space_sdk="gradio", exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=name, repo_type="space", commit_message="The page of samoe app")
    return str(url)


def _gradio_version() -> str:
    """Of this environment, which the Space is to have too."""
    return version("gradio")


def _requirements(wheel: Path | None) -> str:
    """What a Space installs, beside the Gradio of its `sdk_version`."""
    return f"./{wheel.name}[app]\n" if wheel is not None else f"samoe_hf[app]=={__version__}\n"
