"""Fixtures that several folders share. Slow imports are in functions, since the controller of xdist needs none."""

from pathlib import Path
from types import SimpleNamespace

import pytest


def pytest_collection(session) -> None:
    """One thread: the models are small, and a fork of a process that has used several waits for them for ever."""
    is_controller = session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput")
    if not is_controller:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["nano", "mini"])
def reference(request) -> SimpleNamespace:
    """A reference model with its experts; tests must leave it as it is."""
    import torch

    from helpers.reference import load_reference

    torch.manual_seed(0)
    return load_reference(request.param)


@pytest.fixture(scope="session")
def nano() -> SimpleNamespace:
    from helpers.reference import load_reference

    return load_reference("nano")


@pytest.fixture(scope="session")
def model_folder(nano, tmp_path_factory) -> Path:
    """A saved SamoeModel and its processor; tests must leave the folder as it is."""
    from samoe_hf.model.processing_samoe import build_processor

    folder = tmp_path_factory.mktemp("nano")
    nano.model.save_pretrained(folder)
    build_processor(nano.model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(nano):
    """A clip of three frames (1, 3, 3, S, S) and its objects' masks (1, N, 3, S, S)."""
    frames = nano.load("train_step")
    return frames["pixel_values"][None, :3], frames["masks"].bool().transpose(0, 1)[None, :, :3]
