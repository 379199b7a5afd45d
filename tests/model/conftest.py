"""Folders for tests of models."""

import shutil

import pytest
import torch

from samoe_hf import SamoeModel


@pytest.fixture(scope="session")
def trained_folder(model_folder, tmp_path_factory):
    model = SamoeModel.from_pretrained(model_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder, experts_only=True)
    return folder


@pytest.fixture
def experts_folder(trained_folder, tmp_path):
    """A folder with only what was trained, from the base `model_folder`; free to be changed."""
    return shutil.copytree(trained_folder, tmp_path / "experts")
