"""Fixtures of the model's tests."""

import pytest


@pytest.fixture(scope="module")
def clip(nano):
    frames = nano.load("train_step")
    return frames["pixel_values"][None, :3], frames["masks"].bool().transpose(0, 1)[None, :, :3]
