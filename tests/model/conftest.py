"""Folders for tests of models."""

import pytest
import torch

from samoe_hf import SamoeModel


@pytest.fixture
def experts_folder(model_folder, tmp_path):
    """A folder with only what was trained, from the base `model_folder`."""
    model = SamoeModel.from_pretrained(model_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    model.save_pretrained(tmp_path / "experts", experts_only=True)
    return tmp_path / "experts"
