"""Fixtures that several folders share."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.reference import load_reference
from samoe_hf.model.processor import build_processor

# The models are small. And a fork of a process that has computed with several threads waits for them for ever.
torch.set_num_threads(1)


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
