"""A small model, a video, and sessions of the app's core. Slow imports are in functions, as in the folder above."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_model(nano):
    """A model with woken experts; tests must leave it as it is."""
    from samoe_hf.app.models import LoadedModel
    from samoe_hf.model.processor import build_processor

    return LoadedModel("nano", "nano", nano.model.eval(), build_processor(nano.model.config))


@pytest.fixture(scope="session")
def small_video(tmp_path_factory) -> Path:
    from helpers.app import write_small_video

    return write_small_video(tmp_path_factory.mktemp("videos") / "some video.mp4")


@pytest.fixture
def make_session(small_model, small_video, tmp_path):
    """Makes a session of a video in a new folder."""
    import threading

    from samoe_hf.app.limits import Limits
    from samoe_hf.app.session import TrackingSession
    from samoe_hf.app.videos import open_kept

    made = []

    def make(path: Path = small_video, limits=None, model=small_model, **kwargs) -> TrackingSession:
        limits = limits or Limits()
        folder = tmp_path / f"session_{len(made)}"
        folder.mkdir()
        video = open_kept("small", path, limits)
        made.append(TrackingSession(folder, video, model, threading.Lock(), limits, **kwargs))
        return made[-1]

    return make


@pytest.fixture
def session(make_session):
    return make_session()
