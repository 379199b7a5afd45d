"""Fixtures of the data room."""

import numpy as np
import pytest


@pytest.fixture
def gradient():
    """30 frames (48, 64, 3) of even gray, each brighter than the last, with a lighter upper left corner."""
    frames = np.zeros((30, 48, 64, 3), np.uint8) + np.arange(0, 210, 7, dtype=np.uint8)[:, None, None, None]
    frames[:, :16, :16] += 40
    return frames
