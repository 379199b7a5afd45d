"""A Hugging Face Space that runs the app: its files, their upload, and what runs there. Knows no Gradio by itself."""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import HfApi

from samoe_hf import __version__
from samoe_hf.errors import InputError
from samoe_hf.model.configuration_samoe import SamoeConfig
from samoe_hf.whole_files import new_folder

from .models import load_model, small_model
from .uploads import Limits

MODEL_FOLDER = "model"
FILES = Path(__file__).parent / "space_files"
# What a Space shares among strangers is small, and nothing is learned there.
LIMITS = Limits(upload_bytes=100 * 2**20, frames=3000, sessions=16, idle_seconds=1800)


def write_space(folder: Path, model: str | None = None, wheel: Path | None = None) -> None:
    """Writes the files of a Space into a new folder.

    Args:
        model: an id of the Hub, or a folder, which is copied into the Space; by default the small model.
        wheel: of this package, which is put into the Space; by default it is installed from the package index.
    """
    if wheel is not None and not (wheel.is_file() and wheel.name.startswith("samoe_hf-") and wheel.suffix == ".whl"):
        example = f"samoe_hf-{__version__}-py3-none-any.whl"
        raise InputError(f"`wheel` must be a wheel of samoe_hf, such as {example}, got {wheel}.")
    if model is not None and Path(model).is_file():
        raise InputError(f"`model` must be a folder or an id of the Hub, got {model}; `samoe convert` makes a folder.")
    is_folder = model is not None and Path(model).is_dir()
    base = (SamoeConfig.from_pretrained(model).base_model or {}).get("name_or_path") if is_folder else None
    if base is not None and os.path.isabs(base):
        raise InputError(
            f"`model` {model} holds only what was trained, and its base {base} is on this machine alone; "
            f"`samoe convert {model} --output DIR` writes a whole model."
        )
    title = "samoe" if model is None else f"samoe {PurePosixPath(model).name}"
    about = {
        "title": json.dumps(title),
        "gradio": version("gradio"),  # of this environment, which the Space is to have too
        "models": f"models:\n- {model}\n" if model is not None and not is_folder else "",
    }
    with new_folder(folder) as target:
        named = MODEL_FOLDER if is_folder else model
        app = (FILES / "app.py.txt").read_text(encoding="utf-8").format(model=named and json.dumps(named))
        (target / "app.py").write_text(app, encoding="utf-8")
        readme = (FILES / "README.md").read_text(encoding="utf-8").format(**about)
        (target / "README.md").write_text(readme, encoding="utf-8")
        source = f"samoe_hf[app]=={__version__}" if wheel is None else f"./{wheel.name}[app]"
        (target / "requirements.txt").write_text(f"{source}\n", encoding="utf-8")
        if wheel is not None:
            shutil.copy(wheel, target / wheel.name)
        if model is not None and is_folder:
            shutil.copytree(model, target / MODEL_FOLDER, ignore=shutil.ignore_patterns("checkpoint-*", "*.bin"))


def push_space(folder: Path, name: str) -> str:
    """Makes a Space OWNER/NAME of the Hub of a folder, or updates it; gives its address."""
    api = HfApi()
    url = api.create_repo(name, repo_type="space", space_sdk="gradio", exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=name, repo_type="space", commit_message="The page of samoe app")
    return str(url)


def run_space(model: str | None) -> None:
    """Serves the page in a Space, which tells by variables where, until it is ended; None is the small model."""
    from .server import serving, until_stopped

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(model, device) if model else small_model(device)
    host, port = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    until_stopped(serving([loaded], LIMITS, host=host, port=port))
