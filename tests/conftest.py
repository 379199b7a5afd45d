"""Reference data of the original system, and models that load it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from samoe_hf import SamoeModel
from samoe_hf.conversion import build_processor

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[2] / "shared"


def reference_folder(name: str) -> Path:
    """The folder of a reference model; `nano` comes with the tests, others lie beside the repository."""
    if name == "nano":
        return FIXTURES / "nano"
    folder = SHARED / "reference" / name
    if not folder.is_dir():
        pytest.skip(f"needs ../shared/reference/{name}, which is not part of the repository")
    return folder


def shared_data(name: str) -> Path:
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"needs ../shared/data/{name}, which is not part of the repository")
    return folder


def load_reference(name: str, with_experts: bool = True) -> SimpleNamespace:
    folder = reference_folder(name)
    files = {
        "checkpoint": folder / f"sam2.1_hiera_{name}.pt",
        "experts": folder / f"samoe_{name}_adapters.pt",
        "original_config": folder / f"sam2.1_hiera_{name}_moe.yaml",
    }
    model = SamoeModel.from_pretrained(
        files["checkpoint"],
        experts=files["experts"] if with_experts else None,
        original_config=files["original_config"],
    )
    return SimpleNamespace(
        name=name, folder=folder, model=model, load=lambda f: load_file(folder / f"{f}.safetensors"), **files
    )


@pytest.fixture(scope="session", params=["nano", "mini"])
def reference(request) -> SimpleNamespace:
    """A reference model with its experts; tests must leave it as it is."""
    torch.manual_seed(0)
    return load_reference(request.param)


@pytest.fixture(scope="session")
def nano() -> SimpleNamespace:
    return load_reference("nano")


@pytest.fixture(scope="session")
def model_folder(nano, tmp_path_factory) -> Path:
    """A saved SamoeModel and its processor; tests must leave the folder as it is."""
    folder = tmp_path_factory.mktemp("nano")
    nano.model.save_pretrained(folder)
    build_processor(nano.model.config).save_pretrained(folder)
    return folder
